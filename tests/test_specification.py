"""The specification: its signatures, and its examples as they are printed, with numbers that NumPy confirms.

An example is run as the text that stands there. What it leaves out (the model, the data, the loss) is defined around it
by the test, in the namespace it runs in.
"""

import inspect
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import distributed_metrics
from artifex.generative_models.training import distributed
from artifex.generative_models.training.distributed import data_parallel, mesh, metrics
from artifex.generative_models.training.distributed.metrics import DistributedMetrics

DEVICES = 8

# --- names and signatures ---

PRINTED = """
def all_gather(
    self,
    metrics: dict[str, Any],
    axis_name: str = "batch",
) -> dict[str, Any]: ...

def reduce_mean(
    self,
    metrics: dict[str, Any],
    axis_name: str = "batch",
) -> dict[str, Any]: ...

def reduce_sum(
    self,
    metrics: dict[str, Any],
    axis_name: str = "batch",
) -> dict[str, Any]: ...

def reduce_max(
    self,
    metrics: dict[str, Any],
    axis_name: str = "batch",
) -> dict[str, Any]: ...

def reduce_min(
    self,
    metrics: dict[str, Any],
    axis_name: str = "batch",
) -> dict[str, Any]: ...

def reduce_custom(
    self,
    metrics: dict[str, Any],
    reduce_fn: dict[str, str | None] | None = None,
    axis_name: str = "batch",
) -> dict[str, Any]: ...

def collect_from_devices(
    self,
    metrics: dict[str, Any],
) -> dict[str, list[Any] | Any]: ...
"""

PRINTED_STATIC = [
    'all_gather_static(metrics, axis_name="batch")',
    'reduce_mean_static(metrics, axis_name="batch")',
    'reduce_sum_static(metrics, axis_name="batch")',
    'reduce_max_static(metrics, axis_name="batch")',
    'reduce_min_static(metrics, axis_name="batch")',
    'reduce_custom_static(metrics, reduce_fn=None, axis_name="batch")',
    "collect_from_devices_static(metrics)",
]


def run_text(text: str, **names: Any) -> dict[str, Any]:
    """The namespace that is left after a text has run in one of these names."""
    exec(compile(text, "<specification>", "exec"), names)
    return names


METHODS = {name: f for name, f in run_text(PRINTED, Any=Any).items() if inspect.isfunction(f)}


