"""The functional core: rows in, rows out. Everything here is pure, and nothing here knows of nnx.

The functions named ``_local_*`` see one row of the tables, on the device that owns it; the others bring them to every
way of running, which a ``View`` describes, and to populations.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from distributed_metrics.contributions import Feed, assembled, contributed, is_first
from distributed_metrics.gathering import Gathering, gathering_of, merge_rows
from distributed_metrics.merging import Merge, Parts
from distributed_metrics.plan import Plan
from distributed_metrics.tables import (
    Tables,
    joined_words,
    parts_of,
    relaid_parts,
    row_of,
    row_shapes,
    split_words,
    table_dims,
)
from distributed_metrics.view import Layout, View, look_fresh, varying_axes

ONE_ROW, MANY_ROWS = "reduced_into_one_row", "reduced_into_the_first_row"
"""Labels, in the compiled program, of values that XLA reduces because it is not known how they are partitioned."""

# --- one row, on its device ---


def _local_fresh(plan: Plan, axes: tuple[str, ...]) -> Tables:
    """A row that has seen nothing, varying over ``axes`` at once, so that a loop may carry it."""

    def row(merge: Merge, shape: tuple[int, ...]) -> Array:
        words = np.asarray(merge.identity, np.float32)
        if 0 in shape:  # the CPU backend of jax 0.11.2 crashes at a constant without elements that stands beside others
            identity = jnp.zeros(shape, jnp.float32)
        else:
            identity = jnp.asarray(np.broadcast_to(words if len(words) > 1 else words[0], shape))
        return lax.pcast(identity, axes, to="varying") if axes else identity

    return {table: row(plan.tables[table], like.shape) for table, like in row_shapes(plan).items()}


def _like_fresh(plan: Plan, tables: Tables) -> Tables:
    """Fresh rows with exactly the types of ``tables``, so that a loop can carry either."""

    def reset(table: str, row: Array) -> Array:
        never = (row != row) & (row == row)
        return jnp.where(never, row, _local_fresh(plan, ())[table])

    return {table: reset(table, row) for table, row in tables.items()}


def _local_follow(plan: Plan, rows: Tables, contribution: dict[str, Parts]) -> Tables:
    """The rows after a contribution."""
    after = {}
    for table in sorted(contribution):
        merge = plan.tables[table]
        after[table] = row_of(merge, merge.after(parts_of(merge, rows[table]), contribution[table]))
    return after


def _local_merged(plan: Plan, axes: tuple[str, ...], row: Tables) -> Array:
    """The merge of all rows, the same on all devices, as one flat buffer: one collective, or two for large tables."""
    if not axes:
        return joined_words(row)
    gathering = gathering_of(plan, lax.axis_size(axes), row)
    merged = merge_rows(plan, gathering.open(gathering.gather(axes, row)))
    return joined_words({table: row_of(plan.tables[table], parts) for table, parts in merged.items()})


# --- every way of running ---


def _on_rows(view: View, function: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """``function`` of the per-device view, mapped over the global axes, if there are any to map over."""
    if not view.global_axes:
        return function
    return jax.shard_map(
        function, mesh=view.mesh, in_specs=in_specs, out_specs=out_specs, axis_names=set(view.global_axes)
    )


def _rowless(view: View, tables: Tables) -> Tables:
    return {name: table[0] for name, table in tables.items()} if view.row_dim else tables


def _rowed(view: View, tables: Tables) -> Tables:
    return {name: table[None] for name, table in tables.items()} if view.row_dim else tables


def updated(plan: Plan, view: View, feeds: Sequence[Feed], tables: Tables, arrays: Sequence[Any]) -> Tables:
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
    with jax.named_scope(MANY_ROWS if view.global_axes else ONE_ROW):
        outer = contributed(plan, unknown, [feed.take(arrays) for feed in unknown], (), view.mapped, split=False)
    touched = plan.tables_of(member for feed in feeds for member in feed.metrics)

    def local(rows: Tables, given: Sequence[Sequence[Array]], outer_fields: Sequence[dict[str, Parts]]) -> Tables:
        blocks = contributed(plan, known, given, counting, view.mapped, split=True)
        blocks += [replace(block, fields=f).on_first(counting) for block, f in zip(outer, outer_fields, strict=True)]
        contribution = assembled(plan, blocks)
        if used_others:
            contribution = merged_over(plan, used_others, contribution)
        return _rowed(view, _local_follow(plan, _rowless(view, rows), contribution))

    row_spec = P(view.spread)
    specs = [[source.spec for source in feed.sources] for feed in known]
    given = [feed.take(arrays) for feed in known]
    if view.explicit:  # a weight follows its value
        given = jax.tree.map(partial(_resharded, view), given, specs)
    # A program of several updates must not become one fusion: XLA would work out the first again in each of the others.
    before = lax.optimization_barrier({table: tables[table] for table in touched})
    after = _on_rows(view, local, (row_spec, specs, P()), row_spec)(before, given, [block.fields for block in outer])
    return {**tables, **after}


def _resharded(view: View, array: Array, spec: P) -> Array:
    return jax.sharding.reshard(array, NamedSharding(view.mesh_here(), spec))


def merged_over(plan: Plan, axes: tuple[str, ...], contribution: dict[str, Parts]) -> dict[str, Parts]:
    """The contributions of devices that share a row, as one."""
    tables = {table: row_of(plan.tables[table], parts) for table, parts in contribution.items()}
    merged = split_words(plan, _local_merged(plan, axes, tables), tables)
    return {table: parts_of(plan.tables[table], row) for table, row in merged.items()}


def merged(plan: Plan, view: View, tables: Tables) -> Array:
    """The merge of all rows as one flat buffer of float32 words, the same on all devices. At most two collectives."""

    def local(rows: Tables) -> Array:
        return _local_merged(plan, view.mapped + view.spread, _rowless(view, rows))

    return _over_populations(plan, view, _on_rows(view, local, P(view.spread), P()), tables)


def absorbed(plan: Plan, view: View, tables: Tables, words: Array) -> Tables:
    """The rows after a merged snapshot, a buffer of words that is the same everywhere: the first row takes it."""

    def local(rows: Tables, words: Array) -> Tables:
        first = is_first(view.mapped + view.spread) if view.mapped + view.spread else jnp.bool_(True)
        contribution = {}
        for table, row in split_words(plan, words).items():
            parts = parts_of(plan.tables[table], row)
            others = plan.tables[table].in_other_rows(parts)
            contribution[table] = tuple(jnp.where(first, part, o) for part, o in zip(parts, others, strict=True))
        return _rowed(view, _local_follow(plan, _rowless(view, rows), contribution))

    return _on_rows(view, local, (P(view.spread), P()), P(view.spread))(tables, words)


def reset(plan: Plan, view: View, tables: Tables) -> Tables:
    """Rows that have seen nothing, with the shapes, dtypes and shardings of ``tables``."""
    return _over_populations(
        plan, view, _on_rows(view, partial(_like_fresh, plan), P(view.spread), P(view.spread)), tables
    )


def relaid(old: Plan, new: Plan, view: View, tables: Tables) -> Tables:
    """The rows of one plan as those of another, whose metrics have learnt more fields."""

    def local(rows: Tables) -> Tables:
        given = {table: parts_of(old.tables[table], row) for table, row in rows.items()}
        parts = relaid_parts(old, new, given, jnp)
        varying = varying_axes(next(iter(rows.values())))
        return {table: _varying(row_of(new.tables[table], of_table), varying) for table, of_table in parts.items()}

    return _over_populations(old, view, _on_rows(view, local, P(view.spread), P(view.spread)), tables)


def _varying(row: Array, axes: frozenset[str]) -> Array:
    """A row whose type varies over ``axes``, as those of all rows in a program do."""
    missing = tuple(axes - varying_axes(row))
    return lax.pcast(row, missing, to="varying") if missing else row


def gathered(plan: Plan, view: View, gathering: Gathering, tables: Tables, labels: Array) -> Array:
    """The buffer of a gathering ``(..., rows, width)``, on all devices: what an eager flush of many processes keeps.

    Args:
        plan, view, tables: of the object.
        gathering: of these tables.
        labels: ``(rows, words)``: what the process that owns a row says of it.
    """

    def local(rows: Tables, labels: Array) -> Array:
        return gathering.gather(view.spread, _rowless(view, rows), labels[0])

    mapped = _on_rows(view, local, (P(view.spread), P(view.spread)), P())
    return _over_populations(plan, view, lambda tables: mapped(tables, labels), tables)


def unmerged(plan: Plan, view: View, tables: Tables) -> Array:
    """The rows as one buffer ``(..., rows, words)``: what an eager flush keeps. No communication."""
    like = row_shapes(plan)
    flat = [t.reshape(*t.shape[: t.ndim - len(like[m].shape)], -1) for m, t in sorted(tables.items())]
    if view.explicit:  # a reshape of one row, on a mesh of one device, loses the partition of its type
        lead = (None,) * populations(plan, view, tables)
        flat = [_resharded(view, table, P(*lead, view.spread)) for table in flat]
    return jnp.concatenate(flat, axis=-1)


def populations(plan: Plan, view: View, tables: Tables) -> int:
    """How many dims ``vmap`` (or ``scan``) put in front of the rows."""
    table = min(tables)
    return tables[table].ndim - table_dims(plan, table) + (0 if view.row_dim else 1)


def refuse_populations(method: str, plan: Plan, view: View, tables: Tables) -> None:
    """Raise a ValueError where the rows are those of a population, outside of the ``vmap`` that goes over it."""
    if lead := populations(plan, view, tables):
        raise ValueError(
            f"metrics.{method}(): these accumulators are a population, with {lead} dim(s) in front of the rows: "
            f"shape {tables[min(tables)].shape}.\n"
            f"  Do it under vmap: jax.vmap(lambda m, x: (m.{method}({'loss=x' if method == 'update' else 'x'}), m)"
            "[1])(metrics, values)"
        )


def _over_populations(plan: Plan, view: View, function: Callable[[Tables], Any], tables: Tables) -> Any:
    for _ in range(populations(plan, view, tables)):
        function = jax.vmap(function)
    return function(tables)


def fresh(plan: Plan, layout: Layout) -> Tables:
    """Rows for a new object, wherever it is made: eagerly, in a trace, or inside a ``shard_map``."""
    view, varying = look_fresh(layout)

    def local() -> Tables:
        return {table: row[None] for table, row in _local_fresh(plan, varying).items()}

    if layout.mesh is None or not view.spread:
        return local()
    return jax.shard_map(local, mesh=view.mesh, in_specs=(), out_specs=P(view.spread), axis_names=set(view.spread))()
