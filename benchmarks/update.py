"""One update of K means

Beside what an expert would write for exactly these metrics (one packed array of float32 sums and counts, a row for each
device, without compensation): the limit. The values are 64 numbers for each metric, split over the devices. Each cell
is microseconds for one call including its execution, of ten in a row; in brackets its ratio to the hand-written one in
the same wrapper, or in `jax.jit` where it has none.
"""

import argparse
import json
import os
from collections.abc import Callable
from typing import Any

from common import in_turns, table, virtual_devices

BATCH = 64
MEAN = (BATCH - 1) / 2
COUNTS = (1, 4, 20, 200)
LIMIT, LIMIT_NNX = "hand-written, `jax.jit`", "hand-written, `nnx.jit`"
Rival = tuple[Callable[[], Any], Callable[[], float]]
"""One update, and the mean of the first metric so far."""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--json", help="a file to write the times to")
    options = parser.parse_args()
    virtual_devices(options.devices)
    os.environ.setdefault("KERAS_BACKEND", "jax")
    times: dict[int, dict[str, float]] = {}
    for k in COUNTS:
        rivals = make_rivals(k)
        times[k] = in_turns(
            {name: call for name, (call, _) in rivals.items()}, repeats=300 if k < 200 else 40, burst=10
        )
        for name, (_, mean) in rivals.items():
            assert abs(mean() - MEAN) < 1e-5, (name, mean())
    print(f"### {options.devices} virtual device{'s' if options.devices > 1 else ''}\n")
    table(
        ["µs for one update of K means", *(f"K = {k}" for k in COUNTS)],
        [[name, *(cell(times[k], name) for k in COUNTS)] for name in times[COUNTS[0]]],
    )
    if options.json:
        with open(options.json, "w") as file:
            json.dump(times, file)


def cell(times: dict[str, float], name: str) -> str:
    limit = times[LIMIT_NNX if "nnx.jit" in name else LIMIT]
    return f"{times[name]:,.0f} (×{times[name] / limit:.2f})"


def make_rivals(k: int) -> dict[str, Rival]:
    import jax
    import numpy as np
    from jax.sharding import Mesh, NamedSharding
    from jax.sharding import PartitionSpec as P

    mesh = Mesh(jax.devices(), ("data",))
    split = NamedSharding(mesh, P("data"))
    values = {f"m{i}": jax.device_put(np.arange(BATCH, dtype=np.float32), split) for i in range(k)}
    rivals = {
        **by_hand(mesh, values),
        **ours(mesh, values),
        **of_nnx(values),
        "clu `Collection`, `jax.jit`": of_clu(mesh, values),
        "Keras `Mean`, `jax.jit`": of_keras(mesh, values),
    }
    if mesh.size == 1:
        rivals["torchmetrics, eager, PyTorch on the CPU"] = of_torch(values)
    return rivals


def by_hand(mesh, values) -> dict[str, Rival]:
    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    k = len(values)

    def local(rows, *xs):
        sums = jnp.sum(jnp.stack(xs), axis=1)
        return rows + jnp.stack([sums, jnp.full_like(sums, xs[0].size)], axis=-1)[None]

    mapped = jax.shard_map(local, mesh=mesh, in_specs=(P("data"),) * (k + 1), out_specs=P("data"))
    update = jax.jit(mapped, donate_argnums=0)
    rows = jax.device_put(np.zeros((mesh.size, k, 2), np.float32), NamedSharding(mesh, P("data")))
    state = {"rows": rows}

    def call():
        state["rows"] = update(state["rows"], *values.values())
        return state["rows"]

    class Packed(nnx.Module):
        def __init__(self):
            self.rows = nnx.metrics.MetricState(jnp.copy(rows))

        def update(self, values):
            self.rows.set_raw_value(mapped(self.rows.get_raw_value(), *values.values()))

    packed, step = Packed(), nnx.jit(lambda packed, values: packed.update(values))

    def call_nnx():
        step(packed, values)
        return packed.rows.get_raw_value()

    def mean(rows):
        total, count = np.asarray(rows, np.float64).sum(0)[0]
        return total / count

    return {
        LIMIT: (call, lambda: mean(state["rows"])),
        LIMIT_NNX: (call_nnx, lambda: mean(packed.rows.get_raw_value())),
    }


