"""Snapshots as dicts of numeric arrays, which any checkpoint can hold, and back.

The dict has three entries: ``format_version``; ``spec``, the spec as JSON in UTF-8 bytes; and ``metrics``, the merged
fields of each metric by its flat name, each an array ``(..., *shape, words)`` of float32. The two words of a number add
up to it exactly, and unlike float64 they go through every library unharmed. A field of no numbers, as of a clu metric
before its first value, is left out: JSON loses its shape, and Orbax refuses it.

The spec says all that a file means, so that no default of a later version is read into it: every setting, and of every
field its merge, words and shape.
"""

import dataclasses
import functools
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from distributed_metrics import accumulators
from distributed_metrics.accumulators import Accumulator, CluMetric, clu_metric
from distributed_metrics.accumulators.clu_metric import NotLearntError
from distributed_metrics.merging import MERGES, Merge, Number
from distributed_metrics.plan import Metric, Plan, fields_of, learnt_plan, plan_of

FORMAT_VERSION = 1
"""What a file needs of its reader. It rises where an older version would misread a new file: another meaning of the
three entries, of words, or of a field or setting that has been there. The files of all versions before are still read,
by code of its own for each (``tests/data``).

It stays for a new accumulator, which older versions keep as ``Stored``; for a new setting, which they refuse by its
name, and whose default means what was done before there was one; and for another default, as files hold every setting.
"""

_OURS: dict[str, type[Accumulator]] = {
    kind.__name__.lower(): kind
    for kind in (getattr(accumulators, name) for name in accumulators.__all__)
    if isinstance(kind, type) and issubclass(kind, Accumulator) and kind not in (Accumulator, CluMetric)
}

_WITH_FIELDS: tuple[type[Accumulator], ...] = (CluMetric, *_OURS.values())
_OF_FIELDS = (merge for kind in _WITH_FIELDS for merge in kind.fields.values() if isinstance(merge, Merge))
_KNOWN_MERGES = {merge.name: merge for merge in (*MERGES.values(), *_OF_FIELDS)}

_CALL = "Snapshot.from_dict()"
_UPGRADE = "pip install --upgrade distributed-metrics"


def _wrong(what: str, fix: str) -> ValueError:
    return ValueError(f"{_CALL}: {what}\n  {fix}")


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

    known = _KNOWN_MERGES.get(name)
    if known is not None and _words(known) == words:
        return known
    return Merge(name, tuple(Number(f"number {i}", pair=word == "2") for i, word in enumerate(words)), unknown, unknown)


def _words(merge: Merge) -> str:
    return "".join("2" if number.pair else "1" for number in merge.numbers)


