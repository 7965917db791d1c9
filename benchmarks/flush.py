"""A flush of 20 means, from the call to its numbers

Beside `np.asarray` of one array that is sharded like the rows, and beside reading 20 numbers one by one with `float()`,
which is what people do with the metrics that their step returns. Microseconds; every array is new, and was waited for.
"""

import argparse
import time

from common import median, table, virtual_devices

NAMES = [f"metric{i}" for i in range(20)]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--devices", type=int, default=8)
    virtual_devices(parser.parse_args().devices)
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    from distributed_metrics import DistributedMetrics

    mesh = jax.make_mesh((jax.device_count(),), ("data",))
    split, everywhere = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    values = {name: jax.device_put(np.arange(64, dtype=np.float32), split) for name in NAMES}
    metrics = DistributedMetrics(dict.fromkeys(NAMES, "mean"), mesh=mesh)
    rows = jax.device_put(jnp.zeros((mesh.size, 40, 2)), split)
    more = jax.jit(lambda rows: rows + 1)
    means = jax.jit(lambda values: {name: value.mean() for name, value in values.items()}, out_shardings=everywhere)
    times: dict[str, list[float]] = {}

    def timed(name, call):
        started = time.perf_counter()
        result = call()
        times.setdefault(name, []).append(time.perf_counter() - started)
        return result

    for repeat in range(220):
        if repeat == 20:
            times.clear()
        timed("eager `update`, to its return", lambda: metrics.update(values))
        jax.block_until_ready(metrics._arrays())
        window = timed("`flush()`, to its return", metrics.flush)
        jax.block_until_ready((window._arrays(), metrics._arrays()))
        assert timed("`flatten()` of 20 numbers, after it", window.flatten)[NAMES[3]] == 31.5
        metrics.update(values)  # the caches are as cold as above
        rows = jax.block_until_ready((more(rows), metrics._arrays()))[0]
        timed("`np.asarray` of a sharded array", lambda: np.asarray(rows))  # noqa: B023 (called at once)
        metrics.update(values)
        returned = jax.block_until_ready((means(values), metrics._arrays()))[0]
        read = timed("`float()` of 20 numbers", lambda: {name: float(one) for name, one in returned.items()})  # noqa: B023 (so is this)
        assert read[NAMES[3]] == 31.5
    base = median(times["`np.asarray` of a sharded array"])
    table(
        [f"{mesh.size} virtual device{'s' if mesh.size > 1 else ''}", "µs", "ratio to `np.asarray`"],
        [(name, median(one), f"×{median(one) / base:.2f}") for name, one in times.items()],
    )


if __name__ == "__main__":
    main()
