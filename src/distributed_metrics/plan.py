"""The static side of an object: its metrics, and where each of their fields lies in the packed state."""

import difflib
import functools
import math
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from distributed_metrics.accumulators import BY_NAME, Accumulator, clu_metric
from distributed_metrics.merging import SUM, Merge

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
class Field:
    """One field of the metrics of a group: their slots lie side by side in one table.

    Attributes:
        merge: how two of them become one; its name is that of the table.
        shape: of one metric's field.
        start: the first slot of the block of ``members * size`` slots.
    """

    merge: Merge
    shape: tuple[int, ...]
    start: int

    @property
    def size(self) -> int:
        """Slots of one metric."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Group:
    """The metrics of one accumulator: computed together, their fields side by side.

    Attributes:
        accumulator: shared by all members.
        members: indices into ``Plan.metrics``.
        fields: ``weight``, the accumulator's own, and ``nonfinite`` where elements that are not finite are counted.
    """

    accumulator: Accumulator
    members: tuple[int, ...]
    fields: Mapping[str, Field]


NONFINITE = "nonfinite"
"""The field that counts the elements which ``nan_policy="ignore"`` left out."""


class Plan:
    """A parsed spec. Equal specs give one and the same object, so that comparing and hashing it cost nothing.

    Attributes:
        metrics: in the order of the user's spec.
        ignores: whether elements that are not finite are left out and counted.
        groups: the same metrics by accumulator.
        tables: how two slots of a table become one, by the table's name; only those in use, in the order of names.
        variables: the attributes of an object that hold these tables.
        slots: how many slots each table has.
        values: for each flat name that ``update`` takes, the indices of its metrics.
    """

    def __init__(self, metrics: tuple[Metric, ...], ignores: bool):
        self.metrics = metrics
        self.ignores = ignores
        self.values: dict[str, tuple[int, ...]] = {}
        by_accumulator: dict[Accumulator, list[int]] = {}
        for i in sorted(range(len(metrics)), key=lambda i: metrics[i].name):
            by_accumulator.setdefault(metrics[i].accumulator, []).append(i)
        for i, metric in enumerate(metrics):
            self.values[metric.value] = (*self.values.get(metric.value, ()), i)
        tables: dict[str, Merge] = {}
        self.slots: dict[str, int] = {}
        self.groups: list[Group] = []
        for accumulator in sorted(by_accumulator, key=lambda a: metrics[by_accumulator[a][0]].name):
            members = tuple(by_accumulator[accumulator])
            fields = {}
            for name, merge in fields_of(accumulator, ignores).items():
                shape = accumulator.shape if name == NONFINITE else accumulator.field_shape(name)
                fields[name] = Field(merge, shape, self.slots.get(merge.name, 0))
                self.slots[merge.name] = fields[name].start + len(members) * fields[name].size
                if tables.setdefault(merge.name, merge) != merge:
                    raise ValueError(
                        f"DistributedMetrics(): {accumulator}: the merge of {name!r} is named {merge.name!r}, and "
                        "another merge has that name.\n  Merges that differ need names of their own."
                    )
            self.groups.append(Group(accumulator, members, fields))
        self.tables = dict(sorted(tables.items()))
        self.variables = tuple(map(variable_of, self.tables))
        self.group_of = {i: group for group in self.groups for i in group.members}

    def tables_of(self, members: Iterable[int]) -> tuple[str, ...]:
        """The names of the tables in which some metrics have fields."""
        return tuple(sorted({field.merge.name for i in members for field in self.group_of[i].fields.values()}))

    def __reduce__(self) -> tuple[Any, ...]:
        return plan_of, (self.metrics, self.ignores)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Plan":
        return self

    def __repr__(self) -> str:
        policy = ', nan_policy="ignore"' if self.ignores else ""
        return f"Plan({', '.join(f'{m.name}={m.accumulator}' for m in self.metrics)}{policy})"


def variable_of(table: str) -> str:
    """The name of the attribute, an ``nnx.Variable``, that holds a table."""
    return f"{table}_rows"


def fields_of(accumulator: Accumulator, ignores: bool) -> dict[str, Merge]:
    """All fields that are accumulated for an accumulator, with their merges."""
    return {**accumulator.merges(), **({NONFINITE: SUM} if ignores else {})}


def learnt_plan(plan: Plan, learnt: Mapping[int, Accumulator]) -> Plan:
    """The plan in which some metrics, by index, have the accumulators that were learnt from their first values."""
    if not learnt:
        return plan
    metrics = (
        Metric(metric.value_path, metric.path, learnt.get(i, metric.accumulator))
        for i, metric in enumerate(plan.metrics)
    )
    return plan_of(tuple(metrics), plan.ignores)


@functools.cache  # never dropped: while an object lives, an equal spec must give its very plan
def plan_of(metrics: tuple[Metric, ...], ignores: bool) -> Plan:
    """The one plan of these metrics."""
    return Plan(metrics, ignores)


def parse(spec: Mapping[str, Any] | None, ignores: bool = False) -> Plan:
    """The plan of ``reduce_fn``: a (nested) mapping of names to what is accumulated.

    Args:
        spec: the mapping.
        ignores: whether elements that are not finite are left out and counted.

    Raises:
        TypeError: a spec that is no mapping, a name that is no string, or something that cannot be accumulated.
        ValueError: a bad name, an unknown operation, or two names that flatten to one.
    """
    if spec is None:
        return plan_of((), ignores)
    if not isinstance(spec, Mapping):
        raise TypeError(
            f"DistributedMetrics() takes a dict of names to what is accumulated, not {type(spec).__name__}: {spec!r}.\n"
            '  For example: DistributedMetrics({"loss": "mean", "tokens": "sum"})'
            + (f"\n  {hint}" if (hint := clu_metric.hint(spec)) else "")
        )
    metrics = tuple(_metrics_of(spec, ()))
    _check_names(metrics)
    for metric in metrics:
        if ignores and metric.accumulator.keywords:
            raise ValueError(
                f'DistributedMetrics(nan_policy="ignore"): {show_path(metric.path)} is {metric.accumulator}, which '
                "sees its values itself: elements cannot be left out for it.\n"
                '  Mask its values by its own arguments, and take nan_policy="propagate" (or two objects).'
            )
    _check_tuples(metrics)
    return plan_of(metrics, ignores)


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
            f"  For example: {str(name)!r}. Of a model's parameters (lists of layers have numbers for names):\n"
            '  {"/".join(map(str, path)): "mean" for path, _ in nnx.to_flat_state(nnx.state(model, nnx.Param))}'
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
    if clu_metric.is_metric_class(what):
        try:
            what = clu_metric.accumulator_of(what)
        except ValueError as error:
            raise ValueError(f"DistributedMetrics(): {show_path(path)}: {error}") from error
    if hint := clu_metric.hint(what):
        raise TypeError(f"DistributedMetrics(): {show_path(path)} is {what!r:.80}.\n  {hint}")
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
    try:
        what.merges()
    except ValueError as error:
        raise ValueError(f"DistributedMetrics(): {show_path(path)}: {error}") from error
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
        if _value_kind(other.accumulator) != _value_kind(metric.accumulator):
            raise ValueError(
                f"DistributedMetrics(): {metric.value!r} is accumulated both as {other.accumulator} and as "
                f"{metric.accumulator}, which take different values.\n  Give them names of their own."
            )


def _value_kind(accumulator: Accumulator) -> Any:
    """Equal for accumulators that read the same values."""
    return accumulator.inputs, accumulator.shape, accumulator.keywords


def show_path(path: tuple[str, ...]) -> str:
    """A path as it is written in code: ``['train']['loss']``."""
    return "".join(f"[{key!r}]" for key in path)


def did_you_mean(name: str, known) -> str:
    """`` Did you mean ...?``, or nothing."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean {near[0]!r}?" if near else ""
