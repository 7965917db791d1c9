"""Train a small classifier on real handwritten digits, with live metrics from every device.

One ``DistributedMetrics`` follows the run. The compiled training step updates it, and ``PeriodicFlush`` tells of a
window every few steps: in the progress bar, in TensorBoard's files and in JSON Lines. The windows of an epoch add up to
the epoch. An update sends nothing between the devices; the table at the end holds the compiled step to that. Without an
accelerator there are eight virtual devices.
"""

import argparse
import math
import os
import statistics
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8 " + os.environ.get("XLA_FLAGS", "")

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from sklearn.datasets import load_digits

from distributed_metrics import DistributedMetrics, PeriodicFlush, count_collectives
from distributed_metrics.writers import JsonLinesWriter, MemoryWriter, TensorBoardWriter

METRICS = {"loss": "mean", "accuracy": "mean", "grad_norm": ("mean", "max"), "samples": "count"}
HELDOUT = {"loss": "mean", "accuracy": "mean"}
ADAM = optax.adam(1e-3)
PLOTTED = ("loss", "accuracy", "grad_norm/mean", "grad_norm/max", "samples_per_sec")
HELDOUT_DIGITS = 360
REQUIRED_ACCURACY = 0.95

Digits = tuple[np.ndarray, np.ndarray]
Batch = dict[str, jax.Array]


class Classifier(nnx.Module):
    """Images of 8 by 8 pixels, through two convolutions and a hidden layer, to ten logits."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.conv1 = nnx.Conv(1, 16, (3, 3), rngs=rngs)
        self.conv2 = nnx.Conv(16, 32, (3, 3), strides=2, rngs=rngs)
        self.hidden = nnx.Linear(4 * 4 * 32, 64, rngs=rngs)
        self.output = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        x = nnx.relu(self.conv1(images[..., None]))
        x = nnx.relu(self.conv2(x))
        x = nnx.relu(self.hidden(x.reshape(len(x), -1)))
        return self.output(x)


def new_model(mesh: Mesh) -> tuple[Classifier, nnx.Optimizer]:
    """An untrained model and its optimizer, the same on every device."""
    model = Classifier(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, ADAM, wrt=nnx.Param)
    return jax.device_put((model, optimizer), NamedSharding(mesh, P()))


def score(model: Classifier, batch: Batch) -> dict[str, jax.Array]:
    """The loss of each example, and whether the model is right about it."""
    logits = model(batch["image"])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
    return {"loss": losses, "accuracy": logits.argmax(axis=-1) == batch["label"]}


@nnx.jit
def train_step(
    model: Classifier, optimizer: nnx.Optimizer, batch: Batch, metrics: DistributedMetrics | None = None
) -> None:
    """One step of the optimizer, which ``metrics`` sees. Without metrics it is the bare step."""

    def loss_fn(model: Classifier) -> tuple[jax.Array, dict[str, jax.Array]]:
        scores = score(model, batch)
        return jnp.average(scores["loss"], weights=batch["weight"]), scores

    (_, scores), gradients = nnx.value_and_grad(loss_fn, has_aux=True)(model)
    optimizer.update(model, gradients)
    if metrics is not None:  # out here: value_and_grad traces loss_fn, and what that captures cannot be changed in it
        metrics.update(scores, samples=batch["label"], weight=batch["weight"])
        metrics.update(grad_norm=optax.tree.norm(gradients))


@nnx.jit
def evaluation_step(model: Classifier, batch: Batch, metrics: DistributedMetrics) -> None:
    """Add the scores of one batch of held-out digits."""
    metrics.update(score(model, batch), weight=batch["weight"])


def load() -> tuple[Digits, Digits]:
    """The 1,797 digits of scikit-learn, as images and labels: those to train on, and those held out."""
    digits = load_digits()
    images, labels = digits.images.astype(np.float32) / 16, digits.target.astype(np.int32)
    heldout, train = np.split(np.random.default_rng(0).permutation(len(labels)), [HELDOUT_DIGITS])
    return (images[train], labels[train]), (images[heldout], labels[heldout])


def batches(digits: Digits, size: int, mesh: Mesh, rng: np.random.Generator | None = None) -> Iterator[Batch]:
    """Every digit once, in batches of one shape: the last one is filled up with digits of weight 0."""
    images, labels = digits
    order = np.arange(len(labels)) if rng is None else rng.permutation(len(labels))
    for start in range(0, len(order), size):
        chosen = order[start : start + size]
        filled = np.resize(chosen, size)
        batch = {"image": images[filled], "label": labels[filled], "weight": np.arange(size) < len(chosen)}
        yield jax.device_put(batch, NamedSharding(mesh, P("data")))


class Bar:
    """A writer that shows the latest window in the progress bar or, without a terminal, on a line."""

    def __init__(self, progress: Progress, steps: int) -> None:
        self.progress, self.task = progress, progress.add_task("training", total=steps, window="")

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Numbers of training; those of whole epochs have a line of their own."""
        if "train/loss" not in scalars:
            return
        numbers = f"loss {scalars['train/loss']:.4f}, accuracy {scalars['train/accuracy']:.1%}, "
        numbers += f"gradient {scalars['train/grad_norm/mean']:.2f}"
        if "train/samples_per_sec" in scalars:  # not in the first window, which compiles
            numbers += f", {scalars['train/samples_per_sec']:,.0f} samples/s"
        self.progress.update(self.task, completed=step + 1, window=numbers)
        if self.progress.disable:
            self.progress.console.print(f"step {step + 1}: {numbers}")


