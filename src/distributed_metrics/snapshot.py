"""merged -> numbers: the results of a window, as a mapping on the host and as a pytree in a trace."""

from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from distributed_metrics import heads, portable
from distributed_metrics.accumulators import Histogram
from distributed_metrics.accumulators.clu_metric import NotLearntError
from distributed_metrics.gathering import Gathering, merge_rows
from distributed_metrics.merging import Numbers, Parts
from distributed_metrics.naming import SEPARATOR, did_you_mean, element, show_path
from distributed_metrics.placement import on_host
from distributed_metrics.plan import NONFINITE, Group, Plan
from distributed_metrics.results import field_of, outside_of, results_of, shows
from distributed_metrics.tables import join_words, parts_of, relaid_parts, split_words, words_of_a_row
from distributed_metrics.view import is_traced

Number = float | np.ndarray | jax.Array


class Binned(NamedTuple):
    """A histogram: float64 counts ``(n,)``, edges ``(n + 1,)``, and the n names of its counts in ``flatten()``."""

    counts: np.ndarray
    edges: np.ndarray
    names: tuple[str, ...]


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

    __slots__ = ("_gathering", "_merged", "_plan", "_results", "_words")

    def __init__(self, plan: Plan, words: Any, gathering: Gathering | None = None):
        """Not for users: ``words`` is ``(..., words)`` of merged tables, or ``(..., rows, width)`` of a gathering."""
        self._plan = plan
        self._words: Any = words
        self._gathering = gathering
        self._merged: dict[str, Numbers] | None = None
        self._results: list[Any] | None = None

    # --- a mapping ---

    def __getitem__(self, key: str) -> Any:
        members = [i for i, metric in enumerate(self._plan.metrics) if metric.path[0] == key]
        if not members:
            known = list(self)
            hint = did_you_mean(str(key), known)
            if not isinstance(key, str):
                hint = (
                    f" Of stacked windows or a population, take one: jax.tree.map(lambda x: x[{key!r}], snapshot), or "
                    "all: snapshot.unstack()"
                )
            for metric in self._plan.metrics:
                if key in (metric.name, metric.value_name):
                    hint = f" A nested result is read by one key at a time: snapshot{show_path(metric.path)}"
            raise KeyError(f"{key!r}: this snapshot has {', '.join(map(repr, known))}.{hint}")
        tree: Any = {}
        for i in members:
            path = self._plan.metrics[i].path[1:]
            if not path:
                return self._result(i)
            branch = tree
            for inner in path[:-1]:
                branch = branch.setdefault(inner, {})
            branch[path[-1]] = self._result(i)
        return tree

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys(metric.path[0] for metric in self._plan.metrics))

    def __len__(self) -> int:
        return len({metric.path[0] for metric in self._plan.metrics})

    def __repr__(self) -> str:
        if isinstance(self._words, np.ndarray) or (isinstance(self._words, jax.Array) and not is_traced(self._words)):
            stored = [metric.name for metric in self._plan.metrics if isinstance(metric.accumulator, portable.Stored)]
            if stored:  # their results cannot be read
                return f"Snapshot({self.flatten()!r}, and without their classes: {', '.join(stored)})"
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
            Names to floats. A vector, or a population, gives one float for each element, by the
            labels of its accumulator or numbered: ``acc/003``, ``loss/0``.

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
        if sep != SEPARATOR and len(names := [sep.join(metric.path) for metric in self._plan.metrics]) > len(
            set(names)
        ):
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(
                f"Snapshot.flatten(sep={sep!r}): two results flatten to one name, {twice!r}.\n"
                f"  Take a separator that is in no name: sep={SEPARATOR!r}"
            )
        flat: dict[str, float] = {}
        prefix = prefix.removesuffix(sep)
        outside = self._by_metric(outside_of)
        for i, (metric, weight) in enumerate(zip(self._plan.metrics, self._weights(), strict=True)):
            if isinstance(metric.accumulator, portable.Stored):
                continue
            name, result = sep.join((prefix, *metric.path) if prefix else metric.path), self._result(i)
            if isinstance(result, float) and isinstance(weight, float):  # nearly always
                if empty == "nan" or shows(result, weight):
                    flat[name] = result
            else:
                results, weights = np.asarray(result), np.asarray(weight)
                for index in np.ndindex(results.shape):
                    if empty == "nan" or shows(results[index], weights[index[: weights.ndim]]):
                        keys = element(index, results.shape, metric.accumulator.labels)
                        flat[sep.join((name, *keys))] = float(results[index])
            for kind, number in outside[i].items():
                for index in np.ndindex(np.shape(number)):
                    if empty == "nan" or number[index] != 0:
                        flat[sep.join((name, *element(index, number.shape), kind))] = float(number[index])
        return flat

    def histograms(self) -> dict[str, "Binned"]:
        """The histograms by flat name, for writers that can show them as such.

        >>> from distributed_metrics import DistributedMetrics, Histogram
        >>> metrics = DistributedMetrics({"x": Histogram([0.0, 0.5, 1.0])})
        >>> metrics.update(x=0.1)
        >>> metrics.compute().histograms()["x"].counts
        array([1., 0.])
        """
        found: dict[str, Binned] = {}
        for i, metric in enumerate(self._plan.metrics):
            if not isinstance(metric.accumulator, Histogram):
                continue
            counts, edges = np.asarray(self._result(i)), np.asarray(metric.accumulator.edges)
            for index in np.ndindex(counts.shape[:-1]):
                name = SEPARATOR.join((metric.name, *element(index, counts.shape[:-1])))
                bins = [element((k,), counts.shape[-1:], metric.accumulator.labels) for k in range(counts.shape[-1])]
                found[name] = Binned(counts[index], edges, tuple(SEPARATOR.join((name, *bin)) for bin in bins))
        return found

    @property
    def count(self) -> Mapping[str, Any]:
        """The total weight that each result has seen, by flat name; of a ratio, its denominator."""
        return _ByFlatName(self._weights(), self._plan)

    @property
    def nonfinite(self) -> Mapping[str, Any]:
        """How many elements were left out because they were not finite, by flat name.

        Raises:
            ValueError: with ``nan_policy="propagate"``, where none are left out.
        """
        if not self._plan.ignores:
            raise ValueError(
                'Snapshot.nonfinite: these metrics propagate what is not finite, with nan_policy="propagate".\n'
                '  To leave it out and count it: DistributedMetrics({...}, nan_policy="ignore")'
            )
        return _ByFlatName(self._by_metric(lambda group, tables, xp: field_of(group, NONFINITE, tables)), self._plan)

    @property
    def outside(self) -> Mapping[str, Mapping[str, Any]]:
        """What histograms saw beyond their edges, by flat name: weights of ``underflow``, ``overflow`` and ``nan``."""
        shown = [
            {kind: number if np.ndim(number) or is_traced(number) else float(number) for kind, number in one.items()}
            for one in self._by_metric(outside_of)
        ]
        return _ByFlatName(shown, self._plan)

    def to_dict(self) -> dict[str, Any]:
        """The merged state as a nested dict of NumPy arrays (numbers only), for a checkpoint or a file.

        JSON wants lists: ``jax.tree.map(np.ndarray.tolist, snapshot.to_dict())``. Rows are merged in it, so that any
        number of devices can carry on with it: ``metrics.merge(Snapshot.from_dict(d))``.

        >>> from distributed_metrics import DistributedMetrics
        >>> metrics = DistributedMetrics({"loss": "mean"})
        >>> metrics.update(loss=0.5)
        >>> saved = metrics.compute().to_dict()
        >>> Snapshot.from_dict(saved)["loss"]
        0.5
        """
        if is_traced(self._words):
            raise TypeError(
                "Snapshot.to_dict() gives NumPy arrays, and in a trace there are none yet.\n"
                "  Return the snapshot from the jitted function, and save it outside."
            )
        return portable.to_dict(self._plan, self._host_parts())

    @staticmethod
    def from_dict(d: Mapping[str, Any]) -> "Snapshot":
        """The snapshot of what ``to_dict`` gave; its leaves may be NumPy arrays, JAX arrays or lists.

        The result of a clu metric, or of an accumulator of your own, can be read after ``metrics.merge`` into an object
        that has its class; flat results leave it out before. What a newer version of this library can accumulate, and
        this one cannot, is kept in the same way.

        Raises:
            ValueError: no such dict; one that a newer version of this library wrote; metrics or fields that are missing
                or of another shape than its spec says.
        """
        plan, parts = portable.from_dict(d)
        return Snapshot(plan, join_words(plan, parts, np))

    def _host_parts(self) -> dict[str, Parts]:
        """Each table merged, in words ``(..., slots)``, on the host."""
        return {table: self._plan.tables[table].split(numbers) for table, numbers in self._tables().items()}

    def _require_fits(self, plan: Plan, method: str) -> Plan:
        """The plan of both, where the accumulators of a plan can take this up.

        Args:
            plan: of the accumulators.
            method: what was called, for an error.

        Raises:
            ValueError: another spec, or a population.
        """
        try:
            common = portable.reconciled(plan, self._plan)
        except NotLearntError as error:
            raise ValueError(f"{method}(): {error}") from error
        except ValueError as error:
            raise ValueError(
                f"{method}(): the snapshot is of another spec. The accumulators first, the snapshot second:\n{error}"
            ) from error
        if lead := self._lead():
            raise ValueError(
                f"{method}(): the snapshot is of a population, or of stacked windows: {lead} in front of its "
                f"results.\n  Take one: {method}(jax.tree.map(lambda x: x[0], snapshot))\n"
                f"  Of stacked windows all: {method}(sum(snapshot.unstack()))"
            )
        return common

    def _merged_words(self, plan: Plan) -> Any:
        """The merged state in one buffer of words, as a plan that it fits lays them out."""
        xp = jnp if is_traced(self._words) else np
        parts = self._merged_parts() if is_traced(self._words) else self._host_parts()
        return join_words(plan, relaid_parts(self._plan, plan, parts, xp), xp)

    def _as_of(self, plan: Plan) -> "Snapshot":
        """The same, merged, with the plan of a sum that it goes into."""
        return self if plan is self._plan else Snapshot(plan, self._merged_words(plan))

    def __add__(self, other: Any) -> "Snapshot":
        """Both windows together: what one would have been told of a window that spans the two.

        Raises:
            ValueError: the snapshots are of different specs, or of populations of different sizes.
        """
        if not isinstance(other, Snapshot):
            return NotImplemented
        try:
            plan = portable.reconciled(self._plan, other._plan)
        except ValueError as error:
            raise ValueError(
                f"Snapshot + Snapshot: they are of different specs. The left first, the right second:\n{error}"
            ) from error
        if plan is not self._plan or plan is not other._plan:
            return self._as_of(plan) + other._as_of(plan)
        shapes = [self._lead(), other._lead()]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"Snapshot + Snapshot: the left one has the leading dims {shapes[0]}, the right one {shapes[1]}.\n"
                "  Add members one by one: jax.tree.map(lambda x: x[i], snapshot)\n"
                "  Of stacked windows all: sum(snapshot.unstack())"
            )
        merges = self._plan.tables
        if is_traced(self._words) or is_traced(other._words):
            # A long sum must not become one fusion: XLA would work out the first terms again in each of the others.
            # (That of jax 0.10 passes over the barrier here.)
            in_trace, added = jax.lax.optimization_barrier(self._merged_parts()), other._merged_parts()
            parts = {table: merges[table].after(in_trace[table], added[table]) for table in merges}
            return Snapshot(self._plan, join_words(self._plan, parts, jnp))
        mine, theirs = self._tables(), other._tables()
        with np.errstate(invalid="ignore"):  # inf - inf
            words = {
                table: merges[table].split(merges[table].after_numbers(mine[table], theirs[table])) for table in mine
            }
        return Snapshot(self._plan, join_words(self._plan, words, np))

    def __radd__(self, other: Any) -> "Snapshot":
        """``sum(snapshots)`` starts from 0."""
        return self if isinstance(other, int) and other == 0 else NotImplemented

    def unstack(self) -> list["Snapshot"]:
        """The snapshots along the first dim that ``vmap`` or ``scan`` put in front: windows, or members.

        On the host, all are fetched at once. ``sum(windows.unstack())`` is all of them together; never average or add
        up the arrays of a snapshot (``jax.tree.map(jnp.mean, windows)``): they are no results yet.

        Raises:
            ValueError: there is no such dim.

        >>> from distributed_metrics import DistributedMetrics
        >>> def window(metrics, losses):
        ...     metrics.update(loss=losses)
        ...     return metrics, metrics.flush()
        >>> metrics = DistributedMetrics({"loss": ("mean", "max")})
        >>> _, windows = jax.lax.scan(window, metrics, jnp.array([[1.0, 2.0], [3.0, 8.0]]))
        >>> [window["loss"]["mean"] for window in windows.unstack()], sum(windows.unstack())["loss"]["max"]
        ([1.5, 5.5], 8.0)
        """
        if not self._lead():
            raise ValueError(
                "Snapshot.unstack(): this is one snapshot, with no dims in front that vmap or scan put there."
            )
        words = self._fetched() if isinstance(self._words, jax.Array) and not is_traced(self._words) else self._words
        return [Snapshot(self._plan, words[i], self._gathering) for i in range(self._lead()[0])]

    def per_device(self, name: str) -> np.ndarray:
        """The result of each row on its own, to find stragglers.

        Args:
            name: the flat name of a result.

        Returns:
            A float64 array of shape ``(..., rows, *S)``, rows in the order of the mesh.

        Raises:
            ValueError: the snapshot was made in a trace, where the rows are merged.
        """
        i = self._plan.results.get(name)
        if i is None:
            known = list(self._plan.results)
            hint = did_you_mean(name, known)
            if name in self._plan.values:
                results = ", ".join(repr(self._plan.metrics[k].name) for k in self._plan.values[name])
                hint = f" Of {name!r} take one of: {results}."
            raise KeyError(f"{name!r}: this snapshot has {', '.join(map(repr, known))}.{hint}")
        if self._gathering is None:
            raise ValueError(
                f"Snapshot.per_device({name!r}): made in a trace, a sum of snapshots, or read in a process without "
                "devices of the mesh: the rows are merged.\n"
                "  Call compute() or flush() outside of jit to keep them; a sum of snapshots has none either."
            )
        tables = self._host_rows()
        group = self._plan.group_of[i]
        if merged := sorted({field.merge.name for field in group.fields.values()} & set(self._gathering.merged)):
            slots = max(self._plan.slots[table] for table in merged)
            raise ValueError(
                f"Snapshot.per_device({name!r}): what is as large as this, with {slots} slots on each device, is "
                "merged on its way between processes: there is no row for each device.\n"
                "  Small metrics beside it go into an object of their own; a large one has to be coarser: "
                "Quantile(0.5, relative_error=0.05), or a Histogram of few bins."
            )
        results = results_of(group, tables, np)
        lead = next(iter(tables.values()))[0].ndim - 1
        return results[(slice(None),) * lead + (group.members.index(i),)]

    def is_ready(self) -> bool:
        """Whether reading a number would not wait for the device."""
        return all(array.is_ready() for array in self._arrays())

    def _arrays(self) -> list[Any]:
        """What is ready once the results are; nothing where they are on the host."""
        words = self._words  # another thread may be fetching them
        return [] if self._merged is not None or isinstance(words, np.ndarray) else [words]

    # --- from words to results ---

    def _lead(self) -> tuple[int, ...]:
        """The dims that ``vmap`` or ``scan`` put in front of the results."""
        return np.shape(self._words)[: -1 if self._gathering is None else -2]

    def _fetched(self) -> np.ndarray:
        if isinstance(self._words, jax.Array):
            if not (self._words.is_fully_addressable or self._words.is_fully_replicated):
                raise RuntimeError(
                    "Snapshot: its members lie on devices of several processes, and none can read all of them.\n"
                    "  Return it replicated: jax.jit(..., out_shardings=NamedSharding(mesh, P())), or P() for it alone."
                )
            self._words = on_host(self._words)
        return self._words

    def _host_rows(self) -> dict[str, Numbers]:
        """Each table in float64 numbers ``(..., rows, slots)``, or ``(..., slots)`` where rows are merged. One copy.

        Raises:
            OutOfStepError: what was gathered is not of one flush of all processes.
        """
        words = self._fetched()
        if self._gathering is None:
            if words.shape[-1] != (width := words_of_a_row(self._plan)):
                raise ValueError(
                    f"Snapshot: {words.shape[-1]} words, and one of this spec has {width}: those of several devices "
                    "were put one behind the other.\n"
                    "  Give members a dim of their own, jax.shard_map(jax.vmap(step), ...), and take them by unstack()."
                )
            tables = split_words(self._plan, words)
        else:
            heads.require_one_flush(self._gathering, words)
            tables = self._gathering.open(words)
        merges = self._plan.tables
        return {name: merges[name].widen(parts_of(merges[name], table)) for name, table in tables.items()}

    def _tables(self) -> dict[str, Numbers]:
        """Each table merged, in numbers ``(..., slots)``: float64 NumPy arrays on the host, float32 in a trace."""
        if self._merged is None:
            merges = self._plan.tables
            if is_traced(self._words):
                self._merged = {table: merges[table].narrow(parts) for table, parts in self._merged_parts().items()}
            else:
                tables = self._host_rows()
                if self._gathering is not None:
                    with np.errstate(invalid="ignore"):  # inf - inf
                        tables = {name: merges[name].merge_rows(numbers, axis=-2) for name, numbers in tables.items()}
                self._merged = tables
        return self._merged

    def _merged_parts(self) -> dict[str, Parts]:
        """Each table merged, in words, in a trace."""
        if self._gathering is None:
            tables = split_words(self._plan, self._words)
            return {name: parts_of(self._plan.tables[name], table) for name, table in tables.items()}
        words = self._words
        mesh = jax.typeof(words).sharding.mesh
        if any(kind == AxisType.Explicit for kind in mesh.axis_types):
            words = jax.sharding.reshard(words, NamedSharding(mesh, P()))  # rows on devices are not sliced
        rows = np.ndim(words) - 2
        opened = {name: jnp.moveaxis(table, rows, 0) for name, table in self._gathering.open(words).items()}
        return merge_rows(self._plan, opened)

    def _result(self, i: int) -> Any:
        """The result of the i-th metric of the plan; with it, those of all of its group."""
        if self._results is None:
            self._results = [None] * len(self._plan.metrics)
        if self._results[i] is None:
            group = self._plan.group_of[i]
            results = self._of_group(results_of, group)
            for member, result in zip(group.members, results, strict=True):
                self._results[member] = result
        return self._results[i]

    def _weights(self) -> list[Any]:
        return self._by_metric(lambda group, tables, xp: field_of(group, "weight", tables))

    def _by_metric(self, of_group: Any) -> list[Any]:
        results: list[Any] = [None] * len(self._plan.metrics)
        for group in self._plan.groups:
            for i, result in zip(group.members, self._of_group(of_group, group), strict=True):
                results[i] = result
        return results

    def _of_group(self, of_group: Any, group: Group) -> list[Any]:
        """What a function gives for each member of a group."""
        traced, tables = is_traced(self._words), self._tables()
        lead = next(iter(tables.values()))[0].ndim - 1
        together = of_group(group, tables, jnp if traced else np)

        if isinstance(together, dict) and not together:
            return [{} for _ in group.members]
        if not traced and isinstance(together, np.ndarray) and together.ndim == 1:
            return together.astype(np.float64).tolist()

        def member(k: int) -> Any:
            if isinstance(together, dict):
                return {name: number[(slice(None),) * lead + (k,)] for name, number in together.items()}
            one = together[(slice(None),) * lead + (k,)]
            return one if traced or np.ndim(one) else float(one)

        return [member(k) for k in range(len(group.members))]


class _ByFlatName(Mapping[str, Any]):
    """Results by flat name; the name of a value stands for the first member of its tuple."""

    def __init__(self, results: list[Any], plan: Plan):
        self._results = results
        self._plan = plan

    def __getitem__(self, name: str) -> Any:
        if name in self._plan.results:
            return self._results[self._plan.results[name]]
        if name in self._plan.values:
            return self._results[self._plan.values[name][0]]
        raise KeyError(f"{name!r}: this snapshot has {', '.join(map(repr, self))}.{did_you_mean(str(name), self)}")

    def __iter__(self) -> Iterator[str]:
        return iter(self._plan.results)

    def __len__(self) -> int:
        return len(self._results)

    def __repr__(self) -> str:
        return repr(dict(self))


def _flatten(snapshot: Snapshot) -> tuple[tuple[Any], tuple[Plan, Gathering | None]]:
    return (snapshot._words,), (snapshot._plan, snapshot._gathering)


def _unflatten(static: tuple[Plan, Gathering | None], children: Any) -> Snapshot:
    return Snapshot(static[0], children[0], static[1])


jax.tree_util.register_pytree_node(Snapshot, _flatten, _unflatten)
