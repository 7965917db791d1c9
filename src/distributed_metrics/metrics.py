"""``DistributedMetrics``: wires the stages together, owns the Variables, and is safe to share between threads."""

import threading
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, Literal

import flax
import jax
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from distributed_metrics import eager, heads, meeting, programs, reducers, rows
from distributed_metrics.accumulators import Accumulator, CluMetric, clu_metric
from distributed_metrics.gathering import Gathering, gathering_of
from distributed_metrics.keyword_values import keywords_of
from distributed_metrics.placement import Situation, by_process, of_this_process, on_device, row_sharding, situation_of
from distributed_metrics.plan import Plan, learnt_plan, parse, variable_of
from distributed_metrics.snapshot import Snapshot
from distributed_metrics.tables import Tables, identity_words, table_dims
from distributed_metrics.values import by_name, feeds_of, named_values
from distributed_metrics.view import (
    Layout,
    View,
    is_traced,
    make_layout,
    processes_of,
)

_LOCK = threading.RLock()
"""Held while rows are read and replaced. One for all objects: an object's attributes are part of its graphdef, and what
is held here is only ever the dispatch of a small program."""


_WATCHED: "weakref.WeakKeyDictionary[DistributedMetrics, Callable[[str], None]]" = weakref.WeakKeyDictionary()
"""Who is told of a flush or a reset by hand: what that takes is missing where somebody else flushes the object."""


