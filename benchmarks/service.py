"""What a call of PeriodicFlush holds up

20 means, written to TensorBoard and JSON Lines: beside device steps of 100 ms and more, each of which ends a window,
and in a loop of steps that take next to nothing. Without an accelerator there are eight virtual devices.
"""

import statistics
import tempfile
import time
from pathlib import Path

from common import virtual_devices

virtual_devices(8)

import jax
import jax.numpy as jnp

from distributed_metrics import DistributedMetrics, PeriodicFlush
from distributed_metrics.writers import JsonLinesWriter, TensorBoardWriter

NAMES = [f"metric{i}" for i in range(20)]


def main() -> None:
    beside_long_steps()
    in_a_fast_loop()


def new_metrics() -> DistributedMetrics:
    mesh = jax.make_mesh((jax.device_count(),), ("data",))
    return DistributedMetrics(dict.fromkeys(NAMES, "mean"), mesh=mesh)


@jax.jit
def step_fn(metrics, x, n):
    """Keep the device busy for a time that grows with n, and update."""
    x = jax.lax.fori_loop(0, n, lambda i, x: jnp.tanh(x @ x), x)
    metrics.update(dict.fromkeys(NAMES, x.mean()))
    return metrics, x


def writers(folder: str):
    return TensorBoardWriter(Path(folder) / "tensorboard"), JsonLinesWriter(Path(folder) / "metrics.jsonl")


def beside_long_steps() -> None:
    """Every call ends a window, and the device is never idle."""
    x, n, took = jnp.eye(256), 8, 0.0
    while took < 0.1:
        n *= 2
        jax.block_until_ready(step_fn(new_metrics(), x, n))
        started = time.perf_counter()
        jax.block_until_ready(step_fn(new_metrics(), x, n))
        took = time.perf_counter() - started
    metrics, calls = new_metrics(), []
    with tempfile.TemporaryDirectory() as folder, PeriodicFlush(metrics, 1, writers(folder)) as flusher:
        started = time.perf_counter()
        for step in range(20):
            metrics, x = step_fn(metrics, x, n)
            before = time.perf_counter()
            flusher(step, metrics)
            calls.append(1e3 * (time.perf_counter() - before))
        jax.block_until_ready(x)
        per_step = 1e3 * (time.perf_counter() - started) / 20
    later = sorted(calls[2:])  # the first compile
    print(
        f"- Steps of {1e3 * took:.0f} ms ({per_step:.0f} ms in the loop), a window each: a call takes "
        f"{statistics.median(later):.2f} ms (median; longest {later[-1]:.2f}), "
        f"1/{took * 1e3 / statistics.median(later):.0f} of a step"
    )


def in_a_fast_loop() -> None:
    """Calls that end no window, and those that do, where the step itself takes next to nothing."""
    metrics, x = new_metrics(), jnp.eye(2)
    plain, ending = [], []
    with tempfile.TemporaryDirectory() as folder, PeriodicFlush(metrics, 100, writers(folder)) as flusher:
        for step in range(5000):
            metrics, x = step_fn(metrics, x, 1)
            jax.block_until_ready(x)
            before = time.perf_counter()
            flusher(step, metrics, epoch=1)
            (ending if step % 100 == 99 else plain).append(1e6 * (time.perf_counter() - before))
    per_call, per_window = statistics.median(plain), statistics.median(ending)
    print(f"- Small steps: a call takes {per_call:.0f} us, one that ends a window {per_window:.0f} us (medians)")


if __name__ == "__main__":
    main()
