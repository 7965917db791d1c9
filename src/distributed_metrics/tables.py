"""The tables that the state of an object consists of, and their words in one flat buffer.

There is one *table* for each merge in use: ``(rows, slots, words)`` float32, without the last dim where a slot is one
word.
"""

import functools
from collections.abc import Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, ShapeDtypeStruct

from distributed_metrics import packing
from distributed_metrics.merging import Merge, Parts
from distributed_metrics.plan import Plan

Tables = dict[str, Array]


def table_dims(plan: Plan, table: str) -> int:
    """How many dims a table has, rows included."""
    return 2 if plan.tables[table].words == 1 else 3


def row_shapes(plan: Plan, tables: Iterable[str] | None = None) -> dict[str, ShapeDtypeStruct]:
    """The shape and dtype of one row of each table, or of some of them."""
    return {table: _row_shape(plan, table) for table in sorted(plan.tables if tables is None else tables)}


@functools.lru_cache(maxsize=1024)
def _row_shape(plan: Plan, table: str) -> ShapeDtypeStruct:
    words = plan.tables[table].words
    return ShapeDtypeStruct((plan.slots[table],) if words == 1 else (plan.slots[table], words), jnp.float32)


def parts_of(merge: Merge, row: Any) -> Parts:
    """The parts of a table (or row, or rows) whose last dim holds the words of a slot."""
    return (row,) if merge.words == 1 else tuple(row[..., i] for i in range(merge.words))


def row_of(merge: Merge, parts: Parts) -> Array:
    """A table (or row, or rows) of its parts."""
    return parts[0] if merge.words == 1 else jnp.stack(parts, axis=-1)


def joined_words(tables: Tables) -> Array:
    """A row as one flat float32 buffer: the tables in the order of their names."""
    return packing.pack([tables[table] for table in sorted(tables)])[np.dtype(np.float32)]


def split_words(plan: Plan, words: Any, tables: Iterable[str] | None = None) -> dict[str, Any]:
    """The tables (all, or some) of a buffer ``(..., words)``: arrays ``(..., slots, words of a slot)``."""
    like = row_shapes(plan, tables)
    return dict(zip(like, packing.unpack({np.dtype(np.float32): words}, list(like.values())), strict=True))


def join_words(plan: Plan, parts: Mapping[str, tuple[Any, ...]], xp: Any) -> Any:
    """The buffer ``(..., words)`` of tables in parts ``(..., slots)``: NumPy arrays, or traced ones."""
    flat = []
    for table, of_table in sorted(parts.items()):
        words = xp.stack(of_table, axis=-1) if plan.tables[table].words > 1 else of_table[0]
        flat.append(words.reshape(*of_table[0].shape[:-1], -1))
    return xp.concatenate(flat, axis=-1)


@functools.lru_cache(maxsize=1024)
def words_of_a_row(plan: Plan) -> int:
    """How many words the buffer of one row has."""
    return sum(like.size for like in row_shapes(plan).values())


def identity_words(plan: Plan) -> np.ndarray:
    """The buffer of tables that have seen nothing, on the host."""
    rows = {
        table: np.broadcast_to(np.asarray(plan.tables[table].identity, np.float32).squeeze(), like.shape)
        for table, like in row_shapes(plan).items()
    }
    return np.concatenate([row.reshape(-1) for row in rows.values()])


def relaid_parts(old: Plan, new: Plan, parts: Mapping[str, Parts], xp: Any) -> dict[str, Parts]:
    """The slots ``(..., slots)`` of one plan in the order of another, whose metrics have learnt more fields.

    Args:
        old, new: plans of the same metrics.
        parts: the tables of ``old``.
        xp: ``numpy`` or ``jax.numpy``.
    """
    lead = next(iter(parts.values()))[0].shape[:-1]
    relaid: dict[str, list[Parts]] = {table: [] for table in new.tables}
    for group in new.groups:
        for name, field in group.fields.items():
            for i in group.members:
                before = old.group_of[i]
                place = before.fields.get(name)
                if place is not None and (place.merge.name, place.shape) == (field.merge.name, field.shape):
                    slots = place.slots_of_one(before.members.index(i))
                    words = tuple(part[..., slots] for part in parts[place.merge.name])
                else:
                    words = tuple(xp.full((*lead, field.size), one, xp.float32) for one in field.merge.identity)
                relaid[field.merge.name].append(words)
    return {
        table: tuple(xp.concatenate(part, axis=-1) for part in zip(*words, strict=True))
        for table, words in relaid.items()
    }
