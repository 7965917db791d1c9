"""The weight of an update for metrics that others wrote.

Those that take a mask or weights get it as theirs. For the others it is done from outside: where the state of a batch
is the sum of the states of its examples, which is tried, the weighted sum of those is the state of a weighted batch.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from distributed_metrics.accumulators._aside import aside
from distributed_metrics.accumulators._batch import Batch
from distributed_metrics.compensated import Pair, pair_of

WEIGHT, EXAMPLES = "weight of the update", "arrays of examples"
"""Keywords that no function has: the weight, for a metric that takes none, and the arrays that it is for."""


@functools.cache
def weight_keyword(metric: Any) -> str | None:
    """The keyword by which ``from_model_output`` takes a mask or weights; None where it takes none."""
    parameters = dict(inspect.signature(metric.from_model_output).parameters)
    if any(one.kind == one.VAR_KEYWORD for one in parameters.values()):  # as clu's do, for their base class
        for base in metric.__mro__[1:]:
            if "from_model_output" in vars(base):
                parameters |= inspect.signature(base.from_model_output).parameters
                break
    return next((name for name in ("mask", "sample_weights") if name in parameters), None)


def weighted(name: str, metric: Any, outputs: Mapping[str, Any], weight: Any, examples: int | None) -> dict[str, Any]:
    """The keywords of a metric with the weight of an update, one number for each example.

    Args:
        name: of the value.
        metric: the class.
        outputs: the keywords of its ``from_model_output``.
        weight: of shape ``(examples,)``, or one for all.
        examples: how many there are.

    Raises:
        ValueError: the metric has got weights already, or cannot be weighted; or the weight is of another shape.
    """
    keyword = weight_keyword(metric)
    if keyword in outputs:
        raise ValueError(
            f"metrics.update(weight=...): {name!r} has got {keyword}= among its keywords already.\n"
            "  Give one of the two: weights by name, weight={...}, and none to this one."
        )
    weight = weight.get_value() if isinstance(weight, nnx.Variable) else weight
    if isinstance(weight, Mapping):
        raise ValueError(f"metrics.update(weight=...): {name!r} takes one weight, of examples, and got a dict.")
    if np.ndim(weight) > 1 or (np.ndim(weight) == 1 and np.shape(weight)[0] not in (1, examples)) or not examples:
        raise ValueError(
            f"metrics.update(weight=...): {name!r} has {examples} examples, and its weight has the shape "
            f"{np.shape(weight)}.\n  Give one number for each example"
            + (f"; a weight of what is in an example is its own keyword {keyword}=." if keyword else ".")
        )
    xp: Any = jnp if isinstance(weight, jax.Array) else np
    weight = xp.broadcast_to(weight, (examples,))
    if weight.dtype != bool:
        weight = weight.astype(np.float32)
    by = _weighted_by(metric, *_described(outputs, examples))
    if by is None:
        raise ValueError(
            f"metrics.update(weight=...): {name!r} is {metric.__module__}.{metric.__qualname__}, which takes no mask "
            "and no weights of examples, and whose state of a batch is no sum over its examples.\n"
            "  Leave out what does not count before the update; give weights by name, weight={...}, none to this one."
        )
    return {**outputs, by: weight.astype(np.float32) if by == "sample_weights" else weight}  # metrax adds them up


def without_masked(outputs: Mapping[str, Any], weight: Any) -> dict[str, Any]:
    """The keywords with 0 for the numbers of examples of weight 0: NaN times 0 would be NaN."""

    def cleared(one: Any) -> Any:
        if np.ndim(weight) != 1 or not hasattr(one, "dtype") or np.shape(one)[:1] != np.shape(weight):
            return one
        if not jnp.issubdtype(one.dtype, jnp.floating):
            return one
        return jnp.where(jnp.reshape(weight, (-1,) + (1,) * (one.ndim - 1)) != 0, one, 0)

    return {name: cleared(one) for name, one in outputs.items()}


def weighted_sum(numbers_of: Callable[..., Pair], outputs: Mapping[str, Any]) -> tuple[Pair, Pair]:
    """The numbers of a weighted batch, and the sum of its weights.

    Args:
        numbers_of: the numbers of a state, a pair ``(size,)``, of the keywords of ``from_model_output``.
        outputs: the keywords, with ``WEIGHT`` and ``EXAMPLES``.
    """
    given = {name: one for name, one in outputs.items() if name not in (WEIGHT, EXAMPLES)}
    of_examples = {name: given[name] for name in outputs[EXAMPLES]}
    numbers = jax.vmap(lambda one: numbers_of(**{**given, **{name: x[None] for name, x in one.items()}}))(of_examples)
    return _batch(numbers, outputs[WEIGHT]).sum(), total_weight(outputs[WEIGHT])


def total_weight(weight: Any) -> Pair:
    """The sum of a mask, or of weights."""
    return _batch(jnp.ones(np.shape(weight), bool), jnp.asarray(weight)).total_weight()


def _batch(value: Any, weight: Any) -> Batch:
    """Numbers ``(examples, ...)`` and their weights. XLA sums them in float32, as it does what a metric sums itself."""
    kept = np.shape(value[0] if isinstance(value, tuple) else value)[np.ndim(weight) :]
    pair_or_mask = weight if weight.dtype == bool else pair_of(weight.astype(jnp.float32))
    return Batch(value, pair_or_mask, kept, split=False)


def _described(outputs: Mapping[str, Any], examples: int) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """The arrays of the keywords (name, whether of examples, the shape of one, dtype), and the settings."""
    arrays, settings = [], []
    for keyword, one in outputs.items():
        if hasattr(one, "shape") and hasattr(one, "dtype"):
            of_examples = one.ndim > 0 and one.shape[0] == examples
            arrays.append((keyword, of_examples, one.shape[1:] if of_examples else one.shape, np.dtype(one.dtype)))
        else:
            settings.append((keyword, one))
    return tuple(arrays), tuple(settings)


@functools.lru_cache(maxsize=256)
def _weighted_by(metric: Any, arrays: tuple[Any, ...], settings: tuple[Any, ...]) -> str | None:
    """The keyword for weights of examples, or ``WEIGHT`` where states are to be weighted; None where neither works.

    It is tried on a few made-up examples, some of which are masked.
    """
    random = np.random.default_rng(0)
    size = next(n for n in range(4, 99) if all(n not in shape for _, _, shape, _ in arrays))
    mask = np.arange(size) % 3 != 1

    def draw(of_examples: bool, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        if not of_examples:
            return np.arange(1, 1 + int(np.prod(shape))).reshape(shape).astype(dtype)
        if jnp.issubdtype(dtype, jnp.floating):
            return random.uniform(0.05, 0.95, (size, *shape)).astype(dtype)
        return random.integers(0, 2, (size, *shape)).astype(dtype)

    given = {keyword: draw(*of) for keyword, *of in arrays}

    def state(chosen: Any, **weight: Any) -> list[np.ndarray]:
        cut = {
            keyword: given[keyword][chosen] if of_examples else given[keyword] for keyword, of_examples, *_ in arrays
        }
        leaves = jax.tree.leaves(metric.from_model_output(**jax.tree.map(jnp.asarray, cut | weight), **dict(settings)))
        return [np.asarray(leaf, np.float64) for leaf in leaves]

    def alike(one: list[Any], other: list[Any]) -> bool:
        return all(
            a.shape == b.shape and np.allclose(a, b, rtol=1e-3, atol=1e-5) for a, b in zip(one, other, strict=True)
        )

    with aside():
        expected = state(mask)
        keyword = weight_keyword(metric)
        if keyword is not None:
            try:
                if alike(state(slice(None), **{keyword: mask.astype(np.float32)}), expected):
                    return keyword
            except (TypeError, ValueError):  # the weights that it takes are no weights of examples
                pass
        of_each = [state(slice(i, i + 1)) for i in range(size) if mask[i]]
    constant = [all(np.array_equal(each[k], expected[k]) for each in of_each) for k in range(len(expected))]
    added = [expected[k] if constant[k] else sum(each[k] for each in of_each) for k in range(len(expected))]
    return WEIGHT if alike(added, expected) else None
