"""One of several processes: python service.py RANK PROCESSES PORT. A loop with PeriodicFlush; prints a line of JSON."""

import json
import time

import jax
from join import processes  # before anything else touches a device

from distributed_metrics import DistributedMetrics, PeriodicFlush

mesh = jax.make_mesh((2 * processes,), ("data",))
results: dict[str, object] = {}
derived: list[float] = []


class Writer:
    def __init__(self, broken=False):
        self.steps, self.losses, self.broken = [], [], broken

    def write_scalars(self, step, scalars):
        if self.broken and step > 1:
            raise OSError("the disk is full")
        self.steps.append(step)
        self.losses.append(scalars["loss"])

    def flush(self):
        pass

    def close(self):
        pass


def loop(flusher, metrics, steps, nan=None):
    for step in steps:
        metrics.update(loss=float("nan") if step == nan else float(step))
        flusher(step)


metrics, writer = DistributedMetrics({"loss": "mean"}, mesh=mesh), Writer()
with (
    jax.thread_guard(True),
    PeriodicFlush(metrics, 2, writer, derive=lambda numbers, window: derived.append(numbers["loss"])) as flusher,
):
    loop(flusher, metrics, range(7))
    results["total"] = flusher.total()["loss"]
results |= {"steps": writer.steps, "loss": writer.losses, "derived": derived}


def stop(numbers, window):
    if numbers["loss"] != numbers["loss"]:
        raise FloatingPointError("NaN")


metrics, stopped = DistributedMetrics({"loss": "mean"}, mesh=mesh), None
try:
    with PeriodicFlush(metrics, 2, Writer(), derive=stop) as flusher:
        for step in range(100):
            loop(flusher, metrics, [step], nan=3)
except FloatingPointError:
    stopped = step
results["stopped at"] = stopped

metrics, broken, other = DistributedMetrics({"loss": "mean"}, mesh=mesh), Writer(broken=True), Writer()
results["at the end"] = None
try:
    with PeriodicFlush(metrics, 2, [broken, other]) as flusher:
        loop(flusher, metrics, range(6))
except OSError as error:
    results["at the end"] = str(error)
results["steps of the other writer"] = other.steps

metrics, missed = DistributedMetrics({"loss": "mean"}, mesh=mesh), []
with PeriodicFlush(metrics, 2, Writer(), timeout=5) as flusher:
    for step in range(6):
        metrics.update(loss=float(step))
        if step == 1 and jax.process_index() == 1:
            time.sleep(7)  # the other gives up waiting for it at the end of this window
        try:
            flusher(step)
        except TimeoutError as error:
            missed.append(str(error).splitlines()[0])
    results |= {"missed": missed, "total after that": flusher.total()["loss"]}

metrics = DistributedMetrics({"loss": "mean"}, mesh=mesh)
try:
    with PeriodicFlush(metrics, 10, Writer()) as flusher:
        loop(flusher, metrics, range(3))
        raise KeyError("missing")
except KeyError as error:
    results["left alone"] = type(error).__name__
print(json.dumps(results))
