"""States and processes that grow

Both paths of a gather on eight virtual devices, and a flush of two processes of two devices, over gloo. Each answer is
checked. (Bytes and collectives for up to 512 devices are read off compiled programs by `tests/programs/scale.py`.)
"""

import os
import socket
import statistics
import subprocess
import sys
import time

PROCESSES, DEVICES = 2, 2
CHILD = len(sys.argv) > 1
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={DEVICES if CHILD else 8}"

import jax
import numpy as np
from common import table
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from distributed_metrics import DistributedMetrics, Mean, PeriodicFlush, gathering

NAMES = [f"metric{i}" for i in range(20)]


def main() -> None:
    both_paths()
    several_processes()


def both_paths() -> None:
    """A traced compute() of one mean of many elements, on 8 devices, by each path; they take turns."""
    mesh = jax.make_mesh((jax.device_count(),), ("data",))
    rows = []
    for size in (64, 512, 4096, 8192, 65_536, 524_288):
        x = np.arange(8.0 * size, dtype=np.float32).reshape(8, size)
        sharded = jax.device_put(x, NamedSharding(mesh, P("data")))
        calls = {}
        for path, most in (("gathered", 2**62), ("merged", 0)):
            gathering.MOST_GATHERED_BYTES = most
            metrics = DistributedMetrics({path: Mean(shape=(size,))}, mesh=mesh)
            nnx.jit(lambda metrics, x, path=path: metrics.update({path: x}))(metrics, sharded)
            graphdef, state = nnx.split(metrics)
            compute = jax.jit(lambda state, graphdef=graphdef: nnx.merge(graphdef, state).compute())
            calls[path] = lambda compute=compute, state=state: compute(state)
            window = calls[path]()
            np.testing.assert_allclose(window[path], x.astype(np.float64).mean(axis=0), rtol=1e-12)
        times: dict[str, list[float]] = {path: [] for path in calls}
        for _ in range(60):
            for path, call in calls.items():
                started = time.perf_counter()
                jax.block_until_ready(call())
                times[path].append(time.perf_counter() - started)
        gathered, merged = (1e6 * statistics.median(times[path]) for path in calls)
        rows.append((f"{16 * size:,}", gathered, merged))
    table(["bytes of state on a device", "all_gather, µs", "all_to_all, merge, all_gather, µs"], rows)


def several_processes() -> None:
    """This file again, in several processes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    children = [
        subprocess.Popen([sys.executable, __file__, str(rank), port], stdout=subprocess.PIPE, text=True)
        for rank in range(PROCESSES)
    ]
    try:
        printed = [child.communicate(timeout=300)[0] for child in children]
    finally:
        for child in children:
            child.kill()
            child.wait()
    print("\n".join(line for line in printed[0].splitlines() if not line.startswith("[Gloo]")))


def one_of_several(rank: int, port: str) -> None:
    jax.distributed.initialize(f"127.0.0.1:{port}", PROCESSES, rank, cluster_detection_method="deactivate")
    mesh = jax.make_mesh((jax.device_count(),), ("data",))
    metrics = DistributedMetrics(dict.fromkeys(NAMES, "mean"), mesh=mesh)
    values = dict.fromkeys(NAMES, 1.0)
    update = nnx.jit(lambda metrics: metrics.update(values))
    flush_in_jit = nnx.jit(lambda metrics: metrics.flush())

    def flushed(flush):
        def call():
            update(metrics)
            started = time.perf_counter()
            window = flush()
            launched = time.perf_counter()
            assert window[NAMES[-1]] == 1.0
            return launched - started, time.perf_counter() - started

        return call

    calls = {
        "flush()": flushed(metrics.flush),
        "flush(timeout=60)": flushed(lambda: metrics.flush(timeout=60)),
        "nnx.jit of flush()": flushed(lambda: flush_in_jit(metrics)),
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for repeat in range(120):
        for name, call in calls.items():
            both = call()
            if repeat >= 20:
                times[name].append(both)
    rows = [
        (f"`{name}`", *(1e6 * statistics.median(one) for one in zip(*both, strict=True)))
        for name, both in times.items()
    ]
    table([f"20 means in {PROCESSES} processes", "launched after, µs", "numbers read after, µs"], rows)
    every_step(metrics, update)


def every_step(metrics, update) -> None:
    """A loop that flushes at every step, with and without a limit."""
    for timeout in (None, 60):
        with PeriodicFlush(metrics, 1, timeout=timeout) as flusher:
            for step in range(220):
                if step == 20:
                    started = time.perf_counter()
                update(metrics)
                flusher(step)
        took = 1e6 * (time.perf_counter() - started) / 200
        print(f"- `PeriodicFlush(every_steps=1, timeout={timeout})`: {took:,.0f} µs a step, with its update")


if __name__ == "__main__":
    if CHILD:
        one_of_several(int(sys.argv[1]), sys.argv[2])
    else:
        main()
