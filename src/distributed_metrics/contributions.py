"""values -> contribution: what a batch adds, in the small arrays that the state is made of."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import PartitionSpec as P

from distributed_metrics import compensated
from distributed_metrics.accumulators import Accumulator, Batch
from distributed_metrics.compensated import Pair
from distributed_metrics.merging import Parts
from distributed_metrics.plan import NONFINITE, Field, Group, Plan, fields_of
from distributed_metrics.view import spec_axes

_MOST_STACKED_ELEMENTS = 4096
"""Values up to this size that are accumulated alike are stacked and reduced together: one operation for all of them
compiles many times faster. Larger ones are not worth the copy."""


@dataclass(frozen=True)
class Source:
    """One array of one update.

    Attributes:
        index: its position among the arrays of the update.
        spec: how it is partitioned over the global axes; None where that is not known.
        pair: whether its last dim holds the high and low words of a number split on the host.
    """

    index: int
    spec: P | None
    pair: bool


@dataclass(frozen=True)
class Feed:
    """One value of one update: the metrics it feeds, and the arrays it consists of, each with its weight or None.

    Where the value is a dict of keywords, ``keywords`` names the arrays, and ``settings`` are those that are no arrays.
    """

    metrics: tuple[int, ...]
    inputs: tuple[Source, ...]
    weights: tuple[Source | None, ...]
    keywords: tuple[str, ...] | None = None
    settings: tuple[tuple[str, Any], ...] = ()

    @property
    def sources(self) -> tuple[Source, ...]:
        """The inputs, then the weights."""
        return self.inputs + tuple(source for source in self.weights if source is not None)

    @property
    def known(self) -> bool:
        """Whether it is known how the value is partitioned."""
        return all(source.spec is not None for source in self.inputs)

    @property
    def axes(self) -> frozenset[str]:
        """The mesh axes over which some part of the value is partitioned."""
        return frozenset(axis for source in self.inputs if source.spec is not None for axis in spec_axes(source.spec))

    def take(self, arrays: Sequence[Array]) -> list[Array]:
        """The arrays of its sources."""
        return [arrays[source.index] for source in self.sources]


@dataclass(frozen=True)
class Block:
    """Contributions to metrics of one group: for each field its parts, of shape ``(members, *shape)``."""

    members: tuple[int, ...]
    group: Group
    fields: dict[str, Parts]

    def on_first(self, axes: tuple[str, ...]) -> "Block":
        """The same where this device is the first along ``axes``, else nothing: of copies one counts."""
        if not axes:
            return self
        first = is_first(axes)
        fields = {}
        for name, parts in self.fields.items():
            others = self.group.fields[name].merge.in_other_rows(parts)
            fields[name] = tuple(jnp.where(first, part, other) for part, other in zip(parts, others, strict=True))
        return Block(self.members, self.group, fields)


def is_first(axes: tuple[str, ...]) -> Array:
    """Whether this device is the first of those along ``axes``."""
    return lax.axis_index(axes) == 0


def contributed(
    plan: Plan,
    feeds: Sequence[Feed],
    arrays: Sequence[Sequence[Array]],
    counting: tuple[str, ...],
    mapped: tuple[str, ...],
    split: bool,
) -> list[Block]:
    """The contributions of this device.

    Args:
        plan: of the object.
        feeds: the values of this update.
        arrays: for each feed, the arrays of its ``sources``.
        counting: the axes over which contributions are merged in the end: of copies along these the first counts.
        mapped: the axes over which this code is mapped, each of whose devices has values of its own.
        split: see ``Batch``.
    """
    alike: dict[Any, list[tuple[int, Sequence[Array]]]] = {}
    for feed, given in zip(feeds, arrays, strict=True):
        for i in feed.metrics:
            alike.setdefault(_likeness(plan, i, feed, given, split), []).append((i, given))
    feed_of = {i: feed for feed in feeds for i in feed.metrics}
    blocks = []
    for members in alike.values():
        first_member, given = members[0]
        feed = feed_of[first_member]
        group = plan.group_of[first_member]
        contribute = _contribution_function(group.accumulator, plan.ignores, feed, counting, mapped, split)
        inputs = len(feed.inputs)
        with jax.named_scope(update_scope(_shapes(plan, feed_of, members, counting))):
            if len(members) == 1:
                fields = jax.tree.map(lambda part: part[None], contribute(given[:inputs], given[inputs:]))
            else:
                stacked = [jnp.stack(same) for same in zip(*(given[:inputs] for _, given in members), strict=True)]
                fields = jax.vmap(contribute, in_axes=(0, None), axis_size=len(members))(stacked, given[inputs:])
        block = Block(tuple(i for i, _ in members), group, fields)
        blocks.append(block.on_first(tuple(axis for axis in counting if axis not in feed.axes)))
    return blocks


def update_scope(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """How operations on values are labelled in the compiled program, for profiles and for ``assert_silent``."""
    return f"update{dict(shapes)!r}"


def _shapes(
    plan: Plan, feed_of: Mapping[int, Feed], members: Sequence[tuple[int, Sequence[Array]]], counting: tuple[str, ...]
) -> dict[str, tuple[int, ...]]:
    """The shapes of values by name, as their update gave them: whole, where this device has a part of them."""
    shapes = {}
    for i, given in members:
        source = feed_of[i].inputs[0]
        shape = given[0].shape[: given[0].ndim - source.pair]
        entries = [*((source.spec if counting else None) or ()), *(None for _ in shape)]
        parts = [lax.axis_size(spec_axes(P(entry))) if entry else 1 for entry in entries]
        shapes[plan.metrics[i].value_name] = tuple(size * part for size, part in zip(shape, parts, strict=False))
    return shapes


def _likeness(plan: Plan, i: int, feed: Feed, given: Sequence[Array], split: bool) -> Any:
    """Equal for metrics whose contributions may be computed together."""
    values = given[: len(feed.inputs)]
    if not split or feed.keywords is not None or any(array.size > _MOST_STACKED_ELEMENTS for array in values):
        return i
    shapes = tuple((array.shape, array.dtype, source.pair) for array, source in zip(values, feed.inputs, strict=True))
    return plan.metrics[i].accumulator, shapes, tuple(source.spec for source in feed.inputs), feed.weights


def _contribution_function(
    accumulator: Accumulator,
    ignores: bool,
    feed: Feed,
    counting: tuple[str, ...],
    mapped: tuple[str, ...],
    split: bool,
) -> Callable[[Sequence[Array], Sequence[Array]], dict[str, Parts]]:
    """What one value adds, as a function of its arrays and their weights."""

    def contribute(values: Sequence[Array], weights: Sequence[Array]) -> dict[str, Parts]:
        if feed.keywords is not None:
            named = dict(zip(feed.keywords, values, strict=True))
            return _checked_fields(accumulator, accumulator.contribution(**named, **dict(feed.settings)))
        remaining = iter(weights)
        batches = []
        for value, source, weight_source in zip(values, feed.inputs, feed.weights, strict=True):
            weight = None if weight_source is None else _weight_numbers(next(remaining), weight_source.pair)
            copied = tuple(a for a in counting if a in feed.axes and a not in spec_axes(source.spec or P()))
            if copied:  # the other half of a pair is partitioned over these axes, so this half must count once
                weight = _gated(weight, is_first(copied))
            leading = value.shape[: value.ndim - source.pair - len(accumulator.shape)]
            origin = _origin(leading, source.spec if counting else None, mapped)
            batches.append(Batch(_numbers(value, source.pair), weight, accumulator.shape, split, origin))
        nonfinite: dict[str, Parts] = {}
        if ignores:
            batches, nonfinite = _finite_only(batches)
        given = accumulator.contribution(*batches)
        return {**_checked_fields(accumulator, {"weight": batches[0].total_weight(), **given}), **nonfinite}

    return contribute


def _origin(leading: tuple[int, ...], spec: P | None, mapped: tuple[str, ...]) -> tuple[tuple[Any, int], ...]:
    """Where this device's part of a value lies in the whole: see ``Batch``."""

    def part_of(axes: tuple[str, ...], size: int) -> tuple[Any, int]:
        return (lax.axis_index(axes) * size, lax.axis_size(axes) * size) if axes else (0, size)

    entries = [*(spec or ()), *(None,) * len(leading)]
    places = [part_of(spec_axes(P(entry)), size) for entry, size in zip(entries, leading, strict=False)]
    return (part_of(mapped, 1), *places) if mapped else tuple(places)


