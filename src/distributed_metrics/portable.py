"""Snapshots as dicts of numeric arrays, which any checkpoint can hold, and back.

The dict has three entries: ``format_version``; ``spec``, the spec as JSON in UTF-8 bytes; and ``metrics``, the merged
fields of each metric by its flat name, each an array ``(..., *shape, words)`` of float32. The two words of a number add
up to it exactly, and unlike float64 they go through every library unharmed.
"""

import dataclasses
import functools
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from distributed_metrics import accumulators
from distributed_metrics.accumulators import Accumulator, CluMetric, clu_metric
from distributed_metrics.accumulators.clu_metric import ADDED
from distributed_metrics.merging import BINS, Merge, Number
from distributed_metrics.plan import Metric, Plan, fields_of, learnt_plan, plan_of

FORMAT_VERSION = 1

_OURS = {
    kind.__name__.lower(): kind
    for kind in (getattr(accumulators, name) for name in accumulators.__all__)
    if isinstance(kind, type) and issubclass(kind, Accumulator) and kind not in (Accumulator, CluMetric)
}

_KNOWN_MERGES = {
    merge.name: merge
    for accumulator in (kind() for kind in accumulators.BY_NAME.values())
    for merge in (*accumulator.merges().values(), BINS, ADDED)
}


@functools.cache
def _stored_merge(name: str, words: str) -> Merge:
    """The merge of a stored field; one that is not ours can be kept, and not applied.

    Args:
        name: of the merge.
        words: for each of its numbers "2" or "1": the words that it takes.
    """

    def unknown(a: Any, b: Any) -> Any:
        raise TypeError(
            f"This snapshot was read from a dict, which does not hold the code of the merge {name!r}.\n"
            "  Merge it into an object that has it: metrics = DistributedMetrics({...}); metrics.merge(snapshot)"
        )

    numbers = tuple(Number(f"number {i}", pair=word == "2") for i, word in enumerate(words))
    return _KNOWN_MERGES.get(name) or Merge(name, numbers, unknown, unknown)


