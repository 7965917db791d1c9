"""The static side of an object: its metrics, and where each of their fields lies in the packed state."""

import difflib
import functools
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from distributed_metrics.accumulators import BY_NAME, Accumulator
from distributed_metrics.merging import MERGES

SEPARATOR = "/"


@dataclass(frozen=True)
class Metric:
    """One accumulated number (or vector).

    Attributes:
        value_path: the keys of the value that ``update`` takes for it, from the outermost.
        path: its keys in a snapshot: the same, or one more for a member of a tuple.
        accumulator: what is accumulated.
    """

    value_path: tuple[str, ...]
    path: tuple[str, ...]
    accumulator: Accumulator

    @property
    def value(self) -> str:
        """The flat name of the value."""
        return SEPARATOR.join(self.value_path)

    @property
    def name(self) -> str:
        """The flat name of the result."""
        return SEPARATOR.join(self.path)


@dataclass(frozen=True)
class Group:
    """The metrics of one accumulator: computed together, their fields side by side.

    Attributes:
        accumulator: shared by all members.
        members: indices into ``Plan.metrics``.
        starts: for each field, the first slot of the block of ``len(members) * size`` slots in its table.
        size: slots of one field of one member: the product of the accumulator's ``shape``.
    """

    accumulator: Accumulator
    members: tuple[int, ...]
    starts: Mapping[str, int]
    size: int


class Plan:
    """A parsed spec. Equal specs give one and the same object, so that comparing and hashing it cost nothing.

    Attributes:
        metrics: in the order of the user's spec.
        groups: the same metrics by accumulator.
        slots: how many slots each table has, by the name of its merge; tables without slots are absent.
        values: for each flat name that ``update`` takes, the indices of its metrics.
    """

    def __init__(self, metrics: tuple[Metric, ...]):
        self.metrics = metrics
        self.values: dict[str, tuple[int, ...]] = {}
        by_accumulator: dict[Accumulator, list[int]] = {}
        for i in sorted(range(len(metrics)), key=lambda i: metrics[i].name):
            by_accumulator.setdefault(metrics[i].accumulator, []).append(i)
        for i, metric in enumerate(metrics):
            self.values[metric.value] = (*self.values.get(metric.value, ()), i)
        self.slots: dict[str, int] = {}
        self.groups: list[Group] = []
        for accumulator in sorted(by_accumulator, key=lambda a: metrics[by_accumulator[a][0]].name):
            members = tuple(by_accumulator[accumulator])
            size = int(np.prod(accumulator.shape, dtype=np.int64))
            starts = {}
            for field, merge in accumulator.all_fields().items():
                starts[field] = self.slots.get(merge, 0)
                self.slots[merge] = starts[field] + len(members) * size
            self.groups.append(Group(accumulator, members, starts, size))

    def __reduce__(self) -> tuple[Any, ...]:
        return _plan_of, (self.metrics,)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Plan":
        return self

    def __repr__(self) -> str:
        return f"Plan({', '.join(f'{m.name}={m.accumulator}' for m in self.metrics)})"


@functools.cache  # never dropped: while an object lives, an equal spec must give its very plan
def _plan_of(metrics: tuple[Metric, ...]) -> Plan:
    return Plan(metrics)


def parse(spec: Mapping[str, Any] | None) -> Plan:
    """The plan of ``reduce_fn``: a (nested) mapping of names to what is accumulated.

    Raises:
        TypeError: a spec that is no mapping, a name that is no string, or something that cannot be accumulated.
        ValueError: a bad name, an unknown operation, or two names that flatten to one.
    """
    if spec is None:
        return _plan_of(())
    if not isinstance(spec, Mapping):
        raise TypeError(
            f"DistributedMetrics() takes a dict of names to what is accumulated, not {type(spec).__name__}: {spec!r}.\n"
            '  For example: DistributedMetrics({"loss": "mean", "tokens": "sum"})'
        )
    metrics = tuple(_metrics_of(spec, ()))
    _check_names(metrics)
    _check_tuples(metrics)
    return _plan_of(metrics)


def _metrics_of(spec: Mapping[str, Any], outer: tuple[str, ...]):
    for name, what in spec.items():
        path = (*outer, checked_name(name, outer))
        if isinstance(what, Mapping):
            yield from _metrics_of(what, path)
        elif isinstance(what, tuple | list):
            if not what:
                raise ValueError(f"DistributedMetrics(): {show_path(path)} is an empty tuple: nothing to accumulate.")
            for one in what:
                accumulator = _accumulator_of(one, path)
                yield Metric(path, (*path, checked_name(accumulator.label(), path)), accumulator)
        else:
            yield Metric(path, path, _accumulator_of(what, path))


