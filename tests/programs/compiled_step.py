"""Compiles a step with all kinds of state with the compilation cache in a folder, and runs eager updates and a flush.

It prints the compiled step without what tells where its lines were written, and how often the cache had a program.
"""

import os
import re
import sys

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"

import jax
import jax.numpy as jnp

from distributed_metrics import DistributedMetrics, Histogram, Quantile
from distributed_metrics.audit import compiled_text

SPEC = {"loss": ("mean", "max", "var"), "z": {"last": "last"}, "h": Histogram((0.0, 1.0)), "q": Quantile(0.5)}

jax.config.update("jax_compilation_cache_dir", sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
events: list[str] = []
jax.monitoring.register_event_listener(lambda event, **_: events.append(event))

mesh = jax.make_mesh((2, 2), ("data", "model"))
metrics = DistributedMetrics(SPEC, mesh=mesh, axis_name="data", nan_policy="ignore")
values = {"loss": jnp.ones(8), "z": {"last": jnp.ones(())}, "h": jnp.ones(8), "q": jnp.ones(8)}


@jax.jit
def step(metrics, values):
    metrics.update(values)
    return metrics.compute(), metrics


text = compiled_text(step, metrics, values)
print(re.sub(r', metadata={(?:"(?:[^"\\]|\\.)*"|[^"}])*}', "", text[text.index("\n%") :]))
metrics.update(values)
metrics.flush().flatten()
hits, misses = (events.count(f"/jax/compilation_cache/cache_{which}") for which in ("hits", "misses"))
print(f"hits: {hits}, misses: {misses}", file=sys.stderr)
