"""Snapshots as dicts of numeric arrays, which any checkpoint can hold, and back.

The dict has three entries: ``format_version``; ``spec``, the spec as JSON in UTF-8 bytes; and ``metrics``, the merged
fields of each metric by its flat name, each an array ``(..., *shape, words)`` of float32. The two words of a number add
up to it exactly, and unlike float64 they go through every library unharmed.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from distributed_metrics import accumulators
from distributed_metrics.accumulators import Accumulator
from distributed_metrics.merging import BINS, MERGES, Merge
from distributed_metrics.plan import Metric, Plan, fields_of, plan_of

FORMAT_VERSION = 1

_OURS = {
    kind.__name__.lower(): kind
    for kind in (getattr(accumulators, name) for name in accumulators.__all__)
    if isinstance(kind, type) and issubclass(kind, Accumulator) and kind is not Accumulator
}

_STORED_MERGES = {
    merge.name: merge for merge in (*MERGES.values(), BINS, *accumulators.Var().merges().values(),
                                    *accumulators.Last().merges().values())
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Stored(Accumulator):
    """An accumulator of a class that is not ours: its state is here, its formula is not.

    Attributes:
        kind: the full name of the class.
        settings: its arguments, as JSON.
        stored: for each field its name, merge and shape.
    """

    kind: str = ""
    settings: str = "{}"
    stored: tuple[tuple[str, str, tuple[int, ...]], ...] = ()

    def merges(self) -> dict[str, Merge]:
        return {name: _STORED_MERGES[merge] for name, merge, _ in self.stored}

    def field_shape(self, field: str) -> tuple[int, ...]:
        return next(shape for name, _, shape in self.stored if name == field)

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
    fields = [
        [name, merge.name, list(accumulator.field_shape(name))] for name, merge in fields_of(accumulator, False).items()
    ]
    if isinstance(accumulator, Stored):
        return {"kind": accumulator.kind, "settings": json.loads(accumulator.settings), "fields": fields}
    kind = type(accumulator)
    name = kind.__name__.lower()
    if _OURS.get(name) is not kind:
        name = f"{kind.__module__}.{kind.__qualname__}"
    settings: dict[str, Any] = {
        one.name: _plain(getattr(accumulator, one.name))
        for one in dataclasses.fields(accumulator)
        if getattr(accumulator, one.name) != one.default
    }
    return {"kind": name, "settings": settings, "fields": fields}


def _plain(setting: Any) -> Any:
    if isinstance(setting, tuple | list):
        return [_plain(one) for one in setting]
    return setting if isinstance(setting, str | int | float | bool | None) else repr(setting)


def _rebuilt(described: Mapping[str, Any]) -> Accumulator:
    settings: dict[str, Any] = {
        name: tuple(setting) if isinstance(setting, list) else setting
        for name, setting in described["settings"].items()
    }
    if described["kind"] in _OURS:
        return _OURS[described["kind"]](**settings)
    unknown = {merge for _, merge, _ in described["fields"]} - set(_STORED_MERGES)
    if unknown:
        raise ValueError(f"Snapshot.from_dict(): {described['kind']} has merges of its own, {sorted(unknown)}.")
    stored = tuple((name, merge, tuple(shape)) for name, merge, shape in described["fields"])
    shape = tuple(settings.get("shape", ()))
    labels: dict[str, Any] = {name: settings[name] for name in ("name", "labels") if name in settings}
    return Stored(shape, described["kind"], json.dumps(described["settings"]), stored, **labels)


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


def from_dict(given: Mapping[str, Any], plan: Plan | None = None) -> tuple[Plan, dict[str, tuple[np.ndarray, ...]]]:
    """The plan and the tables of what ``to_dict`` gave, with arrays or lists as leaves.

    Args:
        given: the dict.
        plan: one that accumulates the same, if it is known; else it is made from the dict.

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
    version = int(np.asarray(given["format_version"]))
    if version > FORMAT_VERSION:
        raise ValueError(
            f"Snapshot.from_dict(): the format version is {version}, and this library reads up to {FORMAT_VERSION}: a "
            "newer one wrote it.\n  Upgrade: pip install --upgrade distributed-metrics"
        )
    described = json.loads(np.asarray(given["spec"], np.uint8).tobytes().decode())
    plan = plan or plan_of(
        tuple(Metric(tuple(m["value"]), tuple(m["path"]), _rebuilt(m)) for m in described["metrics"]),
        described["nan_policy"] == "ignore",
    )
    return plan, _tables_of(plan, given["metrics"])


def _tables_of(plan: Plan, metrics: Mapping[str, Any]) -> dict[str, tuple[np.ndarray, ...]]:
    _same_names("metrics", [metric.name for metric in plan.metrics], metrics)
    lead: tuple[int, ...] | None = None
    tables: dict[str, list[np.ndarray]] = {table: [] for table in plan.tables}
    for group in plan.groups:
        for i in group.members:
            _same_names(f"fields of {plan.metrics[i].name!r}", list(group.fields), metrics[plan.metrics[i].name])
        for name, field in group.fields.items():
            for i in group.members:
                words = np.asarray(metrics[plan.metrics[i].name][name], np.float32)
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


def _same_names(what: str, expected: list[str], given: Mapping[str, Any]) -> None:
    missing, extra = [name for name in expected if name not in given], [name for name in given if name not in expected]
    if missing or extra:
        raise ValueError(
            f"Snapshot.from_dict(): the {what} are not those of its spec.\n"
            f"  Missing: {', '.join(map(repr, missing)) or 'none'}\n  Extra:   {', '.join(map(repr, extra)) or 'none'}"
        )


def difference(mine: Plan, theirs: Plan) -> str:
    """What two specs do not share, both sides of it; empty where they accumulate the same."""
    a, b = describe(mine), describe(theirs)
    if a == b:
        return ""
    lines = []
    if a["nan_policy"] != b["nan_policy"]:
        lines.append(f"  nan_policy: {a['nan_policy']!r} and {b['nan_policy']!r}")
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
            if (x.value_path, x.path, _describe(x.accumulator)) != (y.value_path, y.path, _describe(y.accumulator)):
                lines.append(f"  {name!r}: {_shown(x)} and {_shown(y)}")
    if not lines:
        lines.append("  the metrics are the same, in another order")
    return "\n".join(lines)


def _shown(metric: Metric) -> str:
    described = _describe(metric.accumulator)
    settings = ", ".join(f"{name}={setting!r}" for name, setting in described["settings"].items())
    nested = "" if metric.path == metric.value_path and len(metric.path) == 1 else f" at {list(metric.path)}"
    return f"{described['kind']}({settings}){nested}"
