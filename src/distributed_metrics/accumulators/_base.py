"""What an accumulator is: a few fields, each with a named merge; a contribution; a result."""

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import numpy as np

from distributed_metrics.merging import MERGES, SUM, Merge

_OF_ALL = ("shape", "name", "labels")  # what each accumulator has, beside settings of its own


@dataclass(frozen=True)
class Accumulator:
    """What is accumulated of one value: the base class of all accumulators, for your own as well.

    A subclass names its ``fields`` (each with the merge that joins two of them, ``"sum"`` or ``"max"``), says what a
    batch contributes to them, and what number they make in the end. One more field, ``weight``, is always there: the
    total weight seen, of merge ``"sum"``. ``testing.check_accumulator`` holds one of yours to the laws.

    Args:
        shape: the shape S of one element, ``()`` for scalars; 10 is short for ``(10,)``. Values then have shape
            ``(..., *S)``, and results shape S: a vector per class or per layer.
        name: the name of the result in a tuple of accumulators; by default that of the class, in lower case.
        labels: names for the last dim of the result, in flat results; by default its elements are numbered.

    Raises:
        TypeError, ValueError: no shape; not one label for each element.

    Example: the geometric mean of positive numbers.

    >>> import jax.numpy as jnp
    >>> import distributed_metrics as dm
    >>> class GeometricMean(dm.Accumulator):
    ...     fields = {"log_total": "sum"}
    ...
    ...     def contribution(self, batch):
    ...         return {"log_total": batch.map(jnp.log).sum()}
    ...
    ...     def result(self, xp, weight, log_total):
    ...         return xp.exp(log_total / weight)
    >>> metrics = dm.DistributedMetrics({"growth": GeometricMean()})
    >>> metrics.update(growth=jnp.array([1.0, 10.0, 100.0]))
    >>> round(metrics.compute()["growth"], 5)
    10.0
    """

    fields: ClassVar[Mapping[str, str | Merge]] = {}
    """The accumulated fields, beside ``weight``, and the merge of each."""

    empty: ClassVar[float | None] = float("nan")
    """The result while the total weight is 0; None where the formula holds then too, as it does for a sum."""

    inputs: ClassVar[tuple[str, ...]] = ("value",)
    """What a value consists of: ``("numerator", "denominator")`` where ``update`` takes a pair."""

    counts_copies: ClassVar[bool] = False
    """Whether a value that all devices hold alike would be counted once per device: true of sums and counts."""

    keywords: ClassVar[bool] = False
    """Whether a value is a dict of keywords, which ``contribution`` takes as they are."""

    shape: Any = ()
    name: str | None = field(default=None, kw_only=True)
    labels: Any = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        shape = (self.shape,) if isinstance(self.shape, int) else self.shape
        try:
            object.__setattr__(self, "shape", tuple(map(operator.index, shape)))
        except TypeError as error:
            kind, own = type(self).__name__, [one.name for one in fields(self) if one.name not in _OF_ALL]
            hint = f"\n  It comes first; give settings of your own by keyword: {kind}({own[0]}=...)" if own else ""
            raise TypeError(
                f"{kind}(shape={self.shape!r}): the shape of one element, such as 10 or (10, 3).{hint}"
            ) from error
        if any(size < 1 for size in self.shape):
            raise ValueError(
                f"{type(self).__name__}(shape={self.shape!r}): the shape of one element, of sizes of 1 or more."
            )
        if self.labels is not None:
            object.__setattr__(self, "labels", tuple(self.labels))
            twice = [label for label in self.labels if self.labels.count(label) > 1]
            if twice:
                raise ValueError(
                    f"{self}: the label {twice[0]!r} is there twice, and flat results would keep one of the two: "
                    f"{', '.join(map(repr, self.labels))}.\n  Give each element a label of its own."
                )
            if (len(self.labels),) != self.result_shape()[-1:]:
                raise ValueError(
                    f"{self}: {len(self.labels)} labels for results of shape {self.result_shape()}: "
                    f"{', '.join(map(repr, self.labels))}.\n  Give one label for each element of the last dim."
                )

    def contribution(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """What a batch adds: for each field an array of its shape, or what a reduction of ``Batch`` returned.

        Args:
            *args: the elements and weights that one device sees: one ``Batch`` for each of ``inputs``.
            **kwargs: none.

        Returns:
            The fields by name. ``weight`` may be among them; otherwise it is the sum of the batch's weights.
        """
        raise NotImplementedError(f"{type(self).__name__} must say what a batch adds: def contribution(self, batch)")

    def result(self, *args: Any, **kwargs: Any) -> Any:
        """The number, from merged fields.

        Args:
            *args: ``xp``: ``numpy`` (float64, on the host) or ``jax.numpy`` (float32, in a trace).
            **kwargs: ``weight``, the total weight, and the merged fields by name, each of shape ``(..., *S)``; where
                the merge has several numbers, a tuple of such arrays.

        Returns:
            An array of shape ``(..., *result_shape())``; where ``weight`` is 0, ``empty`` stands instead.
        """
        raise NotImplementedError(f"{type(self).__name__} must say what it results in: def result(self, xp, weight)")

    def field_shape(self, field: str) -> tuple[int, ...]:
        """The shape of one field: S, unless it is overridden."""
        return self.shape

    def result_shape(self) -> tuple[int, ...]:
        """The shape of the result: S, unless it is overridden; its leading dims are S."""
        return self.shape

    def outside(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """What was seen and is not in the result, by name, from the arguments of ``result``: nothing, as a rule.

        Flat results show it where it is not 0, as in ``latency/overflow`` beside the bins of a histogram.
        """
        return {}

    def merges(self) -> dict[str, Merge]:
        """``weight`` and the fields, with their merges.

        Raises:
            ValueError: a merge that does not exist.
        """
        unknown = {name: merge for name, merge in self.fields.items() if isinstance(merge, str) and merge not in MERGES}
        if unknown:
            raise ValueError(
                f"{type(self).__name__}.fields has unknown merges {unknown}.\n"
                f"  Known: {', '.join(map(repr, MERGES))}; or give a distributed_metrics.merging.Merge."
            )
        named = {name: MERGES[merge] if isinstance(merge, str) else merge for name, merge in self.fields.items()}
        return {"weight": SUM, **named}

    def label(self) -> str:
        """The name under which a tuple of accumulators shows this one."""
        return self.name if self.name is not None else type(self).__name__.lower()

    def __str__(self) -> str:
        kind = type(self).__name__.lower()
        return kind if not self.shape else f"{kind}{list(self.shape)}"


def as_numbers(call: str, given: Any) -> np.ndarray:
    """Settings as float64.

    Raises:
        TypeError: they are no numbers.
    """
    try:
        return np.asarray(given, np.float64)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{call}={given!r}): a number, or several.") from error
