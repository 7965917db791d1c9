"""What ``update()`` was given -> arrays and feeds. Whatever can be wrong with a value is found here, at trace time."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
from jax.sharding import PartitionSpec as P

from distributed_metrics.accumulators import Accumulator, CluMetric
from distributed_metrics.contributions import Feed, Source
from distributed_metrics.keyword_values import keyword_feed
from distributed_metrics.naming import SEPARATOR, did_you_mean, flattened
from distributed_metrics.numbers import numbers_of
from distributed_metrics.placement import Situation, Value, on_device, placed
from distributed_metrics.plan import Plan
from distributed_metrics.view import full_spec, spec_axes, varying_axes


def named_values(plan: Plan, metrics: Mapping[str, Any] | None, named: Mapping[str, Any]) -> dict[str, Any]:
    """The values of one update by flat name, in the order of the plan.

    Raises:
        TypeError: ``metrics`` is no mapping.
        ValueError: a name that is not accumulated, or one given twice.
    """
    if metrics is not None and not isinstance(metrics, Mapping):
        raise TypeError(
            f"metrics.update() takes a dict of names to values, got {type(metrics).__name__}.\n"
            '  For example: metrics.update({"loss": loss}) or metrics.update(loss=loss)'
        )
    given: dict[str, Any] = {}
    for source in (metrics or {}, named):
        for name, value in flattened(source, plan.values):
            if name in given:
                raise ValueError(
                    f"metrics.update() got {name!r} twice: in the dict and as a keyword, or nested and flat.\n"
                    f"  Give it once: metrics.update({{{name!r}: x}})"
                )
            if name not in plan.values:
                raise _unknown_name(plan, name)
            given[name] = value
    return given


_MASKS = ("mask", "masks", "weights", "sample_weight", "sample_weights", "where")  # as others call weight=


def _unknown_name(plan: Plan, name: str, argument: str = "") -> ValueError:
    known = tuple(plan.values)
    shown = ", ".join(map(repr, known[:20])) + (f" and {len(known) - 20} more" if len(known) > 20 else "")
    add = "" if argument else f'\n  To add it: DistributedMetrics({{..., "{name}": "mean"}})'
    near = did_you_mean(name, known)
    if name in plan.results:
        whole = plan.metrics[plan.results[name]].value_name
        return ValueError(
            f"metrics.update({argument}) got {name!r}, which is a result of {whole!r}.\n"
            f"  Give the value once, for all its statistics: metrics.update({{{whole!r}: x}})"
        )
    for metric in plan.metrics:
        if isinstance(metric.accumulator, CluMetric) and name in (taken := metric.accumulator.parameters()):
            value, keywords = metric.value_name, ", ".join(f"{keyword}={keyword}" for keyword in taken)
            near = f"\n  {name}= is one of the keywords of {value!r}: metrics.update({{{value!r}: dict({keywords})}})"
            add = ""
    if not argument and name in _MASKS:
        add = ""
        near = " A mask or weights of the values are the argument weight=."
    elif not argument and not near and (meant := did_you_mean(name, ("weight", "spec"))):
        add = f" Did you mean the argument {meant.split(chr(39))[1]}=?"
    return ValueError(
        f"metrics.update({argument}) got {name!r}, which this object does not accumulate.\n"
        f"  It accumulates: {shown}.{near}{add}"
    )


def by_name(plan: Plan, given: Any, argument: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """``weight`` or ``spec`` for each name: one for all, or a (nested) dict, whose entries hold for all below them.

    Raises:
        ValueError: a name that stands for nothing, or for nothing that is updated.
    """
    if given is None:
        return {}
    if argument in plan.values and argument not in values:
        raise ValueError(
            f"metrics.update({argument}=...): this object has a metric named {argument!r}, and {argument}= is an "
            f"argument of update().\n  Give the metric in a dict: metrics.update({{{argument!r}: x}})"
        )
    if not isinstance(given, Mapping):
        return dict.fromkeys(plan.values, given)
    chosen: dict[str, Any] = {}
    keyworded = {name for name, of_name in plan.values.items() if plan.metrics[of_name[0]].accumulator.keywords}
    for name, value in flattened(given, keyworded):
        below = [name] if name in plan.values else [one for one in plan.values if one.startswith(name + SEPARATOR)]
        if not below:
            raise _unknown_name(plan, name, f"{argument}=")
        if not any(one in values for one in below):
            raise ValueError(
                f"metrics.update({argument}=...) names {name!r}, and this call updates "
                f"{', '.join(map(repr, values)) or 'nothing'} only."
            )
        chosen.update(dict.fromkeys(below, value))
    return chosen


def feeds_of(
    plan: Plan, situation: Situation, values: Mapping[str, Any], weights: Mapping[str, Any], specs: Mapping[str, Any]
) -> tuple[tuple[Feed, ...], list[Value]]:
    """The static side and the arrays of one update.

    Raises:
        TypeError: a value or a weight that is no number.
        ValueError: a shape, a weight, a spec or a placement that does not fit.
    """
    arrays: list[Value] = []
    feeds = []
    taken: dict[int, tuple[int, bool]] = {}  # one weight for many values is one array

    def add_weight(name: str, weight: Any) -> tuple[int, bool]:
        if id(weight) not in taken:
            numbers, pair = numbers_of(name, weight, "weight")
            taken[id(weight)] = (len(arrays), pair)
            arrays.append(numbers)
        return taken[id(weight)]

    for name, value in values.items():
        metrics = plan.values[name]
        accumulator = plan.metrics[metrics[0]].accumulator
        if accumulator.keywords:
            feeds.append(keyword_feed(name, metrics, value, specs.get(name), situation, arrays))
            continue
        inputs: list[Source] = []
        input_weights: list[Source | None] = []
        for part_name, part, spec in zip(
            accumulator.inputs, _inputs(name, value, accumulator), _specs(specs.get(name), accumulator), strict=True
        ):
            label = name if len(accumulator.inputs) == 1 else f"{name} ({part_name})"
            numbers, pair = numbers_of(label, part, "value")
            shape = numbers.shape[:-1] if pair else numbers.shape
            _check_shape(label, shape, accumulator)
            numbers, spec = placed(label, numbers, shape, spec, situation)
            inputs.append(Source(len(arrays), spec, pair))
            arrays.append(numbers)
            weight = weights.get(name)
            if weight is None:
                input_weights.append(None)
            else:
                index, weight_pair = add_weight(name, weight)
                weight_shape = arrays[index].shape[:-1] if weight_pair else arrays[index].shape
                others = [repr(one) for one in values if one != name]
                _check_weight(label, weight_shape, shape, accumulator, others)
                input_weights.append(Source(index, _weight_spec(spec, weight_shape, weight_pair), weight_pair))
        if plan.ignores:
            _check_partners(name, accumulator, [arrays[one.index].shape[: -1 if one.pair else None] for one in inputs])
            inputs = _partitioned_alike(inputs)
            for k, (one, weighted) in enumerate(zip(inputs, input_weights, strict=True)):
                if weighted is not None:
                    shape = arrays[weighted.index].shape[: -1 if weighted.pair else None]
                    input_weights[k] = replace(weighted, spec=_weight_spec(one.spec, shape, weighted.pair))
        feeds.append(Feed(metrics, tuple(inputs), tuple(input_weights)))
        if situation.rows_vary:
            _check_varying(plan, name, feeds[-1], arrays, situation)
    return tuple(feeds), [on_device(array, situation) for array in arrays]


def _inputs(name: str, value: Any, accumulator: Accumulator) -> tuple[Any, ...]:
    wanted = accumulator.inputs
    if len(wanted) == 1:
        return (value,)
    if not isinstance(value, tuple | list) or len(value) != len(wanted):
        got = f"{len(value)} parts" if isinstance(value, tuple | list) else type(value).__name__
        raise ValueError(
            f"metrics.update(): {name!r} is accumulated as {accumulator}, whose value is ({', '.join(wanted)}); "
            f"got {got}.\n  For example: metrics.update({{{name!r}: (loss_sum, token_count)}})"
        )
    return tuple(value)


def _specs(spec: Any, accumulator: Accumulator) -> tuple[Any, ...]:
    if isinstance(spec, tuple | list) and not isinstance(spec, P) and len(spec) == len(accumulator.inputs):
        return tuple(spec)
    return (spec,) * len(accumulator.inputs)


def _check_shape(name: str, shape: tuple[int, ...], accumulator: Accumulator) -> None:
    kept = accumulator.shape
    if kept and shape[len(shape) - len(kept) :] != kept:
        raise ValueError(
            f"metrics.update(): {name!r} has shape {shape}, and {type(accumulator).__name__}(shape={kept}) takes "
            f"(..., {', '.join(map(str, kept))}): the trailing dims are kept."
        )


def _check_weight(
    name: str, weight: tuple[int, ...], value: tuple[int, ...], accumulator: Accumulator, others: Sequence[str]
) -> None:
    """A weight's dims are the leading ones of the value, or of size 1; the kept dims have none."""
    leading = value[: len(value) - len(accumulator.shape)]
    fits = len(weight) <= len(leading) and all(w in (1, v) for w, v in zip(weight, leading, strict=False))
    if fits:
        return
    fix = "Weights align with the leading dims of a value; a dim of size 1 is stretched."
    if accumulator.shape and weight[: len(leading)] == leading:
        fix = (
            f"The kept dims {accumulator.shape} take no weight: give one of shape {leading}. For weights of their own, "
            f"per class for example: Ratio(shape={accumulator.shape}) of the pair (weight * value, weight)."
        )
    elif len(weight) < len(leading) and weight == leading[len(leading) - len(weight) :]:
        fix += f" Probably: weight[{'None, ' * (len(leading) - len(weight))}...]"
    elif others:
        fix += f" Give weights by name, and none to {name!r} if it needs none: weight={{{others[0]}: mask}}"
    raise ValueError(
        f"metrics.update(): the weight of {name!r} has shape {weight}, and its value has shape {value}: they do not "
        f"align.\n  {fix}"
    )


