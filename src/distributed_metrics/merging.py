"""The table of merges: how two accumulated numbers become one. Everything else is derived from it.

A row's initial value is the identity; a batch is merged into a row, a row into a row, a snapshot into a snapshot with
the same operation; reset writes the identity back.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from distributed_metrics import compensated

Parts = tuple[Array, ...]
"""What one merge works on: float32 arrays of one shape, as many as a slot has words."""


@dataclass(frozen=True)
class Merge:
    """One way of merging, element by element.

    Attributes:
        identity: the float32 words of a slot that has seen nothing; merging it changes nothing.
        combine: merges two tuples of words on the device; associative and commutative up to rounding.
        widen: the words as one float64 number, on the host (NumPy arrays).
        split: a float64 number as words again, on the host.
        narrow: the words as one float32 number, in a trace.
        combine_rows: merges float64 numbers along an axis, on the host.
    """

    identity: tuple[float, ...]
    combine: Callable[[Parts, Parts], Parts]
    widen: Callable[[tuple[Any, ...]], np.ndarray]
    split: Callable[[np.ndarray], tuple[np.ndarray, ...]]
    narrow: Callable[[Parts], Array]
    combine_rows: Callable[..., np.ndarray]

    @property
    def words(self) -> int:
        """How many float32 words one slot takes."""
        return len(self.identity)


MERGES: dict[str, Merge] = {
    "sum": Merge(
        identity=(0.0, 0.0),
        combine=lambda a, b: compensated.add((a[0], a[1]), (b[0], b[1])),
        widen=lambda parts: parts[0].astype(np.float64) + parts[1].astype(np.float64),
        split=lambda x: tuple(np.moveaxis(compensated.host_pair(x), -1, 0)),
        narrow=lambda parts: parts[0] + parts[1],
        combine_rows=np.sum,
    ),
    "max": Merge(
        identity=(-np.inf,),
        combine=lambda a, b: (jnp.maximum(a[0], b[0]),),
        widen=lambda parts: parts[0].astype(np.float64),
        split=lambda x: (x.astype(np.float32),),
        narrow=lambda parts: parts[0],
        combine_rows=np.max,
    ),
}
"""Sums are pairs of floats (see ``compensated``); a minimum is the maximum of the negated values."""
