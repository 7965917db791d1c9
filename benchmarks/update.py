"""What one update costs: K means, beside a hand-written accumulator, clu's Collection and nnx.MultiMetric, in one run.

Run it on an idle machine: python benchmarks/update.py [--devices 8]. Rivals take turns, times are medians of one call
including its execution, and each rival's answer is checked. The hand-written one is what an expert would write for
exactly these metrics: the limit (in plain float32, without compensation).
"""

import argparse
import os
import platform
import statistics
import time


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=300)
    options = parser.parse_args()
    os.environ["XLA_FLAGS"] = (
        f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={options.devices}"
    )
    import flax
    import jax

    print(f"jax {jax.__version__}, flax {flax.__version__}, {options.devices} x {jax.devices()[0].device_kind}")
    print(f"{os.cpu_count()} cores, {platform.machine()}, median of {options.repeats} calls, microseconds\n")
    for metrics in (1, 4, 20):
        rivals = make_rivals(metrics)
        times = interleaved(rivals, options.repeats)
        limit = times["hand-written"]
        print(f"K = {metrics}")
        for name, microseconds in times.items():
            print(f"  {name:<28} {microseconds:8.0f}   x{microseconds / limit:.2f}")


def interleaved(rivals, repeats: int) -> dict[str, float]:
    """The median time of one call of each rival, in microseconds; they take turns."""
    times: dict[str, list[float]] = {name: [] for name in rivals}
    for call, _ in rivals.values():
        for _ in range(20):
            call()
    for _ in range(repeats):
        for name, (call, _) in rivals.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    for name, (_, check) in rivals.items():
        assert abs(check() - MEAN) < 1e-5, (name, check())
    return {name: 1e6 * statistics.median(seconds) for name, seconds in times.items()}


BATCH = 64
MEAN = (BATCH - 1) / 2


def make_rivals(k: int):
    """Name -> (one blocking update, the mean of the first metric so far). Values are per example, split over "data"."""
    import clu.metrics
    import flax
    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx
    from jax.sharding import Mesh, NamedSharding
    from jax.sharding import PartitionSpec as P

    from distributed_metrics import DistributedMetrics

    mesh = Mesh(jax.devices(), ("data",))
    split = NamedSharding(mesh, P("data"))
    names = [f"m{i}" for i in range(k)]
    values = {name: jax.device_put(np.arange(BATCH, dtype=np.float32), split) for name in names}

    # Hand-written: one packed array of float32 sums and counts, a row for each device, updated in a shard_map.
    rows = jax.device_put(np.zeros((mesh.size, k, 2), np.float32), split)

    def local(rows, *xs):
        sums = jnp.stack([jnp.stack([jnp.sum(x), jnp.float32(x.size)]) for x in xs])
        return rows + sums[None]

    by_hand = jax.jit(
        jax.shard_map(local, mesh=mesh, in_specs=(P("data"),) * (k + 1), out_specs=P("data")), donate_argnums=0
    )
    state = {"rows": rows}

    def call_by_hand():
        state["rows"] = jax.block_until_ready(by_hand(state["rows"], *values.values()))

    def mean_by_hand():
        total, count = np.asarray(state["rows"], np.float64).sum(0)[0]
        return total / count

    eager = DistributedMetrics(dict.fromkeys(names, "mean"), mesh=mesh)
    jitted = DistributedMetrics(dict.fromkeys(names, "mean"), mesh=mesh)
    program = nnx.jit(lambda metrics, values: metrics.update(values))
    plain = {"metrics": DistributedMetrics(dict.fromkeys(names, "mean"), mesh=mesh)}
    pure = jax.jit(lambda metrics, values: (metrics.update(values), metrics)[1])

    def call_eager():
        eager.update(values)
        jax.block_until_ready(eager.sum_rows.get_raw_value())

    def call_jitted():
        program(jitted, values)
        jax.block_until_ready(jitted.sum_rows.get_raw_value())

    def call_plain():
        plain["metrics"] = jax.block_until_ready(pure(plain["metrics"], values))

    multi = nnx.MultiMetric(**{name: nnx.metrics.Average(name) for name in names})
    multi_program = nnx.jit(lambda multi, values: multi.update(**values))

    def call_multi():
        multi_program(multi, values)
        jax.block_until_ready(nnx.state(multi))

    collection = flax.struct.dataclass(
        type(
            "Collection",
            (clu.metrics.Collection,),
            {"__annotations__": {name: clu.metrics.Average.from_output(name) for name in names}},
        )
    )
    merge = jax.jit(lambda state, values: state.merge(collection.single_from_model_output(**values)), donate_argnums=0)
    clu_state = {"state": jax.device_put(collection.empty(), NamedSharding(mesh, P()))}

    def call_clu():
        clu_state["state"] = jax.block_until_ready(merge(clu_state["state"], values))

    return {
        "hand-written": (call_by_hand, mean_by_hand),
        "ours, eager update": (call_eager, lambda: eager.compute()["m0"]),
        "ours in nnx.jit": (call_jitted, lambda: jitted.compute()["m0"]),
        "ours in jax.jit, in and out": (call_plain, lambda: plain["metrics"].compute()["m0"]),
        "nnx.MultiMetric in nnx.jit": (call_multi, lambda: float(multi.compute()["m0"])),
        "clu Collection in jax.jit": (call_clu, lambda: float(clu_state["state"].compute()["m0"])),
    }


if __name__ == "__main__":
    main()
