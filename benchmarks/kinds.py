"""What single accumulators cost: a large sum beside jnp.sum, one update of each kind, and a spec of 2,000 leaves.

Run it on an idle machine: python benchmarks/kinds.py. Each answer is checked against float64 NumPy.
"""

import os
import platform
import statistics
import time

import flax
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from distributed_metrics import DistributedMetrics, Histogram, Quantile, compensated


def main() -> None:
    print(f"jax {jax.__version__}, flax {flax.__version__}, 1 x {jax.devices()[0].device_kind}")
    print(f"{os.cpu_count()} cores, {platform.machine()}, medians of calls that take turns, microseconds\n")
    large_sums()
    kinds()
    many_leaves()


def interleaved(calls, repeats: int) -> dict[str, float]:
    """The median time of one call of each, in microseconds; they take turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        jax.block_until_ready(call())
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            times[name].append(time.perf_counter() - start)
    return {name: 1e6 * statistics.median(seconds) for name, seconds in times.items()}


def large_sums() -> None:
    """One batch: our sum beside jnp.sum, and the relative error of both."""
    ours = jax.jit(lambda x: compensated.tree_sum(compensated.pair_of(x), 1))
    plain = jax.jit(jnp.sum)
    for n in (10**4, 10**5, 10**6, 10**7):
        values = {
            "lognormal": np.random.default_rng(0).lognormal(size=n).astype(np.float32),
            "0.7": np.full(n, 0.7, np.float32),
        }
        x = jnp.asarray(values["lognormal"])
        times = interleaved({"ours": lambda x=x: ours(x), "jnp.sum": lambda x=x: plain(x)}, 100)
        errors = {}
        for name, one in values.items():
            high, low = ours(one)
            exact = one.sum(dtype=np.float64)
            errors[name] = abs((float(high) + float(low)) / exact - 1), abs(float(plain(one)) / exact - 1)
            assert errors[name][0] < 1e-7
        shown = ", ".join(f"{name} {a:.0e} ({b:.0e})" for name, (a, b) in errors.items())
        ratio = times["ours"] / times["jnp.sum"]
        print(f"sum of {n:>10,}: {times['ours']:7.0f} (x{ratio:.2f} of jnp.sum); errors (of jnp.sum): {shown}")
    print()


def kinds() -> None:
    """One update of one metric in jax.jit, in and out, for batches of 64 and of 65,536."""
    edges = np.linspace(-4, 4, 65)
    specs = {
        "mean": "mean",
        "var": "var",
        "last": "last",
        "histogram, 64 bins": Histogram(edges),
        "quantile, 1 %": Quantile(0.99),
    }
    for batch in (64, 65_536):
        x = np.random.default_rng(0).normal(size=batch).astype(np.float32)
        rivals = {name: updating(spec, jnp.asarray(x)) for name, spec in specs.items()}
        times = interleaved({name: call for name, (call, _) in rivals.items()}, 100)
        results = {name: result() for name, (_, result) in rivals.items()}
        assert np.isclose(results["var"], x.astype(np.float64).var(), rtol=1e-9)
        assert results["last"] == x[-1]
        assert (results["histogram, 64 bins"] == 101 * np.histogram(x, edges)[0]).all()
        assert abs(results["quantile, 1 %"] / np.quantile(np.tile(x, 101), 0.99, method="lower") - 1) < 0.01
        print(f"update with {batch:,} values: " + ", ".join(f"{name} {t:.0f}" for name, t in times.items()))
    print()


def updating(spec, x):
    """One update with the same values, and the result so far."""
    update = jax.jit(lambda metrics, x: (metrics.update(x=x), metrics)[1])
    state = {"metrics": DistributedMetrics({"x": spec})}

    def call():
        state["metrics"] = update(state["metrics"], x)
        return state["metrics"]

    return call, lambda: state["metrics"].compute()["x"]


def many_leaves() -> None:
    """Norms of 2,000 parameters, a metric each."""
    params = {f"layer{i}": {f"w{j}": jnp.float32(j) for j in range(10)} for i in range(200)}
    for what in ("mean", ("mean", "max"), "var"):
        metrics = DistributedMetrics({"norms": jax.tree.map(lambda _, what=what: what, params)})
        step = nnx.jit(lambda metrics, params: metrics.update({"norms": params}))

        def call(metrics=metrics, step=step):
            step(metrics, params)
            return nnx.state(metrics)

        start = time.perf_counter()
        jax.block_until_ready(call())
        first = time.perf_counter() - start
        again = interleaved({"again": call}, 20)["again"]
        start = time.perf_counter()
        flat = metrics.flush().flatten()
        print(
            f"2,000 leaves, {what!r}: first update {first:.1f} s, later ones {again / 1000:.0f} ms, "
            f"flush and flatten {1e3 * (time.perf_counter() - start):.0f} ms; {len(nnx.state(metrics))} Variable(s)"
        )
        assert flat["norms/layer0/w3" + ("" if isinstance(what, str) else "/mean")] == (0.0 if what == "var" else 3.0)


if __name__ == "__main__":
    main()
