"""One of two processes, whose devices hold the seeds of a population: python sharded_seeds.py RANK PROCESSES PORT."""

import json

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from join import processes  # before anything else touches a device

from distributed_metrics import DistributedMetrics

mesh = jax.make_mesh((2 * processes,), ("seeds",))
by_seed = NamedSharding(mesh, P("seeds"))


def train(x):
    metrics = DistributedMetrics({"x": "mean"}, axis_name=())
    metrics.update(x=x)
    return metrics.flush()


x = jax.make_array_from_callback((4, 2), by_seed, lambda index: np.arange(8.0, dtype=np.float32).reshape(4, 2)[index])
mapped = jax.shard_map(jax.vmap(train), mesh=mesh, in_specs=P("seeds"), out_specs=P("seeds"))
snapshot = jax.jit(mapped)(x)
try:
    error = str(snapshot["x"])
except RuntimeError as raised:
    error = str(raised)
replicated = jax.jit(mapped, out_shardings=NamedSharding(mesh, P()))(x)
print(json.dumps([error, replicated["x"].tolist()]))
