"""Reducing 20 scalars in mapped code

`reduce_mean` and its like, of a dict of 20 scalars, beside the `jax.lax` call for each leaf, on eight virtual devices.
"""

from common import in_turns, table, virtual_devices

virtual_devices(8)

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import distributed_metrics as dm

NAMES = [f"metric{i}" for i in range(20)]
PAIRS = ((dm.reduce_mean, jax.lax.pmean), (dm.reduce_sum, jax.lax.psum), (dm.reduce_max, jax.lax.pmax))


def main() -> None:
    mesh = jax.make_mesh((8,), ("data",))
    scalars = jax.device_put({name: np.arange(8.0, dtype=np.float32) for name in NAMES}, NamedSharding(mesh, P("data")))

    def mapped(function):
        def inner(scalars):
            return function({name: one[0] for name, one in scalars.items()})

        program = jax.jit(jax.shard_map(inner, mesh=mesh, in_specs=P("data"), out_specs=P()))
        return lambda: program(scalars)

    def by_leaf(reduce):
        return lambda scalars: {name: reduce(one, "data") for name, one in scalars.items()}

    rows = []
    for ours, of_leaf in PAIRS:
        calls = {
            "ours": mapped(lambda scalars, ours=ours: ours(scalars, "data")),
            "leaf by leaf": mapped(by_leaf(of_leaf)),
        }
        for name in NAMES:
            np.testing.assert_array_equal(calls["ours"]()[name], calls["leaf by leaf"]()[name])
        times = in_turns(calls, burst=10)
        rows.append((f"`{ours.__name__}`", times["ours"], times["leaf by leaf"],
                     f"{times['leaf by leaf'] / times['ours']:.1f} times faster"))  # fmt: skip
    table(["", "ours, µs", "leaf by leaf, µs", ""], rows)


if __name__ == "__main__":
    main()