class DistributedMetrics(nnx.Module):
    """Metrics that every device accumulates on its own, and that come together only when they are read.

    ``update`` adds to accumulators that live on the devices, one row each, without any communication; ``flush`` (or
    ``compute``) brings the rows together, once, for all metrics. Without a spec, ``DistributedMetrics()`` has no
    accumulators and offers the stateless reducers only.

    Args:
        reduce_fn: a (nested) dict of names to what is accumulated: ``"mean"``, ``"sum"``, ``"count"``, ``"max"``,
            ``"min"``, ``"ratio"``, ``"var"``, ``"std"``, ``"last"``, an ``Accumulator`` such as ``Histogram(edges)`` or
            ``Quantile(0.99)``, or a tuple of these for several statistics of one value.
        mesh: where the accumulators live, one row for each device. Default: the mesh of ``jax.set_mesh``; without one,
            a single row.
        axis_name: the mesh axes that rows spread over, and that a mapped ``compute`` reduces over. Default: all.
            ``()``: none. The object then is one row, and devices that are mapped have nothing to do with each other:
            for a population (of seeds, say) whose members lie on different devices.
        nan_policy: ``"propagate"``: a NaN makes NaN of the metrics that saw it, and of no other. ``"ignore"``: elements
            that are not finite are left out and counted, see ``Snapshot.nonfinite``; of a ratio, both parts.

    Raises:
        TypeError, ValueError: a bad name, an unknown operation, an axis that the mesh does not have.

    >>> import jax.numpy as jnp
    >>> metrics = DistributedMetrics({"loss": "mean", "tokens": "sum"})
    >>> for step in range(3):
    ...     metrics.update(loss=jnp.array([1.0, 2.0]) + step, tokens=jnp.array([10, 20]))
    >>> snapshot = metrics.flush()
    >>> snapshot["loss"], snapshot["tokens"]
    (2.5, 90.0)
    """

    def __init__(
        self,
        reduce_fn: Mapping[str, Any] | None = None,
        *,
        mesh: Mesh | AbstractMesh | None = None,
        axis_name: str | Iterable[str] | None = None,
        nan_policy: Literal["propagate", "ignore"] = "propagate",
    ) -> None:
        super().__init__()
        if nan_policy not in ("propagate", "ignore"):
            raise ValueError(f"DistributedMetrics(nan_policy={nan_policy!r}): known are 'propagate' and 'ignore'.")
        self._plan = parse(reduce_fn, ignores=nan_policy == "ignore")
        self._layout = make_layout(mesh, axis_name) if self._plan.metrics else Layout(None, ())
        tables = programs.fresh(self._plan, self._layout)() if self._plan.metrics else {}
        for name, table in tables.items():
            setattr(self, variable_of(name), self._variable(table))

    def _variable(self, table: jax.Array) -> nnx.Variable[jax.Array]:
        annotation: dict[str, Any] = {}
        if self._layout.mesh is not None:
            spec = (self._layout.axes, *(None,) * (table.ndim - 1))
            annotation = {"out_sharding": spec, "mesh": self._layout.mesh, "eager_sharding": False}
        return nnx.metrics.MetricState(table, **annotation)

    # --- stateful ---

    @property
    def names(self) -> tuple[str, ...]:
        """The flat names of the values that ``update`` takes."""
        return tuple(self._plan.values)

    @property
    def mesh(self) -> Mesh | AbstractMesh | None:
        """The mesh on which the accumulators live; None where there is a single row."""
        return self._layout.mesh

    @property
    def sharding(self) -> NamedSharding | None:
        """How all accumulators lie, for ``in_shardings`` and ``out_shardings``; None where there is a single row.

        >>> mesh = jax.make_mesh((jax.device_count(),), ("data",))
        >>> DistributedMetrics({"loss": "mean"}, mesh=mesh).sharding.spec[0]
        'data'
        """
        return None if self._layout.mesh is None else NamedSharding(self._layout.mesh, PartitionSpec(self._layout.axes))

    def update(
        self, metrics: Mapping[str, Any] | None = None, /, *, weight: Any = None, spec: Any = None, **named: Any
    ) -> None:
        """Add values to the accumulators, on the devices where they are. Nothing is sent, nothing is waited for.

        In code with a global view (eager, ``jit``) a value counts once, however it is sharded or replicated; in code
        that is mapped over devices (``shard_map``, ``pmap``) each device's value counts.

        Args:
            metrics: a (nested) dict of names to values, or the values by keyword. A value is a scalar or an array of
                any shape, all of whose elements count (of an accumulator with ``shape=S``: of shape ``(..., *S)``);
                floats, integers or booleans of any width. For ``"ratio"`` a pair ``(numerator, denominator)``. Metrics
                that are not named are left alone. In several processes, host values must be the same in all of them.
            weight: a mask or numbers, or a (nested) dict of them by name. It aligns with the leading dims of the value;
                a dim of size 1 is stretched; a scalar gates the whole value. Elements of weight 0 are left out, NaN
                included.
            spec: how the values are partitioned, a ``jax.sharding.PartitionSpec`` or a (nested) dict of them by name.
                Needed only under ``jit`` on meshes of Auto axes, where JAX does not show it; without it, XLA reduces
                what is not known to be partitioned along its leading dim on a mesh of one axis.
            **named: values by name.

        Raises:
            ValueError: an unknown name; a weight, a shape or a placement that does not fit.
            TypeError: a value that is no number.
            flax.errors.TraceContextError: the object belongs to an outer trace (that of ``jax.grad``, say).
        """
        if spec is None and self._updated_quickly((metrics, named, weight)):
            return
        self._require_accumulators("update")
        values = named_values(self._plan, metrics, named)
        weights = by_name(self._plan, weight, "weight", values)
        for name, value in values.items():
            accumulator = self._plan.metrics[self._plan.values[name][0]].accumulator
            if isinstance(accumulator, CluMetric):
                values[name] = keywords_of(name, accumulator, value, weights.pop(name, None))
        specs = by_name(self._plan, spec, "spec", values)
        if not values:
            return
        with _LOCK:
            tables = self._tables()
            situation = self._situation(tables)
            view = situation.view
            rows.refuse_populations("update", self._plan, view, tables)
            if situation.elsewhere:
                return
            if situation.eager and any(map(is_traced, jax.tree.leaves((values, weights)))):
                situation = replace(situation, eager=False)  # under vmap alone fresh rows are no part of the trace
            if not situation.eager:  # metrics have no gradients, and integer arithmetic on bits could not give any
                values, weights = _each(_without_gradient, values), _each(_without_gradient, weights)
            elif len(self._layout.processes) > 1:
                values, weights = _each(of_this_process, values), _each(of_this_process, weights)
            plan = learnt_plan(self._plan, self._learnt_from(values))
            feeds, arrays = feeds_of(plan, situation, values, weights, specs)
            tables = self._relaid(plan, view, tables)
            self._replace(programs.update(plan, view, feeds)(tables, arrays), "update", plan)
            if situation.eager:
                self._note((values, weights))

    def _updated_quickly(self, given: eager.Given) -> bool:
        """An eager update of arrays that lie on the devices of the rows, and of numbers, if it is that."""
        plan = self._plan
        with _LOCK:
            tables = [getattr(self, name).get_raw_value() for name in plan.variables]
            quick = eager.quick_update(plan, self._layout, tables, given)
            if quick is None:
                return False
            try:
                for name, table in zip(plan.variables, quick.tables, strict=True):
                    getattr(self, name).set_raw_value(table)
            except flax.errors.TraceContextError:
                return False
            if quick.noted:
                metrics, named, weight = given
                values = named_values(plan, metrics, named)
                self._note((values, by_name(plan, weight, "weight", values)))
            return True

    def _note(self, given: Any) -> None:
        """For the heads of flushes: an eager update or merge of these values."""
        if len(self._layout.processes) > 1:
            heads.record_of(self).updated(given)

    def _learnt_from(self, values: Mapping[str, Any]) -> dict[int, Accumulator]:
        """The accumulators of clu metrics that get their first value, with what it shows."""
        learnt: dict[int, Accumulator] = {}
        for name, value in values.items():
            for i in self._plan.values[name]:
                accumulator = self._plan.metrics[i].accumulator
                if isinstance(accumulator, CluMetric) and accumulator.learnt is None:
                    try:
                        learnt[i] = clu_metric.learn(accumulator, value)
                    except ValueError as error:
                        raise ValueError(f"metrics.update(): {self._plan.metrics[i].name!r}: {error}") from error
        return learnt

    def _relaid(self, plan: Plan, view: View, tables: Tables) -> Tables:
        """The rows with room for what a plan has learnt."""
        return tables if plan is self._plan else programs.relay(self._plan, plan, view)(tables)

    def compute(self, *, timeout: float | None = None) -> Snapshot:
        """The results so far; the accumulators stay as they are.

        In a trace: one collective (two where the state is large: ``docs/scaling.md``), and a merged snapshot. Eager:
        none where this process holds all devices.

        Args:
            timeout: as in ``flush``.
        """
        return self._read("compute", fresh=False, timeout=timeout)

    def flush(self, *, timeout: float | None = None) -> Snapshot:
        """The results so far, and the accumulators start afresh. It costs as much as ``compute``.

        In several processes all of them flush, in the same order.

        Args:
            timeout: seconds to wait for the other processes; None: no limit. With a limit, the processes meet before
                anything is launched, by the coordination service of ``jax.distributed`` (which JAX has no public
                interface for); this call then waits for the last of them, and nothing is flushed if one does not come.

        Raises:
            TimeoutError: a process did not come in time; the message names it, and the accumulators go on.
            RuntimeError: with ``timeout``, the processes are about to make different flushes. Without it, reading a
                number of the snapshot raises this, in every process.
        """
        self._tell("flush")
        return self._read("flush", fresh=True, timeout=timeout)

    def merge(self, snapshot: Snapshot) -> None:
        """Add what a snapshot has seen: a restored one, or that of another job. It counts as later than what is here.

        In several processes all must merge the same snapshot.

        Args:
            snapshot: of an object with the same spec, on any number of devices.

        Raises:
            TypeError: no snapshot.
            ValueError: a snapshot of another spec (its names, shapes or edges, say), or of a population.

        >>> before, after = DistributedMetrics({"loss": "mean"}), DistributedMetrics({"loss": "mean"})
        >>> before.update(loss=1.0)
        >>> after.merge(Snapshot.from_dict(before.compute().to_dict()))
        >>> after.update(loss=2.0)
        >>> after.compute()["loss"]
        1.5
        """
        self._require_accumulators("merge")
        if not isinstance(snapshot, Snapshot):
            hint = "Snapshot.from_dict(d)" if isinstance(snapshot, Mapping) else "other.compute()"
            raise TypeError(f"metrics.merge() takes a Snapshot, got {type(snapshot).__name__}.\n  For example: {hint}")
        with _LOCK:
            tables = self._tables()
            situation = self._situation(tables)
            rows.refuse_populations("merge", self._plan, situation.view, tables)
            if situation.elsewhere:
                return
            plan = snapshot._require_fits(self._plan, "metrics.merge")
            merged = snapshot._merged_words(plan)
            words = on_device(merged, situation)
            tables = self._relaid(plan, situation.view, tables)
            self._replace(programs.absorb(plan, situation.view)(tables, words), "merge", plan)
            if situation.eager:
                self._note(merged)

    def reset(self) -> None:
        """The accumulators start afresh."""
        self._require_accumulators("reset")
        self._tell("reset")
        with _LOCK:
            tables = self._tables()
            situation = self._situation(tables)
            if not situation.elsewhere:
                self._replace(programs.reset(self._plan, situation.view)(tables), "reset")
                if situation.eager:
                    heads.record_of(self).reset()

    def _read(self, method: str, *, fresh: bool, timeout: float | None = None, step: int | None = None) -> Snapshot:
        self._require_accumulators(method)
        timeout = meeting.checked_timeout(f"metrics.{method}", timeout)
        if timeout is not None:
            self._meet(method, fresh, timeout, step)
        with _LOCK:
            tables = self._tables()
            situation = self._situation(tables)
            gathering = None
            if not situation.eager:
                words = programs.merge(self._plan, situation.view)(tables)
                new = programs.reset(self._plan, situation.view)(tables) if fresh else None
            elif situation.elsewhere:
                return self._nothing()
            elif _is_whole(tables):
                gathering = Gathering(self._plan, tuple(self._plan.tables))
                words, new = programs.read(self._plan, situation.view, fresh)(tables)
            else:
                gathering = gathering_of(self._plan, self._layout.rows, self._plan.tables, heads.HEAD_WORDS)
                record, head = self._head(fresh, step)
                labels = by_process(heads.label(head, gathering, self._layout.rows), self._layout.rows, tables)
                words, new = programs.gather(self._plan, situation.view, gathering, fresh)(tables, labels)
                heads.launched(self._layout, record, head)
            if new is not None:
                self._replace(new, method)
            return Snapshot(self._plan, words, gathering)

    def _meet(self, method: str, fresh: bool, timeout: float, step: int | None) -> None:
        """Wait for the other processes, where there are any, for so many seconds."""
        with _LOCK:
            tables = self._tables()
            situation = self._situation(tables)
            if not situation.eager:
                raise ValueError(
                    f"metrics.{method}(timeout=...): in a trace there is nothing to wait for yet.\n"
                    f"  Leave it out, or call metrics.{method}(timeout=...) outside of jit."
                )
            if situation.elsewhere or _is_whole(tables):
                return
            _, head = self._head(fresh, step)
            processes = processes_of(row_sharding(tables).mesh)
        meeting.meet(head, processes, timeout)

    def _head(self, fresh: bool, step: int | None) -> tuple[heads.Record, heads.Head]:
        record = heads.record_of(self)
        return record, heads.head_of(self._plan, self._layout, record, jax.process_index(), fresh, step)

    def _nothing(self) -> Snapshot:
        """What a process sees that owns no devices of the mesh."""
        return Snapshot(self._plan, identity_words(self._plan))

    def _flush_where(self, ends: jax.Array, look: Callable[[Tables], Tables], tell: Callable[[Snapshot], None]) -> None:
        """In a trace: a flush at steps that end a window. ``look`` passes the rows on; ``tell`` gets the results."""
        self._require_accumulators("flush")
        with _LOCK:
            tables, plan = self._tables(), self._plan
            view = self._situation(tables).view

            def flushed(tables: Tables) -> Tables:
                tell(Snapshot(plan, programs.merge(plan, view)(look(tables))))
                return programs.reset(plan, view)(tables)

            self._replace(jax.lax.cond(ends, flushed, lambda tables: tables, tables), "flush")

    # --- for periodic.py and streaming.py, which flush in the name of an object ---

    def _watch(self, tell: Callable[[str], None] | None) -> None:
        """Tell of each flush and reset by hand from here on; None: no longer."""
        if tell is not None:
            _WATCHED[self] = tell
        else:
            _WATCHED.pop(self, None)

    def _tell(self, method: str) -> None:
        if (tell := _WATCHED.get(self)) is not None:
            tell(method)

    def _in_trace(self) -> bool:
        return any(map(is_traced, self._tables().values()))

    def _arrays(self) -> list[Any]:
        """What is ready once the devices are done with all that was given to the accumulators so far."""
        return list(self._tables().values())

    def _processes(self) -> tuple[int, ...]:
        """The processes that have a part in a flush; all of them where each has an object of its own."""
        return self._layout.processes or tuple(range(jax.process_count()))

    def _situation(self, tables: Tables) -> Situation:
        name, table = next(iter(tables.items()))
        return situation_of(self._layout, table, table_dims(self._plan, name))

    def _tables(self) -> Tables:
        tables = {name: getattr(self, variable_of(name)).get_raw_value() for name in self._plan.tables}
        if any(isinstance(table, jax.ShapeDtypeStruct) for table in tables.values()):
            raise RuntimeError(
                "DistributedMetrics: this object has shapes only, of jax.eval_shape or nnx.eval_shape.\n"
                "  Make a real one, with the same arguments or by jax.jit(make, out_shardings=...)()."
            )
        if any(
            isinstance(table, jax.Array) and not is_traced(table) and table.is_deleted() for table in tables.values()
        ):
            raise RuntimeError(
                "DistributedMetrics: these accumulators were donated to a jitted function (donate_argnums): gone.\n"
                "  Go on with the object that it returned: metrics = step(metrics, batch)"
            )
        return tables

    def _replace(self, tables: Tables, method: str, plan: Plan | None = None) -> None:
        try:
            for name, table in tables.items():
                if hasattr(self, variable_of(name)):
                    getattr(self, variable_of(name)).set_raw_value(table)
                else:  # of a clu metric whose merge is its own, and has just been seen
                    setattr(self, variable_of(name), self._variable(table))
            if plan is not None and plan is not self._plan:
                for name in set(self._plan.variables) - set(plan.variables):
                    delattr(self, name)
                self._plan = plan
        except flax.errors.TraceContextError as error:
            raise flax.errors.TraceContextError(_outer_trace(method)) from error

    def _require_accumulators(self, method: str) -> None:
        if not self._plan.metrics:
            raise ValueError(
                f"metrics.{method}(): this object has no accumulators: DistributedMetrics() is the stateless one.\n"
                f'  Say what to accumulate: DistributedMetrics({{"loss": "mean"}})'
            )

    def __repr__(self) -> str:
        if not self._plan.metrics:
            return "DistributedMetrics(): stateless reducers only"
        mesh = self._layout.mesh
        where = (
            "1 row"
            if mesh is None
            else f"{self._layout.rows} rows over {', '.join(self._layout.axes)} of the mesh "
            f"({', '.join(f'{axis}: {size}' for axis, size in mesh.shape.items())})"
        )
        width = max(len(metric.name) for metric in self._plan.metrics)
        lines = [f"  {metric.name:<{width}}  {metric.accumulator}" for metric in self._plan.metrics]
        return "\n".join([f"DistributedMetrics, {where}", *lines])

    __str__ = __repr__

    # --- stateless: the specification's reducers, each one implementation under three names ---

    def all_gather(self, metrics: dict[str, Any], axis_name: str = "batch") -> dict[str, Any]:
        """As the function ``distributed_metrics.all_gather``."""
        return reducers.all_gather(metrics, axis_name)

    def reduce_mean(self, metrics: dict[str, Any], axis_name: str = "batch") -> dict[str, Any]:
        """As the function ``distributed_metrics.reduce_mean``."""
        return reducers.reduce_mean(metrics, axis_name)

    def reduce_sum(self, metrics: dict[str, Any], axis_name: str = "batch") -> dict[str, Any]:
        """As the function ``distributed_metrics.reduce_sum``."""
        return reducers.reduce_sum(metrics, axis_name)

    def reduce_max(self, metrics: dict[str, Any], axis_name: str = "batch") -> dict[str, Any]:
        """As the function ``distributed_metrics.reduce_max``."""
        return reducers.reduce_max(metrics, axis_name)

    def reduce_min(self, metrics: dict[str, Any], axis_name: str = "batch") -> dict[str, Any]:
        """As the function ``distributed_metrics.reduce_min``."""
        return reducers.reduce_min(metrics, axis_name)

    def reduce_custom(
        self, metrics: dict[str, Any], reduce_fn: dict[str, str | None] | None = None, axis_name: str = "batch"
    ) -> dict[str, Any]:
        """As the function ``distributed_metrics.reduce_custom``; what this object accumulates does not matter to it."""
        return reducers.reduce_custom(metrics, reduce_fn, axis_name)

    def collect_from_devices(self, metrics: dict[str, Any]) -> dict[str, list[Any] | Any]:
        """As the function ``distributed_metrics.collect_from_devices``."""
        return reducers.collect_from_devices(metrics)

    all_gather_static = staticmethod(reducers.all_gather)
    reduce_mean_static = staticmethod(reducers.reduce_mean)
    reduce_sum_static = staticmethod(reducers.reduce_sum)
    reduce_max_static = staticmethod(reducers.reduce_max)
    reduce_min_static = staticmethod(reducers.reduce_min)
    reduce_custom_static = staticmethod(reducers.reduce_custom)
    collect_from_devices_static = staticmethod(reducers.collect_from_devices)


