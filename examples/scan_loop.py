"""An epoch in one compiled program: the numbers of each window as its output, or while it still runs.

Where a ``lax.scan`` runs the steps, no Python code stands between them. There are two ways to the numbers of a window:

- as an output: an outer scan over windows, an inner one over steps, and what ``flush()`` gives in the outer one's
  ``ys``. They come when the program ends, as one stacked snapshot.
- while it runs: ``flush_every`` sends every window to a function on the host.

Both give the same numbers, which the end of this script checks. Without an accelerator there are eight virtual devices.
"""

import functools
import operator
import os
import sys
from collections.abc import Callable

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8 " + os.environ.get("XLA_FLAGS", "")

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from sklearn.datasets import load_digits

from distributed_metrics import DistributedMetrics, Snapshot, flush_every, wait_for_callbacks

BATCH_SIZE, STEPS, WINDOW = 64, 28, 7  # a window of an epoch is 7 of its 28 steps
SPEC = {"loss": ("mean", "max"), "accuracy": "mean"}
SGD = optax.sgd(0.5)

Batch = dict[str, jax.Array]
Carry = tuple[jax.Array, optax.OptState, DistributedMetrics]


def train_step(carry: Carry, batch: Batch) -> Carry:
    """One step of a linear classifier. The metrics are carried through the scan as the kernel is."""
    kernel, state, metrics = carry

    def loss_fn(kernel: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        logits = batch["image"] @ kernel
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        return losses.mean(), {"loss": losses, "accuracy": logits.argmax(axis=-1) == batch["label"]}

    gradient, scores = jax.grad(loss_fn, has_aux=True)(kernel)
    metrics.update(scores)
    updates, state = SGD.update(gradient, state)
    return kernel + updates, state, metrics


@jax.jit
def epoch_with_outputs(carry: Carry, batches: Batch) -> tuple[Carry, Snapshot]:
    """The epoch, and its windows as one snapshot with a leading dim."""

    def window(carry: Carry, batches: Batch) -> tuple[Carry, Snapshot]:
        carry, _ = lax.scan(lambda carry, batch: (train_step(carry, batch), None), carry, batches)
        return carry, carry[-1].flush()

    windows = jax.tree.map(lambda x: x.reshape(STEPS // WINDOW, WINDOW, *x.shape[1:]), batches)
    return lax.scan(window, carry, windows)


@functools.partial(jax.jit, static_argnames="callback")
def epoch_with_callback(carry: Carry, batches: Batch, callback: Callable[[int, Snapshot], None]) -> Carry:
    """The epoch, of whose windows ``callback`` is told as they end."""

    def step(carry: Carry, numbered: tuple[jax.Array, Batch]) -> tuple[Carry, None]:
        number, batch = numbered
        carry = train_step(carry, batch)
        flush_every(carry[-1], number, WINDOW, callback)
        return carry, None

    return lax.scan(step, carry, (jnp.arange(STEPS), batches))[0]


def show(step: int, window: Snapshot) -> None:
    """Print a window."""
    print(f"  step {step:2}: loss {window['loss']['mean']:.4f}, accuracy {window['accuracy']:6.1%}")


def main() -> None:
    """Run the epoch both ways.

    Raises:
        SystemExit: they give different numbers.
    """
    mesh = Mesh(jax.devices(), ("data",))
    digits = load_digits()
    epoch = {"image": (digits.data / 16).astype(np.float32), "label": digits.target.astype(np.int32)}
    batches = {name: x[: STEPS * BATCH_SIZE].reshape(STEPS, BATCH_SIZE, *x.shape[1:]) for name, x in epoch.items()}
    batches = jax.device_put(batches, NamedSharding(mesh, P(None, "data")))
    kernel = jax.device_put(jnp.zeros((64, 10)), NamedSharding(mesh, P()))

    def new_carry() -> Carry:
        return kernel, SGD.init(kernel), DistributedMetrics(SPEC, mesh=mesh)

    ends = range(WINDOW - 1, STEPS, WINDOW)
    print("as an output, at the end:")
    _, windows = epoch_with_outputs(new_carry(), batches)
    outputs = {end: jax.tree.map(operator.itemgetter(i), windows) for i, end in enumerate(ends)}
    for end, window in outputs.items():
        show(end, window)

    received: dict[int, Snapshot] = {}

    def receive(step: int, window: Snapshot) -> None:
        received[step] = window
        show(step, window)

    print("by a callback, while it runs:")
    epoch_with_callback(new_carry(), batches, callback=receive)
    wait_for_callbacks()  # the call above returned at once

    if list(received) != list(ends):
        sys.exit(f"The callback was told of the steps {list(received)}, and should be of {list(ends)}.")
    for end, window in outputs.items():
        if not np.allclose([*window.flatten().values()], [*received[end].flatten().values()], rtol=1e-6, atol=0):
            sys.exit(f"The window to step {end} is {window} as an output, and {received[end]} by the callback.")
    print("Both give the same numbers.")


if __name__ == "__main__":
    main()
