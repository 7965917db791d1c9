"""The laws, on whatever devices there are

Every kind of accumulator is held to the laws, and sums and variances to their digits: for accelerators that the tests
have not run on.
"""

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from distributed_metrics import DistributedMetrics, Histogram, Quantile
from distributed_metrics.accumulators import BY_NAME
from distributed_metrics.testing import check_accumulator


def main() -> None:
    print(f"{jax.device_count()} x {jax.devices()[0].device_kind}\n")
    laws()
    digits()


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


if __name__ == "__main__":
    main()
