"""What one device sees of one value: elements and their weights, and the reductions that accumulators use."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

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
            with or without S, of size 1 where it is stretched.
        shape: S, the trailing dims that are kept.
        split: whether the elements may be cut up: a compensated sum is a tree of slices, which would move the elements
            of an array whose sharding is not known. Otherwise XLA reduces them in float32.
        origin: for each leading dim the index of the first element here in the whole array, and the size of that dim
            there; before these, the same for the mapped axes, if there are any. For what depends on order.
    """

    value: Array | Pair
    weight: Array | Pair | None
    shape: tuple[int, ...]
    split: bool
    origin: tuple[tuple[Any, int], ...] = ()

    @property
    def elements(self) -> Array:
        """The elements as float32, of shape ``(..., *S)``."""
        return self.value[0] if isinstance(self.value, tuple) else self.value.astype(jnp.float32)

    @property
    def exact_elements(self) -> Pair:
        """The elements as pairs of float32: integers exactly up to 2^47."""
        return self.value if isinstance(self.value, tuple) else compensated.integer_pair(self.value)

    def map(self, function: Callable[[Array], Array]) -> "Batch":
        """The batch of ``function(elements)``, with the same weights: an elementwise function of float32 arrays."""
        # A product in it must not be contracted with the sum that follows.
        return replace(self, value=compensated.pair_of(compensated.opaque(function(self.elements).astype(jnp.float32))))

    def shifted(self, by: Pair) -> "Batch":
        """The batch of the elements minus ``by``, a pair of shape S, to about 2^-47."""
        value = self._where_counted(self.exact_elements)  # what is left out may be NaN, which would not stay behind
        high, low = (jnp.broadcast_to(part, self._full_shape) for part in by)
        return replace(self, value=compensated.add(value, (-high, -low)))

    def squared(self) -> "Batch":
        """The batch of the squares of the elements, to about 2^-46."""
        return replace(self, value=compensated.multiply(self.exact_elements, self.exact_elements))

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
            count = float(np.prod(self._leading, dtype=np.float64))
            high, low = compensated.constant(count)
            return jnp.full(self.shape, high), jnp.full(self.shape, low)
        if isinstance(weight, tuple):
            high, low = (jnp.broadcast_to(part, self._full_shape) for part in weight)
            return self._reduce((high, low))
        return self._reduce(jnp.broadcast_to(weight, self._full_shape))

    def max(self) -> Array:
        """The largest element of nonzero weight, of shape S; -inf if there is none, NaN if one is NaN."""
        counted = self._where_counted(self.elements, instead=-jnp.inf)
        return jnp.max(counted, axis=self._axes, initial=-jnp.inf)

    @property
    def sums_exactly(self) -> bool:
        """Whether sums of the elements have all digits of a pair: not those of large batches, nor those of XLA."""
        return self.split and int(np.prod(self._leading, dtype=np.int64)) <= compensated.MOST_TREE_ELEMENTS

    def rough_mean(self) -> Array:
        """The plain float32 mean of the elements of nonzero weight, of shape S; 0 if there are none."""
        number = jnp.sum(jnp.broadcast_to(self.counted(), self._full_shape), self._axes, dtype=jnp.float32)
        return compensated.opaque(jnp.sum(self._where_counted(self.elements), self._axes) / jnp.maximum(number, 1))

    def last(self) -> tuple[Array, Pair, Pair]:
        """The last element of nonzero weight, in row-major order.

        Returns:
            Whether there is one, its index in the whole array, and the element; all of shape S.
        """
        shape, number = self._leading, int(np.prod(self._leading))
        if self.weight is None and self.split and number:
            high, low = (part.reshape(number, *self.shape)[-1] for part in self.exact_elements)
            found_at = jnp.full(self.shape, number - 1, jnp.int32)
            return found_at >= 0, self._index_in_whole(found_at), (high, low)
        index = jnp.arange(number, dtype=jnp.int32).reshape(shape + (1,) * len(self.shape))
        index = jnp.broadcast_to(index, self._full_shape)
        found_at = jnp.max(jnp.where(self.counted(), index, -1), axis=self._axes, initial=-1)
        chosen = index == found_at
        high, low = (jnp.sum(jnp.where(chosen, part, 0), self._axes) for part in self.exact_elements)
        return found_at >= 0, self._index_in_whole(jnp.maximum(found_at, 0)), (high, low)

    def tally(self, bins: Array, number: int) -> Pair:
        """The total weight in each of a number of bins.

        Args:
            bins: the bin of each element: int32 of the shape of the elements, from 0 to ``number`` - 1.
            number: of bins.

        Returns:
            The pair of shape ``(*S, number)``. Exact for whole numbers.
        """
        size = int(np.prod(self.shape, dtype=np.int64))
        bins = bins + number * jnp.arange(size, dtype=jnp.int32).reshape(self.shape)
        weight = self._aligned_weight()
        if isinstance(weight, tuple):
            weight = (jnp.broadcast_to(weight[0], self._full_shape), jnp.broadcast_to(weight[1], self._full_shape))
        elif weight is not None:
            weight = jnp.broadcast_to(weight, self._full_shape)
        high, low = compensated.binned_sum(weight, bins, size * number)
        return high.reshape(*self.shape, number), low.reshape(*self.shape, number)

    def counted(self) -> Array:
        """Which elements have a nonzero weight: booleans that broadcast to the shape of the elements."""
        weight = self._aligned_weight()
        if weight is None:
            return jnp.ones((1,) * len(self._full_shape), bool)
        return weight[0] != 0 if isinstance(weight, tuple) else weight

    def finite(self) -> Array:
        """Which elements are finite: booleans of the shape of the elements."""
        if not isinstance(self.value, tuple):
            return jnp.ones(self._full_shape, bool)
        return jnp.isfinite(self.value[0])

    def counted_elements(self) -> Pair:
        """How many elements have a nonzero weight, of shape S."""
        return compensated.integer_sum(jnp.broadcast_to(self.counted(), self._full_shape), len(self._leading))

    def only(self, kept: Array) -> "Batch":
        """The same with weight 0 where ``kept``, booleans of the shape of the elements, is False."""
        weight = self._aligned_weight()
        if weight is None:
            return replace(self, weight=kept)
        if isinstance(weight, tuple):
            return replace(self, weight=(jnp.where(kept, weight[0], 0), jnp.where(kept, weight[1], 0)))
        return replace(self, weight=weight & kept)

    @property
    def _full_shape(self) -> tuple[int, ...]:
        return (self.value[0] if isinstance(self.value, tuple) else self.value).shape

    @property
    def _leading(self) -> tuple[int, ...]:
        return self._full_shape[: len(self._full_shape) - len(self.shape)]

    @property
    def _axes(self) -> tuple[int, ...]:
        return tuple(range(len(self._leading)))

    def _index_in_whole(self, index: Array) -> Pair:
        """The row-major index in the whole array of the element that has ``index`` here."""
        origin = self.origin or tuple((0, size) for size in self._leading)
        mapped, places = origin[: len(origin) - len(self._leading)], origin[len(origin) - len(self._leading) :]
        position = compensated.integer_pair(jnp.zeros_like(index))
        stride, stride_here = 1, 1
        for (start, size), here in zip(reversed(places), reversed(self._leading), strict=True):
            along = compensated.integer_pair(start + index // stride_here % here)
            position = compensated.add(position, compensated.multiply(along, _full_pair(stride, index.shape)))
            stride, stride_here = stride * size, stride_here * here
        for start, size in reversed(mapped):
            along = compensated.integer_pair(start + jnp.zeros_like(index))
            position = compensated.add(position, compensated.multiply(along, _full_pair(stride, index.shape)))
            stride *= size
        return position

    def _aligned_weight(self) -> Array | Pair | None:
        """The weight with a dim for each dim of the value."""

        def align(part: Array) -> Array:
            return part.reshape(part.shape + (1,) * (len(self._full_shape) - part.ndim))

        if self.weight is None:
            return None
        return (align(self.weight[0]), align(self.weight[1])) if isinstance(self.weight, tuple) else align(self.weight)

    def _where_counted(self, value: Any, instead: float = 0) -> Any:
        if self.weight is None:
            return value
        counted = self.counted()
        if isinstance(value, tuple):
            return tuple(jnp.where(counted, part, instead) for part in value)
        return jnp.where(counted, value, jnp.asarray(instead, value.dtype))

    def _reduce(self, value: Array | Pair) -> Pair:
        if not isinstance(value, tuple):
            return compensated.integer_sum(value, len(self._leading))
        return (compensated.tree_sum if self.split else compensated.plain_sum)(value, len(self._leading))


def _broadcast_pairs(x: Pair, y: Pair) -> tuple[Pair, Pair]:
    shape = jnp.broadcast_shapes(x[0].shape, y[0].shape)
    x_high, x_low, y_high, y_low = (jnp.broadcast_to(part, shape) for part in (*x, *y))
    return (x_high, x_low), (y_high, y_low)


def _full_pair(number: int, shape: tuple[int, ...]) -> Pair:
    high, low = compensated.constant(number)
    return jnp.full(shape, high), jnp.full(shape, low)
