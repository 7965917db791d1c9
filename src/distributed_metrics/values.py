"""What ``update()`` was given -> arrays and feeds. Whatever can be wrong with a value is found here, at trace time."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P

from distributed_metrics.accumulators import Accumulator, CluMetric
from distributed_metrics.accumulators.clu_metric import batch_size, in_order
from distributed_metrics.accumulators.clu_weight import EXAMPLES, WEIGHT, weighted
from distributed_metrics.compensated import host_pair
from distributed_metrics.contributions import Feed, Source
from distributed_metrics.placement import Situation, Value, on_device, placed
from distributed_metrics.plan import SEPARATOR, Plan, did_you_mean
from distributed_metrics.view import full_spec, is_traced, spec_axes, varying_axes


@dataclass(frozen=True)
class HostNumber:
    """A number that was split on the host: its high and low words, float32 of shape (2,)."""

    words: jax.Array


def flattened(metrics: Mapping[str, Any], leaves: Collection[str], outer: str = "") -> Iterator[tuple[str, Any]]:
    """The flat names and values of a nested mapping; a mapping under a name of ``leaves`` is a value itself."""
    for key, value in metrics.items():
        name = f"{outer}{SEPARATOR}{key}" if outer else str(key)
        if isinstance(value, Mapping) and name not in leaves:
            yield from flattened(value, leaves, name)
        else:
            yield name, value


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
                raise ValueError(f"metrics.update() got {name!r} twice.")
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
            numbers, pair = _numbers(name, weight, "weight")
            taken[id(weight)] = (len(arrays), pair)
            arrays.append(numbers)
        return taken[id(weight)]

    for name, value in values.items():
        metrics = plan.values[name]
        accumulator = plan.metrics[metrics[0]].accumulator
        if accumulator.keywords:
            feeds.append(_keyword_feed(name, metrics, value, specs.get(name), situation, arrays))
            continue
        inputs: list[Source] = []
        input_weights: list[Source | None] = []
        for part_name, part, spec in zip(
            accumulator.inputs, _inputs(name, value, accumulator), _specs(specs.get(name), accumulator), strict=True
        ):
            label = name if len(accumulator.inputs) == 1 else f"{name} ({part_name})"
            numbers, pair = _numbers(label, part, "value")
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


def keywords_of(name: str, accumulator: CluMetric, value: Any, weight: Any) -> dict[str, Any]:
    """The value of a metric that takes keywords: arrays, in dtypes that devices have, settings, and the weight, if any.

    Raises:
        TypeError: no dict, or something that is neither an array nor a setting.
        ValueError: a weight that does not fit, or a metric that cannot be weighted.
    """
    if not isinstance(value, Mapping):
        raise TypeError(
            f"metrics.update(): {name!r} is {accumulator}, whose value is a dict of the keywords of its "
            f"from_model_output(); got {type(value).__name__}.\n"
            f"  For example: metrics.update({{{name!r}: dict(predictions=predictions, labels=labels)}})"
        )
    given = {}
    for keyword, one in in_order(accumulator.metric, value).items():
        one = one.get_value() if isinstance(one, nnx.Variable) else one
        if isinstance(one, np.ndarray) and one.dtype.kind in "biuf":
            one = _in_device_dtype(f"{name} ({keyword})", one)
        elif not isinstance(one, jax.Array):
            try:
                hash(one)
            except TypeError as error:
                raise TypeError(
                    f"metrics.update(): {keyword}= of {name!r} is {one!r:.80}, neither an array nor a setting (a "
                    "number, a string, a tuple).\n  Strings cannot be accumulated on a device; of a list of numbers "
                    "make an array: jnp.asarray(...)."
                ) from error
        given[keyword] = one
    return given if weight is None else weighted(name, accumulator.metric, given, weight, batch_size(given))


def _in_device_dtype(name: str, array: np.ndarray) -> np.ndarray:
    dtype = jax.dtypes.canonicalize_dtype(array.dtype)
    if dtype.kind in "iu" and array.size and not np.array_equal(array.astype(dtype), array):
        raise ValueError(f"metrics.update(): {name!r} holds integers beyond {dtype}, which is all that it is given.")
    return array.astype(dtype)


def _keyword_feed(
    name: str, metrics: tuple[int, ...], value: Mapping[str, Any], spec: Any, situation: Situation, arrays: list[Value]
) -> Feed:
    """The feed of a value that is a dict of keywords: the arrays of the batch are partitioned alike, others are not."""
    batch = batch_size(value)
    by_keyword = spec if isinstance(spec, Mapping) else {}
    found: dict[str, tuple[Value, P | None]] = {}
    batched: dict[str, P | None] = {}
    for keyword, one in value.items():
        if not isinstance(one, jax.Array | np.ndarray):
            continue
        asked = by_keyword.get(keyword) if isinstance(spec, Mapping) else spec
        of_batch = one.ndim > 0 and one.shape[0] == batch and by_keyword.get(keyword) != P()
        if not of_batch:
            asked = P()
        elif isinstance(asked, P):
            asked = P(*asked[: one.ndim])
        asked = None if situation.view.explicit else asked  # there types say it, also of a setting
        found[keyword] = placed(f"{name} ({keyword})", one, one.shape, asked, situation)
        if of_batch:
            batched[keyword] = found[keyword][1]
    for keyword, lies in batched.items():
        if lies is not None and (further := [entry for entry in lies[1:] if entry is not None]):
            raise ValueError(
                f"metrics.update(): {keyword}= of {name!r} is partitioned over {further[0]!r} within an example, and "
                "its metric needs examples as a whole.\n  Gather it first: jax.sharding.reshard(x, P(batch_axis))."
            )
    leading = {P(*lies[:1]) for lies in batched.values() if lies is not None and spec_axes(lies)}
    if len(leading) > 1:
        raise ValueError(
            f"metrics.update(): the arrays of {name!r} are partitioned along their examples in different ways: "
            f"{', '.join(f'{k}: {lies}' for k, lies in batched.items())}.\n  Partition them alike."
        )
    unknown = any(lies is None for lies in batched.values())
    common = None if unknown else next(iter(leading), P())
    sources = []
    for keyword, (array, _) in found.items():
        sources.append(Source(len(arrays), common if keyword in batched else P(), pair=False))
        arrays.append(array)
    settings = tuple((keyword, one) for keyword, one in value.items() if keyword not in found)
    if WEIGHT in value:
        settings += ((EXAMPLES, tuple(keyword for keyword in batched if keyword != WEIGHT)),)
    return Feed(metrics, tuple(sources), (None,) * len(sources), tuple(found), settings)


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


def _numbers(name: str, value: Any, what: str) -> tuple[Value, bool]:
    """The value as an array, and whether it was split into high and low words on the host.

    Raises:
        TypeError: it is no number, or a complex one.
    """
    if isinstance(value, HostNumber):
        return value.words, True
    if isinstance(value, nnx.Variable):
        value = value.get_value()
    if isinstance(value, jax.Array):
        if not (jnp.issubdtype(value.dtype, jnp.number) or value.dtype == jnp.bool_):
            raise _no_number(name, value, what)
        if not is_traced(value) and value.is_deleted():
            raise ValueError(
                f"metrics.update(): the {what} of {name!r} was deleted: donated to a jitted function, as a rule.\n"
                "  Update with it before, or return it from that function."
            )
        if jnp.issubdtype(value.dtype, jnp.complexfloating):
            raise _is_complex(name, value.dtype, what)
        return value, False
    if isinstance(value, bool | int | float | complex | np.ndarray | np.generic):
        array = np.asarray(value)
        if np.iscomplexobj(array):
            raise _is_complex(name, array.dtype, what)
        if array.dtype == np.bool_:
            return array, False
        if (array.dtype.kind in "iuf" and array.dtype.itemsize > 4) or (
            array.dtype == object and isinstance(value, int)
        ):
            try:
                return host_pair(array), True
            except OverflowError as error:
                raise ValueError(
                    f"metrics.update(): the {what} of {name!r} is an integer beyond every float: about "
                    f"2^{max(int(one).bit_length() for one in array.flat)}.\n  Sums hold up to 2^127."
                ) from error
        if jnp.issubdtype(array.dtype, jnp.number):
            return array, False
        raise _no_number(name, array, what)
    raise _no_number(name, value, what)


def _no_number(name: str, got: Any, what: str) -> TypeError:
    shown = f"an array of {got.dtype}" if isinstance(got, jax.Array | np.ndarray) else f"{_of(got)}{_shown(got)}"
    fix = "Give a scalar or an array of floats, integers or booleans"
    if isinstance(got, tuple) and len(got) == 2:
        fix = (
            'Of a sum and what it is divided by, the accumulator is "ratio"; a mean of values under a mask is '
            f"metrics.update({{{name!r}: values}}, weight=mask)."
        )
    elif isinstance(got, list | tuple):
        fix += "; of a list make one: jnp.asarray(...)."
    elif got is None:
        fix += ", or leave it out: metrics that are not named are left alone."
    elif isinstance(got, Mapping):
        fix += f"; for names below {name!r} the spec is a dict as well: DistributedMetrics({{{name!r}: {{...}}}})."
    else:
        fix += "."
    return TypeError(f"metrics.update(): the {what} of {name!r} is no number: {shown}.\n  {fix}")


def _shown(value: Any) -> str:
    if isinstance(value, tuple | list) and any(isinstance(one, jax.Array | np.ndarray) for one in value):
        return f" of arrays of the shapes {', '.join(str(np.shape(one)) for one in value)}"
    return f": {value!r:.80}"


def _of(value: Any) -> str:
    kind = type(value).__name__
    return f"{'an' if kind[0].lower() in 'aeiou' else 'a'} {kind}"


def _is_complex(name: str, dtype: Any, what: str) -> TypeError:
    return TypeError(
        f"metrics.update(): the {what} of {name!r} is complex ({dtype}), and complex numbers have no order to "
        "log them by.\n  Give its magnitude, jnp.abs(x), or its real part, x.real."
    )


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
