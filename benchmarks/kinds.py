"""Single accumulators

A large sum beside `jnp.sum`, with the relative error of both; one update of each kind; a spec of 2,000 leaves. On one
device. Each answer is checked against float64 NumPy.
"""

import time

import jax
import jax.numpy as jnp
import numpy as np
from common import in_turns, table
from flax import nnx

from distributed_metrics import DistributedMetrics, Histogram, Quantile, compensated


def main() -> None:
    large_sums()
    kinds()
    many_leaves()


def large_sums() -> None:
    """One batch: our sum beside jnp.sum, and the relative error of both."""
    ours = jax.jit(lambda x: compensated.tree_sum(compensated.pair_of(x), 1))
    plain = jax.jit(jnp.sum)
    rows = []
    for n in (10**4, 10**5, 10**6, 10**7):
        values = {
            "lognormal": np.random.default_rng(0).lognormal(size=n).astype(np.float32),
            "0.7": np.full(n, 0.7, np.float32),
        }
        x = jnp.asarray(values["lognormal"])
        times = in_turns({"ours": lambda x=x: ours(x), "jnp.sum": lambda x=x: plain(x)}, 100)
        errors = {}
        for name, one in values.items():
            high, low = ours(one)
            exact = one.sum(dtype=np.float64)
            errors[name] = abs((float(high) + float(low)) / exact - 1), abs(float(plain(one)) / exact - 1)
            assert errors[name][0] < 2e-7
        shown = [f"{error:.0e}" for both in errors.values() for error in both]
        rows.append((f"{n:,}", times["ours"], f"×{times['ours'] / times['jnp.sum']:.2f}", *shown))
    table(["elements", "µs", "ratio", "error, lognormal", "of `jnp.sum`", "error, 0.7 repeated", "of `jnp.sum`"], rows)


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
    of_batch = {}
    for batch in (64, 65_536):
        x = np.random.default_rng(0).normal(size=batch).astype(np.float32)
        rivals = {name: updating(spec, jnp.asarray(x)) for name, spec in specs.items()}
        times = in_turns({name: call for name, (call, _) in rivals.items()}, 100)
        results = {name: result() for name, (_, result) in rivals.items()}
        assert np.isclose(results["var"], x.astype(np.float64).var(), rtol=1e-9)
        assert results["last"] == x[-1]
        assert (results["histogram, 64 bins"] == 120 * np.histogram(x, edges)[0]).all()
        assert abs(results["quantile, 1 %"] / np.quantile(np.tile(x, 120), 0.99, method="lower") - 1) < 0.01
        of_batch[batch] = times
    columns = ["µs for one update of one metric in `jax.jit`", *(f"{batch:,} values" for batch in of_batch)]
    table(columns, [(name, *(times[name] for times in of_batch.values())) for name in specs])


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
    rows = []
    for what in ("mean", ("mean", "max"), "var"):
        metrics = DistributedMetrics({"norms": jax.tree.map(lambda _, what=what: what, params)})
        step = nnx.jit(lambda metrics, params: metrics.update({"norms": params}))

        def call(metrics=metrics, step=step):
            step(metrics, params)
            return nnx.state(metrics)

        start = time.perf_counter()
        jax.block_until_ready(call())
        first = time.perf_counter() - start
        again = in_turns({"again": call}, 20)["again"]
        start = time.perf_counter()
        flat = metrics.flush().flatten()
        flushed = 1e3 * (time.perf_counter() - start)
        shown = what if isinstance(what, str) else " and ".join(what)
        rows.append((shown, f"{first:.1f} s", f"{again / 1000:.0f} ms", f"{flushed:.0f} ms", len(nnx.state(metrics))))
        assert flat["norms/layer0/w3" + ("" if isinstance(what, str) else "/mean")] == (0.0 if what == "var" else 3.0)
    table(
        ["2,000 leaves, a metric each", "first update (compiles)", "later ones", "flush and flatten", "Variables"], rows
    )


if __name__ == "__main__":
    main()
