"""The functional core: rows in, rows out. Everything here is pure, and nothing here knows of nnx.

The state of an object is a few *tables*, one for each merge in use: ``(rows, slots, words)`` float32, without the last
dim where a slot is one word. The functions named ``_local_*`` see one row, on the device that owns it; ``updated``,
``fresh`` and ``merged`` bring them to every way of running, which a ``View`` describes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, ShapeDtypeStruct, lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from distributed_metrics import compensated, packing
from distributed_metrics.contributions import Feed, assembled, contributed
from distributed_metrics.merging import MERGES, Parts
from distributed_metrics.plan import Plan
from distributed_metrics.view import Layout, View

Tables = dict[str, Array]


def table_dims(merge: str) -> int:
    """How many dims a table has, rows included."""
    return 2 if MERGES[merge].words == 1 else 3


def row_shapes(plan: Plan) -> dict[str, ShapeDtypeStruct]:
    """The shape and dtype of one row of each table."""

    def shape(merge: str, slots: int) -> tuple[int, ...]:
        return (slots,) if MERGES[merge].words == 1 else (slots, MERGES[merge].words)

    return {merge: ShapeDtypeStruct(shape(merge, slots), jnp.float32) for merge, slots in sorted(plan.slots.items())}


# --- one row, on its device ---


def parts_of(merge: str, row: Any) -> Parts:
    """The parts of a table (or row, or rows) whose last dim holds the words of a slot."""
    return (row,) if MERGES[merge].words == 1 else tuple(row[..., i] for i in range(MERGES[merge].words))


def _row(merge: str, parts: Parts) -> Array:
    return parts[0] if MERGES[merge].words == 1 else jnp.stack(parts, axis=-1)


def _local_fresh(plan: Plan, axes: tuple[str, ...]) -> Tables:
    """A row that has seen nothing, varying over ``axes`` at once, so that a loop may carry it."""

    def row(merge: str, shape: tuple[int, ...]) -> Array:
        words = np.asarray(MERGES[merge].identity, np.float32)
        identity = jnp.asarray(np.broadcast_to(words if len(words) > 1 else words[0], shape))
        return lax.pcast(identity, axes, to="varying") if axes else identity

    return {merge: row(merge, like.shape) for merge, like in row_shapes(plan).items()}


def _like_fresh(plan: Plan, tables: Tables) -> Tables:
    """Fresh rows with exactly the types of ``tables``, so that a loop can carry either."""

    def reset(merge: str, row: Array) -> Array:
        never = (row != row) & (row == row)
        return jnp.where(never, row, _local_fresh(plan, ())[merge])

    return {merge: reset(merge, row) for merge, row in tables.items()}


def _local_merge(plan: Plan, rows: Tables, contribution: dict[str, Parts]) -> Tables:
    return {
        merge: _row(merge, MERGES[merge].combine(parts_of(merge, rows[merge]), contribution[merge]))
        for merge in sorted(plan.slots)
    }


def _local_words(tables: Tables) -> Array:
    """A row as one flat float32 buffer: the tables in the order of their names."""
    return packing.pack([tables[merge] for merge in sorted(tables)])[np.dtype(np.float32)]


def split_words(plan: Plan, words: Any) -> dict[str, Any]:
    """The tables of a buffer ``(..., words)``: arrays ``(..., slots, words of a slot)``."""
    like = row_shapes(plan)
    return dict(zip(like, packing.unpack({np.dtype(np.float32): words}, list(like.values())), strict=True))


def join_words(parts: Mapping[str, tuple[Any, ...]], xp: Any) -> Any:
    """The buffer ``(..., words)`` of tables in parts ``(..., slots)``: NumPy arrays, or traced ones."""
    flat = []
    for merge, table in sorted(parts.items()):
        words = xp.stack(table, axis=-1) if MERGES[merge].words > 1 else table[0]
        flat.append(words.reshape(*table[0].shape[:-1], -1))
    return xp.concatenate(flat, axis=-1)


def _local_merged(plan: Plan, axes: tuple[str, ...], row: Tables) -> Array:
    """The merge of all rows, the same on all devices: one collective."""
    words = _local_words(row)
    if not axes:
        return words
    tables = split_words(plan, lax.all_gather(words, axes, to="invarying"))
    merged = {
        merge: _row(merge, compensated.fold(MERGES[merge].combine, parts_of(merge, rows), MERGES[merge].identity))
        for merge, rows in tables.items()
    }
    return _local_words(merged)


# --- every way of running ---


def _on_rows(view: View, function: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """``function`` of the per-device view, mapped over the global axes, if there are any to map over."""
    if not view.global_axes:
        return function
    return jax.shard_map(
        function, mesh=view.mesh, in_specs=in_specs, out_specs=out_specs, axis_names=set(view.global_axes)
    )


def _rowless(view: View, tables: Tables) -> Tables:
    return {merge: table[0] for merge, table in tables.items()} if view.row_dim else tables


def _rowed(view: View, tables: Tables) -> Tables:
    return {merge: table[None] for merge, table in tables.items()} if view.row_dim else tables


def updated(plan: Plan, view: View, feeds: Sequence[Feed], tables: Tables, arrays: Sequence[Array]) -> Tables:
    """The rows after one update.

    Args:
        plan, view: of the object, here.
        feeds: the static side of the values.
        tables: the rows.
        arrays: what the feeds refer to by index.
    """
    used_others = tuple(axis for axis in view.others if any(axis in feed.axes for feed in feeds))
    counting = (view.spread + used_others) if view.global_axes else ()
    known = [feed for feed in feeds if feed.known]
    unknown = [feed for feed in feeds if not feed.known]
    # A value whose partition is not known is reduced by XLA, to the size of an accumulator; the first row counts it.
    outer = contributed(plan, unknown, [feed.take(arrays) for feed in unknown], (), split=False)

    def local(rows: Tables, given: Sequence[Sequence[Array]], outer_fields: Sequence[dict[str, Parts]]) -> Tables:
        blocks = contributed(plan, known, given, counting, split=True)
        blocks += [replace(block, fields=f).on_first(counting) for block, f in zip(outer, outer_fields, strict=True)]
        contribution = assembled(plan, blocks)
        if used_others:
            contribution = _merged_over(plan, used_others, contribution)
        return _rowed(view, _local_merge(plan, _rowless(view, rows), contribution))

    row_spec = P(view.spread)
    specs = [[source.spec for source in feed.sources] for feed in known]
    given = [feed.take(arrays) for feed in known]
    if view.explicit:  # a weight follows its value
        given = jax.tree.map(partial(_resharded, view), given, specs)
    return _on_rows(view, local, (row_spec, specs, P()), row_spec)(tables, given, [block.fields for block in outer])


def _resharded(view: View, array: Array, spec: P) -> Array:
    mesh = view.mesh if view.mesh is not None else jax.sharding.get_abstract_mesh()
    return jax.sharding.reshard(array, NamedSharding(mesh, spec))


def _merged_over(plan: Plan, axes: tuple[str, ...], contribution: dict[str, Parts]) -> dict[str, Parts]:
    """The contributions of devices that share a row, as one."""
    tables = {merge: _row(merge, parts) for merge, parts in contribution.items()}
    merged = split_words(plan, _local_merged(plan, axes, tables))
    return {merge: parts_of(merge, row) for merge, row in merged.items()}


def merged(plan: Plan, view: View, tables: Tables) -> Array:
    """The merge of all rows as one flat buffer of float32 words, the same on all devices. At most one collective."""

    def local(rows: Tables) -> Array:
        return _local_merged(plan, view.mapped + view.spread, _rowless(view, rows))

    return _over_populations(plan, view, _on_rows(view, local, P(view.spread), P()), tables)


def reset(plan: Plan, view: View, tables: Tables) -> Tables:
    """Rows that have seen nothing, with the shapes, dtypes and shardings of ``tables``."""
    return _over_populations(
        plan, view, _on_rows(view, partial(_like_fresh, plan), P(view.spread), P(view.spread)), tables
    )


def unmerged(plan: Plan, tables: Tables) -> Array:
    """The rows as one buffer ``(..., rows, words)``: what an eager flush keeps. No communication."""
    like = row_shapes(plan)
    flat = [t.reshape(*t.shape[: t.ndim - len(like[m].shape)], -1) for m, t in sorted(tables.items())]
    return jnp.concatenate(flat, axis=-1)


def populations(plan: Plan, view: View, tables: Tables) -> int:
    """How many dims ``vmap`` (or ``scan``) put in front of the rows."""
    merge = min(tables)
    return tables[merge].ndim - table_dims(merge) + (0 if view.row_dim else 1)


def _over_populations(plan: Plan, view: View, function: Callable[[Tables], Any], tables: Tables) -> Any:
    for _ in range(populations(plan, view, tables)):
        function = jax.vmap(function)
    return function(tables)


def fresh(plan: Plan, layout: Layout) -> Tables:
    """Rows for a new object, wherever it is made: eagerly, in a trace, or inside a ``shard_map``."""
    context = jax.sharding.get_abstract_mesh()
    mapped = tuple(axis for axis in layout.axes if axis in context.manual_axes)
    spread = tuple(axis for axis in layout.axes if axis not in mapped)

    def local() -> Tables:
        return {merge: row[None] for merge, row in _local_fresh(plan, mapped + spread).items()}

    if layout.mesh is None or not spread:
        return local()
    mesh = None if not context.empty and all(axis in context.axis_names for axis in layout.axes) else layout.mesh
    return jax.shard_map(local, mesh=mesh, in_specs=(), out_specs=P(spread), axis_names=set(spread))()