def _check_partners(name: str, accumulator: Accumulator, shapes: list[tuple[int, ...]]) -> None:
    """With ``nan_policy="ignore"`` an element that is left out takes its partner with it, so it must have one."""
    if len(set(shapes)) > 1:
        parts = ", ".join(f"{part} {shape}" for part, shape in zip(accumulator.inputs, shapes, strict=True))
        raise ValueError(
            f'metrics.update(): {name!r} has parts of the shapes {parts}, and nan_policy="ignore" leaves out pairs of '
            "which one is not finite.\n  Give both parts one shape, or mask them yourself with weight= and "
            'nan_policy="propagate".'
        )


def _partitioned_alike(inputs: list[Source]) -> list[Source]:
    """Partners must lie on one device: the part that is partitioned less follows the other."""
    specs = [one.spec for one in inputs]
    known = [spec for spec in specs if spec is not None]
    if len(set(known)) < 2 or len(known) < len(specs):
        return inputs
    widest = max(known, key=lambda spec: len(spec_axes(spec)))
    return [replace(one, spec=full_spec(P(*widest), len(one.spec or ()))) for one in inputs]


def _weight_spec(spec: P | None, shape: tuple[int, ...], pair: bool) -> P | None:
    if spec is None:
        return None
    entries = [entry if size != 1 else None for entry, size in zip(spec, shape, strict=False)]
    return P(*entries, None) if pair else P(*entries)