def train(options: argparse.Namespace, mesh: Mesh, progress: Progress) -> MemoryWriter:
    """Train a model and show how it goes: the latest window in the bar, and a line for every epoch."""
    train_digits, heldout_digits = load()
    model, optimizer = new_model(mesh)
    metrics, heldout = DistributedMetrics(METRICS, mesh=mesh), DistributedMetrics(HELDOUT, mesh=mesh)
    bar = Bar(progress, options.epochs * math.ceil(len(train_digits[1]) / options.batch_size))
    memory = MemoryWriter()
    files = TensorBoardWriter(options.output / "tensorboard"), JsonLinesWriter(options.output / "metrics.jsonl")
    step, rng = 0, np.random.default_rng(0)
    with PeriodicFlush(metrics, options.every, [bar, memory, *files], prefix="train", rates=("samples",)) as flusher:
        for number in range(1, options.epochs + 1):
            flusher.start_epoch()
            for batch in batches(train_digits, options.batch_size, mesh, rng):
                train_step(model, optimizer, batch, metrics)
                flusher(step, epoch=number)
                step += 1
            with flusher.pause():  # what follows is no part of the rate of training
                for batch in batches(heldout_digits, options.batch_size, mesh):
                    evaluation_step(model, batch, heldout)
                epoch, score = flusher.total(), heldout.flush()
                flusher.write(step - 1, epoch, prefix="epoch")
                flusher.write(step - 1, score, prefix="heldout")
                progress.console.print(
                    f"epoch {number:2}: loss {epoch['loss']:.4f}, accuracy {epoch['accuracy']:6.1%}; "
                    f"held out: loss {score['loss']:.4f}, accuracy {score['accuracy']:6.1%}"
                )
    return memory


def measure_step(options: argparse.Namespace, mesh: Mesh, repeats: int = 100) -> tuple[list[str], list[float]]:
    """What the training step sends, and the median of its milliseconds: first without metrics, then with them.

    The two take turns, so that whatever else the machine does slows both of them down.
    """
    batch = next(batches(load()[0], options.batch_size, mesh))
    variants: list[tuple[Any, ...]] = [
        (*new_model(mesh), batch),
        (*new_model(mesh), batch, DistributedMetrics(METRICS, mesh=mesh)),
    ]
    sent = [count_collectives(train_step, *arguments) for arguments in variants]
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(5 + repeats):  # the first five compile and warm up
        for arguments, milliseconds in zip(variants, times, strict=True):
            started = time.perf_counter()
            train_step(*arguments)
            jax.block_until_ready(arguments)
            milliseconds.append(1e3 * (time.perf_counter() - started))
    collectives = [", ".join(f"{count} {kind}" for kind, count in sorted(counts.items())) or "none" for counts in sent]
    return collectives, [statistics.median(milliseconds[5:]) for milliseconds in times]


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=64, help="of all devices together")
    parser.add_argument("--every", type=int, default=10, help="the number of steps in a window")
    parser.add_argument("--output", type=Path, default=Path("demo-output"), help="the folder for what is left of a run")
    options = parser.parse_args()
    if min(options.epochs, options.batch_size, options.every) < 1:
        parser.error("--epochs, --batch-size and --every start at 1")
    if options.batch_size % jax.device_count():
        parser.error(f"--batch-size {options.batch_size} cannot be divided among {jax.device_count()} devices")
    return options


def main() -> None:
    """Train, measure the step, and show what came of it.

    Raises:
        SystemExit: the model did not learn, or its metrics changed what the training step sends.
    """
    options = parse_options()
    console = Console(highlight=False)
    mesh = Mesh(jax.devices(), ("data",))
    devices = f"{mesh.size} x {mesh.devices.flat[0].device_kind}"
    columns = MofNCompleteColumn(), BarColumn(bar_width=8), TextColumn("{task.fields[window]}")
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        memory = train(options, mesh, progress)
    curves = memory.to_dict()
    memory.plot(options.output / "curves.png", [name for name in curves if name.partition("/")[2] in PLOTTED])
    for what, where in (
        ("curves", options.output / "curves.png"),
        ("JSON Lines", f"{options.output / 'metrics.jsonl'}, for pandas.read_json(path, lines=True)"),
        ("TensorBoard", f"{sys.executable} -m tensorboard.main --logdir {options.output / 'tensorboard'}"),
    ):
        console.print(f"{what}: {where}", soft_wrap=True)
    accuracy = curves["heldout/accuracy"]["value"][-1]
    if accuracy <= REQUIRED_ACCURACY:
        sys.exit(f"The held-out accuracy is {accuracy:.1%}, and should be above {REQUIRED_ACCURACY:.0%}.")

    with console.status(f"timing the step on {devices}"):
        collectives, milliseconds = measure_step(options, mesh)
    table = Table("", "without metrics", "with metrics", title=f"{devices}, batches of {options.batch_size}")
    table.add_row("held-out accuracy", "unknown", f"{accuracy:.1%}")
    table.add_row("collectives in the training step", *collectives)
    table.add_row("time per training step (median)", *(f"{median:.2f} ms" for median in milliseconds))
    console.print(table)
    if len(set(collectives)) > 1:
        sys.exit("The metrics change what the training step sends.")


if __name__ == "__main__":
    main()