def test_the_specification_has_seven_methods_and_seven_twins():
    assert len(METHODS) == len(PRINTED_STATIC) == 7
    assert [text.split("_static(")[0] for text in PRINTED_STATIC] == list(METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_has_the_printed_signature(name):
    assert inspect.signature(getattr(DistributedMetrics, name)) == inspect.signature(METHODS[name])


@pytest.mark.parametrize("text", PRINTED_STATIC, ids=lambda text: text.split("(")[0])
def test_a_static_twin_has_the_printed_signature(text):
    name = text.split("(")[0]
    assert isinstance(inspect.getattr_static(DistributedMetrics, name), staticmethod)
    parameters = inspect.signature(getattr(DistributedMetrics, name)).parameters.values()
    shown = [p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in parameters]
    assert f"{name}({', '.join(shown)})".replace("'", '"') == text


@pytest.mark.parametrize("name", METHODS)
def test_method_twin_and_function_give_the_same(name):
    x = np.random.default_rng(0).normal(size=(DEVICES, 3)).astype(np.float32)

    def result(reduce):
        if name == "collect_from_devices":
            return reduce({"a": jnp.asarray(x), "n": 3})
        return jax.pmap(lambda x: reduce({"a": x, "b": {"c": x.sum()}}))(x)

    method, static = getattr(DistributedMetrics(), name), getattr(DistributedMetrics, f"{name}_static")
    function = getattr(distributed_metrics, name)
    assert static is function
    expected = result(function)
    for reduce in (method, static):
        jax.tree.map(np.testing.assert_array_equal, result(reduce), expected)


def test_the_class_is_a_module_that_needs_no_arguments():
    assert issubclass(DistributedMetrics, nnx.Module)
    assert isinstance(DistributedMetrics(), nnx.Module)


def test_the_printed_path_gives_the_same_objects():
    assert distributed.DistributedMetrics is metrics.DistributedMetrics is distributed_metrics.DistributedMetrics
    assert distributed.DeviceMeshManager is mesh.DeviceMeshManager
    assert distributed.DataParallel is data_parallel.DataParallel
    assert set(distributed.__all__) == {"DataParallel", "DeviceMeshManager", "DistributedMetrics"}


# --- examples ---

RNG = np.random.default_rng(1)
X = RNG.normal(size=(DEVICES, 4, 3)).astype(np.float32)
Y = RNG.normal(size=(DEVICES, 4)).astype(np.float32)
W = RNG.normal(size=3).astype(np.float32)
BATCH = {"data": X, "targets": Y}
PARAMS = np.broadcast_to(W, (DEVICES, 3))
ERRORS = (X @ W - Y).astype(np.float64)
LOSSES = (ERRORS**2).mean(1)
ACCURACIES = (np.abs(ERRORS) < 1).mean(1)
GRADIENTS = np.einsum("db,dbf->df", 2 * ERRORS / 4, X.astype(np.float64))


def on_every_device(values, number) -> None:
    """Each device got the same, and it is ``number``."""
    np.testing.assert_allclose(values, np.full(DEVICES, number), rtol=1e-6)


class LeftOut:
    """``compute_loss``, and what the lines left out around it would leave behind: ``acc`` and ``grads``."""

    def __init__(self) -> None:
        self.names: dict[str, Any] = {"compute_loss": self.compute_loss, "compute_grad_norm": jnp.linalg.norm}

    def compute_loss(self, params, batch):
        def loss(params):
            errors = batch["data"] @ params - batch["targets"]
            return jnp.mean(errors**2), errors

        (value, errors), grads = jax.value_and_grad(loss, has_aux=True)(params)
        self.names.update(acc=jnp.mean(jnp.abs(errors) < 1), grads=grads)
        return value

    def run(self, text: str) -> dict[str, Any]:
        """As ``run_text``; what ``compute_loss`` leaves behind is seen by the text."""
        exec(compile(text, "<specification>", "exec"), self.names)
        return self.names


def test_basic_metrics_reduction():
    train_step = LeftOut().run("""
from artifex.generative_models.training.distributed import DistributedMetrics
import jax
import jax.numpy as jnp

# Create instance
dm = DistributedMetrics()

# Inside a pmap context, reduce metrics across devices
@jax.pmap
def train_step(params, batch):
    # ... compute loss and gradients ...
    loss = compute_loss(params, batch)

    # Reduce metrics across devices
    metrics = {"loss": loss, "accuracy": acc}
    metrics = dm.reduce_mean(metrics)

    return params, metrics
""")["train_step"]
    params, metrics = train_step(PARAMS, BATCH)
    np.testing.assert_array_equal(params, PARAMS)
    assert metrics.keys() == {"loss", "accuracy"}
    on_every_device(metrics["loss"], LOSSES.mean())
    on_every_device(metrics["accuracy"], ACCURACIES.mean())


def test_static_method_usage():
    train_step = LeftOut().run("""
from artifex.generative_models.training.distributed import DistributedMetrics
import jax

# Static methods don't require instantiation
@jax.pmap
def train_step(params, batch):
    loss = compute_loss(params, batch)

    # Use static method
    metrics = {"loss": loss}
    metrics = DistributedMetrics.reduce_mean_static(metrics)

    return params, metrics
""")["train_step"]
    _, metrics = train_step(PARAMS, BATCH)
    on_every_device(metrics["loss"], LOSSES.mean())


def test_custom_reduction_operations():
    left_out = LeftOut()
    left_out.names["jax"] = jax
    train_step = left_out.run("""
from artifex.generative_models.training.distributed import DistributedMetrics

dm = DistributedMetrics()

# Define custom reduction per metric
@jax.pmap
def train_step(params, batch):
    loss = compute_loss(params, batch)
    batch_size = batch["data"].shape[0]
    max_grad_norm = compute_grad_norm(grads)

    metrics = {
        "loss": loss,
        "total_samples": batch_size,
        "max_grad_norm": max_grad_norm,
    }

    # Custom reductions: mean for loss, sum for samples, max for grad norm
    reduce_ops = {
        "loss": "mean",
        "total_samples": "sum",
        "max_grad_norm": "max",
    }
    metrics = dm.reduce_custom(metrics, reduce_fn=reduce_ops)

    return params, metrics
""")["train_step"]
    _, metrics = train_step(PARAMS, BATCH)
    on_every_device(metrics["loss"], LOSSES.mean())
    on_every_device(metrics["total_samples"], 32)
    on_every_device(metrics["max_grad_norm"], np.linalg.norm(GRADIENTS, axis=1).max())


def test_gathering_metrics_from_all_devices():
    evaluate_step = run_text(
        """
from artifex.generative_models.training.distributed import DistributedMetrics

dm = DistributedMetrics()

@jax.pmap
def evaluate_step(params, batch):
    predictions = model(params, batch["data"])

    # Gather predictions from all devices (not reduce)
    results = {"predictions": predictions}
    results = dm.all_gather(results)

    return results
""",
        jax=jax,
        model=lambda params, x: x @ params,
    )["evaluate_step"]
    predictions = evaluate_step(PARAMS, BATCH)["predictions"]
    assert predictions.shape == (DEVICES, DEVICES, 4)
    np.testing.assert_allclose(predictions, np.broadcast_to(X @ W, (DEVICES, DEVICES, 4)), rtol=1e-5)


def test_collecting_per_device_metrics(capsys):
    left_out = LeftOut()
    names = run_text(
        """
from artifex.generative_models.training.distributed import DistributedMetrics

dm = DistributedMetrics()

# After pmap returns metrics with device dimension
metrics_per_device = train_step(params, batch)
# Shape of metrics_per_device["loss"]: (num_devices,)

# Collect into list of per-device values
collected = dm.collect_from_devices(metrics_per_device)
# collected["loss"] is now a list of values, one per device

# Useful for debugging or logging per-device metrics
for i, loss in enumerate(collected["loss"]):
    print(f"Device {i} loss: {loss}")
""",
        train_step=jax.pmap(lambda p, b: {"loss": left_out.compute_loss(p, b)}),
        params=PARAMS,
        batch=BATCH,
    )
    assert names["metrics_per_device"]["loss"].shape == (DEVICES,)
    assert type(names["collected"]["loss"]) is list
    np.testing.assert_allclose(names["collected"]["loss"], LOSSES, rtol=1e-5)
    printed = re.findall(r"^Device (\d) loss: (.*)$", capsys.readouterr().out, re.MULTILINE)
    assert [int(i) for i, _ in printed] == list(range(DEVICES))
    np.testing.assert_allclose([float(loss) for _, loss in printed], LOSSES, rtol=1e-5)


def test_integration_with_a_training_loop(capsys):
    class LinearModel:
        def apply(self, params, x):
            return x @ params

    batches = [{"data": RNG.normal(size=(16, 3)), "targets": RNG.normal(size=16)} for _ in range(4)]
    batches = jax.tree.map(lambda x: x.astype(np.float32), batches)
    optimizer = optax.sgd(0.1)
    names = run_text(
        """
from artifex.generative_models.training.distributed import (
    DeviceMeshManager,
    DataParallel,
    DistributedMetrics,
)
import jax
import jax.numpy as jnp

# Setup distributed training
manager = DeviceMeshManager()
mesh = manager.create_data_parallel_mesh()
dp = DataParallel()
dm = DistributedMetrics()

# Create shardings
data_sharding = dp.create_data_parallel_sharding(mesh)

@jax.jit
def train_step(params, optimizer_state, batch):
    def loss_fn(p):
        logits = model.apply(p, batch["data"])
        loss = jnp.mean((logits - batch["targets"]) ** 2)
        return loss, {"loss": loss}

    (loss, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)

    # Aggregate gradients and metrics
    grads = dp.all_reduce_gradients(grads, reduce_type="mean")

    # Update parameters
    updates, optimizer_state = optimizer.update(grads, optimizer_state)
    params = optax.apply_updates(params, updates)

    return params, optimizer_state, metrics

# Training loop
for batch in dataloader:
    # Shard batch
    sharded_batch = dp.shard_batch(batch, data_sharding)

    # Training step
    params, optimizer_state, metrics = train_step(
        params, optimizer_state, sharded_batch
    )

    print(f"Loss: {metrics['loss']}")
""",
        model=LinearModel(),
        optimizer=optimizer,
        optax=optax,
        params=jnp.asarray(W),
        optimizer_state=optimizer.init(jnp.asarray(W)),
        dataloader=batches,
    )

    params, losses = W.astype(np.float64), []
    for batch in batches:
        errors = batch["data"].astype(np.float64) @ params - batch["targets"]
        losses.append((errors**2).mean())
        params = params - 0.1 * 2 / 16 * errors @ batch["data"]
    printed = re.findall(r"^Loss: (.*)$", capsys.readouterr().out, re.MULTILINE)
    np.testing.assert_allclose([float(loss) for loss in printed], losses, rtol=1e-5)
    np.testing.assert_allclose(names["params"], params, rtol=1e-5)
    assert names["sharded_batch"]["data"].sharding == names["data_sharding"]
    assert names["mesh"].size == DEVICES


def numpy_training(weights, batches, rate=1e-3):
    """Loss and accuracy before each step of Adam (Kingma and Ba, 2015), for two dense layers with a softmax."""
    first, second = ([np.zeros_like(w) for w in weights] for _ in range(2))
    results = []
    for t, batch in enumerate(batches, start=1):
        kernel1, bias1, kernel2, bias2 = weights
        images, labels = batch["images"].astype(np.float64), batch["labels"]
        before = images @ kernel1 + bias1
        hidden = np.maximum(before, 0)
        logits = hidden @ kernel2 + bias2
        odds = np.exp(logits - logits.max(1, keepdims=True))
        probabilities = odds / odds.sum(1, keepdims=True)
        rows = np.arange(len(labels))
        results.append((-np.log(probabilities[rows, labels]).mean(), (logits.argmax(1) == labels).mean()))

        delta = probabilities.copy()
        delta[rows, labels] -= 1
        delta /= len(labels)
        inner = delta @ kernel2.T * (before > 0)
        gradients = [images.T @ inner, inner.sum(0), hidden.T @ delta, delta.sum(0)]
        for i, gradient in enumerate(gradients):
            first[i] = 0.9 * first[i] + 0.1 * gradient
            second[i] = 0.999 * second[i] + 0.001 * gradient**2
            step = first[i] / (1 - 0.9**t) / (np.sqrt(second[i] / (1 - 0.999**t)) + 1e-8)
            weights[i] = weights[i] - rate * step
    return results


@pytest.mark.slow
def test_complete_multi_gpu_example(capsys):
    batches = [
        {"images": RNG.random((16, 784)).astype(np.float32), "labels": RNG.integers(0, 10, 16).astype(np.int32)}
        for _ in range(3)
    ] * 2  # the second time the model has seen them
    start: list[np.ndarray] = []

    def dataloader():
        model = names["model"]
        parts = [model.dense1.kernel, model.dense1.bias, model.dense2.kernel, model.dense2.bias]
        start.extend(np.asarray(part[...], np.float64) for part in parts)
        yield from batches

    names: dict[str, Any] = {"dataloader": dataloader()}
    exec(
        compile(
            """
from artifex.generative_models.training.distributed import (
    DeviceMeshManager,
    DataParallel,
    DistributedMetrics,
)
from flax import nnx
import jax
import jax.numpy as jnp
import optax

# Model definition
class SimpleModel(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs):
        super().__init__()
        self.dense1 = nnx.Linear(784, 256, rngs=rngs)
        self.dense2 = nnx.Linear(256, 10, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.dense1(x))
        return self.dense2(x)

# Setup
manager = DeviceMeshManager()
mesh = manager.create_data_parallel_mesh()
dp = DataParallel()
dm = DistributedMetrics()

# Create model and optimizer (wrt=nnx.Param required in NNX 0.11.0+)
model = SimpleModel(rngs=nnx.Rngs(0))
optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)

# Training step with metrics aggregation
def train_step(model, optimizer, batch):
    def loss_fn(m):
        logits = m(batch["images"])
        loss = jnp.mean(
            optax.softmax_cross_entropy_with_integer_labels(
                logits, batch["labels"]
            )
        )
        accuracy = jnp.mean(jnp.argmax(logits, axis=-1) == batch["labels"])
        return loss, {"loss": loss, "accuracy": accuracy}

    (loss, metrics), grads = nnx.value_and_grad(loss_fn, has_aux=True)(model)
    optimizer.update(model, grads)  # NNX 0.11.0+ API

    return metrics

# Training loop
data_sharding = dp.create_data_parallel_sharding(mesh)

for batch in dataloader:
    sharded_batch = dp.shard_batch(batch, data_sharding)
    metrics = train_step(model, optimizer, sharded_batch)
    print(f"Loss: {metrics['loss']:.4f}, Accuracy: {metrics['accuracy']:.4f}")
""",
            "<specification>",
            "exec",
        ),
        names,
    )
    expected = np.array(numpy_training(start, batches))
    printed = re.findall(r"^Loss: (.*), Accuracy: (.*)$", capsys.readouterr().out, re.MULTILINE)
    np.testing.assert_allclose(np.array(printed, float), expected, atol=1e-4)
    assert expected[-1, 0] < expected[0, 0]
    assert names["sharded_batch"]["images"].sharding == names["data_sharding"]