def _check_varying(plan: Plan, name: str, feed: Feed, arrays: list[Value], situation: Situation) -> None:
    """In mapped code, where types show it: what is the same on all devices must not be counted by each.

    Raises:
        ValueError: a copy would be counted once per device, or a device's values have no row of their own.
    """
    rows = frozenset(situation.view.mapped)

    def varies(source: Source | None) -> frozenset[str]:
        array = None if source is None else arrays[source.index]
        return varying_axes(array) if isinstance(array, jax.Array) else frozenset()

    def given(source: Source) -> bool:
        return isinstance(arrays[source.index], jax.Array)

    over = [varies(value) | varies(weight) for value, weight in zip(feed.inputs, feed.weights, strict=True)]
    beyond = frozenset().union(*over) - situation.rows_vary
    if beyond:
        raise ValueError(
            f"metrics.update(): {name!r} differs over {sorted(beyond)}, and the rows spread over "
            f"{situation.layout.axes} only: devices that share a row saw different values.\n"
            f"  Reduce it first, lax.pmean(x, {sorted(beyond)[0]!r}), or give these devices rows: "
            "DistributedMetrics({...}, axis_name=...)"
        )
    copies = [sorted(rows - o) for o, source in zip(over, feed.inputs, strict=True) if given(source) and rows - o]
    counted = [plan.metrics[i] for i in feed.metrics if plan.metrics[i].accumulator.counts_copies]
    if counted and copies:
        raise ValueError(
            f"metrics.update(): {name!r} is the same on all devices along {copies[0]}: already reduced, or made "
            f"the same everywhere. Its {counted[0].accumulator.label()} would count it once per device.\n"
            "  Give each device's own value, before psum or pmean, split by in_specs. If devices along these axes hold "
            "the same batch, give them one row: DistributedMetrics({...}, axis_name=...).\n"
            "  To count a constant once per device: a Python number, or "
            f'jax.lax.pcast(x, {tuple(copies[0])}, to="varying").'
        )
    arrays_over = [o & rows for o, source in zip(over, feed.inputs, strict=True) if given(source)]
    if len(set(arrays_over)) > 1:
        parts = plan.metrics[feed.metrics[0]].accumulator.inputs
        raise ValueError(
            f"metrics.update(): of {name!r}, {parts[0]} differs over {sorted(arrays_over[0])} and {parts[1]} over "
            f"{sorted(arrays_over[1])}: one is already reduced.\n  Give each device's own, of both."
        )
