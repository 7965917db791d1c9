"""Variances and standard deviations that survive a mean a million times the deviation.

Sums of squares cannot: of a mean of 10^6 deviations, 40 of their 48 bits cancel. What is kept is the weight n, the mean
and the sum of squared differences from it, M2, and two of these merge into one.

Source: T. F. Chan, G. H. Golub, R. J. LeVeque, "Updating formulae and a pairwise algorithm for computing sample
variances" (1979).
"""

from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp
import numpy as np

from distributed_metrics.accumulators._base import Accumulator
from distributed_metrics.accumulators._batch import Batch
from distributed_metrics.compensated import add, divide, multiply
from distributed_metrics.merging import Merge, Number, Numbers, Parts


def _of_batch(batch: Batch) -> Parts:
    """n, mean and M2 of a batch, as three pairs."""
    # Near the elements, so that nothing cancels in what follows. It has to be one and the same number wherever it is
    # used, and a compiler for GPUs computes a small sum again, in another order, in each kernel that uses it: so it is
    # the largest element of a small batch. Sums of large ones are kernels of their own, and rough: they want a mean.
    largest = batch.max()
    pivot = jnp.where(jnp.isfinite(largest), largest, 0) if batch.sums_exactly else batch.rough_mean()
    weight = batch.total_weight()
    nonzero = (jnp.where(weight[0] == 0, 1, weight[0]), weight[1])
    differences = batch.shifted((pivot, jnp.zeros_like(pivot)))
    rest = divide(differences.sum(), nonzero)
    squares = differences.shifted(rest).squared().sum()
    mean = add((pivot, jnp.zeros_like(pivot)), rest)
    return (*weight, *mean, *squares)


def _combine(a: Parts, b: Parts) -> Parts:
    """Chan, Golub and LeVeque, equation 2.1, for means instead of totals, on pairs."""
    a_weight, a_mean, a_squares = (a[0], a[1]), (a[2], a[3]), (a[4], a[5])
    b_weight, b_mean, b_squares = (b[0], b[1]), (b[2], b[3]), (b[4], b[5])
    weight = add(a_weight, b_weight)
    share = divide(b_weight, (jnp.where(weight[0] == 0, 1, weight[0]), weight[1]))
    apart = add(b_mean, (-a_mean[0], -a_mean[1]))
    moved = multiply(apart, share)
    mean = add(a_mean, moved)
    squares = add(add(a_squares, b_squares), multiply(multiply(apart, moved), a_weight))
    both = (*weight, *mean, *squares)
    a_empty, b_empty = a[0] == 0, b[0] == 0
    return tuple(
        jnp.where(a_empty, of_b, jnp.where(b_empty, of_a, of_both))
        for of_a, of_b, of_both in zip(a, b, both, strict=True)
    )


def _combine_numbers(a: Numbers, b: Numbers) -> Numbers:
    """The same in float64."""
    weight = a[0] + b[0]
    with np.errstate(all="ignore"):  # what is empty, or overflows
        apart = b[1] - a[1]
        moved = apart * (b[0] / weight)
        both = (weight, a[1] + moved, a[2] + b[2] + apart * moved * a[0])
    return tuple(
        np.where(a[0] == 0, of_b, np.where(b[0] == 0, of_a, of_both))
        for of_a, of_b, of_both in zip(a, b, both, strict=True)
    )


MOMENTS = Merge("moments", (Number("weight"), Number("mean"), Number("squares")), _combine, _combine_numbers)


@dataclass(frozen=True)
class Var(Accumulator):
    """The weighted variance, M2 / (n - ddof), where M2 = sum(w (x - mean)^2) and n = sum(w). Empty: NaN.

    Args:
        shape, name, labels: see ``Accumulator``.
        ddof: 0 for the variance of the population, 1 for the unbiased estimate from a sample, as in ``numpy.var``;
            weights then count repetitions.

    >>> from distributed_metrics import DistributedMetrics
    >>> metrics = DistributedMetrics({"x": ("var", "std"), "y": Var(ddof=1)})
    >>> metrics.update(x=jnp.array([1e6 + 1, 1e6 + 2, 1e6 + 3, 1e6 + 6]), y=jnp.array([1, 3]))
    >>> metrics.compute()["x"]["var"], metrics.compute()["y"]
    (3.5, 2.0)
    """

    fields = {"moments": MOMENTS}
    ddof: float = field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        kinds = (int, float, np.integer, np.floating)
        if isinstance(self.ddof, bool) or not isinstance(self.ddof, kinds) or not 0 <= self.ddof < np.inf:
            raise ValueError(
                f"{type(self).__name__}(ddof={self.ddof!r}): a number, 0 or more: what is taken off the total weight.\n"
                f"  For example: {type(self).__name__}(ddof=1)"
            )
        object.__setattr__(self, "ddof", float(self.ddof))  # 1 and 1.0 are one setting, in a file as well

    def contribution(self, batch: Batch) -> dict[str, Any]:
        return {"moments": _of_batch(batch)}

    def result(self, xp: Any, weight: Any, moments: Any) -> Any:
        return moments[2] / xp.maximum(weight - self.ddof, 0)


@dataclass(frozen=True)
class Std(Var):
    """The weighted standard deviation: the square root of ``Var``. Empty: NaN."""

    def result(self, xp: Any, weight: Any, moments: Any) -> Any:
        return xp.sqrt(super().result(xp, weight, moments))
