"""One of three processes, of which one fails: python faults.py RANK PROCESSES PORT FAULT VICTIM LIMIT.

Prints a line for all that the others see. LIMIT is the timeout of a flush in seconds; 0 is none.
"""

import os
import sys
import time

import jax
from join import rank  # before anything else touches a device

from distributed_metrics import DistributedMetrics

fault, victim, limit = sys.argv[4], int(sys.argv[5]), float(sys.argv[6])
mesh = jax.make_mesh((jax.device_count(),), ("data",))
metrics = DistributedMetrics({"loss": "mean", "steps": "sum"}, mesh=mesh)


def tell(line):
    print(line, flush=True)


def flush():
    return metrics.flush(timeout=limit or None).flatten()


metrics.update(loss=1.0, steps=1)
assert flush() == {"loss": 1.0, "steps": 1.0}
metrics.update(loss=2.0, steps=1)
tell("in step")
if rank == victim:
    if fault == "killed":
        time.sleep(300)
    if fault == "raised":
        raise RuntimeError("the victim has an error")
    if fault == "sleeps":
        time.sleep(3 * limit)
elif fault == "killed":
    time.sleep(1.0)  # the test kills it now
begun = time.monotonic()
for _ in range(20):
    try:
        window = flush()
        tell(f"flushed {window}")
        break
    except TimeoutError as error:
        tell(f"TimeoutError after {time.monotonic() - begun:.1f} s: {error}")
        if fault != "sleeps":
            mine = [shard.data.tolist() for shard in metrics._tables()["sum"].addressable_shards]
            tell(f"saved {mine}")
            time.sleep(2.0 if rank == 0 else 0.0)  # it runs the coordination service, by which the others learn of it
            os._exit(3)
        time.sleep(0.1)
    except Exception as error:
        tell(f"{type(error).__name__} after {time.monotonic() - begun:.1f} s: {str(error)[:300]}")
        os._exit(4)
tell("ended")
