"""On as many virtual devices as are asked for: python scale.py DEVICES. Prints what is compiled as one line of JSON."""

import collections
import json
import os
import re
import sys
from typing import Any

devices = int(sys.argv[1])
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from distributed_metrics import DistributedMetrics, Mean, Quantile

SPECS: dict[str, dict[str, Any]] = {
    "scalars": {"loss": ("mean", "max", "min", "count"), "tokens": "ratio"},
    "all": {"norms": Mean(shape=(10_000,)), "x": Quantile((0.5, 0.99)), "loss": ("mean", "max")},
}
mesh = jax.make_mesh((devices,), ("data",))


def value(name: str) -> jax.ShapeDtypeStruct:
    dims = (2 * devices, 10_000) if name == "norms" else (2 * devices,)
    return jax.ShapeDtypeStruct(dims, jnp.float32, sharding=NamedSharding(mesh, P("data")))


def collectives(text: str) -> dict[str, int]:
    """How many of each kind."""
    return dict(collections.Counter(re.findall(r" (all-[a-z]+(?:-[a-z]+)?|collective-[a-z]+)\(", text)))


def sent_bytes(text: str) -> int:
    """What one device hands to the collectives of a program: the sizes of their operands, all of float32."""
    shapes = dict(re.findall(r"(%[\w.-]+) = f32\[([\d,]*)\]", text))
    operands = [name for given in re.findall(r" all-(?:gather|to-all)\(([^)]*)\)", text)
                for name in re.findall(r"%[\w.-]+", given)]  # fmt: skip
    return sum(4 * int(np.prod([int(d) for d in shapes[name].split(",")])) for name in operands)


told = {}
for name, spec in SPECS.items():
    metrics = DistributedMetrics(spec, mesh=mesh)
    values = {name: (value(name), value(name)) if spec[name] == "ratio" else value(name) for name in spec}
    update = nnx.jit(lambda metrics, values: metrics.update(values)).lower(metrics, values).compile()
    compute = nnx.jit(lambda metrics: metrics.compute()).lower(metrics).compile()
    text, memory = compute.as_text(), compute.memory_analysis()
    assert text is not None
    assert memory is not None
    told[name] = {
        "update sends": collectives(update.as_text() or ""),
        "compute sends": collectives(text),
        "bytes sent by a device": sent_bytes(text),
        "temporary bytes on a device": memory.temp_size_in_bytes,
        "bytes of state on a device": sum(4 * x.size for x in jax.tree.leaves(nnx.state(metrics))) // devices,
    }
print(json.dumps(told))
