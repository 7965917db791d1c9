"""merged -> numbers: the results of a window, as a mapping on the host and as a pytree in a trace."""

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from distributed_metrics import compensated
from distributed_metrics.merging import MERGES
from distributed_metrics.plan import SEPARATOR, Group, Plan, did_you_mean, show_path
from distributed_metrics.rows import join_words, parts_of, split_words
from distributed_metrics.view import is_traced

Number = float | np.ndarray | jax.Array


class Snapshot(Mapping[str, Any]):
    """The results of ``compute()`` and ``flush()``: a read-only mapping with the structure of the object's spec.

    It holds sufficient statistics, not results. On the host they are fetched from the device in one copy, when a number
    is first read; until then nothing waits. ``snapshot["loss"]`` is a Python float, or a float64 array where the metric
    is not scalar; nested specs and tuples give nested dicts. In a trace the results are float32 arrays.

    A snapshot is a pytree of one array: a jitted step may return it (``out_specs=P()`` in ``shard_map``,
    ``out_axes=None`` in ``pmap``), and ``jax.lax.scan`` may stack it. Dims that ``vmap`` or ``scan`` put in front stay
    in front of every result.

    >>> import jax.numpy as jnp
    >>> from distributed_metrics import DistributedMetrics
    >>> metrics = DistributedMetrics({"loss": "mean", "reward": ("mean", "max")})
    >>> metrics.update(loss=jnp.array([1.0, 3.0]), reward=jnp.array([2.0, 6.0]))
    >>> snapshot = metrics.flush()
    >>> snapshot["loss"], snapshot["reward"]
    (2.0, {'mean': 4.0, 'max': 6.0})
    >>> snapshot.flatten(prefix="train")
    {'train/loss': 2.0, 'train/reward/mean': 4.0, 'train/reward/max': 6.0}
    """

    __slots__ = ("_merged", "_plan", "_results", "_rows", "_words")

    def __init__(self, plan: Plan, words: Any, rows: bool):
        """Not for users: ``words`` is ``(..., words)``, or ``(..., rows, words)`` where ``rows`` is True."""
        self._plan = plan
        self._words: Any = words
        self._rows = rows
        self._merged: dict[str, Any] | None = None
        self._results: list[Any] | None = None

    # --- a mapping ---

    def __getitem__(self, key: str) -> Any:
        members = [i for i, metric in enumerate(self._plan.metrics) if metric.path[0] == key]
        if not members:
            known = list(self)
            hint = did_you_mean(str(key), known)
            if not isinstance(key, str):
                hint = f" Of stacked windows or a population, take one: jax.tree.map(lambda x: x[{key!r}], snapshot)"
            for metric in self._plan.metrics:
                if key in (metric.name, metric.value):
                    hint = f" A nested result is read by one key at a time: snapshot{show_path(metric.path)}"
            raise KeyError(f"{key!r}: this snapshot has {', '.join(map(repr, known))}.{hint}")
        results = self._all_results()
        tree: Any = {}
        for i in members:
            path = self._plan.metrics[i].path[1:]
            if not path:
                return results[i]
            branch = tree
            for inner in path[:-1]:
                branch = branch.setdefault(inner, {})
            branch[path[-1]] = results[i]
        return tree

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys(metric.path[0] for metric in self._plan.metrics))

    def __len__(self) -> int:
        return len({metric.path[0] for metric in self._plan.metrics})

    def __repr__(self) -> str:
        if isinstance(self._words, np.ndarray) or (isinstance(self._words, jax.Array) and not is_traced(self._words)):
            return f"Snapshot({dict(self)!r})"
        return f"Snapshot of {', '.join(metric.name for metric in self._plan.metrics)}: {self._words!r}"

    # --- more than a mapping ---

    def flatten(
        self, sep: str = SEPARATOR, prefix: str = "", empty: Literal["skip", "nan"] = "skip"
    ) -> dict[str, float]:
        """The results as one flat dict of Python floats, as writers want them.

        Args:
            sep: joins the keys of nested specs.
            prefix: put before every name, joined by ``sep``.
            empty: ``"skip"`` leaves out what has seen nothing; ``"nan"`` keeps it, with its empty value.

        Returns:
            Names to floats. A vector, or a population, gives one float for each element: ``acc/003``, ``loss/0``, or by
            the labels of its accumulator.

        Raises:
            TypeError: in a trace, where there are no floats yet.
        """
        if empty not in ("skip", "nan"):
            raise ValueError(f"Snapshot.flatten(empty={empty!r}): empty is 'skip' or 'nan'.")
        if is_traced(self._words):
            raise TypeError(
                "Snapshot.flatten() gives Python floats, and in a trace there are none yet.\n"
                "  Return the snapshot from the jitted function, and flatten it outside."
            )
        flat: dict[str, float] = {}
        for metric, result, weight in zip(self._plan.metrics, self._all_results(), self._weights(), strict=True):
            name = sep.join((prefix, *metric.path) if prefix else metric.path)
            results, weights = np.asarray(result), np.asarray(weight)
            for index in np.ndindex(results.shape):
                if empty == "nan" or weights[index[: weights.ndim]] != 0:
                    element = _padded(index, results.shape)
                    if (labels := metric.accumulator.labels) is not None:
                        element[-1] = labels[index[-1]]
                    flat[sep.join((name, *element))] = float(results[index])
        return flat

    @property
    def count(self) -> Mapping[str, Any]:
        """The total weight that each result has seen, by flat name; of a ratio, its denominator."""
        counts = {}
        for metric, weight in zip(self._plan.metrics, self._weights(), strict=True):
            counts[metric.name] = weight
        return _ByFlatName(counts, self._plan)

    def __add__(self, other: Any) -> "Snapshot":
        """Both windows together: what one would have been told of a window that spans the two.

        Raises:
            ValueError: the snapshots are of different specs, or of populations of different sizes.
        """
        if not isinstance(other, Snapshot):
            return NotImplemented
        if self._plan is not other._plan:
            raise ValueError(
                "Snapshot + Snapshot: they are of different specs.\n"
                f"  The left:  {self._plan}\n  The right: {other._plan}"
            )
        if is_traced(self._words) or is_traced(other._words):
            mine, theirs = self._merged_parts(), other._merged_parts()
            parts = {merge: MERGES[merge].combine(mine[merge], theirs[merge]) for merge in mine}
            return Snapshot(self._plan, join_words(parts, jnp), rows=False)
        mine, theirs = self._tables(), other._tables()
        shapes = [next(iter(tables.values())).shape[:-1] for tables in (mine, theirs)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"Snapshot + Snapshot: the left one has the leading dims {shapes[0]}, the right one {shapes[1]}.\n"
                "  Add members one by one: jax.tree.map(lambda x: x[i], snapshot)"
            )
        with np.errstate(invalid="ignore"):  # inf - inf
            words = {
                merge: MERGES[merge].split(MERGES[merge].combine_rows(np.stack([mine[merge], theirs[merge]]), axis=0))
                for merge in mine
            }
        return Snapshot(self._plan, join_words(words, np), rows=False)

    def __radd__(self, other: Any) -> "Snapshot":
        """``sum(snapshots)`` starts from 0."""
        return self if isinstance(other, int) and other == 0 else NotImplemented

    def per_device(self, name: str) -> np.ndarray:
        """The result of each row on its own, to find stragglers.

        Args:
            name: the flat name of a result.

        Returns:
            A float64 array of shape ``(..., rows, *S)``, rows in the order of the mesh.

        Raises:
            ValueError: the snapshot was made in a trace, where the rows are merged.
        """
        i = {metric.name: i for i, metric in enumerate(self._plan.metrics)}.get(name)
        if i is None:
            known = [metric.name for metric in self._plan.metrics]
            raise KeyError(f"{name!r}: this snapshot has {', '.join(map(repr, known))}.{did_you_mean(name, known)}")
        if not self._rows:
            raise ValueError(
                f"Snapshot.per_device({name!r}): made in a trace, or a sum of snapshots: the rows are merged.\n"
                "  Call compute() or flush() outside of jit to keep them; a sum of snapshots has none either."
            )
        tables = self._host_rows()
        group = next(group for group in self._plan.groups if i in group.members)
        results = _results_of(group, tables, np)
        lead = next(iter(tables.values())).ndim - 1
        return results[(slice(None),) * lead + (group.members.index(i),)]

    def is_ready(self) -> bool:
        """Whether reading a number would not wait for the device."""
        on_host = self._merged is not None or isinstance(self._words, np.ndarray)
        return on_host or self._words.is_ready()

    # --- from words to results ---

    def _host_rows(self) -> dict[str, np.ndarray]:
        """Each table as float64 ``(..., rows, slots)``, or ``(..., slots)`` where rows are merged. One copy."""
        if isinstance(self._words, jax.Array):
            self._words = jax.device_get(self._words)
        tables = split_words(self._plan, self._words)
        return {merge: MERGES[merge].widen(parts_of(merge, table)) for merge, table in tables.items()}

    def _tables(self) -> dict[str, Any]:
        """Each table merged: float64 NumPy arrays ``(..., slots)`` on the host, float32 in a trace."""
        if self._merged is None:
            if is_traced(self._words):
                self._merged = {merge: MERGES[merge].narrow(parts) for merge, parts in self._merged_parts().items()}
            else:
                tables = self._host_rows()
                if self._rows:
                    tables = {merge: MERGES[merge].combine_rows(table, axis=-2) for merge, table in tables.items()}
                self._merged = tables
        return self._merged

    def _merged_parts(self) -> dict[str, Any]:
        """Each table merged, in words, in a trace."""
        tables = {}
        for merge, table in split_words(self._plan, self._words).items():
            parts = parts_of(merge, table)
            if self._rows:
                rows_first = tuple(jnp.moveaxis(part, -2, 0) for part in parts)
                parts = compensated.fold(MERGES[merge].combine, rows_first, MERGES[merge].identity)
            tables[merge] = parts
        return tables

    def _all_results(self) -> list[Any]:
        """The result of each metric, in the order of the plan."""
        if self._results is None:
            tables = self._tables()
            self._results = self._by_metric(lambda group, xp: _results_of(group, tables, xp))
        return self._results

    def _weights(self) -> list[Any]:
        tables = self._tables()
        return self._by_metric(lambda group, xp: _field(group, "weight", tables))

    def _by_metric(self, of_group: Any) -> list[Any]:
        traced = is_traced(self._words)
        lead = next(iter(self._tables().values())).ndim - 1 if self._plan.metrics else 0
        results: list[Any] = [None] * len(self._plan.metrics)
        for group in self._plan.groups:
            together = of_group(group, jnp if traced else np)
            for k, i in enumerate(group.members):
                one = together[(slice(None),) * lead + (k,)]
                results[i] = one if traced or np.ndim(one) else float(one)
        return results


