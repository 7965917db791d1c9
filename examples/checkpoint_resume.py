"""Training that may be killed at any moment, and goes on from its last checkpoint on whatever devices there are then.

A checkpoint of Orbax holds the model, the optimizer, the number of steps, and what the metrics have seen of the epoch
so far. The order of the examples follows from the number of the epoch. So the numbers of an epoch are those of all its
examples, each counted once, however often the run was interrupted:

    python examples/checkpoint_resume.py --devices 8    # stop it with Ctrl-C, or kill -9
    python examples/checkpoint_resume.py --devices 4    # goes on

``metrics.jsonl`` in the directory has a line for each epoch. It may have it twice, where the run was killed after the
line was written and before the next checkpoint was; both say the same.
"""

import argparse
import contextlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from sklearn.datasets import load_digits

from distributed_metrics import DistributedMetrics, Histogram, Snapshot
from distributed_metrics.writers import JsonLinesWriter

BATCH_SIZE = 64
METRICS = {
    "loss": ("mean", "std", "max"),
    "correct": "sum",
    "examples": "count",
    "pixel": ("mean", "max", Histogram((0.0, 0.25, 0.5, 0.75, 1.0))),
}

Batch = dict[str, Any]


@nnx.jit
def train_step(model: nnx.Linear, optimizer: nnx.Optimizer, metrics: DistributedMetrics, batch: Batch) -> None:
    """One step of the optimizer, which the metrics see."""

    def loss_fn(model: nnx.Linear) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        logits = model(batch["image"])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        return jnp.average(losses, weights=batch["weight"]), (losses, logits.argmax(axis=-1) == batch["label"])

    (_, (losses, correct)), gradients = nnx.value_and_grad(loss_fn, has_aux=True)(model)
    optimizer.update(model, gradients)
    metrics.update(loss=losses, correct=correct, examples=losses, pixel=batch["image"], weight=batch["weight"])


def batch_of(images: np.ndarray, labels: np.ndarray, step: int, steps: int) -> Batch:
    """The batch of a step, which depends on nothing but its number. The last one of an epoch is filled up."""
    epoch, position = divmod(step, steps)
    order = np.random.default_rng(epoch).permutation(len(labels))
    chosen = order[position * BATCH_SIZE :][:BATCH_SIZE]
    filled = np.resize(chosen, BATCH_SIZE)
    return {"image": images[filled], "label": labels[filled], "weight": np.arange(BATCH_SIZE) < len(chosen)}


def restore(checkpoints: ocp.CheckpointManager, trained: Any, metrics: DistributedMetrics) -> int:
    """Put the last checkpoint, if there is one, into what is trained and the metrics. Returns the steps done."""
    done = checkpoints.latest_step()
    if done is None:
        return 0
    state = ocp.args.StandardRestore(nnx.state(trained))  # which says on what devices it shall be
    seen = ocp.args.StandardRestore()
    saved = checkpoints.restore(done, args=ocp.args.Composite(state=state, seen=seen))
    nnx.update(trained, saved["state"])
    metrics.merge(Snapshot.from_dict(saved["seen"]))
    return done


def save(checkpoints: ocp.CheckpointManager, done: int, trained: Any, metrics: DistributedMetrics) -> None:
    """Start to save, and let the files be written in the background."""
    state = ocp.args.StandardSave(nnx.state(trained))
    # Merged over the devices, at the cost of a flush: the rows themselves would fit as many devices only. The item is
    # not called "metrics", a name that Orbax keeps for its own.
    seen = ocp.args.StandardSave(metrics.compute().to_dict())
    checkpoints.save(done, args=ocp.args.Composite(state=state, seen=seen), force=True)


def train(options: argparse.Namespace) -> None:
    """Train from the last checkpoint on, or from the beginning. Of several processes, all call this."""
    mesh = Mesh(jax.devices(), ("data",))
    digits = load_digits()
    images, labels = (digits.data / 16).astype(np.float32), digits.target.astype(np.int32)
    steps = -(-len(labels) // BATCH_SIZE)  # in an epoch
    last = options.epochs * steps

    model = nnx.Linear(64, 10, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.sgd(0.1, momentum=0.9), wrt=nnx.Param)
    model, optimizer = trained = jax.device_put((model, optimizer), NamedSharding(mesh, P()))
    metrics = DistributedMetrics(METRICS, mesh=mesh)

    manager_options = ocp.CheckpointManagerOptions(
        save_interval_steps=options.save_every,
        preservation_policy=ocp.checkpoint_managers.LatestN(2),
        cleanup_tmp_directories=True,  # what is left of a process that was killed while it saved
    )
    first_process = jax.process_index() == 0
    with (
        ocp.CheckpointManager((options.directory / "checkpoints").absolute(), options=manager_options) as checkpoints,
        contextlib.closing(JsonLinesWriter(options.directory / "metrics.jsonl")) as writer,
    ):
        start = restore(checkpoints, trained, metrics)
        if first_process:
            print(f"from step {start}, on {mesh.size} devices", flush=True)
        for step in range(start, last):
            batch = jax.device_put(batch_of(images, labels, step, steps), NamedSharding(mesh, P("data")))
            train_step(model, optimizer, metrics, batch)
            done = step + 1
            if done % steps == 0:  # before the checkpoint, which would not bring back a line that a kill prevented
                epoch = metrics.flush()
                if first_process:
                    writer.write_scalars(done, {"epoch": done // steps, **epoch.flatten()})
                    print(f"epoch {done // steps}: loss {epoch['loss']['mean']:.4f}", flush=True)
            if checkpoints.should_save(done) or done == last:  # also when a cluster of processes is being preempted
                save(checkpoints, done, trained, metrics)


def main() -> None:
    """Read the command line, and train."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--directory", type=Path, default=Path("resume-output"), help="for checkpoints and numbers")
    parser.add_argument("--devices", type=int, default=8, help="virtual ones, where there is no accelerator")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--save-every", type=int, default=10, help="the number of steps between checkpoints")
    options = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", options.devices)  # goes before what XLA_FLAGS may say
    if BATCH_SIZE % jax.device_count():
        parser.error(f"batches of {BATCH_SIZE} cannot be divided among {jax.device_count()} devices")
    train(options)


if __name__ == "__main__":
    main()
