"""What it takes to start

The import of the package after that of jax and flax, and the first eager update and the first jitted step with metrics,
which compile, each in a process of its own; medians of five. "With the cache" is a later process that finds JAX's
persistent compilation cache filled. The step without metrics is one dense layer with its gradient.
"""

import statistics
import subprocess
import sys
import tempfile

from common import table

IMPORT = """
import time
import jax, flax.nnx
started = time.perf_counter()
import distributed_metrics
print(time.perf_counter() - started)
"""

STEP = """
import os, sys, time
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from distributed_metrics import DistributedMetrics
k, cache = int(sys.argv[1]), sys.argv[2]
if cache:
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
mesh = jax.sharding.Mesh(jax.devices(), ("data",))
split = NamedSharding(mesh, P("data"))
names = [f"m{i}" for i in range(k)]
metrics = DistributedMetrics(dict.fromkeys(names, "mean"), mesh=mesh)
x, w = jax.device_put(np.ones((64, 32), np.float32), split), np.ones((32, 8), np.float32)

def loss(w, x):
    each = ((x @ w) ** 2).sum(1)
    return each.mean(), {name: each * i for i, name in enumerate(names)}

def step(w, metrics, x):
    gradient, seen = jax.grad(loss, has_aux=True)(w, x)
    if seen:
        metrics.update(seen)
    return w - gradient, metrics

started = time.perf_counter()
jax.block_until_ready(jax.jit(step)(w, metrics if names else None, x))
print(time.perf_counter() - started)
"""

EAGER = (
    STEP[: STEP.index("x, w =")]
    + """
values = {name: jax.device_put(np.ones(64, np.float32), split) for name in names}
started = time.perf_counter()
metrics.update(values)
jax.block_until_ready(metrics._arrays())
print(time.perf_counter() - started)
"""
)


def seconds(code: str, *arguments: object, repeats: int = 5) -> float:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return statistics.median(float(subprocess.check_output(command, text=True)) for _ in range(repeats))


def main() -> None:
    with tempfile.TemporaryDirectory() as cache:
        rows = [
            ("`import distributed_metrics`", seconds(IMPORT), ""),
            *((f"first step {name}", seconds(STEP, k, ""), (seconds(STEP, k, cache), seconds(STEP, k, cache))[1])
              for k, name in ((0, "without metrics"), (20, "with 20 means"), (200, "with 200 means"))),
            *((f"first eager update of {k:,} means", seconds(EAGER, k, "", repeats=repeats),
               (seconds(EAGER, k, cache, repeats=1), seconds(EAGER, k, cache, repeats=repeats))[1])
              for k, repeats in ((20, 5), (2000, 3))),
        ]  # fmt: skip
    shown = [(name, f"{1e3 * first:,.0f}", f"{1e3 * second:,.0f}" if second else "") for name, first, second in rows]
    table(["ms", "", "with the cache"], shown)


if __name__ == "__main__":
    main()
