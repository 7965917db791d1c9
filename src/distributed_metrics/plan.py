"""The static side of an object: its metrics, and where each of their fields lies in the packed state."""

import dataclasses
import functools
import inspect
import math
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from distributed_metrics.accumulators import BY_NAME, Accumulator, clu_metric
from distributed_metrics.merging import SUM, Merge
from distributed_metrics.naming import SEPARATOR, did_you_mean, is_element, show_path


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
    def value_name(self) -> str:
        """The flat name of the value."""
        return SEPARATOR.join(self.value_path)

    @property
    def name(self) -> str:
        """The flat name of the result."""
        return SEPARATOR.join(self.path)

    def shows(self, keys: Sequence[str]) -> bool:
        """Whether one of its flat results has these keys behind its name: an element, or what is beside the result."""
        beside = self._is_beside(keys)
        return beside or is_element(keys, self.accumulator.result_shape(), self.accumulator.labels)

    def _is_beside(self, keys: Sequence[str]) -> bool:
        if type(self.accumulator).outside is Accumulator.outside or not keys:
            return False
        zeros = {
            name: np.zeros((len(merge.numbers), *self.accumulator.field_shape(name)))
            for name, merge in self.accumulator.merges().items()
        }
        fields = {name: numbers[0] if len(numbers) == 1 else tuple(numbers) for name, numbers in zeros.items()}
        return keys[-1] in self.accumulator.outside(np, **fields) and is_element(keys[:-1], self.accumulator.shape)


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

    def slots_of(self, members: int) -> slice:
        """The slots of all members of the group, side by side."""
        return slice(self.start, self.start + members * self.size)

    def slots_of_one(self, position: int) -> slice:
        """The slots of the member at a position in the group."""
        start = self.start + position * self.size
        return slice(start, start + self.size)


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
        results: for each flat name of a result, the index of its metric.
    """

    def __init__(self, metrics: tuple[Metric, ...], ignores: bool):
        self.metrics = metrics
        self.ignores = ignores
        self.results = {metric.name: i for i, metric in enumerate(metrics)}
        self.values: dict[str, tuple[int, ...]] = {}
        by_accumulator: dict[Accumulator, list[int]] = {}
        for i in sorted(range(len(metrics)), key=lambda i: metrics[i].name):
            by_accumulator.setdefault(metrics[i].accumulator, []).append(i)
        for i, metric in enumerate(metrics):
            self.values[metric.value_name] = (*self.values.get(metric.value_name, ()), i)
        tables: dict[str, Merge] = {}
        self.slots: dict[str, int] = {}
        self.groups: list[Group] = []
        for accumulator in sorted(by_accumulator, key=lambda a: metrics[by_accumulator[a][0]].name):
            members = tuple(by_accumulator[accumulator])
            fields = {}
            for name, merge in fields_of(accumulator, ignores).items():
                shape = accumulator.shape if name == NONFINITE else accumulator.field_shape(name)
                fields[name] = Field(merge, shape, self.slots.get(merge.name, 0))
                self.slots[merge.name] = fields[name].slots_of(len(members)).stop
                if tables.setdefault(merge.name, merge) != merge:
                    raise ValueError(
                        f"DistributedMetrics(): {accumulator}: the merge of {name!r} is named {merge.name!r}, and "
                        "another merge has that name.\n  Merges that differ need names of their own."
                    )
            self.groups.append(Group(accumulator, members, fields))
        self.tables = dict(sorted(tables.items()))
        self.variables = tuple(map(variable_of, self.tables))
        self.group_of = {i: group for group in self.groups for i in group.members}

    def shows(self, name: str) -> bool:
        """Whether flat results have a number of this name, that of an element included."""
        return _shown_by(name, {metric.name: metric for metric in self.metrics}) is not None

    def tables_of(self, members: Iterable[int]) -> tuple[str, ...]:
        """The names of the tables in which some metrics have fields."""
        return tuple(sorted({field.merge.name for i in members for field in self.group_of[i].fields.values()}))

    def __reduce__(self) -> tuple[Any, ...]:
        return plan_of, (self.metrics, self.ignores)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Plan":
        return self

    def __repr__(self) -> str:
        policy = ', nan_policy="ignore"' if self.ignores else ""
        return f"Plan({', '.join(f'{m.name}={_shown(m.accumulator)}' for m in self.metrics)}{policy})"


def _shown(accumulator: Accumulator) -> str:
    """Of two plans that differ before and after a first update, JAX shows both, as in the carry of a scan."""
    learns = isinstance(accumulator, clu_metric.CluMetric) and accumulator.learnt is None
    return f"{accumulator}{' (before its first update: update it once, then reset(), before a scan)' if learns else ''}"


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


def _metrics_of(spec: Mapping[str, Any], outer: tuple[str, ...]) -> Iterator[Metric]:
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
                f"  Known: {', '.join(map(repr, BY_NAME))}.{_meant(what)}\n"
                "  Others have settings: Quantile(0.5), Histogram(edges)."
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
            f"  Make one: {what.__name__}({', '.join(_required(what))})"
        )
    if not isinstance(what, Accumulator):
        raise TypeError(
            f"DistributedMetrics(): {show_path(path)} is {what!r} ({type(what).__name__}), which cannot be "
            f"accumulated.\n  Give one of {', '.join(map(repr, BY_NAME))}, an Accumulator, or a tuple of these."
        )
    if unseen := _unseen_settings(what):
        kind = type(what).__name__
        raise TypeError(
            f"DistributedMetrics(): {show_path(path)}: {kind} has the attribute {unseen[0]!r}, which is no field of a "
            "dataclass: two of them that differ in it would be taken for one.\n"
            f"  Declare it: @dataclass(frozen=True) class {kind}(Accumulator): {unseen[0]}: float = 0.0"
        )
    try:
        hash(what)
    except TypeError as error:
        raise TypeError(
            f"DistributedMetrics(): the accumulator of {show_path(path)} cannot be hashed ({error}).\n"
            "  Make its class a frozen dataclass whose fields are numbers, strings and tuples."
        ) from error
    for label in what.labels or ():
        if not isinstance(label, str):
            raise TypeError(
                f"DistributedMetrics(): a label of {show_path(path)} must be a string, got {label!r} "
                f"({type(label).__name__}).\n  For example: labels={tuple(map(str, what.labels))}"
            )
        checked_name(label, path)
    try:
        what.merges()
    except ValueError as error:
        raise ValueError(f"DistributedMetrics(): {show_path(path)}: {error}") from error
    return what


def _unseen_settings(accumulator: Accumulator) -> list[str]:
    """Attributes that an ``__init__`` of a user's own has set, where that of a dataclass would have made fields."""
    if not any(
        "__init__" in vars(one) and "__dataclass_params__" not in vars(one) for one in type(accumulator).mro()[:-1]
    ):
        return []
    fields = {one.name for one in dataclasses.fields(accumulator)}
    return [name for name in vars(accumulator) if name not in fields and not hasattr(type(accumulator), name)]


