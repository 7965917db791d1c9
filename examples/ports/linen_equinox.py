"""An epoch of a Linen and of an Equinox model: our object in a TrainState, and as an argument of ``eqx.filter_jit``.

By hand, Linen has a ``clu.metrics.Collection`` in its TrainState, as in flax's guide: a mean of the means of batches,
in which what fills up the last one counts, reduced over the devices in every step. Equinox waits for ``loss.item()`` in
every step, and takes such a mean too. Ours is given what each example has, and a mask.
"""

import os
from typing import Any

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8 " + os.environ.get("XLA_FLAGS", "")

import equinox as eqx
import jax
import numpy as np
import optax
from clu.metrics import Average, Collection
from comparison import Numbers, compare
from flax import linen as nn
from flax.training import train_state

from distributed_metrics import DistributedMetrics, collective_bytes

EXAMPLES, BATCHES, FEATURES, CLASSES = 968, 16, 16, 4
MESH = jax.sharding.Mesh(jax.devices(), ("data",))
EVERYWHERE, SPLIT = jax.NamedSharding(MESH, jax.P()), jax.NamedSharding(MESH, jax.P("data"))
ADAM, SPEC = optax.adam(0.02), {"loss": "mean", "accuracy": "mean"}
ByHand = Collection.create(loss=Average.from_output("loss"), accuracy=Average.from_output("accuracy"))
Arrays = dict[str, jax.Array]


def epoch() -> list[Arrays]:
    """Batches of one shape; ``mask`` tells examples from the zeros that fill up the last batch."""
    rng, mask = np.random.default_rng(0), np.arange(BATCHES * 64).reshape(BATCHES, 64) < EXAMPLES
    x = rng.normal(size=(*mask.shape, FEATURES)).astype(np.float32) * mask[..., None]
    label = (x @ rng.normal(size=(FEATURES, CLASSES))).argmax(axis=-1)
    return [jax.device_put({"x": x[i], "label": label[i], "mask": mask[i]}, SPLIT) for i in range(BATCHES)]


def scored(logits: jax.Array, batch: Arrays) -> tuple[jax.Array, Arrays]:
    """The loss of a batch, and what each of its examples has."""
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
    return losses.mean(where=batch["mask"]), {"loss": losses, "accuracy": logits.argmax(axis=-1) == batch["label"]}


class TrainState(train_state.TrainState):
    """With metrics: ours, by hand, or none."""

    metrics: Any


@jax.jit(donate_argnums=0)
def linen_step(state: TrainState, batch: Arrays) -> tuple[TrainState, Arrays]:
    """The next state, and what each example has."""
    loss_fn = jax.value_and_grad(lambda params: scored(state.apply_fn(params, batch["x"]), batch), has_aux=True)
    (loss, each), gradient = loss_fn(state.params)
    state = state.apply_gradients(grads=gradient)
    if isinstance(state.metrics, ByHand):  # by hand
        update = state.metrics.single_from_model_output(loss=loss, accuracy=each["accuracy"])
        state = state.replace(metrics=state.metrics.merge(update))
    elif state.metrics is not None:
        state.metrics.update(each, weight=batch["mask"])
    return state, each


def linen_epoch(metrics: DistributedMetrics | Collection) -> tuple[TrainState, list[Arrays]]:
    """The state after an epoch, and what each of its examples had."""
    network, outputs = nn.Sequential([nn.Dense(32), nn.relu, nn.Dense(CLASSES)]), []
    params = jax.jit(network.init, out_shardings=EVERYWHERE)(jax.random.key(0), np.zeros(FEATURES))
    state = TrainState.create(apply_fn=network.apply, params=params, tx=ADAM, metrics=metrics)
    for batch in epoch():
        state, each = linen_step(state, batch)
        outputs.append(each)
    return state, outputs


@eqx.filter_jit
def equinox_step(batch: Arrays, model: eqx.Module, optimizer: tuple, metrics: DistributedMetrics | None) -> tuple:
    """The loss, what each example has, and the next model, optimizer and metrics."""
    loss_fn = eqx.filter_value_and_grad(lambda model: scored(jax.vmap(model)(batch["x"]), batch), has_aux=True)
    (loss, each), gradient = loss_fn(model)
    updates, optimizer = ADAM.update(gradient, optimizer)
    if metrics is not None:
        metrics.update(each, weight=batch["mask"])
    return loss, each, (eqx.apply_updates(model, updates), optimizer, metrics)


def main() -> None:
    """An epoch of each, both ways. Raises: SystemExit: see ``compare``."""
    by_hand = linen_epoch(ByHand.empty())[0].metrics.compute()
    state, outputs = linen_epoch(DistributedMetrics(SPEC, mesh=MESH))
    runs = [("Linen", by_hand, state.metrics.flush(), outputs)]
    model = eqx.nn.MLP(FEATURES, CLASSES, 32, 1, key=jax.random.key(0))
    start = eqx.filter_shard((model, ADAM.init(eqx.filter(model, eqx.is_array))), EVERYWHERE)
    carry, losses, accuracies, outputs = (*start, None), [], [], []
    for batch in epoch():  # by hand
        loss, each, carry = equinox_step(batch, *carry)
        losses.append(loss.item())
        accuracies.append(each["accuracy"].mean().item())
    by_hand = {"loss": np.mean(losses), "accuracy": np.mean(accuracies)}
    carry = (*start, DistributedMetrics(SPEC, mesh=MESH))
    for batch in epoch():
        _, each, carry = equinox_step(batch, *carry)
        outputs.append(each)
    runs.append(("Equinox", by_hand, carry[-1].flush(), outputs))
    numbers, sent = {}, []
    for kind, by_hand, ours, outputs in runs:
        for name in SPEC:
            everything = np.concatenate([each[name] for each in outputs])[:EXAMPLES]
            numbers[f"{kind}: {name}"] = Numbers(by_hand[name], ours[name], everything.mean(dtype=np.float64))
    for metrics in (None, carry[-1]):
        of_linen = collective_bytes(linen_step, state.replace(metrics=metrics), batch)
        of_equinox = collective_bytes(equinox_step, batch, *start, metrics)
        sent.append({**of_linen, **{f"in Equinox {kind}": size for kind, size in of_equinox.items()}})
    compare(sent[0], sent[1], numbers)


if __name__ == "__main__":
    main()