def _field(group: Group, field: str, tables: Mapping[str, Any]) -> Any:
    """One field of all members of a group: ``(..., members, *S)``."""
    merge = group.accumulator.all_fields()[field]
    table = tables[merge]
    block = table[..., group.starts[field] : group.starts[field] + len(group.members) * group.size]
    return block.reshape(*table.shape[:-1], len(group.members), *group.accumulator.shape)


def _results_of(group: Group, tables: Mapping[str, Any], xp: Any) -> Any:
    """The results of all members of a group: ``(..., members, *S)``."""
    accumulator = group.accumulator
    fields = {field: _field(group, field, tables) for field in accumulator.all_fields()}
    with np.errstate(all="ignore"):  # what is empty divides by 0
        results = accumulator.result(xp, **fields)
    if accumulator.empty is None:
        return results
    weight = fields["weight"].reshape(fields["weight"].shape + (1,) * (results.ndim - fields["weight"].ndim))
    return xp.where(weight == 0, accumulator.empty, results)


def _padded(index: tuple[int, ...], shape: tuple[int, ...]) -> list[str]:
    return [str(i).zfill(len(str(n - 1))) for i, n in zip(index, shape, strict=True)]


class _ByFlatName(dict[str, Any]):
    """Results by flat name; the name of a value stands for the first member of its tuple."""

    def __init__(self, results: dict[str, Any], plan: Plan):
        super().__init__(results)
        self._plan = plan

    def __missing__(self, name: str) -> Any:
        if name in self._plan.values:
            return self[self._plan.metrics[self._plan.values[name][0]].name]
        raise KeyError(f"{name!r}: this snapshot has {', '.join(map(repr, self))}.{did_you_mean(str(name), self)}")


def _flatten(snapshot: Snapshot) -> tuple[tuple[Any], tuple[Plan, bool]]:
    return (snapshot._words,), (snapshot._plan, snapshot._rows)


def _unflatten(static: tuple[Plan, bool], children: Any) -> Snapshot:
    return Snapshot(static[0], children[0], static[1])


jax.tree_util.register_pytree_node(Snapshot, _flatten, _unflatten)
