"""One of several processes: python same_results.py RANK PROCESSES PORT [CASE ...].

Prints ``results()`` of these cases, by default of all, as one line of JSON.
"""

import json
import sys
from collections.abc import Callable, Mapping, Sequence

import jax
import metrax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from distributed_metrics import (
    DistributedMetrics,
    Histogram,
    PeriodicFlush,
    Quantile,
    Snapshot,
    count_collectives,
    programs,
)
from distributed_metrics.gathering import gathering_of
from distributed_metrics.heads import HEAD_WORDS, label
from distributed_metrics.placement import by_process
from distributed_metrics.writers import MemoryWriter

SPEC = {"x": ("mean", "sum", "count", "max", "min"), "ratio": "ratio", "hits": "sum", "steps": "sum", "never": "mean"}
ALL = {**SPEC, "y": ("std", "last"), "bins": Histogram((0.0, 1.0, 2.0)), "median": Quantile(0.5), "error": metrax.RMSE}
EXAMPLES = 32


def on_mesh(mesh: Mesh, spec: P, array: np.ndarray) -> jax.Array:
    """A global array, of which each process puts its own parts."""
    sharding = NamedSharding(mesh, spec)
    parts = [jax.device_put(array[i], d) for d, i in sharding.addressable_devices_indices_map(array.shape).items()]
    return jax.make_array_from_single_device_arrays(array.shape, sharding, parts)


def batch(mesh: Mesh, spec: P, seed: int) -> dict[str, jax.Array]:
    rng = np.random.default_rng(seed)
    arrays = {
        "x": rng.lognormal(size=EXAMPLES).astype(np.float32),
        "y": rng.normal(size=EXAMPLES).astype(np.float32),
        "hits": rng.integers(-(2**31), 2**31, EXAMPLES).astype(np.int32),
        "mask": rng.random(EXAMPLES) < 0.6,
    }
    return {name: on_mesh(mesh, spec, array) for name, array in arrays.items()}


def update(metrics: DistributedMetrics, values: dict[str, jax.Array], spec: P | None = None) -> None:
    x, y, mask = values["x"], values["y"], values["mask"]
    given = {"x": x, "ratio": (x, x + 1), "hits": values["hits"]}
    if "y" in metrics.names:
        given |= {"y": y, "bins": x, "median": x}
        metrics.update(error={"predictions": x, "labels": y})
    metrics.update(given, weight=dict.fromkeys(given, mask), spec=spec)
    metrics.update(steps=1)


def on_one_mesh(
    mesh: Mesh, axes: tuple[str, ...], spec: P, reduce_fn: Mapping[str, object] = SPEC
) -> dict[str, object]:
    """What all the calls give on a mesh, on which values are partitioned by ``spec``."""
    metrics = DistributedMetrics(reduce_fn, mesh=mesh, axis_name=axes)
    auto = mesh.axis_types[0] == AxisType.Auto
    given = spec if auto and len(mesh.axis_names) > 1 else None
    program = nnx.jit(lambda metrics, values: update(metrics, values, given))
    update(metrics, batch(mesh, spec, 0))  # eager
    program(metrics, batch(mesh, spec, 1))
    sent = count_collectives(program, metrics, batch(mesh, spec, 1))
    nan = np.array([np.nan, 1.0])
    metrics.update(x=nan, weight={"x": nan == 1.0})  # numbers of the host, the same in all processes
    traced = nnx.jit(lambda metrics: metrics.compute())(metrics)
    window = metrics.compute()
    again = metrics.flush()
    assert again.flatten() == window.flatten()
    saved = window.to_dict()
    metrics.merge(Snapshot.from_dict(saved))
    merged = metrics.flush()
    collected = metrics.collect_from_devices({"x": batch(mesh, spec, 2)["x"]})["x"]
    return {
        "update sends": sent,
        "flush sends": sent_by_flush(metrics),
        "traced": traced.flatten(),
        "eager": window.flatten(),
        "per device": {name: window.per_device(name).tolist() for name in ("x/mean", "x/max", "ratio", "steps")},
        "count": window.count["x"],
        "merged": merged.flatten(),
        "after": metrics.flush().flatten(),
        "collected": [float(value) for value in collected],
    }


