"""Every public name, used as a user would, with annotations that mypy --strict agrees with.

It runs where only the core dependencies are: what is said of a library that is missing is printed, and at last where
the package lies.
"""

import math
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import clu.metrics
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

import distributed_metrics
from distributed_metrics import (
    Accumulator,
    Batch,
    Count,
    DataParallel,
    DeviceMeshManager,
    DistributedMetrics,
    Histogram,
    Last,
    Max,
    Mean,
    Min,
    PeriodicFlush,
    Quantile,
    Ratio,
    Snapshot,
    Std,
    Sum,
    Var,
    all_gather,
    assert_silent,
    collect_from_devices,
    collective_bytes,
    count_collectives,
    flush_every,
    reduce_custom,
    reduce_max,
    reduce_mean,
    reduce_min,
    reduce_sum,
    wait_for_callbacks,
)
from distributed_metrics.accumulators import BY_NAME, CluMetric
from distributed_metrics.testing import check_accumulator
from distributed_metrics.writers import (
    BinnedWriter,
    ConsoleWriter,
    JsonLinesWriter,
    MemoryWriter,
    MetricWriter,
    PrometheusWriter,
    TensorBoardWriter,
    as_writer,
)

STEPS = 6


@dataclass(frozen=True)
class PowerMean(Accumulator):
    """An accumulator of one's own."""

    power: float = 2.0

    fields = {"total": "sum"}

    def contribution(self, batch: Batch) -> dict[str, jax.Array | tuple[jax.Array, jax.Array]]:
        return {"total": batch.map(lambda x: x**self.power).sum()}

    def result(self, xp: Any, weight: Any, total: Any) -> Any:
        return (total / weight) ** (1 / self.power)


class Printer:
    """A writer of one's own."""

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        print(f"step {step}: loss {scalars['train/loss']:.2f}")

    def flush(self) -> None: ...

    def close(self) -> None: ...


class HistogramPrinter(Printer):
    """One that shows histograms as such."""

    def write_binned(self, step: int, histograms: Mapping[str, tuple[Any, Any]]) -> None:
        for name, (counts, _) in histograms.items():
            print(f"step {step}: {name} {counts.tolist()}")


def accumulators(mesh: Mesh, x: jax.Array) -> Snapshot:
    """All that can be accumulated, beside a metric of clu, over all devices."""
    assert BY_NAME["mean"] is Mean
    kinds: tuple[Accumulator, ...] = (
        Count(),
        Histogram([0.0, 8.0, 16.0]),
        Last(),
        Max(),
        Mean(),
        Min(),
        PowerMean(),
        Quantile(0.5),
        Std(),
        Sum(),
        Var(ddof=1),
    )
    clu_metric: Accumulator = CluMetric(metric=clu.metrics.Accuracy)
    metrics = DistributedMetrics({"x": kinds, "per_token": Ratio(), "accuracy": clu_metric}, mesh=mesh)
    sharding: NamedSharding | None = metrics.sharding
    assert sharding is not None
    logits = jax.device_put(jnp.eye(16), sharding)
    metrics.update(
        {"x": x, "per_token": (x, jnp.ones_like(x)), "accuracy": {"logits": logits, "labels": jnp.arange(16)}}
    )
    names: tuple[str, ...] = metrics.names
    assert names == ("x", "per_token", "accuracy")
    return metrics.flush()


def results(snapshot: Snapshot) -> dict[str, float]:
    """What can be read of a snapshot, which went through a dict."""
    saved: dict[str, Any] = snapshot.to_dict()
    both: Snapshot = sum([snapshot], Snapshot.from_dict(saved))
    assert both.count["per_token"] == 2 * snapshot.count["per_token"]
    by_device: np.ndarray = snapshot.per_device("x/mean")
    assert by_device.shape == (8,)
    binned = snapshot.histograms()["x/histogram"]
    edges: np.ndarray = binned.edges
    assert edges.tolist() == [0, 8, 16]
    assert not any(snapshot.outside["x/histogram"].values())
    assert snapshot.is_ready()
    flat: dict[str, float] = snapshot.flatten(prefix="all", empty="nan")
    return flat