@dataclasses.dataclass(frozen=True)
class Stored(Accumulator):
    """An accumulator of a class that is not ours: its state is here, its formula is not.

    Attributes:
        kind: the full name of the class.
        settings: its arguments, as JSON.
        stored: for each field its name, merge, words of the merge, and shape.
        shape_of_result: of its results.
    """

    kind: str = ""
    settings: str = "{}"
    stored: tuple[tuple[str, str, str, tuple[int, ...]], ...] = ()
    shape_of_result: tuple[int, ...] = ()

    def merges(self) -> dict[str, Merge]:
        return {name: _stored_merge(merge, words) for name, merge, words, _ in self.stored}

    def field_shape(self, field: str) -> tuple[int, ...]:
        return next(shape for name, _, _, shape in self.stored if name == field)

    def result_shape(self) -> tuple[int, ...]:
        return self.shape_of_result

    def result(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(
            f"This snapshot was read from a dict, which does not hold the code of {self.kind}.\n"
            "  Merge it into an object that has it: metrics = DistributedMetrics({...}); metrics.merge(snapshot)"
        )

    def __str__(self) -> str:
        return f"{self.kind}{self.settings if self.settings != '{}' else ''}"


def describe(plan: Plan) -> dict[str, Any]:
    """The spec of a plan, in JSON's types; equal for plans that accumulate the same."""
    return {
        "nan_policy": "ignore" if plan.ignores else "propagate",
        "metrics": [
            {"value": list(metric.value_path), "path": list(metric.path), **_describe(metric.accumulator)}
            for metric in plan.metrics
        ],
    }


def _describe(accumulator: Accumulator) -> dict[str, Any]:
    fields = []
    for name, merge in fields_of(accumulator, False).items():
        words = "".join("2" if number.pair else "1" for number in merge.numbers)
        fields.append([name, merge.name, words, list(accumulator.field_shape(name))])
    kind = type(accumulator)
    settings: dict[str, Any]
    if isinstance(accumulator, Stored):
        of_its_own = {"shape": list(accumulator.shape), "result": list(accumulator.shape_of_result)}
        settings = json.loads(accumulator.settings)
        return {"kind": accumulator.kind, "settings": settings, "fields": fields, **of_its_own}
    if isinstance(accumulator, CluMetric):
        name = accumulator.full_name
        settings = {} if accumulator.learnt is None else {"learnt": clu_metric.describe(accumulator.learnt)}
    else:
        name = kind.__name__.lower()
        if _OURS.get(name) is not kind:
            name = f"{kind.__module__}.{kind.__qualname__}"
        settings = {
            one.name: _plain(getattr(accumulator, one.name))
            for one in dataclasses.fields(accumulator)
            if one.name not in ("name", "labels") and getattr(accumulator, one.name) != one.default
        }
    for label in ("name", "labels"):
        if (given := getattr(accumulator, label)) is not None:
            settings[label] = _plain(given)
    if name in _OURS:
        return {"kind": name, "settings": settings, "fields": fields}
    of_its_own = {"shape": list(accumulator.shape), "result": list(accumulator.result_shape())}
    return {"kind": name, "settings": settings, "fields": fields, **of_its_own}


def _plain(setting: Any) -> Any:
    if isinstance(setting, tuple | list):
        return [_plain(one) for one in setting]
    if isinstance(setting, np.generic):
        return setting.item()
    if isinstance(setting, str | int | float | bool | None):
        return setting
    if callable(setting):  # its repr would show an address
        return f"{setting.__module__}.{getattr(setting, '__qualname__', type(setting).__qualname__)}"
    return repr(setting)


def _rebuilt(described: Mapping[str, Any]) -> Accumulator:
    settings: dict[str, Any] = {
        name: tuple(setting) if isinstance(setting, list) else setting
        for name, setting in described["settings"].items()
    }
    if described["kind"] in _OURS:
        return _OURS[described["kind"]](**settings)
    stored = tuple((name, merge, words, tuple(shape)) for name, merge, words, shape in described["fields"])
    labels: dict[str, Any] = {name: settings[name] for name in ("name", "labels") if name in settings}
    shape, result = tuple(described["shape"]), tuple(described["result"])
    return Stored(shape, described["kind"], json.dumps(described["settings"]), stored, result, **labels)


def to_dict(plan: Plan, parts: Mapping[str, tuple[np.ndarray, ...]]) -> dict[str, Any]:
    """A merged snapshot as a dict of arrays.

    Args:
        plan: of the snapshot.
        parts: each table in words, arrays ``(..., slots)``.
    """
    metrics: dict[str, Any] = {metric.name: {} for metric in plan.metrics}
    for group in plan.groups:
        for name, field in group.fields.items():
            words = np.stack(parts[field.merge.name], axis=-1)
            for k, i in enumerate(group.members):
                start = field.start + k * field.size
                of_one = words[..., start : start + field.size, :]
                shape = (*words.shape[:-2], *field.shape, words.shape[-1])
                metrics[plan.metrics[i].name][name] = np.ascontiguousarray(of_one.reshape(shape))
    spec = np.frombuffer(json.dumps(describe(plan)).encode(), np.uint8)
    return {"format_version": np.asarray(FORMAT_VERSION, np.int32), "spec": spec.copy(), "metrics": metrics}


def from_dict(given: Mapping[str, Any]) -> tuple[Plan, dict[str, tuple[np.ndarray, ...]]]:
    """The plan and the tables of what ``to_dict`` gave, with arrays or lists as leaves.

    Raises:
        TypeError: no mapping.
        ValueError: not such a dict, or one of a newer format; metrics or fields that are missing, of no meaning, or of
            another shape than the spec says.
    """
    if not isinstance(given, Mapping):
        raise TypeError(f"Snapshot.from_dict() takes what to_dict() gave, got {type(given).__name__}.")
    expected = ("format_version", "metrics", "spec")
    if set(given) != set(expected):
        raise ValueError(
            f"Snapshot.from_dict(): this is not what to_dict() gives.\n"
            f"  It has:   {', '.join(sorted(map(repr, given)))}\n  Expected: {', '.join(map(repr, expected))}"
        )
    version = _version(given["format_version"])
    if version > FORMAT_VERSION:
        raise ValueError(
            f"Snapshot.from_dict(): the format version is {version}, and this library reads up to {FORMAT_VERSION}: a "
            "newer one wrote it.\n  Upgrade: pip install --upgrade distributed-metrics"
        )
    plan = _plan_of(given["spec"])
    return plan, _tables_of(plan, given["metrics"])


def _version(given: Any) -> int:
    try:
        version = int(np.asarray(given).item())
    except (TypeError, ValueError) as error:
        raise ValueError(f"Snapshot.from_dict(): the format version is no number: {given!r:.80}.") from error
    if version < 1:
        raise ValueError(f"Snapshot.from_dict(): there is no format version {version}; the first is 1.")
    return version


def _plan_of(spec: Any) -> Plan:
    try:
        described = json.loads(np.asarray(spec, np.uint8).tobytes().decode())
        metrics = tuple(Metric(tuple(m["value"]), tuple(m["path"]), _rebuilt(m)) for m in described["metrics"])
        return plan_of(metrics, described["nan_policy"] == "ignore")
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:  # damaged bytes may say anything
        raise ValueError(
            f"Snapshot.from_dict(): its spec is damaged: {type(error).__name__}: {error}.\n"
            "  It is what to_dict() wrote under 'spec': JSON as bytes, an array of uint8."
        ) from error


def _tables_of(plan: Plan, metrics: Mapping[str, Any]) -> dict[str, tuple[np.ndarray, ...]]:
    _same_names("metrics", [metric.name for metric in plan.metrics], metrics)
    lead: tuple[int, ...] | None = None
    tables: dict[str, list[np.ndarray]] = {table: [] for table in plan.tables}
    for group in plan.groups:
        for i in group.members:
            _same_names(f"fields of {plan.metrics[i].name!r}", list(group.fields), metrics[plan.metrics[i].name])
        for name, field in group.fields.items():
            for i in group.members:
                words = _numbers(plan.metrics[i].name, name, metrics[plan.metrics[i].name][name])
                shape = (*field.shape, field.merge.words)
                lead = words.shape[: words.ndim - len(shape)] if lead is None else lead
                if words.shape != (*lead, *shape):
                    raise ValueError(
                        f"Snapshot.from_dict(): the field {name!r} of {plan.metrics[i].name!r} has the shape "
                        f"{words.shape}, and its spec says {(*lead, *shape)}."
                    )
                tables[field.merge.name].append(words.reshape(*lead, field.size, field.merge.words))
    return {
        table: tuple(np.moveaxis(np.concatenate(words, axis=-2), -1, 0)) for table, words in tables.items() if words
    }


def _numbers(metric: str, field: str, given: Any) -> np.ndarray:
    try:
        return np.asarray(given, np.float32)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"Snapshot.from_dict(): the field {field!r} of {metric!r} is no array of numbers: {given!r:.80}."
        ) from error


