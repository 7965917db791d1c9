"""The latest value: of a learning rate, say, that is logged as it stands."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from distributed_metrics.accumulators._base import Accumulator
from distributed_metrics.accumulators._batch import Batch
from distributed_metrics.compensated import add
from distributed_metrics.merging import Merge, Number, Numbers, Parts

# A state is (updates, at, index, value): how many updates there were, which of them was the last that had an element of
# nonzero weight (0: none), the index of that element in its array, and the element. Devices see the same updates, so
# that of two of them the higher (at, index) is the later. What follows in time counts its updates from there on.


def _later(a: Any, b: Any, xp: Any) -> Any:
    """Whether b's (at, index) is the higher; numbers may be pairs, which compare high word first."""
    b_is_later = xp.zeros_like(a[0], bool)
    equal = ~b_is_later
    for one, other in zip(a, b, strict=True):
        b_is_later = b_is_later | (equal & (other > one))
        equal = equal & (other == one)
    return b_is_later


def _combine(a: Parts, b: Parts) -> Parts:
    """The state of two devices that saw the same updates."""
    take_b = _later(a[2:6], b[2:6], jnp)
    more = _later(a[:2], b[:2], jnp)
    updates = tuple(jnp.where(more, of_b, of_a) for of_a, of_b in zip(a[:2], b[:2], strict=True))
    return updates + tuple(jnp.where(take_b, of_b, of_a) for of_a, of_b in zip(a[2:], b[2:], strict=True))


def _follow(earlier: Parts, later: Parts) -> Parts:
    """The state after more updates."""
    updates = add((earlier[0], earlier[1]), (later[0], later[1]))
    at = add((earlier[0], earlier[1]), (later[2], later[3]))
    seen = later[2] > 0
    return updates + tuple(
        jnp.where(seen, of_later, of_earlier)
        for of_earlier, of_later in zip(earlier[2:], (*at, *later[4:]), strict=True)
    )


def _combine_numbers(a: Numbers, b: Numbers) -> Numbers:
    take_b = _later(a[1:3], b[1:3], np)
    latest = tuple(np.where(take_b, of_b, of_a) for of_a, of_b in zip(a[1:], b[1:], strict=True))
    return (np.maximum(a[0], b[0]), *latest)


def _follow_numbers(earlier: Numbers, later: Numbers) -> Numbers:
    seen = later[1] > 0
    at = earlier[0] + later[1]
    return (
        earlier[0] + later[0],
        np.where(seen, at, earlier[1]),
        np.where(seen, later[2], earlier[2]),
        np.where(seen, later[3], earlier[3]),
    )


def _elsewhere(parts: Parts) -> Parts:
    """Rows that have no part in an update count it all the same."""
    return (*parts[:2], *(jnp.zeros_like(part) for part in parts[2:]))


LAST = Merge(
    "last",
    (Number("updates"), Number("at"), Number("index"), Number("value")),
    _combine,
    _combine_numbers,
    follow=_follow,
    follow_numbers=_follow_numbers,
    elsewhere=_elsewhere,
)


class Last(Accumulator):
    """The last element of nonzero weight of the latest update that had one. Empty: NaN.

    Elements are in row-major order, in mapped code those of later devices after those of earlier ones. In a sum of
    snapshots, and after ``merge``, what was added is the later.
    """

    fields = {"latest": LAST}

    def contribution(self, batch: Batch) -> dict[str, Any]:
        seen, index, value = batch.last()
        one, zero = jnp.ones(self.shape, jnp.float32), jnp.zeros(self.shape, jnp.float32)
        there = (jnp.where(seen, part, 0) for part in (*index, *value))
        return {"latest": (one, zero, jnp.where(seen, one, 0), zero, *there)}

    def result(self, xp: Any, weight: Any, latest: Any) -> Any:
        return xp.where(latest[1] > 0, latest[3], float("nan"))
