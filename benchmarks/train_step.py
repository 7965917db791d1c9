"""What 20 metrics cost inside a training step: the same step without, with them, and returning 20 reduced numbers.

Run it on an idle machine: python benchmarks/train_step.py. Without an accelerator there are eight virtual devices. On
whatever there is, accumulators are held to the laws first.
"""

import os
import platform
import statistics
import time

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8 " + os.environ.get("XLA_FLAGS", "")

import flax
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from distributed_metrics import DistributedMetrics, Histogram, Quantile, count_collectives
from distributed_metrics.accumulators import BY_NAME
from distributed_metrics.audit import compiled_text
from distributed_metrics.testing import check_accumulator

NAMES = [f"metric{i}" for i in range(20)]
MODELS = {"0.3 million": (64, 512, 512), "10 million": (256, 2176, 2176, 2176)}


def main() -> None:
    print(f"jax {jax.__version__}, flax {flax.__version__}, {jax.device_count()} x {jax.devices()[0].device_kind}")
    print(f"{os.cpu_count()} cores, {platform.machine()}; medians\n")
    laws()
    digits()
    for name, widths in MODELS.items():
        train_step(name, widths)
    flush()


def laws() -> None:
    """Every kind of accumulator, on these devices."""
    named = (kind() for kind in BY_NAME.values())
    for accumulator in (*named, Histogram((0.0, 1.0, 2.0, 4.0)), Quantile((0.1, 0.9))):
        check_accumulator(accumulator)
        print(f"keeps the laws: {accumulator}")


def digits() -> None:
    """Sums keep their digits: ten million times 0.1, and what is large beside it."""
    mesh = jax.make_mesh((jax.device_count(),), ("data",))
    metrics = DistributedMetrics({"x": ("sum", "mean", "count"), "n": "sum", "far": "var"}, mesh=mesh)
    rng = np.random.default_rng(0)
    x = rng.lognormal(0.0, 3.0, (100, 1024)).astype(np.float32)
    weight = rng.random((100, 1024)).astype(np.float32)
    far = (1e4 + 0.01 * rng.standard_normal((100, 1024))).astype(np.float32)

    @jax.jit
    def loop(metrics, x, weight, far):
        def body(metrics, one):
            metrics.update({"x": one[0], "n": 2**30, "far": one[2]}, weight={"x": one[1]})
            return metrics, None

        return jax.lax.scan(body, metrics, (x, weight, far))[0]

    sharded = [jax.device_put(a, NamedSharding(mesh, P(None, "data"))) for a in (x, weight, far)]
    window = loop(metrics, *sharded).flush()
    exact = np.sum(x.astype(np.float64) * weight.astype(np.float64))
    variance = far.astype(np.float64).var()
    assert window["n"] == 100 * 2**30
    print(f"relative error of a weighted sum: {abs(window['x']['sum'] / exact - 1):.1e}")
    print(f"of a variance whose mean is a million deviations: {abs(window['far'] / variance - 1):.1e}\n")
    assert abs(window["x"]["sum"] / exact - 1) < 1e-12
    assert abs(window["far"] / variance - 1) < 1e-7


def train_step(name: str, widths: tuple[int, ...]) -> None:
    """Adam on a stack of dense layers; 20 values for each example."""
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    everywhere, sharded = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
    keys = jax.random.split(jax.random.key(0), len(widths))
    shapes = list(zip(widths, (*widths[1:], 10), strict=True))
    weights = [jax.random.normal(key, shape) / shape[0] ** 0.5 for key, shape in zip(keys, shapes, strict=True)]
    state = jax.device_put([weights, *([jnp.zeros_like(w) for w in weights] for _ in range(2))], everywhere)
    batch = jax.device_put(jax.random.normal(keys[0], (512, widths[0])), sharded)
    metrics = DistributedMetrics(dict.fromkeys(NAMES, "mean"), mesh=mesh)

    def losses(weights, batch):
        x = batch
        for one in weights[:-1]:
            x = jax.nn.relu(x @ one)
        logits = x @ weights[-1]
        loss = jax.nn.logsumexp(logits, -1) - logits[:, 0]
        return loss.mean(), {name: loss * i for i, name in enumerate(NAMES)}

    def adam(state, batch):
        weights, first, second = state
        (_, seen), gradients = jax.value_and_grad(losses, has_aux=True)(weights, batch)
        first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, first, gradients)
        second = jax.tree.map(lambda v, g: 0.99 * v + 0.01 * g * g, second, gradients)
        weights = jax.tree.map(lambda w, m, v: w - 1e-4 * m / (jnp.sqrt(v) + 1e-8), weights, first, second)
        return [weights, first, second], seen

    @jax.jit
    def without(state, batch):
        return adam(state, batch)[0], None

    @jax.jit
    def returned(state, batch):
        state, seen = adam(state, batch)
        return state, {name: value.mean() for name, value in seen.items()}

    @jax.jit
    def with_metrics(metrics, state, batch):
        state, seen = adam(state, batch)
        metrics.update(seen)
        return metrics, state

    def accumulated(state, batch):
        nonlocal metrics
        metrics, state = with_metrics(metrics, state, batch)
        return state, metrics

    steps = {"without": without, "with 20 metrics": accumulated, "returning 20 numbers": returned}
    programs = {"without": (without, state, batch), "with 20 metrics": (with_metrics, metrics, state, batch),
                "returning 20 numbers": (returned, state, batch)}  # fmt: skip
    states = dict.fromkeys(steps, state)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(220):
        for kind, step in steps.items():
            started = time.perf_counter()
            states[kind], other = step(states[kind], batch)
            jax.block_until_ready((states[kind], other))
            if repeat >= 20:
                times[kind].append(time.perf_counter() - started)
    window, last = metrics.compute(), returned(states["without"], batch)[1]
    assert window.count[NAMES[0]] == 220 * 512
    assert np.isfinite(window[NAMES[1]])
    assert np.isfinite(float(last[NAMES[1]]))
    print(f"training step, {name} parameters")
    base = statistics.median(times["without"])
    for kind, program in programs.items():
        text = compiled_text(*program)
        took, kernels = statistics.median(times[kind]), text[text.rindex("ENTRY") :].count(" fusion(")
        print(f"  {kind:<22} {1e6 * took:>9,.0f} us  {took / base:.3f}  {kernels:>3} fusions, "
              f"{count_collectives(*program) or 'no collectives'}")  # fmt: skip
    print()


def flush() -> None:
    """Launching a flush, and reading its 20 numbers."""
    mesh = jax.make_mesh((jax.device_count(),), ("data",))
    metrics = DistributedMetrics(dict.fromkeys(NAMES, "mean"), mesh=mesh)
    launched, read = [], []
    for repeat in range(120):
        metrics.update(dict.fromkeys(NAMES, 1.0))
        jax.block_until_ready(metrics._arrays())
        started = time.perf_counter()
        window = metrics.flush()
        between = time.perf_counter()
        assert len(window.flatten()) == 20
        if repeat >= 20:
            launched.append(between - started)
            read.append(time.perf_counter() - between)
    print(f"flush of 20 means: launched in {1e6 * statistics.median(launched):,.0f} us, "
          f"numbers on the host after {1e6 * statistics.median(read):,.0f} us more")  # fmt: skip


if __name__ == "__main__":
    main()
