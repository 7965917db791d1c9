"""Means, sums, counts and extrema: what is logged of nearly every value."""

from typing import Any

from distributed_metrics.accumulators._base import Accumulator
from distributed_metrics.accumulators._batch import Batch


class Mean(Accumulator):
    """The weighted mean: sum(w x) / sum(w) over everything seen. Empty: NaN."""

    fields = {"total": "sum"}

    def contribution(self, batch: Batch) -> dict[str, Any]:
        return {"total": batch.sum()}

    def result(self, xp: Any, weight: Any, total: Any) -> Any:
        return total / weight


class Sum(Accumulator):
    """The weighted sum: sum(w x). Empty: 0. Exact for integers up to 2^47."""

    fields = {"total": "sum"}
    empty = None
    counts_copies = True

    def contribution(self, batch: Batch) -> dict[str, Any]:
        return {"total": batch.sum()}

    def result(self, xp: Any, weight: Any, total: Any) -> Any:
        return total


class Count(Accumulator):
    """The sum of the weights: the number of elements where there are none. The elements do not matter. Empty: 0."""

    empty = None
    counts_copies = True

    def contribution(self, batch: Batch) -> dict[str, Any]:
        return {}

    def result(self, xp: Any, weight: Any) -> Any:
        return weight


class Max(Accumulator):
    """The largest element of nonzero weight, in float32. NaN if one is NaN. Empty: NaN."""

    fields = {"largest": "max"}

    def contribution(self, batch: Batch) -> dict[str, Any]:
        return {"largest": batch.max()}

    def result(self, xp: Any, weight: Any, largest: Any) -> Any:
        return largest


class Min(Accumulator):
    """The smallest element of nonzero weight, in float32. NaN if one is NaN. Empty: NaN."""

    fields = {"largest_negated": "max"}

    def contribution(self, batch: Batch) -> dict[str, Any]:
        return {"largest_negated": batch.map(lambda x: -x).max()}

    def result(self, xp: Any, weight: Any, largest_negated: Any) -> Any:
        return -largest_negated


class Ratio(Accumulator):
    """sum(w a) / sum(w b) of pairs ``(a, b)``: loss per token from the sums that a loss function has formed.

    ``update`` takes ``(numerator, denominator)``, scalars or arrays, which are summed separately, each as it is: 8 × 16
    losses and 8 × 1 ones make 8 ones. Arrays, as (losses, mask), send nothing; a sum of a partitioned array that only
    the log needs is an all-reduce of its own. The count of a ratio is its denominator. Empty (a denominator of 0): NaN.
    """

    fields = {"numerator": "sum"}
    inputs = ("numerator", "denominator")

    def contribution(self, numerator: Batch, denominator: Batch) -> dict[str, Any]:
        return {"numerator": numerator.sum(), "weight": denominator.sum()}

    def result(self, xp: Any, weight: Any, numerator: Any) -> Any:
        return numerator / weight
