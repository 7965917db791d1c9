"""gather: the rows of all devices at one place.

Rows are small as a rule: every device gets all of them, by one ``all_gather``. A table that is too large for that is
merged on the way: an ``all_to_all`` brings each device one part of the slots, of all rows; it merges those, and the
merged parts travel with the rows of the small tables. Memory per device is then two to three times the state, however
many devices there are.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from distributed_metrics import compensated
from distributed_metrics.merging import Parts
from distributed_metrics.plan import Plan
from distributed_metrics.tables import Tables, parts_of, row_of, row_shapes

MOST_GATHERED_BYTES = 2**20
"""A table is merged on the way where its rows of all devices are more bytes than this (see docs/scaling.md)."""


@dataclass(frozen=True)
class Gathering:
    """What lies where in a buffer ``(..., rows, width)``: in each row a head, rows of tables, and merged parts.

    Attributes:
        plan: of the object.
        tables: the names of the tables in it.
        merged: those among them that were merged on the way, of which each row of the buffer holds one part.
        head: how many words stand in front of the tables; more may stand behind them.
    """

    plan: Plan
    tables: tuple[str, ...]
    merged: tuple[str, ...] = ()
    head: int = 0

    def used(self, rows: int) -> int:
        """How many words of a row of the buffer are the head and the tables."""
        sizes = row_shapes(self.plan, self.tables)
        return self.head + sum(
            self._part(table, rows) * self.plan.tables[table].words if table in self.merged else like.size
            for table, like in sizes.items()
        )

    def _part(self, table: str, rows: int) -> int:
        """How many slots of a merged table one row of the buffer holds."""
        return -(-self.plan.slots[table] // rows)

    def gather(self, axes: tuple[str, ...], tables: Tables, label: Array | None = None) -> Array:
        """The buffer, from one row on each device along ``axes``; the same on all of them.

        One collective, or two where tables are merged on the way.

        Args:
            axes: mapped here.
            tables: the row of this device.
            label: the head, and what stands behind the tables.
        """
        rows = lax.axis_size(axes)
        parts = self._parts_merged_here(axes, rows, tables) if self.merged else {}
        flat = [parts[t] if t in parts else tables[t].reshape(-1) for t in self.tables]
        if label is not None:
            flat = [label[: self.head], *flat, label[self.head :]]
        return lax.all_gather(jnp.concatenate(flat), axes, to="invarying")

    def _parts_merged_here(self, axes: tuple[str, ...], rows: int, tables: Tables) -> dict[str, Array]:
        cut = {table: _cut(self.plan, table, rows, tables[table]) for table in self.merged}
        received = lax.all_to_all(jnp.concatenate(list(cut.values()), axis=1), axes, 0, 0)
        here, start = {}, 0
        for table in self.merged:
            merge, size = self.plan.tables[table], cut[table].shape[1]
            part = received[:, start : start + size].reshape(rows, -1, merge.words)
            part = part if merge.words > 1 else part[..., 0]
            folded = compensated.fold(merge.combine, parts_of(merge, part), merge.identity)
            here[table] = row_of(merge, folded).reshape(-1)
            start += size
        return here

    def open(self, buffer: Any) -> dict[str, Any]:
        """The tables of a buffer, ``(..., rows, slots, words)``; a merged one has a single row."""
        *lead, rows, _ = buffer.shape
        opened, start = {}, self.head
        for table, like in row_shapes(self.plan, self.tables).items():
            slots, words = self.plan.slots[table], like.shape[1:]
            held = self._part(table, rows) if table in self.merged else slots
            stop = start + held * self.plan.tables[table].words
            part = buffer[..., start:stop]
            if table in self.merged:
                opened[table] = part.reshape(*lead, 1, rows * held, *words)[(..., slice(slots), *map(slice, words))]
            else:
                opened[table] = part.reshape(*lead, rows, slots, *words)
            start = stop
        return opened


def _cut(plan: Plan, table: str, rows: int, row: Array) -> Array:
    """A row of a table in as many parts as there are rows: ``(rows, words of a part)``."""
    merge, spare = plan.tables[table], -plan.slots[table] % rows
    filled = [
        jnp.concatenate([part, jnp.full((spare,), identity, part.dtype)])
        for part, identity in zip(parts_of(merge, row), merge.identity, strict=True)
    ]
    return row_of(merge, tuple(filled)).reshape(rows, -1)


def gathering_of(plan: Plan, rows: int, tables: Iterable[str], head: int = 0) -> Gathering:
    """How these tables of so many rows are gathered."""
    tables = tuple(sorted(tables))
    merged = tuple(
        table
        for table, like in row_shapes(plan, tables).items()
        if plan.tables[table].by_slot and rows * like.size * like.dtype.itemsize > MOST_GATHERED_BYTES
    )
    return Gathering(plan, tables, merged, head)


def merge_rows(plan: Plan, tables: dict[str, Any]) -> dict[str, Parts]:
    """The merge of the rows ``(rows, ..., slots, words)`` of opened tables, in parts ``(..., slots)``, in a trace."""
    merged = {}
    for table, rows in tables.items():
        merge = plan.tables[table]
        merged[table] = compensated.fold(merge.combine, parts_of(merge, rows), merge.identity)
    return merged