def checked_name(name: Any, outer: tuple[str, ...]) -> str:
    """``name``, if it can name a metric.

    Raises:
        TypeError: it is no string.
        ValueError: it is empty or holds control characters.
    """
    where = f" in {show_path(outer)}" if outer else ""
    if not isinstance(name, str):
        raise TypeError(
            f"DistributedMetrics(): a metric's name must be a string, got {name!r} ({type(name).__name__}){where}.\n"
            f"  For example: {str(name)!r}"
        )
    if not name.strip():
        raise ValueError(f"DistributedMetrics(): a metric's name is empty ({name!r}){where}.")
    control = [c for c in name if unicodedata.category(c) in ("Cc", "Zl", "Zp", "Cs")]
    if control:
        clean = "".join(c for c in name if c not in control)
        raise ValueError(
            f"DistributedMetrics(): the name {name!r}{where} holds the control character {control[0]!r}, which could "
            f"forge lines in a log.\n  For example: {clean!r}"
        )
    return name


def _accumulator_of(what: Any, path: tuple[str, ...]) -> Accumulator:
    if isinstance(what, str):
        if what not in BY_NAME:
            raise ValueError(
                f"DistributedMetrics(): {show_path(path)} asks for {what!r}, which is no known operation.\n"
                f"  Known: {', '.join(map(repr, BY_NAME))}.{did_you_mean(what, BY_NAME)}"
            )
        return BY_NAME[what]()
    if isinstance(what, type) and issubclass(what, Accumulator):
        raise TypeError(
            f"DistributedMetrics(): {show_path(path)} is the class {what.__name__}, not an accumulator.\n"
            f"  Make one: {what.__name__}()"
        )
    if not isinstance(what, Accumulator):
        raise TypeError(
            f"DistributedMetrics(): {show_path(path)} is {what!r} ({type(what).__name__}), which cannot be "
            f"accumulated.\n  Give one of {', '.join(map(repr, BY_NAME))}, an Accumulator, or a tuple of these."
        )
    try:
        hash(what)
    except TypeError as error:
        raise TypeError(
            f"DistributedMetrics(): the accumulator of {show_path(path)} cannot be hashed ({error}).\n"
            "  Make its class a frozen dataclass whose fields are numbers, strings and tuples."
        ) from error
    for label in what.labels or ():
        checked_name(label, path)
    unknown = {field: merge for field, merge in what.all_fields().items() if merge not in MERGES}
    if unknown:
        raise ValueError(
            f"DistributedMetrics(): {show_path(path)}, {type(what).__name__}: unknown merges {unknown}.\n"
            f"  Known: {', '.join(map(repr, MERGES))}."
        )
    return what


def _check_names(metrics: tuple[Metric, ...]) -> None:
    """No two results, and no two values, may have one flat name."""
    results: dict[str, tuple[str, ...]] = {}
    values: dict[str, tuple[str, ...]] = {}
    for metric in metrics:
        result_clash = results.get(metric.name)
        value_clash = values.setdefault(metric.value, metric.value_path)
        if result_clash is not None or value_clash != metric.value_path:
            name, one = (metric.name, result_clash) if result_clash is not None else (metric.value, value_clash)
            other = metric.path if result_clash is not None else metric.value_path
            raise ValueError(
                f"DistributedMetrics(): two metrics flatten to one name, {name!r}: "
                f"{show_path(one)} and {show_path(other)}.\n"
                f"  {'Rename one of them' if one != other else 'Once is enough'}."
            )
        results[metric.name] = metric.path


def _check_tuples(metrics: tuple[Metric, ...]) -> None:
    """A tuple's members read one value, so they must take the same inputs and shape."""
    first: dict[str, Metric] = {}
    for metric in metrics:
        other = first.setdefault(metric.value, metric)
        if other.accumulator.inputs != metric.accumulator.inputs or other.accumulator.shape != metric.accumulator.shape:
            raise ValueError(
                f"DistributedMetrics(): {metric.value!r} is accumulated both as {other.accumulator} and as "
                f"{metric.accumulator}, which take different values.\n  Give them names of their own."
            )


def show_path(path: tuple[str, ...]) -> str:
    """A path as it is written in code: ``['train']['loss']``."""
    return "".join(f"[{key!r}]" for key in path)


def did_you_mean(name: str, known) -> str:
    """`` Did you mean ...?``, or nothing."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean {near[0]!r}?" if near else ""