def loop(mesh: Mesh, x: jax.Array, writers: list[MetricWriter]) -> Snapshot:
    """A training loop, whose numbers go to writers in the background."""
    metrics = DistributedMetrics({"loss": "mean", "examples": "count"}, mesh=mesh)

    @nnx.jit
    def train_step(metrics: DistributedMetrics, x: jax.Array) -> jax.Array:
        loss = x**2
        metrics.update(loss=loss, examples=loss)
        return loss

    def derive(numbers: dict[str, float], window: Snapshot) -> dict[str, float]:
        return {"perplexity": math.exp(numbers["loss"] / window.count["loss"])}

    with PeriodicFlush(metrics, 2, writers, prefix="train", rates=["examples"], derive=derive) as flusher:
        flusher.start_epoch()
        for step in range(STEPS):
            train_step(metrics, x)
            flusher(step, epoch=0.0)
        with flusher.pause():
            flusher.write(STEPS, {"train/loss": 0.0}, prefix="")
        total: Snapshot = flusher.total()

    def update(metrics: DistributedMetrics, x: jax.Array) -> None:
        metrics.update(loss=x)

    assert_silent(update, metrics, x)
    collectives: dict[str, int] = count_collectives(update, metrics, x)
    moved: dict[str, int] = collective_bytes(update, metrics, x)
    assert collectives == moved == {}
    return total


def compiled_loop() -> list[tuple[int, float]]:
    """Numbers out of a loop that is one program."""
    windows: list[tuple[int, float]] = []

    def receive(step: int, window: Snapshot) -> None:
        windows.append((step, window["loss"]))

    @jax.jit
    def run(metrics: DistributedMetrics, losses: jax.Array) -> DistributedMetrics:
        def body(metrics: DistributedMetrics, given: tuple[jax.Array, jax.Array]) -> tuple[DistributedMetrics, None]:
            step, loss = given
            metrics.update(loss=loss)
            flush_every(metrics, step, 2, receive)
            return metrics, None

        return jax.lax.scan(body, metrics, (jnp.arange(4), losses))[0]

    run(DistributedMetrics({"loss": "mean"}), jnp.arange(4.0))
    wait_for_callbacks()
    return windows


def reducers() -> dict[str, Any]:
    """The reducers without a state, and what stands around a data-parallel step."""

    def step(x: jax.Array) -> dict[str, Any]:
        numbers = {"x": x}
        return {
            "rows": all_gather(numbers)["x"],
            "mean": reduce_mean(numbers)["x"],
            "sum": reduce_sum(numbers)["x"],
            "max": reduce_max(numbers)["x"],
            "min": reduce_min(numbers)["x"],
            "custom": reduce_custom(numbers, {"x": "sum"})["x"],
            "gradient": DataParallel().all_reduce_gradients(numbers, "mean")["x"],
        }

    collected: dict[str, Any] = collect_from_devices(jax.vmap(step, axis_name="batch")(jnp.arange(8.0)))
    return {name: np.asarray(of_devices[0]).tolist() for name, of_devices in collected.items()}


def made(make: Callable[[], MetricWriter]) -> list[MetricWriter]:
    """A writer, if its library is there."""
    try:
        return [make()]
    except ImportError as error:
        print(error)
        return []


def main(folder: Path) -> None:
    manager = DeviceMeshManager()
    mesh: Mesh = manager.create_data_parallel_mesh(axis_name="batch")
    parallel = DataParallel()
    sharding: NamedSharding = parallel.create_data_parallel_sharding(mesh, data_axis="batch")
    x: jax.Array = parallel.shard_batch({"x": np.arange(16.0)}, sharding)["x"]

    flat = results(accumulators(mesh, x))
    assert flat["all/x/mean"] == 7.5
    assert flat["all/accuracy"] == 1.0
    assert reducers() == {
        "rows": list(range(8)), "mean": 3.5, "sum": 28, "max": 7, "min": 0, "custom": 28, "gradient": 3.5,
    }  # fmt: skip
    assert compiled_loop() == [(1, 0.5), (3, 2.5)]

    memory = MemoryWriter()
    logged: list[int] = []

    def log(scalars: dict[str, float], step: int) -> None:
        logged.append(step)

    writers: list[MetricWriter] = [memory, JsonLinesWriter(folder / "metrics.jsonl"), Printer(), as_writer(log)]
    binned: BinnedWriter = HistogramPrinter()
    writers.append(binned)
    optional: list[Callable[[], MetricWriter]] = [
        ConsoleWriter,
        PrometheusWriter,
        lambda: TensorBoardWriter(folder / "events"),
    ]
    for make in optional:
        writers += made(make)
    total = loop(mesh, x, writers)
    assert total["examples"] == 16 * STEPS
    assert memory.to_dict()["train/loss"]["step"] == logged == [1, 3, 5, STEPS]
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 4
    try:
        memory.plot(folder / "curves.png")
    except ImportError as error:
        print(error)

    check_accumulator(PowerMean())
    print(distributed_metrics.__file__)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
