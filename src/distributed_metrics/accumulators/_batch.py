"""What one device sees of one value: elements and their weights, and the reductions that accumulators use."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import jax.numpy as jnp
import numpy as np
from jax import Array

from distributed_metrics import compensated
from distributed_metrics.compensated import Pair


@dataclass(frozen=True)
class Batch:
    """Elements of shape ``(..., *S)`` with weights of shape ``(...)``; every reduction is over the leading dims.

    Attributes:
        value: integers or booleans as they are, or the pair of float32 arrays of a float value.
        weight: None (every element counts once), booleans, or a pair of float32 arrays; its dims are those of ``value``
            without S, of size 1 where it is stretched.
        shape: S, the trailing dims that are kept.
        split: whether the elements may be cut up: a compensated sum is a tree of slices, which would move the elements
            of an array whose sharding is not known. Otherwise XLA reduces them in float32.
    """

    value: Array | Pair
    weight: Array | Pair | None
    shape: tuple[int, ...]
    split: bool

    @property
    def elements(self) -> Array:
        """The elements as float32, of shape ``(..., *S)``."""
        return self.value[0] if isinstance(self.value, tuple) else self.value.astype(jnp.float32)

    def map(self, function: Callable[[Array], Array]) -> "Batch":
        """The batch of ``function(elements)``, with the same weights: an elementwise function of float32 arrays."""
        return replace(self, value=compensated.pair_of(function(self.elements)))

    def sum(self) -> Pair:
        """The weighted sum of the elements, of shape S; elements of weight 0 are left out, NaN included."""
        value, weight = self.value, self._aligned_weight()
        if weight is None:
            return self._reduce(value)
        value = self._where_counted(value)
        if isinstance(weight, tuple):
            value = value if isinstance(value, tuple) else compensated.integer_pair(value)
            value = compensated.multiply(*_broadcast_pairs(value, weight))
        return self._reduce(value)

    def total_weight(self) -> Pair:
        """The sum of the weights, one for each element, of shape S."""
        weight = self._aligned_weight()
        if weight is None:
            count = float(np.prod(self._full_shape[: self._dims], dtype=np.float64))
            high, low = compensated.constant(count)
            return jnp.full(self.shape, high), jnp.full(self.shape, low)
        if isinstance(weight, tuple):
            high, low = (jnp.broadcast_to(part, self._full_shape) for part in weight)
            return self._reduce((high, low))
        return self._reduce(jnp.broadcast_to(weight, self._full_shape))

    def max(self) -> Array:
        """The largest element of nonzero weight, of shape S; -inf if there is none, NaN if one is NaN."""
        counted = self._where_counted(self.elements, instead=-jnp.inf)
        return jnp.max(counted, axis=tuple(range(self._dims)), initial=-jnp.inf)

    @property
    def _full_shape(self) -> tuple[int, ...]:
        return (self.value[0] if isinstance(self.value, tuple) else self.value).shape

    @property
    def _dims(self) -> int:
        return len(self._full_shape) - len(self.shape)

    def _aligned_weight(self) -> Array | Pair | None:
        """The weight with a dim for each dim of the value."""

        def align(part: Array) -> Array:
            return part.reshape(part.shape + (1,) * (len(self._full_shape) - part.ndim))

        if self.weight is None:
            return None
        return (align(self.weight[0]), align(self.weight[1])) if isinstance(self.weight, tuple) else align(self.weight)

    def _where_counted(self, value, instead: float = 0):
        weight = self._aligned_weight()
        if weight is None:
            return value
        counted = weight[0] != 0 if isinstance(weight, tuple) else weight
        if isinstance(value, tuple):
            return tuple(jnp.where(counted, part, instead) for part in value)
        return jnp.where(counted, value, jnp.asarray(instead, value.dtype))

    def _reduce(self, value: Array | Pair) -> Pair:
        if not isinstance(value, tuple):
            return compensated.integer_sum(value, self._dims)
        return (compensated.tree_sum if self.split else compensated.plain_sum)(value, self._dims)


def _broadcast_pairs(x: Pair, y: Pair) -> tuple[Pair, Pair]:
    shape = jnp.broadcast_shapes(x[0].shape, y[0].shape)
    x_high, x_low, y_high, y_low = (jnp.broadcast_to(part, shape) for part in (*x, *y))
    return (x_high, x_low), (y_high, y_low)
