"""An eager update whose Python work is done once: JAX finds the program again by what it is given.

Where every value is an array that lies on the devices of the rows, or a number, all that ``update`` looks at is in its
names, shapes, dtypes and shardings. So the whole of it is traced, like an update under ``jit`` that is told how its
values lie, and what is left for each step is one look-up and one dispatch. Whatever else ``update`` takes, it places
first, and looks at anew each time.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, Sharding
from jax.sharding import PartitionSpec as P

from distributed_metrics import rows
from distributed_metrics.compensated import host_pair
from distributed_metrics.numbers import HostNumber
from distributed_metrics.placement import partitions_of, situation_of
from distributed_metrics.plan import Plan
from distributed_metrics.tables import table_dims
from distributed_metrics.values import by_name, feeds_of, named_values
from distributed_metrics.view import Layout, is_traced

Given = tuple[Mapping[str, Any] | None, Mapping[str, Any], Any]
"""What ``update`` was given: a mapping, keywords, and the weight."""

_NUMBERS = frozenset((bool, float, int, np.bool_, np.float16, np.float32, np.float64, np.int32, np.int64))
_LARGEST_INTEGER = 2**53  # beyond, float64 does not hold every integer


class Updated(NamedTuple):
    """The tables after a quick update, and whether it has to be noted for the heads of flushes."""

    tables: list[jax.Array]
    noted: bool


def quick_update(plan: Plan, layout: Layout, tables: Sequence[Any], given: Given) -> Updated | None:
    """The tables, in the order of the plan, after an eager update; None where it is none, or a wrong one."""
    try:
        return _quick_update(plan, layout, tables, given)
    except (TypeError, ValueError):  # the other way says it of the values themselves
        return None


def _quick_update(plan: Plan, layout: Layout, tables: Sequence[Any], given: Given) -> Updated | None:
    leaves, tree = jax.tree.flatten(given)
    if not leaves or not tables or not isinstance(tables[0], jax.Array) or is_traced(tables[0]):
        return None
    numbers: tuple[int, ...] = ()
    words: np.ndarray | None = None
    kinds = set(map(type, leaves))
    kinds.discard(type(tables[0]))
    if kinds:
        if not kinds <= _NUMBERS:
            return None
        numbers = tuple([i for i, leaf in enumerate(leaves) if type(leaf) in _NUMBERS])
        values = [leaves[i] for i in numbers]
        if any(isinstance(value, int | np.integer) and abs(int(value)) > _LARGEST_INTEGER for value in values):
            return None
        words = host_pair(np.array(values, np.float64))
        leaves = [leaf for leaf in leaves if type(leaf) not in _NUMBERS]
    if tables[0].is_deleted():
        return None
    compiled = program(plan, layout, tree, numbers, tables[0].sharding, tuple([leaf.sharding for leaf in leaves]))
    if compiled is None or compiled.failed:
        return None
    try:
        if words is None:
            return Updated(compiled.run(tables, leaves, None), compiled.noted)
        with jax.transfer_guard_host_to_device("allow"):  # it is the caller's explicit wish
            return Updated(compiled.run(tables, leaves, words), compiled.noted)
    except (TypeError, ValueError):
        compiled.failed = True  # tracing is not tried at every step
        raise
    except RuntimeError:
        if any(leaf.is_deleted() for leaf in leaves):
            return None
        raise


@dataclass
class _Compiled:
    """A compiled update.

    Attributes:
        run: the tables after it, of the tables, the arrays and the words of the numbers.
        noted: see ``Updated``.
        failed: whether tracing it raised an error.
    """

    run: Callable[[Sequence[jax.Array], Sequence[jax.Array], np.ndarray | None], list[jax.Array]]
    noted: bool
    failed: bool = False


@functools.lru_cache(maxsize=1024)
def program(
    plan: Plan,
    layout: Layout,
    tree: jax.tree_util.PyTreeDef,
    numbers: tuple[int, ...],
    of_rows: Sharding,
    shardings: tuple[Sharding, ...],
) -> _Compiled | None:
    """The update of a tree of arrays and numbers; the numbers are the leaves at ``numbers``."""
    partitions = partitions_of(layout, of_rows, shardings)
    if partitions is None or any(metric.accumulator.keywords for metric in plan.metrics):
        return None

    def whole(of_arrays: Sequence[Any], of_numbers: Sequence[Any]) -> Given:
        rest_of_arrays, rest_of_numbers = iter(of_arrays), iter(of_numbers)
        return tree.unflatten(
            [next(rest_of_numbers if i in numbers else rest_of_arrays) for i in range(tree.num_leaves)]
        )

    def update(tables: Sequence[jax.Array], arrays: Sequence[jax.Array], words: Any) -> list[jax.Array]:
        metrics, named, weight = whole(arrays, [HostNumber(words[i]) for i in range(len(numbers))])
        values = named_values(plan, metrics, named)
        weights = by_name(plan, weight, "weight", values)
        in_metrics, in_named, _ = jax.tree.map(_unboxed, whole(partitions, [P()] * len(numbers)), is_leaf=_is_variable)
        specs = named_values(plan, in_metrics, in_named)
        all_tables = dict(zip(plan.tables, tables, strict=True))
        situation = situation_of(layout, tables[0], table_dims(plan, next(iter(plan.tables))))
        rows.refuse_populations("update", plan, situation.view, all_tables)
        feeds, taken = feeds_of(plan, situation, values, weights, specs)
        return list(rows.updated(plan, situation.view, feeds, all_tables, taken).values())

    everywhere = NamedSharding(of_rows.mesh, P()) if isinstance(of_rows, NamedSharding) and numbers else None
    return _Compiled(jax.jit(update, in_shardings=(None, None, everywhere)), len(layout.processes) > 1)


def _is_variable(value: Any) -> bool:
    return isinstance(value, nnx.Variable)


def _unboxed(value: Any) -> Any:
    return value.get_raw_value() if _is_variable(value) else value
