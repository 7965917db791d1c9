"""One of several processes: python two_processes.py RANK PROCESSES PORT. Prints its results as one line of JSON."""

import json

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from join import processes, rank  # before anything else touches a device

from distributed_metrics import DistributedMetrics, count_collectives

EXAMPLES = np.arange(16, dtype=np.float32)
results = []
for mesh in (jax.make_mesh((2 * processes,), ("data",)), Mesh(np.array(jax.devices()), ("data",))):
    metrics = DistributedMetrics({"x": ("mean", "max", "count"), "steps": "sum"}, mesh=mesh)
    mine = np.split(EXAMPLES, processes)[rank]
    x = jax.make_array_from_process_local_data(NamedSharding(mesh, P("data")), mine, EXAMPLES.shape)
    program = nnx.jit(lambda metrics, x: metrics.update(x=x, steps=1))
    sent = count_collectives(program, metrics, x)
    program(metrics, x)
    metrics.update(x=x, steps=1, weight={"x": EXAMPLES % 2 == 0})
    traced = nnx.jit(lambda metrics: metrics.compute())(metrics)
    eager = metrics.flush()
    results.append(
        {
            "update sends": sent,
            "traced": traced.flatten(),
            "eager": eager.flatten(),
            "per device": eager.per_device("x/count").tolist(),
            "after": metrics.flush().flatten(),
            "collected": [float(value) for value in metrics.collect_from_devices({"x": x})["x"]],
        }
    )
print(json.dumps(results))
