"""Evaluate a classifier of rare events on two sets, with metrax's AUC and precision, where no transfer may be hidden.

The loop runs under ``jax.transfer_guard("disallow")``, its model under ``checkify``. By hand, a step returns metrics of
its batch, and the loop averages them: but no mean over batches is the AUC of a set, metrax says 0 for a batch without
an event, and the zeros that fill up the last batch count. Ours keeps what the curve is made of until the set has been
seen: one object, flushed after each set. The last column is scikit-learn's, of all scores at once, in float64.
"""

import os
from collections.abc import Iterator
from typing import Any

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8 " + os.environ.get("XLA_FLAGS", "")

import jax
import jax.numpy as jnp
import metrax
import numpy as np
import optax
from comparison import Numbers, compare
from jax.experimental import checkify
from sklearn.metrics import precision_score, roc_auc_score

from distributed_metrics import DistributedMetrics, collective_bytes

BATCH_SIZE, THRESHOLDS = 64, 4001
MESH = jax.sharding.Mesh(jax.devices(), ("data",))
Arrays = dict[str, Any]


def examples(rng: np.random.Generator, size: int, shift: float) -> Arrays:
    """Rare events, which depend on a product of features."""
    x = rng.normal(shift, 1.0, (size, 16)).astype(np.float32)
    chance = 1 / (1 + np.exp(6 - 3 * x[:, 0] * x[:, 1] - x[:, 2]))
    return {"x": x, "label": (rng.random(size) < chance).astype(np.int32), "mask": np.ones(size, bool)}


def batches(data: Arrays) -> Iterator[Arrays]:
    """Batches of one shape, put on the devices; ``mask`` tells examples from the zeros that fill up the last batch."""
    missing = -len(data["mask"]) % BATCH_SIZE
    data = {name: np.pad(array, [(0, missing)] + [(0, 0)] * (array.ndim - 1)) for name, array in data.items()}
    for start in range(0, len(data["mask"]), BATCH_SIZE):
        batch = {name: array[start : start + BATCH_SIZE] for name, array in data.items()}
        yield jax.device_put(batch, jax.NamedSharding(MESH, jax.P("data")))


def forward(params: Arrays, batch: Arrays) -> tuple[jax.Array, jax.Array]:
    """The logit and the loss of each example."""
    logits = jax.nn.relu(batch["x"] @ params["in"] + params["bias"]) @ params["out"] - 3
    checkify.check(jnp.isfinite(logits).all(), "a logit is not finite")
    return logits, optax.sigmoid_binary_cross_entropy(logits, batch["label"])


checked = checkify.checkify(forward, checkify.user_checks | checkify.float_checks)


def trained(data: Arrays, rng: np.random.Generator) -> Arrays:
    """Parameters after some steps on all of the data."""
    params = {"in": rng.normal(0, 0.3, (16, 32)), "bias": np.zeros(32), "out": rng.normal(0, 0.2, 32)}
    params = jax.device_put(jax.tree.map(np.float32, params), jax.NamedSharding(MESH, jax.P()))
    optimizer, gradient = optax.adam(0.01), jax.jit(jax.grad(lambda params: checked(params, data)[1][1].mean()))
    update, state = jax.jit(optimizer.update), optimizer.init(params)
    for _ in range(200):
        updates, state = update(gradient(params), state)
        params = optax.apply_updates(params, updates)
    return params


@jax.jit
def by_hand_step(params: Arrays, batch: Arrays) -> tuple[checkify.Error, Arrays]:
    """The metrics of one batch."""
    error, (logits, losses) = checked(params, batch)
    auc = metrax.AUCROC.from_model_output(jax.nn.sigmoid(logits), batch["label"]).compute()
    precision = metrax.Precision.from_model_output(jax.nn.sigmoid(logits), batch["label"]).compute()
    return error, {"loss": losses.mean(), "auc": auc, "precision": precision}


@jax.jit
def our_step(params: Arrays, batch: Arrays, metrics: DistributedMetrics | None = None) -> tuple[Any, ...]:
    """The scores and losses of one batch, and the object that has seen it, if there is one."""
    error, (logits, losses) = checked(params, batch)
    scores = jax.nn.sigmoid(logits / 4)  # in the same order, and not all next to 0, where few thresholds are
    if metrics is not None:
        rows = {"predictions": scores, "labels": batch["label"]}
        auc = {**rows, "num_thresholds": THRESHOLDS}
        metrics.update(loss=losses, auc=auc, precision=rows, weight=batch["mask"])
    return error, (scores, losses), metrics


def main() -> None:
    """Evaluate both ways. Raises: SystemExit: see ``compare``."""
    rng, numbers, rtol = np.random.default_rng(2), dict[str, Numbers](), 0.0
    params = trained(examples(rng, 4000, 0.0), rng)
    metrics = DistributedMetrics({"loss": "mean", "auc": metrax.AUCROC, "precision": metrax.Precision}, mesh=MESH)
    for name, data in {"same": examples(rng, 1000, 0.0), "shifted": examples(rng, 413, 0.4)}.items():
        of_batches, outputs = [], []
        with jax.transfer_guard("disallow"):
            for batch in batches(data):
                error, of_batch = by_hand_step(params, batch)
                of_batches.append(of_batch)
            of_batches = jax.device_get(of_batches)
            by_hand = jax.tree.map(lambda *values: np.mean(values), *of_batches)
            for batch in batches(data):
                error, output, metrics = our_step(params, batch, metrics)
                jax.device_get(error).throw()
                outputs.append(jax.device_get(output))
            ours = metrics.flush()
        y, (p, losses) = data["label"], np.concatenate(outputs, axis=1, dtype=np.float64)[:, : len(data["label"])]
        truth = {"loss": losses.mean(), "auc": roc_auc_score(y, p), "precision": precision_score(y, p >= 0.5)}
        numbers |= {f"{name}/{key}": Numbers(by_hand[key], ours[key], true) for key, true in truth.items()}
        # An event and another example between the same two thresholds are a tie, and half of one is the most it errs.
        bins = np.ceil(p * (THRESHOLDS - 1)).astype(int)
        ties = np.dot(*(np.bincount(bins[y == label], minlength=THRESHOLDS) for label in (0, 1)))
        rtol = max(rtol, ties / (2 * y.sum() * (1 - y).sum() * truth["auc"]))
    bare, full = (collective_bytes(our_step, params, batch, given) for given in (None, metrics))
    compare(bare, full, numbers, rtol + 1e-6)


if __name__ == "__main__":
    main()
