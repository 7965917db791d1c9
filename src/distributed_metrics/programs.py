"""The jitted programs of an object, one for each plan, view and static side of a call.

Called in a trace they are inlined; either way they are traced once for each set of shapes.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax

from distributed_metrics import rows
from distributed_metrics.contributions import Feed
from distributed_metrics.gathering import Gathering
from distributed_metrics.plan import Plan
from distributed_metrics.tables import Tables
from distributed_metrics.view import Layout, View


@functools.lru_cache(maxsize=1024)
def update(plan: Plan, view: View, feeds: tuple[Feed, ...]) -> Callable[..., Tables]:
    """The tables after an update of arrays."""
    return jax.jit(functools.partial(rows.updated, plan, view, feeds), inline=True)


@functools.lru_cache(maxsize=1024)
def absorb(plan: Plan, view: View) -> Callable[[Tables, Any], Tables]:
    """The tables after a snapshot, a buffer of words."""
    return jax.jit(functools.partial(rows.absorbed, plan, view), inline=True)


@functools.lru_cache(maxsize=1024)
def relay(old: Plan, new: Plan, view: View) -> Callable[[Tables], Tables]:
    """The tables as another plan lays them out."""
    return jax.jit(functools.partial(rows.relaid, old, new, view), inline=True)


@functools.lru_cache(maxsize=1024)
def merge(plan: Plan, view: View) -> Callable[[Tables], jax.Array]:
    """The merge of all rows, the same on all devices, as one buffer of words."""
    return jax.jit(functools.partial(rows.merged, plan, view), inline=True)


@functools.lru_cache(maxsize=1024)
def reset(plan: Plan, view: View) -> Callable[[Tables], Tables]:
    """Tables that have seen nothing, like those given."""
    return jax.jit(functools.partial(rows.reset, plan, view), inline=True)


@functools.lru_cache(maxsize=1024)
def read(plan: Plan, view: View, fresh: bool) -> Callable[[Tables], tuple[jax.Array, Tables | None]]:
    """The rows in one buffer and, with ``fresh``, rows that have seen nothing: all of an eager flush in one process."""

    def of_tables(tables: Tables) -> tuple[jax.Array, Tables | None]:
        return rows.unmerged(plan, view, tables), rows.reset(plan, view, tables) if fresh else None

    return jax.jit(of_tables)


@functools.lru_cache(maxsize=1024)
def gather(
    plan: Plan, view: View, gathering: Gathering, fresh: bool
) -> Callable[[Tables, jax.Array], tuple[jax.Array, Tables | None]]:
    """The same where other processes have some of the rows."""

    def of_tables(tables: Tables, labels: jax.Array) -> tuple[jax.Array, Tables | None]:
        buffer = rows.gathered(plan, view, gathering, tables, labels)
        return buffer, rows.reset(plan, view, tables) if fresh else None

    return jax.jit(of_tables)


@functools.lru_cache(maxsize=1024)
def fresh(plan: Plan, layout: Layout) -> Callable[[], Tables]:
    """The tables of a new object."""
    return jax.jit(functools.partial(rows.fresh, plan, layout))
