"""One of three processes, of which the second and third own the mesh: python sub_mesh.py RANK PROCESSES PORT.

Prints what each call gives as one line of JSON. The first process makes the same calls, and none of them does anything.
"""

import json

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from join import rank  # before anything else touches a device

from distributed_metrics import DistributedMetrics, PeriodicFlush, Snapshot
from distributed_metrics.writers import MemoryWriter

mesh = Mesh(np.array([device for device in jax.devices() if device.process_index > 0]), ("data",))
inside = rank > 0
told: dict[str, object] = {}

metrics = DistributedMetrics({"x": ("mean", "count"), "steps": "sum"}, mesh=mesh)
x = np.arange(12.0, dtype=np.float32)
metrics.update(x=x, steps=1)
if inside:  # programs of one's own are launched by the processes of their devices
    told["traced"] = nnx.jit(lambda metrics: metrics.compute())(metrics).flatten()
computed = metrics.compute()
told["computed"] = computed.flatten()
saved = computed.to_dict()
if inside:
    told["per device"] = computed.per_device("x/count").tolist()
    wider = NamedSharding(Mesh(np.array(jax.devices()), ("data",)), P("data"))
    here = [jax.device_put(np.ones(2, np.float32), device) for device in jax.local_devices()]
    try:
        metrics.update(x=jax.make_array_from_single_device_arrays((2 * jax.device_count(),), wider, here))
    except ValueError as error:
        told["refused"] = str(error)
told["flushed"] = metrics.flush(timeout=20).flatten()
told["is NaN"] = bool(np.isnan(computed["x"]["mean"]))
metrics.merge(Snapshot.from_dict(saved))
metrics.merge(Snapshot.from_dict(saved))
told["merged"] = metrics.flush().flatten()
metrics.reset()

memory, derived = MemoryWriter(), list[float]()
with PeriodicFlush(
    metrics, 2, memory, timeout=20, derive=lambda numbers, window: derived.append(numbers["x/mean"])
) as flusher:
    for step in range(4):
        metrics.update(x=float(step))
        flusher(step)
    told["total"] = flusher.total().flatten().get("x/mean")
told |= {"derived": derived, "written": memory.to_dict().get("x/mean")}
print(json.dumps(told))
