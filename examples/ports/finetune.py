"""Fine-tune LoRA weights with nnx, in the shape of tunix's PeftTrainer: four microbatches make one update of the model.

By hand, the loop keeps what its step returns and logs the ``np.mean``: the mean of the means of microbatches of few or
many tokens, and a norm of the gradient with a 0.0 from every call that made no update. Its evaluation averages means of
batches, the last one mostly padding, and nobody resets between its two data sets. Ours takes the pairs (values, mask)
of the loss function, counts the norm where there is one, and flushes. Both log by ``jax.monitoring``, as tunix does.
"""

import os
from collections.abc import Iterator
from typing import Any

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8 " + os.environ.get("XLA_FLAGS", "")

import jax
import jax.numpy as jnp
import numpy as np
import optax
from comparison import Numbers, compare
from flax import nnx

from distributed_metrics import DistributedMetrics, PeriodicFlush, collective_bytes

WORDS, LENGTH, BATCH_SIZE, MICROBATCHES, UPDATES, EVERY = 32, 16, 16, 4, 20, 10
ALPACA, MATH = (4, 2), (LENGTH, 12)  # the longest answer, and how many words may follow a word
MESH = jax.sharding.Mesh(jax.devices(), ("data",))


def batches(seed: int, examples: int, longest: int, choices: int) -> Iterator[tuple[jax.Array, jax.Array]]:
    """Tokens, and a mask of those to learn, over all devices. The last batch is filled up with a mask of zeros."""
    rng = np.random.default_rng(seed)
    for start in range(0, examples, BATCH_SIZE):
        tokens = np.cumsum(rng.integers(choices, size=(BATCH_SIZE, LENGTH + 1)), axis=1) % WORDS
        lengths = rng.integers(1, longest + 1, size=BATCH_SIZE) * (start + np.arange(BATCH_SIZE) < examples)
        yield jax.device_put((tokens, np.arange(LENGTH) < lengths[:, None]), jax.NamedSharding(MESH, jax.P("data")))


def loss_fn(model: nnx.Module, tokens: jax.Array, mask: jax.Array) -> tuple[jax.Array, dict[str, Any]]:
    """The mean loss of the tokens, and what to log of each of them."""
    logits, target = model(tokens[:, :-1]), tokens[:, 1:]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, target) * mask
    correct = (logits.argmax(axis=-1) == target) * mask
    return losses.sum() / mask.sum(), {"loss": (losses, mask), "accuracy": (correct, mask)}


@nnx.jit
def train_step(model: Any, optimizer: Any, total: Any, metrics: Any, batch: Any, is_last: Any) -> tuple[Any, Any]:
    """Add up the gradients of microbatches, and update the model after the last of them."""
    gradient_fn = nnx.value_and_grad(loss_fn, argnums=nnx.DiffState(0, nnx.LoRAParam), has_aux=True)
    (loss, pairs), gradient = gradient_fn(model, *batch)
    total.set_value(jax.tree.map(lambda old, new: old + new / MICROBATCHES, total.get_value(), gradient))

    def update(model: Any, optimizer: Any, total: Any) -> jax.Array:
        gradient = total.get_value()
        total.set_value(jax.tree.map(jnp.zeros_like, gradient))
        norm = optax.tree.norm(gradient)
        optimizer.update(model, jax.tree.map(lambda x: x / jnp.maximum(norm, 1.0), gradient))
        return norm

    norm = nnx.cond(is_last, update, lambda *_: 0.0, model, optimizer, total)
    if metrics is not None:
        metrics.update(pairs, grad_norm=norm, weight={"grad_norm": is_last})
    return {"loss": loss, "accuracy": pairs["accuracy"][0].sum() / batch[1].sum(), "grad_norm": norm}, pairs  # by hand


def main() -> None:
    """Train, evaluate, and compare.

    Raises:
        SystemExit: a number of ours is not NumPy's, or the metrics send something.
    """
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(nnx.Embed(WORDS, 32, rngs=rngs), nnx.LoRALinear(32, WORDS, lora_rank=8, rngs=rngs))
    optimizer = nnx.Optimizer(model, optax.adam(0.01), wrt=nnx.LoRAParam)
    state = (model, optimizer, nnx.Variable(jax.tree.map(jnp.zeros_like, nnx.state(model, nnx.LoRAParam))))
    state = jax.device_put(state, jax.tree.map(lambda x: jax.NamedSharding(MESH, jax.P(*["data"][: x.ndim])), state))
    metrics = DistributedMetrics({"loss": "ratio", "accuracy": "ratio", "grad_norm": "mean"}, mesh=MESH)
    evaluation = DistributedMetrics({"loss": "ratio", "accuracy": "ratio"}, mesh=MESH)
    averages = nnx.MultiMetric(loss=nnx.metrics.Average("loss"), accuracy=nnx.metrics.Average("accuracy"))
    train: Any = nnx.cached_partial(train_step, *state, metrics)  # type: ignore[call-arg]  # flax's types
    evaluate: Any = nnx.cached_partial(nnx.jit(loss_fn), state[0])
    record, logged, exact = jax.monitoring.record_scalar, {}, {}
    jax.monitoring.register_scalar_listener(lambda event, value, **_: logged.update({event: float(value)}))
    seen: dict[str, Any] = {"train": [], "eval/alpaca": [], "eval/math": []}
    tasks = [batches(seed, UPDATES * BATCH_SIZE, *task) for seed, task in enumerate((ALPACA, MATH) * 2)]
    with PeriodicFlush(metrics, EVERY, record, prefix="train") as flusher:
        for step, microbatches in enumerate(zip(*tasks, strict=True)):
            if step % EVERY == 0:
                buffer, seen["train"] = [], []
            for i, batch in enumerate(microbatches):
                numbers, pairs = train(batch, i == MICROBATCHES - 1)
                buffer.append(numbers)  # by hand
                seen["train"].append(pairs)
            if (step + 1) % EVERY == 0:  # by hand
                for name in numbers:
                    record(f"by_hand/train/{name}", np.mean([numbers[name] for numbers in buffer]), step=step)
            flusher(step)
        for name, data in {"alpaca": batches(4, 34, *ALPACA), "math": batches(5, 18, *MATH)}.items():
            for batch in data:
                loss, pairs = evaluate(*batch)
                averages.update(loss=loss, accuracy=pairs["accuracy"][0].sum() / batch[1].sum())  # by hand
                evaluation.update(pairs)
                seen[f"eval/{name}"].append(pairs)
            for key, value in averages.compute().items():  # by hand
                record(f"by_hand/eval/{name}/{key}", value, step=step)
            flusher.write(step, evaluation.flush(), prefix=f"eval/{name}")
    for prefix, all_pairs in seen.items():
        for name in ("loss", "accuracy"):
            sums = (sum(np.asarray(pairs[name][i], np.float64).sum() for pairs in all_pairs) for i in (0, 1))
            exact[f"{prefix}/{name}"] = next(sums) / next(sums)
    exact["train/grad_norm"] = np.mean([each["grad_norm"] for each in buffer[::-MICROBATCHES]], dtype=np.float64)
    numbers = {name: Numbers(logged[f"by_hand/{name}"], logged[name], by_numpy) for name, by_numpy in exact.items()}
    # Without the outputs of the step, which are for the hand-written way and NumPy.
    bare, ours = (collective_bytes(lambda *a: train_step(*a)[2:], *state, m, batch, True) for m in (None, metrics))
    compare(bare, ours, numbers)


if __name__ == "__main__":
    main()