def _same_names(what: str, expected: list[str], given: Any) -> None:
    if not isinstance(given, Mapping):
        raise ValueError(f"Snapshot.from_dict(): the {what} are no dict: {given!r:.80}.")
    missing, extra = [name for name in expected if name not in given], [name for name in given if name not in expected]
    if missing or extra:
        raise ValueError(
            f"Snapshot.from_dict(): the {what} are not those of its spec.\n"
            f"  Missing: {', '.join(map(repr, missing)) or 'none'}\n  Extra:   {', '.join(map(repr, extra)) or 'none'}"
        )


def reconciled(mine: Plan, theirs: Plan) -> Plan:
    """The one plan of two that accumulate the same: with the classes, and with what was learnt, that either has.

    Raises:
        ValueError: they do not accumulate the same; the message shows what differs, the first plan's side first.
    """
    if mine is theirs:
        return mine
    both: dict[int, Accumulator] = {}
    if [(m.value_path, m.path) for m in mine.metrics] == [(m.value_path, m.path) for m in theirs.metrics]:
        for i, (a, b) in enumerate(zip(mine.metrics, theirs.metrics, strict=True)):
            if (common := _common(a.accumulator, b.accumulator)) is not None:
                both[i] = common
    if len(both) < len(mine.metrics) or mine.ignores != theirs.ignores:
        raise ValueError(_difference(mine, theirs))
    return learnt_plan(mine, both)


def _common(a: Accumulator, b: Accumulator) -> Accumulator | None:
    """The accumulator that two are, one of which may be stored or not have learnt yet; None where they differ."""
    if isinstance(a, Stored) and not isinstance(b, Stored):
        a, b = b, a
    described_a, described_b = _describe(a), _describe(b)
    if json.dumps(described_a) == json.dumps(described_b):  # where NaN is NaN
        return a
    if isinstance(a, Stored) and isinstance(b, Stored) and described_a["kind"] == described_b["kind"]:
        # One may be from before a clu metric had learnt, which is then all that differs.
        of_a, of_b = (described["settings"].pop("learnt", None) for described in (described_a, described_b))
        if (of_a is None) != (of_b is None) and described_a["settings"] == described_b["settings"]:
            return a if of_b is None else b
        return None
    if isinstance(a, CluMetric) and described_a["kind"] == described_b["kind"]:
        if "learnt" not in described_b["settings"]:
            return a
        if a.learnt is None:
            return b if isinstance(b, CluMetric) else clu_metric.relearn(a, described_b["settings"]["learnt"])
    return None


def _difference(mine: Plan, theirs: Plan) -> str:
    """What two specs do not share, both sides of it."""
    lines = []
    if mine.ignores != theirs.ignores:
        policies = ["ignore" if plan.ignores else "propagate" for plan in (mine, theirs)]
        lines.append(f"  nan_policy: {policies[0]!r} and {policies[1]!r}")
    of_a, of_b = ({metric.name: metric for metric in plan.metrics} for plan in (mine, theirs))
    for label, names in (
        ("only the first has", [name for name in of_a if name not in of_b]),
        ("only the second has", [name for name in of_b if name not in of_a]),
    ):
        if names:
            shown = ", ".join(map(repr, names[:10])) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
            lines.append(f"  {label} {shown}")
    for name in of_a:
        if name in of_b:
            x, y = of_a[name], of_b[name]
            if (x.value_path, x.path) != (y.value_path, y.path) or _common(x.accumulator, y.accumulator) is None:
                lines.append(f"  {name!r}: {_shown(x)} and {_shown(y)}")
    if not lines:
        lines.append(f"  the metrics are the same, in another order: {', '.join(of_a)} and {', '.join(of_b)}")
    return "\n".join(lines)


def _shown(metric: Metric) -> str:
    described = _describe(metric.accumulator)
    settings = ", ".join(f"{name}={setting!r}" for name, setting in described["settings"].items())
    nested = "" if metric.path == metric.value_path and len(metric.path) == 1 else f" at {list(metric.path)}"
    nested += f" of a tuple at {list(metric.value_path)}" if metric.path != metric.value_path else ""
    return f"{described['kind']}({settings}){nested}"
