"""What the benchmarks share: calls that take turns, and tables for docs/benchmarks.md."""

import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any


def virtual_devices(number: int) -> None:
    """So many devices where there is no accelerator; to be called before jax is imported."""
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={number} {flags}"


def in_turns(calls: Mapping[str, Callable[[], Any]], repeats: int = 300, burst: int = 1) -> dict[str, float]:
    """The median time of one call of each, until what it returns is there, in microseconds.

    Args:
        calls: by name; they take turns.
        repeats: how often each is timed, after 20 calls that are not.
        burst: calls in one turn. Of several, the first two are not timed: they find the caches full of the others.
    """
    import jax

    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        for _ in range(20):
            jax.block_until_ready(call())
    for _ in range(repeats // burst):
        for name, call in calls.items():
            for within in range(burst if burst == 1 else burst + 2):
                started = time.perf_counter()
                jax.block_until_ready(call())
                if burst == 1 or within >= 2:
                    times[name].append(time.perf_counter() - started)
    return {name: 1e6 * statistics.median(seconds) for name, seconds in times.items()}


def median(seconds: Iterable[float]) -> float:
    """The median in microseconds."""
    return 1e6 * statistics.median(seconds)


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Print a table in Markdown; numbers are shown without decimals."""
    print("| " + " | ".join(columns) + " |")
    print("|" + "---|" * len(columns))
    for row in rows:
        print("| " + " | ".join(f"{cell:,.0f}" if isinstance(cell, float) else str(cell) for cell in row) + " |")
    print()


def machine() -> str:
    """What was measured on."""
    import flax
    import jax

    return (
        f"jax {jax.__version__}, flax {flax.__version__}, Python {platform.python_version()}, {os.cpu_count()} cores, "
        f"{platform.machine()}"
    )
