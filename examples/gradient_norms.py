"""The norm of every layer's gradient: as many metrics as a model has parameters, and no more Variables for it.

The spec is made of the model's own parameters, so that new layers show up by themselves. What is accumulated lies in
one Variable for each kind of merge, here sums and maxima: two of them, for two layers or two hundred, which the end of
this script checks. Without an accelerator there are eight virtual devices.
"""

import math
import os
import sys
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8 " + os.environ.get("XLA_FLAGS", "")

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from sklearn.datasets import load_digits

from distributed_metrics import DistributedMetrics, PeriodicFlush
from distributed_metrics.writers import MemoryWriter

BATCH_SIZE, STEPS, EVERY = 64, 60, 20
WIDTHS = (64, 96, 96, 48, 48, 48, 10)


class Network(nnx.Module):
    """Fully connected layers."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.layers = nnx.List([nnx.Linear(inputs, outputs, rngs=rngs) for inputs, outputs in pairwise(WIDTHS)])

    def __call__(self, x: jax.Array) -> jax.Array:
        *hidden, output = self.layers
        for layer in hidden:
            x = nnx.relu(layer(x))
        return output(x)


def by_name(tree: Any) -> Any:
    """A nested dict with strings as keys, as a spec has them: the layers of an ``nnx.List`` have numbers."""
    return {str(key): by_name(branch) for key, branch in tree.items()} if isinstance(tree, Mapping) else tree


@nnx.jit
def train_step(
    model: Network, optimizer: nnx.Optimizer, metrics: DistributedMetrics, batch: dict[str, jax.Array]
) -> None:
    """One step of the optimizer, with the norm of the gradient of each parameter."""

    def loss_fn(model: Network) -> tuple[jax.Array, jax.Array]:
        losses = optax.softmax_cross_entropy_with_integer_labels(model(batch["image"]), batch["label"])
        return losses.mean(), losses

    (_, losses), gradients = nnx.value_and_grad(loss_fn, has_aux=True)(model)
    optimizer.update(model, gradients)
    norms = jax.tree.map(jnp.linalg.norm, by_name(nnx.to_pure_dict(gradients)))
    metrics.update(loss=losses, grad_norm=norms)


def main() -> None:
    """Train, and show a table of the norms.

    Raises:
        SystemExit: there are more Variables than kinds of merge, or a norm is no positive number.
    """
    mesh = Mesh(jax.devices(), ("data",))
    model = Network(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)
    model, optimizer = jax.device_put((model, optimizer), NamedSharding(mesh, P()))

    parameters = by_name(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    spec = {"loss": "mean", "grad_norm": jax.tree.map(lambda _: ("mean", "max"), parameters)}
    metrics, memory = DistributedMetrics(spec, mesh=mesh), MemoryWriter()

    digits, rng = load_digits(), np.random.default_rng(0)
    with PeriodicFlush(metrics, EVERY, memory) as flusher:
        for step in range(STEPS):
            chosen = rng.choice(len(digits.target), BATCH_SIZE, replace=False)
            batch = {"image": (digits.data[chosen] / 16).astype(np.float32), "label": digits.target[chosen]}
            train_step(model, optimizer, metrics, jax.device_put(batch, NamedSharding(mesh, P("data"))))
            flusher(step)
        total = flusher.total().flatten()  # of all steps; each window is in `memory`

    loss = memory.to_dict()["loss"]
    for step, value in zip(loss["step"], loss["value"], strict=True):
        print(f"step {step}: loss {value:.4f}")
    variables = len(nnx.state(metrics))
    names = [name.removesuffix("/max") for name in total if name.endswith("/max")]
    print(f"{len(names)} parameters, {len(total)} metrics, {variables} Variables; norms of the gradients:")
    print(f"{'':28}{'mean':>8}{'max':>8}")
    for name in names:
        print(f"{name:28}{total[f'{name}/mean']:8.4f}{total[f'{name}/max']:8.4f}")
    if variables > 2:
        sys.exit(f"{len(total)} metrics are kept in {variables} Variables, and should be in 2.")
    if len(names) != 2 * len(model.layers):
        sys.exit(f"There are norms of {len(names)} parameters, and {len(model.layers)} layers of 2.")
    for name in names:
        mean, largest = total[f"{name}/mean"], total[f"{name}/max"]
        if not (0 < mean <= largest * (1 + 1e-6) and math.isfinite(largest)):
            sys.exit(f"{name} has the mean {mean} and the maximum {largest}.")


if __name__ == "__main__":
    main()
