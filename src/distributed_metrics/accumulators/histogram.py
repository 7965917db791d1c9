"""Histograms with given edges."""

from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from distributed_metrics import compensated
from distributed_metrics.accumulators._base import Accumulator, as_numbers
from distributed_metrics.accumulators._batch import Batch
from distributed_metrics.compensated import Pair
from distributed_metrics.merging import BINS

_OUTSIDE = ("underflow", "overflow", "nan")


@dataclass(frozen=True)
class Histogram(Accumulator):
    """The total weight in each bin, exactly as ``numpy.histogram`` counts. Empty: zeros.

    A bin has its left edge and not its right one; the last bin has both. What lies outside, and NaN, is kept apart:
    ``snapshot.outside["x"]`` is ``{"underflow": ..., "overflow": ..., "nan": ...}``, and flat results show what of it
    is not 0. One row takes 8 bytes for each bin.

    Args:
        edges: the edges of the bins, n + 1 of them for n bins, in ascending order; infinite ones are allowed.
        shape, name, labels: see ``Accumulator``; results have the shape ``(*S, n)``.

    Raises:
        TypeError, ValueError: no numbers, fewer than two edges, NaN, edges that descend or lie beyond float32's range.

    >>> from distributed_metrics import DistributedMetrics
    >>> metrics = DistributedMetrics({"x": Histogram([0.0, 0.5, 1.0])})
    >>> metrics.update(x=jnp.array([0.1, 0.2, 0.5, 1.0, 7.0]))
    >>> metrics.compute()["x"].tolist(), metrics.compute().outside["x"]["overflow"]
    ([2.0, 2.0], 1.0)
    """

    fields = {"bins": BINS}
    empty = None
    counts_copies = True

    edges: Any
    shape: Any = field(default=(), kw_only=True)

    def __post_init__(self) -> None:
        edges = as_numbers("Histogram(edges", self.edges)
        wrong = (
            "a number of bins needs edges: numpy.linspace(low, high, bins + 1)" if edges.ndim == 0 else
            f"{edges.ndim} dims, where a list of edges has one" if edges.ndim > 1 else
            f"{edges.size} edges, and the least is two: one bin" if edges.size < 2 else
            "NaN is no edge" if np.isnan(edges).any() else
            "the edges descend; sort them" if (edges[1:] < edges[:-1]).any() else
            "an edge lies beyond float32's range; give an infinite one: float('inf')"
            if (np.isfinite(edges) & (np.abs(edges) > np.finfo(np.float32).max)).any() else None
        )  # fmt: skip
        if wrong:
            raise ValueError(f"Histogram(edges={self.edges!r}): {wrong}.")
        object.__setattr__(self, "edges", tuple(edges.tolist()))
        super().__post_init__()

    def field_shape(self, field: str) -> tuple[int, ...]:
        bins = len(self.edges) - 1
        return (*self.shape, bins + len(_OUTSIDE)) if field == "bins" else self.shape

    def result_shape(self) -> tuple[int, ...]:
        return (*self.shape, len(self.edges) - 1)

    def contribution(self, batch: Batch) -> dict[str, Any]:
        edges, bins = np.asarray(self.edges), len(self.edges) - 1
        high, low = batch.exact_elements
        # Slots are bins, underflow, overflow, NaN. Below the first edge no edge is reached: slot -1, before the bins.
        reached = _edges_at_or_below(edges, (high, low)) - 1
        last_high, last_low = compensated.host_pair(edges[-1])
        on_last = (high == last_high) & (low == last_low)
        slot = jnp.where(on_last, bins - 1, jnp.where(reached < 0, bins, jnp.where(reached >= bins, bins + 1, reached)))
        return {"bins": batch.tally(jnp.where(jnp.isnan(high), bins + 2, slot), bins + len(_OUTSIDE))}

    def result(self, xp: Any, weight: Any, bins: Any) -> Any:
        return bins[..., : len(self.edges) - 1]

    def outside(self, xp: Any, weight: Any, bins: Any) -> dict[str, Any]:
        return {name: bins[..., len(self.edges) - 1 + i] for i, name in enumerate(_OUTSIDE)}

    def __str__(self) -> str:
        return f"{super().__str__()} of {len(self.edges) - 1} bins from {self.edges[0]:g} to {self.edges[-1]:g}"


def _edges_at_or_below(edges: np.ndarray, values: Pair) -> Array:
    """How many edges are less than or equal to each value: a binary search that compares pairs.

    In float32 an edge of 0.7 would be less than the float64 0.7, and numbers between the two would change bins.
    """
    edges_high, edges_low = (jnp.asarray(part) for part in np.moveaxis(compensated.host_pair(edges), -1, 0))
    high, low = values
    reached = jnp.zeros(high.shape, jnp.int32)
    for bit in reversed(range(len(edges).bit_length())):
        candidate = reached + (1 << bit)
        index = jnp.minimum(candidate, len(edges)) - 1
        edge_high, edge_low = edges_high[index], edges_low[index]
        at_or_below = (edge_high < high) | ((edge_high == high) & (edge_low <= low))
        reached = jnp.where((candidate <= len(edges)) & at_or_below, candidate, reached)
    return reached
