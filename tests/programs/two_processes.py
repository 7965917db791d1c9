"""One of several processes: python two_processes.py RANK PROCESSES PORT. Prints its results as one line of JSON."""

import json
import os
import sys

rank, processes, port = map(int, sys.argv[1:])
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2 --xla_cpu_collective_timeout_seconds=20"

import jax

jax.distributed.initialize(
    f"127.0.0.1:{port}",
    processes,
    rank,
    cluster_detection_method="deactivate",
    initialization_timeout=30,
    heartbeat_timeout_seconds=10,
    shutdown_timeout_seconds=10,
)

import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

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