_MEANT = {"average": "'mean'", "avg": "'mean'", "median": "Quantile(0.5)", "p50": "Quantile(0.5)", "variance": "'var'"}


def _meant(operation: str) -> str:
    return f" Did you mean {_MEANT[operation]}?" if operation in _MEANT else did_you_mean(operation, BY_NAME)


def _required(accumulator: type) -> list[str]:
    parameters = inspect.signature(accumulator).parameters.values()
    return [one.name for one in parameters if one.default is one.empty and one.kind is one.POSITIONAL_OR_KEYWORD]


def _check_names(metrics: tuple[Metric, ...]) -> None:
    """No two results, and no two values, may have one flat name."""
    results: dict[str, tuple[str, ...]] = {}
    values: dict[str, tuple[str, ...]] = {}
    for metric in metrics:
        result_clash = results.get(metric.name)
        value_clash = values.setdefault(metric.value_name, metric.value_path)
        if result_clash is not None or value_clash != metric.value_path:
            name, one = (metric.name, result_clash) if result_clash is not None else (metric.value_name, value_clash)
            other = metric.path if result_clash is not None else metric.value_path
            raise ValueError(
                f"DistributedMetrics(): two metrics flatten to one name, {name!r}: "
                f"{show_path(one)} and {show_path(other)}.\n"
                f"  {'Rename one of them' if one != other else 'Once is enough'}."
            )
        results[metric.name] = metric.path
    by_name = {metric.name: metric for metric in metrics}
    for metric in metrics:
        shown_by = _shown_by(metric.name, by_name, of_elements=True)
        if shown_by is not None:
            raise ValueError(
                f"DistributedMetrics(): two results flatten to one name, {metric.name!r}: one of those of "
                f"{show_path(shown_by.path)}, {shown_by.accumulator}, and {show_path(metric.path)}.\n"
                "  Rename one of them."
            )


def _shown_by(name: str, metrics: Mapping[str, Metric], of_elements: bool = False) -> Metric | None:
    """Of metrics by flat name, the one that has a flat result of this name; ``of_elements``: not for its own name."""
    keys = name.split(SEPARATOR)
    for i in range(len(keys) - of_elements, 0, -1):
        metric = metrics.get(SEPARATOR.join(keys[:i]))
        if metric is not None and metric.shows(keys[i:]):
            return metric
    return None


def _check_tuples(metrics: tuple[Metric, ...]) -> None:
    """A tuple's members read one value, so they must take the same inputs and shape."""
    first: dict[str, Metric] = {}
    for metric in metrics:
        other = first.setdefault(metric.value_name, metric)
        if _value_kind(other.accumulator) != _value_kind(metric.accumulator):
            raise ValueError(
                f"DistributedMetrics(): {metric.value_name!r} is accumulated both as {other.accumulator} and as "
                f"{metric.accumulator}, which take different values.\n  Give them names of their own."
            )


def _value_kind(accumulator: Accumulator) -> Any:
    """Equal for accumulators that read the same values."""
    return accumulator.inputs, accumulator.shape, accumulator.keywords