def sent_by_flush(metrics: DistributedMetrics) -> dict[str, int]:
    """The collectives of the one program that an eager flush of several processes runs."""
    tables, rows = metrics._tables(), metrics._layout.rows
    gathering = gathering_of(metrics._plan, rows, metrics._plan.tables, HEAD_WORDS)
    labels = by_process(label(metrics._head(True, None)[1], gathering, rows), rows, tables)
    program = programs.gather(metrics._plan, metrics._situation(tables).view, gathering, True)
    return count_collectives(program, tables, labels)


def mapped(mesh: Mesh) -> dict[str, object]:
    """The same in a ``shard_map``, and a flush in it."""
    metrics = DistributedMetrics({"x": ("mean", "max"), "steps": "sum"}, mesh=mesh)

    def local(metrics: DistributedMetrics, x: jax.Array) -> Snapshot:
        metrics.update(x=x, steps=1)
        seen = metrics.compute()
        metrics.update(x=2 * x)
        return seen

    rows = P(mesh.axis_names)
    step = nnx.jit(nnx.shard_map(local, mesh=mesh, in_specs=(rows, rows), out_specs=P()))
    inside = step(metrics, batch(mesh, rows, 3)["x"])
    return {"inside": inside.flatten(), "outside": metrics.flush().flatten()}


def large(mesh: Mesh) -> dict[str, object]:
    """A state that is too large to be gathered, beside one that is not."""
    metrics = DistributedMetrics({"bins": Histogram(tuple(range(40_001))), "x": "mean"}, mesh=mesh)
    x = on_mesh(mesh, P(mesh.axis_names), np.arange(800, dtype=np.float32) ** 1.5)
    nnx.jit(lambda metrics, x: metrics.update(bins=x, x=x))(metrics, x)
    window = metrics.flush()
    bins = np.asarray(window["bins"])
    return {"bins": np.flatnonzero(bins).tolist(), "sum": bins.sum(), "x": window["x"],
            "per device": window.per_device("x").tolist()}  # fmt: skip


def served(mesh: Mesh) -> dict[str, object]:
    """A loop with ``PeriodicFlush``."""
    metrics, memory = DistributedMetrics({"x": "mean", "steps": "sum"}, mesh=mesh), MemoryWriter()
    derived: list[float] = []
    program = nnx.jit(lambda metrics, x: metrics.update(x=x, steps=1))
    with PeriodicFlush(metrics, 2, memory, derive=lambda numbers, window: derived.append(numbers["x"])) as flusher:
        for step in range(5):
            program(metrics, batch(mesh, P(mesh.axis_names), step)["x"])
            flusher(step)
        total = flusher.total().flatten()
    written = {name: entry for name, entry in memory.to_dict().items() if not name.endswith("_per_sec")}
    return {"written": written, "derived": derived, "total": total}


def results(cases: Sequence[str] = ()) -> dict[str, object]:
    """These cases, on eight devices; all of them if none is named."""
    kinds = {"explicit": AxisType.Explicit, "auto": AxisType.Auto}
    lines = {name: jax.make_mesh((8,), ("data",), axis_types=(kind,)) for name, kind in kinds.items()}
    grid = jax.make_mesh((2, 4), ("model", "data"), axis_types=(AxisType.Auto,) * 2)  # processes along "model"
    everywhere = Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "model"))
    all_of_them: dict[str, Callable[[], dict[str, object]]] = {
        "1 axis, explicit": lambda: on_one_mesh(lines["explicit"], ("data",), P("data"), ALL),
        "2 axes, rows over one, across processes": lambda: on_one_mesh(everywhere, ("data",), P("data")),
        "2 axes, rows over one, within processes": lambda: on_one_mesh(grid, ("data",), P("data")),
        "mapped": lambda: mapped(lines["auto"]),
        "large": lambda: large(lines["auto"]),
        "served": lambda: served(lines["explicit"]),
    }
    return {name: run() for name, run in all_of_them.items() if not cases or name in cases}


if __name__ == "__main__":
    import join  # noqa: F401 (joins this process to the others)

    print(json.dumps(results(sys.argv[4:])))