@dataclasses.dataclass(frozen=True)
class Stored(Accumulator):
    """An accumulator of a class that is not here, a user's or a newer version's: its state is, its formula is not.

    Attributes:
        kind: the full name of the class; of one of ours, the short one.
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
        if "." not in self.kind:
            raise TypeError(
                f"This snapshot was read from a dict that a newer version of distributed-metrics wrote: this one does "
                f"not know the accumulator {self.kind!r}.\n"
                f"  Known: {', '.join(map(repr, _OURS))}\n  Upgrade: {_UPGRADE}"
            )
        raise TypeError(
            f"This snapshot was read from a dict, which does not hold the code of {self.kind}.\n"
            "  Merge it into an object that has it: metrics = DistributedMetrics({...}); metrics.merge(snapshot)"
        )

    def __str__(self) -> str:
        return _call(self.kind, json.loads(self.settings))


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
        [name, merge.name, _words(merge), list(accumulator.field_shape(name))]
        for name, merge in fields_of(accumulator, False).items()
    ]
    kind = type(accumulator)
    if isinstance(accumulator, Stored):
        name, settings = accumulator.kind, json.loads(accumulator.settings)
    else:
        name = kind.__name__.lower()
        settings = {one.name: _plain(getattr(accumulator, one.name)) for one in dataclasses.fields(accumulator)}
        if isinstance(accumulator, CluMetric):
            name, learnt = accumulator.full_name, accumulator.learnt
            del settings["metric"]
            settings["learnt"] = None if learnt is None else clu_metric.describe(learnt)
        elif _OURS.get(name) is not kind:
            name = f"{kind.__module__}.{kind.__qualname__}"
    return {"kind": name, "settings": settings, "fields": fields, "result": list(accumulator.result_shape())}


def _plain(setting: Any) -> Any:
    if isinstance(setting, tuple | list):
        return [_plain(one) for one in setting]
    if isinstance(setting, np.generic):
        return setting.item()
    if isinstance(setting, str | int | float | bool | None):
        return setting
    if isinstance(setting, frozenset):  # in the same order in every process
        return sorted(map(_plain, setting), key=repr)
    if callable(setting) or type(setting).__repr__ is object.__repr__:  # its repr would show an address
        return f"{setting.__module__}.{getattr(setting, '__qualname__', type(setting).__qualname__)}"
    return repr(setting)


def _rebuilt(described: Mapping[str, Any]) -> Accumulator:
    kind = described["kind"]
    settings: dict[str, Any] = {
        name: tuple(setting) if isinstance(setting, list) else setting
        for name, setting in described["settings"].items()
    }
    fields = tuple((name, merge, words, tuple(shape)) for name, merge, words, shape in described["fields"])
    of_all: dict[str, Any] = {name: settings[name] for name in ("shape", "name", "labels")}
    stored = Stored(
        kind=kind, settings=json.dumps(described["settings"]), stored=fields,
        shape_of_result=tuple(described["result"]), **of_all,
    )  # fmt: skip
    if "weight" not in stored.merges():
        raise ValueError("no field 'weight', which every accumulator has")
    if kind not in _OURS:
        return stored
    where, known = f"{'/'.join(described['path'])!r}, {kind}", [one.name for one in dataclasses.fields(_OURS[kind])]
    if unknown := [name for name in settings if name not in known]:
        raise _wrong(
            f"its spec has settings of {where}, that this version does not know: {', '.join(map(repr, unknown))}.",
            f"Known: {', '.join(map(repr, known))}\n  A newer version wrote it: {_UPGRADE}",
        )
    accumulator = _OURS[kind](**settings)
    kept = {name: (merge, words, shape) for name, merge, words, shape in fields}
    ours = {
        name: (merge.name, _words(merge), accumulator.field_shape(name)) for name, merge in accumulator.merges().items()
    }
    if kept != ours:
        theirs, here = (
            ", ".join(
                f"{name} {list(shape)} by {merge!r}, words {words!r}" for name, (merge, words, shape) in of.items()
            )
            for of in (kept, ours)
        )
        raise _wrong(
            f"its spec has other fields of {where}, than this version.\n"
            f"  The dict:     {theirs}\n  This version: {here}",
            f"Where d['spec'] is as to_dict() wrote it, another version did. Of a newer one: {_UPGRADE}",
        )
    return accumulator


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
            for k, i in enumerate(group.members if field.size else ()):
                slots = field.slots_of_one(k)
                of_one = words[..., slots, :]
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
        hint = (
            "metrics.compute().to_dict()" if hasattr(given, "compute") else
            "Snapshot.from_dict(json.loads(text))" if isinstance(given, str | bytes) else "snapshot.to_dict()"
        )  # fmt: skip
        raise TypeError(
            f"Snapshot.from_dict() takes what to_dict() gave, got {type(given).__name__}.\n  For example: {hint}"
        )
    expected = ("format_version", "metrics", "spec")
    if set(given) != set(expected):
        inner = [name for name, one in given.items() if isinstance(one, Mapping) and set(one) == set(expected)]
        fix = (
            f"Snapshot.from_dict(d[{inner[0]!r}])" if inner else "saved = snapshot.to_dict(); Snapshot.from_dict(saved)"
        )
        raise _wrong(
            f"this is not what to_dict() gives.\n"
            f"  It has:   {', '.join(sorted(map(repr, given)))}\n  Expected: {', '.join(map(repr, expected))}",
            f"For example: {fix}",
        )
    version = _version(given["format_version"])
    if version > FORMAT_VERSION:
        raise _wrong(
            f"the format version is {version}, and this library reads up to {FORMAT_VERSION}: a newer one wrote it.",
            f"Upgrade: {_UPGRADE}",
        )
    plan = _plan_of(given["spec"])
    return plan, _tables_of(plan, given["metrics"])


def _version(given: Any) -> int:
    fix = f"to_dict() wrote d['format_version'] as a whole number, 1 or more; now it is {FORMAT_VERSION}."
    try:
        version = np.asarray(given).item()
        whole = int(version)
    except (TypeError, ValueError, OverflowError) as error:
        raise _wrong(f"d['format_version'] is no number: {given!r:.80}.", fix) from error
    if whole != version or whole < 1 or isinstance(version, str | bool):
        raise _wrong(f"there is no format version {version!r}.", fix)
    return whole


def _plan_of(spec: Any) -> Plan:
    fix = "It is JSON in UTF-8, as an array of uint8: leave d['spec'] as to_dict() wrote it."
    try:
        described = json.loads(np.asarray(spec, np.uint8).tobytes().decode())
    except (ValueError, TypeError, OverflowError) as error:
        raise _wrong(f"d['spec'] cannot be read: {type(error).__name__}: {error}.", fix) from error
    where = "d['spec']"
    try:
        policy = described["nan_policy"]
        if policy not in ("propagate", "ignore"):
            raise _wrong(
                f"its spec has the nan_policy {policy!r}, and this version knows 'propagate' and 'ignore'.",
                f"A newer version wrote it: {_UPGRADE}",
            )
        metrics = []
        for i, one in enumerate(described["metrics"]):
            where = f"d['spec'], metric {i}"
            where += f", {'/'.join(one['path'])!r}"
            metrics.append(Metric(tuple(one["value"]), tuple(one["path"]), _rebuilt(one)))
        where = "d['spec']"
        return plan_of(tuple(metrics), policy == "ignore")
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:  # damaged JSON may say anything
        if str(error).startswith(_CALL):
            raise
        what = f"there is no {error}" if isinstance(error, KeyError) else f"{type(error).__name__}: {error}"
        raise _wrong(f"{where} is damaged: {what}.", fix) from error


def _tables_of(plan: Plan, metrics: Mapping[str, Any]) -> dict[str, tuple[np.ndarray, ...]]:
    _same_names("metrics", "d['metrics']", [metric.name for metric in plan.metrics], metrics)
    lead: tuple[int, ...] | None = None
    tables: dict[str, list[np.ndarray]] = {table: [] for table in plan.tables}
    for group in plan.groups:
        written = [name for name, field in group.fields.items() if field.size]
        for i in group.members:
            name = plan.metrics[i].name
            _same_names(f"fields of {name!r}", f"d['metrics'][{name!r}]", written, metrics[name])
        for name, field in group.fields.items():
            shape = (*field.shape, field.merge.words)
            for i in group.members:
                if not field.size:
                    assert lead is not None  # that of the weight, which comes first
                    tables[field.merge.name].append(np.zeros((*lead, 0, field.merge.words), np.float32))
                    continue
                key = f"d['metrics'][{plan.metrics[i].name!r}][{name!r}]"
                words = _numbers(plan.metrics[i].name, name, metrics[plan.metrics[i].name][name])
                lead = words.shape[: words.ndim - len(shape)] if lead is None else lead
                if words.shape != (*lead, *shape):
                    dims = f", with {lead} in front as of the first metric" if lead else ""
                    raise _wrong(
                        f"the field {name!r} of {plan.metrics[i].name!r} has the shape {words.shape}, and its spec "
                        f"says {(*lead, *shape)}{dims}.",
                        f"Leave {key} as to_dict() wrote it. To take or join windows: Snapshot.from_dict(d).unstack()",
                    )
                tables[field.merge.name].append(words.reshape(*lead, field.size, field.merge.words))
    return {
        table: tuple(np.moveaxis(np.concatenate(words, axis=-2), -1, 0)) for table, words in tables.items() if words
    }


def _numbers(metric: str, field: str, given: Any) -> np.ndarray:
    try:
        return np.asarray(given, np.float32)
    except (TypeError, ValueError) as error:
        raise _wrong(
            f"the field {field!r} of {metric!r} is no array of numbers: {given!r:.80}.",
            f"Load d['metrics'][{metric!r}][{field!r}] as to_dict() wrote it, an array of float32 or lists of it.",
        ) from error


def _same_names(what: str, key: str, expected: list[str], given: Any) -> None:
    if not isinstance(given, Mapping):
        raise _wrong(
            f"the {what} are no dict: {given!r:.80}.",
            f"Load {key} as to_dict() wrote it, a dict of {', '.join(map(repr, expected[:10]))}.",
        )
    missing, extra = [name for name in expected if name not in given], [name for name in given if name not in expected]
    if missing or extra:
        raise _wrong(
            f"the {what} are not those of its spec.\n"
            f"  Missing: {', '.join(map(repr, missing)) or 'none'}\n  Extra:   {', '.join(map(repr, extra)) or 'none'}",
            f"Leave {key} and d['spec'] as one to_dict() wrote them, and rename afterwards.",
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
            try:
                common = _common(a.accumulator, b.accumulator)
            except NotLearntError as error:
                raise NotLearntError(f"{a.name!r}: {error}") from error
            if common is not None:
                both[i] = common
    if len(both) < len(mine.metrics) or mine.ignores != theirs.ignores:
        raise ValueError(_difference(mine, theirs))
    return learnt_plan(mine, both)


def _common(a: Accumulator, b: Accumulator) -> Accumulator | None:
    """The accumulator that two are, one of which may be stored or not have learnt yet; None where they differ."""
    if isinstance(a, Stored) and not isinstance(b, Stored):
        a, b = b, a
    described_a, described_b = _describe(a), _describe(b)
    if _text(described_a) == _text(described_b):
        return a
    if described_a["kind"] != described_b["kind"]:
        return None
    # One may be from before a clu metric had learnt, which is then all that differs.
    of_a, of_b = (described["settings"].get("learnt") for described in (described_a, described_b))
    rest_a, rest_b = ({**described["settings"], "learnt": None} for described in (described_a, described_b))
    if (of_a is None) == (of_b is None) or json.dumps(rest_a, sort_keys=True) != json.dumps(rest_b, sort_keys=True):
        return None
    if of_b is None:
        return a
    if isinstance(b, CluMetric) or isinstance(a, Stored):
        return b
    assert isinstance(a, CluMetric)
    return clu_metric.relearn(a, of_b)


def _text(described: Mapping[str, Any]) -> str:
    """Equal for what is the same: where NaN is NaN, and in whatever order a class has its fields and settings."""
    return json.dumps({**described, "fields": sorted(described["fields"])}, sort_keys=True)


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
    nested = "" if metric.path == metric.value_path and len(metric.path) == 1 else f" at {list(metric.path)}"
    nested += f" of a tuple at {list(metric.value_path)}" if metric.path != metric.value_path else ""
    return f"{_call(described['kind'], described['settings'])}{nested}"


def _call(kind: str, settings: Mapping[str, Any]) -> str:
    """What was accumulated, as a call; without the shape, name and labels that were not given."""
    first = sorted(settings, key=("name", "labels").__contains__)
    given = (f"{name}={settings[name]!r}" for name in first if settings[name] not in (None, []))
    return f"{kind}({', '.join(given)})"