def ours(mesh, values) -> dict[str, Rival]:
    import jax
    from flax import nnx

    from distributed_metrics import DistributedMetrics

    def new():
        return DistributedMetrics(dict.fromkeys(values, "mean"), mesh=mesh)

    eager, jitted, tree, plain = new(), new(), new(), {"metrics": new()}
    in_nnx = nnx.jit(lambda metrics, values: metrics.update(values))
    in_tree = nnx.jit(lambda metrics, values: metrics.update(values), graph=False)
    in_jax = jax.jit(lambda metrics, values: (metrics.update(values), metrics)[1])

    def call_eager():
        eager.update(values)
        return eager.sum_rows.get_raw_value()

    def call_nnx():
        in_nnx(jitted, values)
        return jitted.sum_rows.get_raw_value()

    def call_tree():
        in_tree(tree, values)
        return tree.sum_rows.get_raw_value()

    def call_jax():
        plain["metrics"] = in_jax(plain["metrics"], values)
        return plain["metrics"]

    return {
        "ours, eager": (call_eager, lambda: eager.compute()["m0"]),
        "ours, `jax.jit`, in and out": (call_jax, lambda: plain["metrics"].compute()["m0"]),
        "ours, `nnx.jit`": (call_nnx, lambda: jitted.compute()["m0"]),
        "ours, `nnx.jit(graph=False)`": (call_tree, lambda: tree.compute()["m0"]),
    }


def of_nnx(values) -> dict[str, Rival]:
    import metrax.nnx
    from flax import nnx

    step = nnx.jit(lambda metrics, values: metrics.update(**values))

    @nnx.jit
    def each(metrics, values):
        for name, metric in metrics.items():
            metric.update(values=values[name])

    def of_multi():
        multi = nnx.MultiMetric(**{name: nnx.metrics.Average(name) for name in values})

        def call():
            step(multi, values)
            return nnx.state(multi)

        return call, lambda: float(multi.compute()["m0"])

    def of_metrax():
        metrics = {name: metrax.nnx.Average() for name in values}

        def call():
            each(metrics, values)
            return nnx.state(metrics)

        return call, lambda: float(metrics["m0"].compute())

    return {"`nnx.MultiMetric`, `nnx.jit`": of_multi(), "metrax, `nnx.jit`": of_metrax()}


def of_clu(mesh, values) -> Rival:
    import clu.metrics
    import flax
    import jax
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    annotations = {name: clu.metrics.Average.from_output(name) for name in values}
    collection = flax.struct.dataclass(type("Collection", (clu.metrics.Collection,), {"__annotations__": annotations}))
    merge = jax.jit(lambda state, values: state.merge(collection.single_from_model_output(**values)), donate_argnums=0)
    state = {"": jax.device_put(collection.empty(), NamedSharding(mesh, P()))}

    def call():
        state[""] = merge(state[""], values)
        return state[""]

    return call, lambda: float(state[""].compute()["m0"])


def of_keras(mesh, values) -> Rival:
    import jax
    import keras
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    metrics = {name: keras.metrics.Mean(name=name) for name in values}

    @jax.jit
    def update(state, values):
        return {name: metrics[name].stateless_update_state(state[name], value) for name, value in values.items()}

    fresh = {name: [variable.value for variable in metric.variables] for name, metric in metrics.items()}
    state = {"": jax.device_put(fresh, NamedSharding(mesh, P()))}

    def call():
        state[""] = update(state[""], values)
        return state[""]

    return call, lambda: float(metrics["m0"].stateless_result(state[""]["m0"]))


def of_torch(values) -> Rival:
    import numpy as np
    import torch
    import torchmetrics

    metrics = {name: torchmetrics.MeanMetric() for name in values}
    given = {name: torch.from_numpy(np.array(value)) for name, value in values.items()}

    def call():
        for name, metric in metrics.items():
            metric.update(given[name])

    return call, lambda: float(metrics["m0"].compute())


if __name__ == "__main__":
    main()
