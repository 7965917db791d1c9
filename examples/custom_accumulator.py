"""An accumulator of your own: the power mean. It says what to keep, what a batch adds, and what that results in.

``PowerMean(power=-1.0)`` is the harmonic mean, the one for speeds over equal distances; ``PowerMean(power=2.0)`` is the
root mean square. It is held to the laws that every accumulator keeps, then used in a loop beside a plain mean, and
the end of this script compares it with NumPy. Without an accelerator there are eight virtual devices.
"""

import os
import sys
from dataclasses import dataclass
from typing import Any

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8 " + os.environ.get("XLA_FLAGS", "")

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from distributed_metrics import Accumulator, Batch, DistributedMetrics, PeriodicFlush
from distributed_metrics.testing import check_accumulator
from distributed_metrics.writers import MemoryWriter

BATCH_SIZE, STEPS, EVERY = 64, 30, 10


@dataclass(frozen=True)
class PowerMean(Accumulator):
    """(sum(w x^p) / sum(w))^(1/p) of positive numbers."""

    power: float = 1.0

    fields = {"total": "sum"}  # a sum over the elements, which devices can add; the root is taken on reading

    def contribution(self, batch: Batch) -> dict[str, Any]:
        return {"total": batch.map(lambda x: x**self.power).sum()}

    def result(self, xp: Any, weight: Any, total: Any) -> Any:
        return (total / weight) ** (1 / self.power)


HARMONIC, QUADRATIC = PowerMean(power=-1.0, name="harmonic"), PowerMean(power=2.0, name="quadratic")


@nnx.jit
def step_fn(metrics: DistributedMetrics, speeds: jax.Array) -> None:
    """What a step measures; each device has a part of it."""
    metrics.update(speed=speeds)


def main() -> None:
    """Check the accumulator, use it, and compare the results.

    Raises:
        AssertionError: the accumulator breaks a law.
        SystemExit: the results are not those of NumPy.
    """
    for accumulator in (HARMONIC, QUADRATIC):
        check_accumulator(accumulator, tolerance=1e-6)  # its powers are those of float32
        print(f"PowerMean(power={accumulator.power}) keeps the laws.")

    mesh = Mesh(jax.devices(), ("data",))
    metrics = DistributedMetrics({"speed": ("mean", HARMONIC, QUADRATIC)}, mesh=mesh)
    speeds = np.random.default_rng(0).lognormal(1.0, 0.7, (STEPS, BATCH_SIZE)).astype(np.float32)
    memory = MemoryWriter()
    with PeriodicFlush(metrics, EVERY, memory) as flusher:
        for step in range(STEPS):
            step_fn(metrics, jax.device_put(speeds[step], NamedSharding(mesh, P("data"))))
            flusher(step)

    written = memory.to_dict()
    windows = speeds.astype(np.float64).reshape(STEPS // EVERY, -1)
    expected = {
        "speed/mean": windows.mean(axis=1),
        "speed/harmonic": 1 / (1 / windows).mean(axis=1),
        "speed/quadratic": np.sqrt((windows**2).mean(axis=1)),
    }
    print(f"{'windows that end with step':28}" + "".join(f"{step:8}" for step in written["speed/mean"]["step"]))
    for name, values in expected.items():
        print(f"{name:28}" + "".join(f"{value:8.4f}" for value in written[name]["value"]))
        if not np.allclose(written[name]["value"], values, rtol=1e-6, atol=0):
            sys.exit(f"{name} is {written[name]['value']}, and should be {values}.")
    print("All are those of NumPy.")


if __name__ == "__main__":
    main()
