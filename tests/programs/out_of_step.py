"""One of two processes that make mistakes: python out_of_step.py RANK PROCESSES PORT. Prints the errors as JSON.

Every mistake has as many flushes in both processes, so that the next one begins in step.
"""

import json
import time

import jax
import numpy as np
from jax.sharding import PartitionSpec as P
from join import processes, rank  # before anything else touches a device

from distributed_metrics import DistributedMetrics, Histogram, PeriodicFlush
from distributed_metrics.writers import MemoryWriter

first = rank == 0
mesh = jax.make_mesh((2 * processes,), ("data",))
heard: dict[str, object] = {}


def hear(mistake, *calls):
    """What each call gives: numbers, or an error."""
    heard[mistake] = []
    for call in calls:
        try:
            heard[mistake].append(dict(call()))
        except Exception as error:
            heard[mistake].append(f"{type(error).__name__}: {error}")


def on_this_process():
    """The mean of what the rows of this process hold."""
    rows = np.concatenate([shard.data for shard in metrics._tables()["sum"].addressable_shards])
    weight, total = rows.sum(axis=(0, -1))[:2]
    return {"loss": float(total / weight) if weight else 1.0}


def with_loss(reduce_fn="mean", **more):
    metrics = DistributedMetrics({"loss": reduce_fn, **more}, mesh=mesh)
    metrics.update(loss=1.0)
    return metrics


# Another spec, of the same size and of another one that is filled up to the same.
metrics = with_loss("mean" if first else "max")
hear("another operation", metrics.flush, metrics.flush)
metrics = with_loss() if first else with_loss(accuracy="mean")
hear("one metric more", metrics.flush)

# Two objects alike, in another order.
a, b = with_loss(), with_loss()
hear("another order", a.flush, (a if first else b).flush)

# flush() in process 0 only; then both flush, and what meets is of different windows.
metrics = with_loss()
window = metrics.flush() if first else None
metrics.update(loss=3.0)
hear("flush in process 0 only", metrics.flush if window is None else lambda: window)
hear("and the next flush", metrics.flush)

metrics = with_loss()
hear("compute meets flush", metrics.compute if first else metrics.flush)

# Eager values that are not the same in both, of the host and of a device of this process.
for kind in (float, np.float32, lambda x: np.full((4,), x), jax.numpy.asarray):
    metrics = with_loss()
    metrics.update(loss=kind(rank + 1))
    hear(f"other numbers, {kind(0.0)!r}", metrics.flush)
metrics = DistributedMetrics({"loss": "mean", "other": "mean"}, mesh=mesh)
metrics.update({"loss" if first else "other": 1.0})
hear("other names", metrics.flush)
metrics = with_loss()
metrics.update(loss=2.0, weight=[0.0, 1.0][rank])
hear("other weights", metrics.flush)
metrics = with_loss()
metrics.update(loss=2.0 if first else jax.numpy.asarray(2.0))
metrics.update(loss=np.arange(4.0, dtype=np.float32) if first else jax.numpy.arange(4.0))
hear("the same numbers of other kinds", metrics.flush)

# Windows of other lengths.
metrics, stopped = DistributedMetrics({"loss": "mean"}, mesh=mesh), None
memory = MemoryWriter()
try:
    with PeriodicFlush(metrics, 2 if first else 3, memory) as flusher:
        for step in range(100):
            metrics.update(loss=1.0)
            if step < 3:
                flusher(step)
            elif step == 3:
                assert flusher._thread is not None
                flusher._thread.finish()  # what the thread has read is known now
            else:
                flusher(step)
except RuntimeError as error:
    stopped = str(error)
heard["other windows"] = [stopped, step, memory.to_dict()]

# With a limit the processes meet before: nothing is lost, whatever the sizes.
metrics = with_loss() if first else with_loss(x=Histogram(tuple(range(10_000))))
hear("another size, with a limit", lambda: metrics.flush(timeout=20), on_this_process)
metrics = with_loss()
hear("in step, with a limit", lambda: metrics.flush(timeout=20), lambda: metrics.compute(timeout=20))
# The commonest mistake with a limit: an error that names the others, and all goes on.
metrics = with_loss()
if first:
    hear("process 0 only, with a limit", lambda: metrics.flush(timeout=1))
hear("and all of them", metrics.flush)
metrics = with_loss()
if first:
    hear("process 0 only, with a limit, again", lambda: metrics.flush(timeout=1))
else:
    time.sleep(4)  # until that has given up
metrics.update(loss=3.0)
hear("and all of them, with a limit", lambda: metrics.flush(timeout=20))

# A training step that meets a flush.
metrics = with_loss()
gather = jax.jit(jax.shard_map(lambda x: jax.lax.all_gather(x[0], "data"), mesh=mesh, in_specs=P("data"),
                               out_specs=P("data")))  # fmt: skip
step_input = jax.make_array_from_process_local_data(
    jax.sharding.NamedSharding(mesh, P("data")), np.ones((2, 1024), np.float32)
)
if first:
    hear("a training step meets a flush", metrics.flush)
else:
    gather(step_input).block_until_ready()

print(json.dumps(heard))