def _finite_only(batches: Sequence[Batch]) -> tuple[list[Batch], dict[str, Parts]]:
    """The batches without the elements that are not finite, and how many these are (of a pair: either of the two)."""
    if not any(isinstance(batch.value, tuple) for batch in batches):  # integers
        zeros = jnp.zeros(batches[0].shape, jnp.float32)
        return list(batches), {NONFINITE: (zeros, zeros)}
    finite = functools.reduce(jnp.logical_and, [batch.finite() for batch in batches])
    out = batches[0].only(~finite)
    return [batch.only(finite) for batch in batches], {NONFINITE: out.counted_elements()}


def _numbers(array: Array, pair: bool) -> Array | Pair:
    """Integers and booleans as they are; floats, and numbers split on the host, as pairs."""
    if pair:
        return array[..., 0], array[..., 1]
    return array if compensated.is_integer(array) else compensated.pair_of(array)


def _weight_numbers(array: Array, pair: bool) -> Array | Pair:
    """Booleans as they are; every other weight as a pair."""
    if array.dtype == jnp.bool_:
        return array
    numbers = _numbers(array, pair)
    return numbers if isinstance(numbers, tuple) else compensated.integer_pair(numbers)


def _gated(weight: Array | Pair | None, gate: Array) -> Array | Pair:
    if weight is None:
        return gate
    if isinstance(weight, tuple):
        return jnp.where(gate, weight[0], 0), jnp.where(gate, weight[1], 0)
    return weight & gate


