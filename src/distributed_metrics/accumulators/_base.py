"""What an accumulator is: a few fields, each with a named merge; a contribution; a result."""

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar


@dataclass(frozen=True)
class Accumulator:
    """What is accumulated of one value: the base class of all accumulators, for your own as well.

    A subclass names its ``fields`` (each with the merge that joins two of them, ``"sum"`` or ``"max"``), says what a
    batch contributes to them, and what number they make in the end. One more field, ``weight``, is always there: the
    total weight seen, of merge ``"sum"``.

    Args:
        shape: the shape S of one element, ``()`` for scalars; 10 is short for ``(10,)``. Values then have shape
            ``(..., *S)``, and results shape S: a vector per class or per layer.
        name: the name of the result in a tuple of accumulators; by default that of the class, in lower case.
        labels: names for the elements of a vector, in flat results; by default their numbers.

    Raises:
        ValueError: not as many labels as elements.

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

    fields: ClassVar[Mapping[str, str]] = {}
    """The accumulated fields, beside ``weight``, and the merge of each."""

    empty: ClassVar[float | None] = float("nan")
    """The result while the total weight is 0; None where the formula holds then too, as it does for a sum."""

    inputs: ClassVar[tuple[str, ...]] = ("value",)
    """What a value consists of: ``("numerator", "denominator")`` where ``update`` takes a pair."""

    counts_copies: ClassVar[bool] = False
    """Whether a value that all devices hold alike would be counted once per device: true of sums and counts."""

    shape: Any = ()
    name: str | None = field(default=None, kw_only=True)
    labels: Any = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        shape = (self.shape,) if isinstance(self.shape, int) else self.shape
        object.__setattr__(self, "shape", tuple(map(operator.index, shape)))
        if self.labels is not None:
            object.__setattr__(self, "labels", tuple(self.labels))
            if (len(self.labels),) != self.shape:
                raise ValueError(
                    f"{type(self).__name__}(shape={self.shape}): {len(self.labels)} labels for that shape: "
                    f"{', '.join(map(repr, self.labels))}.\n  Give a vector one label for each element."
                )

    def contribution(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """What a batch adds: for each field an array of shape S, or what a reduction of ``Batch`` returned.

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
            **kwargs: ``weight``, the total weight, and the merged fields by name, each of shape ``(..., *S)``.

        Returns:
            An array of that shape; where ``weight`` is 0, ``empty`` stands instead.
        """
        raise NotImplementedError(f"{type(self).__name__} must say what it results in: def result(self, xp, weight)")

    def all_fields(self) -> dict[str, str]:
        """``weight`` and the fields, with their merges."""
        return {"weight": "sum", **self.fields}

    def label(self) -> str:
        """The name under which a tuple of accumulators shows this one."""
        return self.name if self.name is not None else type(self).__name__.lower()

    def __str__(self) -> str:
        kind = type(self).__name__.lower()
        return kind if not self.shape else f"{kind}{list(self.shape)}"