def _each(change: Callable[[Any], Any], tree: Any, changed: dict[int, Any] | None = None) -> Any:
    """The tree with all leaves changed, each once: one weight of many values stays one.

    (``jax.tree.map`` would sort the keywords of a clu metric.)
    """
    changed = {} if changed is None else changed
    if isinstance(tree, Mapping):
        return {name: _each(change, branch, changed) for name, branch in tree.items()}
    if isinstance(tree, tuple | list):
        branches = [_each(change, branch, changed) for branch in tree]
        return branches if isinstance(tree, list) else tuple(branches)
    if id(tree) not in changed:
        changed[id(tree)] = change(tree)
    return changed[id(tree)]


def _without_gradient(value: Any) -> Any:
    """The same value as a constant of differentiation."""
    return jax.lax.stop_gradient(value) if is_traced(value) else value


def _outer_trace(method: str) -> str:
    belong = (
        f"metrics.{method}(): the accumulators belong to an outer trace, and cannot be changed from inside this one"
    )
    if method != "update":
        return (
            f"{belong} (a jitted function that captured the object).\n"
            f"  Pass it in: nnx.jit(lambda metrics: metrics.{method}())(metrics)"
        )
    return (
        f"{belong} (a jitted function that captured the object; jax.grad, nnx.value_and_grad, vmap, scan or cond).\n"
        "  Pass the object into a jitted function as an argument, and carry it through a scan.\n"
        "  Of jax.grad return the values, as of vmap, and update outside:\n"
        "  (loss, aux), grads = nnx.value_and_grad(loss_fn, has_aux=True)(model); metrics.update(aux)\n"
        "  Instead of a cond: metrics.update(loss=loss, weight=condition), or nnx.cond with the object as an operand."
    )


def _restored(metrics: DistributedMetrics, saved: Mapping[str, Any]) -> DistributedMetrics:
    new = jax.tree.map(lambda table: table, metrics)
    new.reset()
    new.merge(Snapshot.from_dict(saved))
    return new


# So that a train state of Linen with the object in it can be saved as it is, under the names of the metrics.
flax.serialization.register_serialization_state(DistributedMetrics, lambda x: x.compute().to_dict(), _restored)


def _is_whole(tables: Tables) -> bool:
    """Whether this process can read all rows by itself."""
    sharding = next(iter(tables.values())).sharding
    return sharding.is_fully_addressable or sharding.is_fully_replicated
