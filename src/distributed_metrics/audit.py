"""What a compiled program sends: so that a test can hold a train step to it."""

import collections
import re
from collections.abc import Callable
from typing import Any

from flax import nnx

_COLLECTIVE = re.compile(
    r"= (?P<type>.*?) (?P<operation>all-reduce|all-gather|all-to-all|ragged-all-to-all|reduce-scatter"
    r"|collective-permute|collective-broadcast)(?:-start)?\("
)


def compiled_text(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    """The optimized HLO of ``fn(*args, **kwargs)``; nothing is run.

    Args:
        fn: a function of arrays and nnx objects, jitted (``jax.jit``, ``nnx.jit``, ``jax.pmap``, ...) or not.
        *args, **kwargs: its arguments, or their shapes (``jax.ShapeDtypeStruct``).
    """
    jitted = fn if hasattr(fn, "lower") else nnx.jit(fn)
    return jitted.lower(*args, **kwargs).compile().as_text()


def count_collectives(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> dict[str, int]:
    """How many collectives of each kind the compiled ``fn(*args, **kwargs)`` holds; nothing is run.

    Args:
        fn: a function of arrays and nnx objects, jitted (``jax.jit``, ``nnx.jit``, ``jax.pmap``, ...) or not.
        *args, **kwargs: its arguments, or their shapes (``jax.ShapeDtypeStruct``).

    Returns:
        For example ``{"all-reduce": 1}``; empty where the program sends nothing. A collective inside a loop counts
        once.

    >>> import jax.numpy as jnp
    >>> from distributed_metrics import DistributedMetrics
    >>> metrics = DistributedMetrics({"loss": "mean"})
    >>> count_collectives(lambda m, x: m.update(loss=x), metrics, jnp.ones(8))
    {}
    """
    text = compiled_text(fn, *args, **kwargs)
    return dict(collections.Counter(match["operation"] for match in _COLLECTIVE.finditer(text)))