def _checked_fields(accumulator: Accumulator, given: Mapping[str, Any]) -> dict[str, Parts]:
    """The contribution in full: every field, as parts of the field's shape.

    Raises:
        TypeError, ValueError: the accumulator returned other fields, or another shape, than it declares.
    """
    name = type(accumulator).__name__
    merges = fields_of(accumulator, ignores=False)
    if set(given) != set(merges):
        raise ValueError(
            f"{name}.contribution() returned the fields {sorted(given)}, and {name}.fields declares {sorted(merges)}."
        )
    fields = {}
    for field, merge in merges.items():
        value = given[field]
        if isinstance(value, Batch):
            raise TypeError(
                f"{name}.contribution(): the field {field!r} is a Batch, which is no number yet.\n"
                "  Reduce it: batch.map(...).sum()"
            )
        parts = value if isinstance(value, tuple) else (compensated.opaque(jnp.asarray(value, jnp.float32)),)
        parts += tuple(jnp.zeros_like(parts[0]) for _ in range(merge.words - len(parts)))
        shape = accumulator.field_shape(field)
        if any(part.shape != shape for part in parts):
            raise ValueError(
                f"{name}.contribution() returned {field!r} of shape {parts[0].shape}, and the shape of {name} is "
                f"{shape}."
            )
        fields[field] = tuple(part.astype(jnp.float32) for part in parts)
    return fields


def assembled(plan: Plan, blocks: Sequence[Block]) -> dict[str, Parts]:
    """One contribution to each table that the blocks touch, parts of shape ``(slots,)``; the rest is the identity."""
    touched = plan.tables_of(member for block in blocks for member in block.members)
    slots: dict[str, list[Parts]] = {table: [] for table in touched}
    for group in plan.groups:
        mine = [block for block in blocks if block.group is group]
        for name, field in group.fields.items():
            if field.merge.name in slots:
                slots[field.merge.name].append(_in_order(group, name, field, mine))
    return {table: tuple(jnp.concatenate(part) for part in zip(*slots[table], strict=True)) for table in slots}


def _in_order(group: Group, name: str, field: Field, blocks: Sequence[Block]) -> Parts:
    """One field of all members of a group, in the order of their slots."""
    identity = field.merge.identity
    if not blocks:
        return tuple(jnp.full((len(group.members) * field.size,), one, jnp.float32) for one in identity)
    came = [member for block in blocks for member in block.members]
    parts = []
    for k, one in enumerate(identity):
        part = jnp.concatenate([block.fields[name][k].reshape(len(block.members), field.size) for block in blocks])
        if came != list(group.members):
            part = jnp.concatenate([part, jnp.full((1, field.size), one, jnp.float32)])
            position = {member: at for at, member in enumerate(came)}
            part = part[np.array([position.get(member, len(came)) for member in group.members])]
        parts.append(part.reshape(-1))
    return tuple(parts)
