"""How two accumulated states become one: the table of merges. Everything else is derived from it.

A row's initial value is the identity; a batch is merged into a row, a row into a row, a snapshot into a snapshot with
the same operation; reset writes the identity back.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from distributed_metrics import compensated

Parts = tuple[Any, ...]
"""The words of slots: float32 arrays of one shape, as many as a slot has words."""

Numbers = tuple[Any, ...]
"""The numbers of slots: float64 NumPy arrays on the host, float32 arrays in a trace, as many as a slot has numbers."""


@dataclass(frozen=True)
class Number:
    """One number of a slot.

    Attributes:
        name: what it is.
        identity: its value in a slot that has seen nothing.
        pair: whether it takes two words, high and low (see ``compensated``), or one.
    """

    name: str
    identity: float = 0.0
    pair: bool = True


@dataclass(frozen=True)
class Merge:
    """One way of merging slots.

    Attributes:
        name: of the table that holds these slots; one table, and one Variable, for each name.
        numbers: what one slot consists of.
        combine: merges the words of two slots on the device: of two devices, in either order.
        combine_numbers: the same for numbers, in float64 on the host.
        follow, follow_numbers: where order matters, the same for a later state that follows an earlier one.
        elsewhere: what the other rows get when words go to one row only; by default the identity.
        by_slot: whether slots are merged independently of each other, so that devices may merge some of them each.
    """

    name: str
    numbers: tuple[Number, ...]
    combine: Callable[[Parts, Parts], Parts]
    combine_numbers: Callable[[Numbers, Numbers], Numbers]
    follow: Callable[[Parts, Parts], Parts] | None = None
    follow_numbers: Callable[[Numbers, Numbers], Numbers] | None = None
    elsewhere: Callable[[Parts], Parts] | None = None
    by_slot: bool = True

    @property
    def identity(self) -> tuple[float, ...]:
        """The float32 words of a slot that has seen nothing; merging it changes nothing."""
        return tuple(word for n in self.numbers for word in ((n.identity, 0.0) if n.pair else (n.identity,)))

    @property
    def words(self) -> int:
        """How many float32 words one slot takes."""
        return len(self.identity)

    def widen(self, parts: Sequence[np.ndarray]) -> Numbers:
        """The words as float64 numbers, on the host."""
        return self._joined([part.astype(np.float64) for part in parts])

    def narrow(self, parts: Parts) -> Numbers:
        """The words as float32 numbers, in a trace."""
        return self._joined(parts)

    def _joined(self, parts: Sequence[Any]) -> Numbers:
        remaining = iter(parts)
        return tuple(next(remaining) + next(remaining) if n.pair else next(remaining) for n in self.numbers)

    def split(self, numbers: Numbers) -> tuple[np.ndarray, ...]:
        """Float64 numbers as words again, on the host."""
        words: list[np.ndarray] = []
        for n, number in zip(self.numbers, numbers, strict=True):
            words.extend(np.moveaxis(compensated.host_pair(number), -1, 0) if n.pair else [number.astype(np.float32)])
        return tuple(words)

    def merge_rows(self, numbers: Numbers, axis: int) -> Numbers:
        """The merge along one axis of float64 arrays, on the host, neighbours first."""
        if numbers[0].shape[axis] == 1:
            return tuple(number.squeeze(axis) for number in numbers)
        numbers = tuple(np.moveaxis(number, axis, 0) for number in numbers)
        while (n := len(numbers[0])) > 1:
            merged = self.combine_numbers(tuple(x[: n - 1 : 2] for x in numbers), tuple(x[1::2] for x in numbers))
            if n % 2:
                merged = tuple(np.concatenate(both) for both in zip(merged, (x[-1:] for x in numbers), strict=True))
            numbers = merged
        return tuple(number[0] for number in numbers)

    def after(self, earlier: Parts, later: Parts) -> Parts:
        """Words that follow others in time, on the device."""
        return (self.follow or self.combine)(earlier, later)

    def after_numbers(self, earlier: Numbers, later: Numbers) -> Numbers:
        """Numbers that follow others in time, on the host."""
        return (self.follow_numbers or self.combine_numbers)(earlier, later)

    def in_other_rows(self, parts: Parts) -> Parts:
        """What the other rows get where ``parts`` are merged into one row only."""
        if self.elsewhere is not None:
            return self.elsewhere(parts)
        return tuple(jnp.full_like(part, word) for part, word in zip(parts, self.identity, strict=True))


def _add_words(a: Parts, b: Parts) -> Parts:
    return compensated.add((a[0], a[1]), (b[0], b[1]))


def _add_numbers(a: Numbers, b: Numbers) -> Numbers:
    return (a[0] + b[0],)


def _larger_words(a: Parts, b: Parts) -> Parts:
    return (jnp.maximum(a[0], b[0]),)


def _larger_numbers(a: Numbers, b: Numbers) -> Numbers:
    return (np.maximum(a[0], b[0]),)


SUM = Merge("sum", (Number("total"),), _add_words, _add_numbers)
"""Sums are pairs of floats."""

MAX = Merge("max", (Number("largest", -np.inf, pair=False),), _larger_words, _larger_numbers)
"""A minimum is the maximum of the negated values."""

BINS = Merge("bins", SUM.numbers, _add_words, _add_numbers)
"""Sums in a table of their own: updates of other metrics need not touch the many slots of a histogram."""

MERGES: dict[str, Merge] = {"sum": SUM, "max": MAX}
"""The names that an accumulator's ``fields`` may use; others are given as a ``Merge``."""
