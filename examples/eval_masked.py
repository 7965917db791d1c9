"""Evaluate on a set whose size nothing divides: pad the last batch, and mask the padding with ``weight=``.

397 held-out digits in batches of 64, over all devices: the last batch has 13 of them and is filled up, since compiled
code wants one shape and every device a part of it. What has weight 0 is not seen, so the results are those of NumPy
over the 397, which the end of this script checks. A mean of the means of batches is another number. Without an
accelerator there are eight virtual devices.
"""

import os
import sys
from collections.abc import Iterator

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8 " + os.environ.get("XLA_FLAGS", "")

import clu.metrics
import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from sklearn.datasets import load_digits

from distributed_metrics import DistributedMetrics

BATCH_SIZE = 64
Batch = dict[str, jax.Array]


def batches(images: np.ndarray, labels: np.ndarray, mesh: Mesh) -> Iterator[Batch]:
    """Every digit once, in batches of one shape; ``mask`` says which of their rows are digits."""
    for start in range(0, len(labels), BATCH_SIZE):
        rows = slice(start, start + BATCH_SIZE)
        missing = BATCH_SIZE - len(labels[rows])
        batch = {
            "image": np.pad(images[rows], ((0, missing), (0, 0))),
            "label": np.pad(labels[rows], (0, missing)),
            "mask": np.arange(BATCH_SIZE) < BATCH_SIZE - missing,
        }
        yield jax.device_put(batch, NamedSharding(mesh, P("data")))


@nnx.jit
def train_step(model: nnx.Linear, optimizer: nnx.Optimizer, images: jax.Array, labels: jax.Array) -> None:
    """One step on all digits at once."""

    def loss_fn(model: nnx.Linear) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(model(images), labels).mean()

    optimizer.update(model, nnx.grad(loss_fn)(model))


@nnx.jit
def evaluation_step(model: nnx.Linear, metrics: DistributedMetrics, batch: Batch) -> jax.Array:
    """Add one batch, without what fills it up. Returns the mean loss of its rows, which is what misleads."""
    logits, labels, mask = model(batch["image"]), batch["label"], batch["mask"]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    metrics.update(loss=losses, accuracy=logits.argmax(axis=-1) == labels, examples=losses, weight=mask)
    metrics.update({"clu_accuracy": {"logits": logits, "labels": labels, "mask": mask}})  # clu calls it a mask
    return losses.mean()


def numpy_results(model: nnx.Linear, images: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """The same in float64, over all digits at once."""
    parameters = jax.tree.map(lambda x: np.asarray(x, np.float64), nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    logits = images @ parameters["kernel"] + parameters["bias"]
    losses = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(labels)), labels]
    return {"loss": losses.mean(), "accuracy": (logits.argmax(axis=1) == labels).mean(), "examples": len(labels)}


def main() -> None:
    """Train a linear model for a moment, and evaluate it.

    Raises:
        SystemExit: the results are not those of NumPy.
    """
    mesh = Mesh(jax.devices(), ("data",))
    digits = load_digits()
    images, labels = (digits.data / 16).astype(np.float32), digits.target.astype(np.int32)
    train, heldout = slice(0, 1400), slice(1400, None)
    model = nnx.Linear(64, 10, precision="highest", rngs=nnx.Rngs(0))  # to compare digits of float32, also on a GPU
    optimizer = nnx.Optimizer(model, optax.adam(0.05), wrt=nnx.Param)
    model, optimizer = jax.device_put((model, optimizer), NamedSharding(mesh, P()))
    for _ in range(50):
        train_step(model, optimizer, images[train], labels[train])

    spec = {"loss": "mean", "accuracy": "mean", "examples": "count", "clu_accuracy": clu.metrics.Accuracy}
    metrics = DistributedMetrics(spec, mesh=mesh)
    batch_means = [evaluation_step(model, metrics, batch) for batch in batches(images[heldout], labels[heldout], mesh)]
    result, expected = metrics.flush(), numpy_results(model, images[heldout], labels[heldout])

    print(f"{len(labels[heldout])} digits in {len(batch_means)} batches of {BATCH_SIZE} on {mesh.size} devices")
    for name, value in expected.items():
        print(f"{name + ':':9} {result[name]:.7g} here, {value:.7g} by NumPy")
    print(f"accuracy by clu: {result['clu_accuracy']:.7g}")
    print(f"mean loss of the batches, which is wrong: {np.mean(batch_means):.7g}")
    if result["examples"] != expected["examples"]:
        sys.exit(f"{result['examples']} examples were counted, of {expected['examples']}.")
    for name, by_numpy in (("loss", "loss"), ("accuracy", "accuracy"), ("clu_accuracy", "accuracy")):
        if not abs(result[name] - expected[by_numpy]) < 1e-6:
            sys.exit(f"{name} is {result[name]}, and should be {expected[by_numpy]}.")


if __name__ == "__main__":
    main()
