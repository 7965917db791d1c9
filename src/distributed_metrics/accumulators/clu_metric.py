"""Metrics that others wrote: subclasses of ``clu.metrics.Metric``, such as those of clu and metrax.

A clu metric is a pytree of arrays with ``from_model_output(**outputs)``, ``merge`` and ``compute``. Nearly all merge by
adding, leaf by leaf; those leaves are kept as pairs, in one table with those of all other clu metrics, and become
exact. A leaf that ``merge`` passes on is a constant. Metrics with any other merge have a table of their own, merged by
it.

What the leaves are is learnt from the first value, without computing it. ``empty()`` is not used: in metrax its leaves
have other shapes and dtypes than those of ``from_model_output``.
"""

import functools
import hashlib
import inspect
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distributed_metrics import compensated
from distributed_metrics.accumulators._aside import aside, nowhere
from distributed_metrics.accumulators._base import Accumulator
from distributed_metrics.accumulators.clu_weight import (
    WEIGHT,
    total_weight,
    weight_keyword,
    weighted_sum,
    without_masked,
)
from distributed_metrics.merging import SUM, Merge, Number, Numbers, Parts

ADDED = Merge("clu", SUM.numbers, SUM.combine, SUM.combine_numbers)


@dataclass(frozen=True)
class Leaf:
    """One leaf of a metric's state.

    Attributes:
        shape, dtype: of the array.
        constant: its value where ``merge`` passes it on, a number or nested tuples of numbers; else None.
    """

    shape: tuple[int, ...]
    dtype: str
    constant: Any = None

    @property
    def size(self) -> int:
        """How many numbers are accumulated for it."""
        return 0 if self.constant is not None else int(np.prod(self.shape, dtype=np.int64))


@dataclass(frozen=True)
class Learnt:
    """What the first value showed.

    Attributes:
        tree: the structure of the metric's state.
        leaves: its leaves.
        adds: whether ``merge`` adds all of them that are no constants.
        result: the shape of the result.
    """

    tree: Any
    leaves: tuple[Leaf, ...]
    adds: bool
    result: tuple[int, ...]

    @property
    def size(self) -> int:
        """How many numbers are accumulated."""
        return sum(leaf.size for leaf in self.leaves)


class NotLearntError(ValueError):
    """What the state of a metric looks like is not known before its first update."""


@dataclass(frozen=True)
class CluMetric(Accumulator):
    """A ``clu.metrics.Metric`` subclass, in whose place the class itself may stand in a spec. Empty: NaN.

    ``update`` takes a dict of the keywords of its ``from_model_output``. Its first parameter that is an array gives the
    batch: arrays of as many examples are cut up between the devices; other arrays, numbers and strings are settings.
    The weight of an update, one for each example, is given to it as its ``mask`` or ``sample_weights``; where it has
    none, the states of examples are weighted. The count is the sum of weights, or the number of examples.

    Args:
        metric: the class.
        name, labels: see ``Accumulator``.
        learnt: not for users.
    """

    fields = {"leaves": ADDED}
    keywords = True

    metric: Any
    learnt: Learnt | None = None
    shape: Any = field(default=(), kw_only=True)

    @property
    def full_name(self) -> str:
        """The name of the class, with its module."""
        return f"{self.metric.__module__}.{self.metric.__qualname__}"

    def label(self) -> str:
        return self.name if self.name is not None else self.metric.__name__.lower()

    def parameters(self) -> list[str]:
        """The keywords that ``from_model_output`` names."""
        kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        named = inspect.signature(self.metric.from_model_output).parameters.values()
        return [one.name for one in named if one.kind not in kinds]

    def merges(self) -> dict[str, Merge]:
        if self.learnt is None or self.learnt.adds:
            return super().merges()
        return {"weight": SUM, "leaves": _own_merge(self.metric, self.learnt)}

    def field_shape(self, field: str) -> tuple[int, ...]:
        if field == "weight":
            return ()
        # A merge of the metric's own works on all leaves at once, and knows by one more number whether there are any.
        return (0 if self.learnt is None else self.learnt.size + (not self.learnt.adds),)

    def result_shape(self) -> tuple[int, ...]:
        return () if self.learnt is None else self.learnt.result

    def contribution(self, **outputs: Any) -> dict[str, Any]:
        if WEIGHT in outputs:
            numbers, seen = weighted_sum(self._numbers_of, outputs)
            return {"weight": seen, "leaves": self._marked(numbers)}
        weight = outputs.get(weight_keyword(self.metric) or "")
        examples = batch_size(outputs)
        if weight is not None:
            outputs = without_masked(outputs, weight)
        count = jnp.float32(1 if examples is None else examples) if weight is None else total_weight(weight)
        return {"weight": count, "leaves": self._marked(self._numbers_of(**outputs))}

    def _numbers_of(self, **outputs: Any) -> compensated.Pair:
        """The numbers of the state of a batch."""
        assert self.learnt is not None  # update() learns first
        leaves, tree = jax.tree.flatten(self.metric.from_model_output(**outputs))
        self._require_same(tree, leaves)
        return _packed(self.learnt, leaves)

    def _marked(self, numbers: compensated.Pair) -> compensated.Pair:
        """The numbers with one more, where a merge of the metric's own wants to know that they are there."""
        assert self.learnt is not None
        if self.learnt.adds:
            return numbers
        high, low = (jnp.append(part, jnp.float32(seen)) for part, seen in zip(numbers, (1, 0), strict=True))
        return high, low

    def _require_same(self, tree: Any, leaves: Sequence[Any]) -> None:
        assert self.learnt is not None
        if tree != self.learnt.tree:
            raise ValueError(f"{self}: the structure of its state changed: it was {self.learnt.tree}, and is {tree}.")
        for leaf, now in zip(self.learnt.leaves, leaves, strict=True):
            if np.shape(now) != leaf.shape:
                raise ValueError(
                    f"{self}: the shape of its state changed: it was {leaf.shape}, and is {np.shape(now)}.\n"
                    "  Give it the same settings at every update, or two of them names of their own."
                )
            if leaf.constant is not None and _constant(now) != leaf.constant:
                raise ValueError(
                    f"{self}: a setting changed: it was {leaf.constant}, and is {_constant(now)}.\n"
                    "  Give it the same settings at every update, or two of them names of their own."
                )

    def result(self, xp: Any, weight: Any, leaves: Any) -> Any:
        if self.learnt is None:
            return weight * float("nan")
        compute = functools.partial(_computed, self.learnt, xp)
        if xp is jnp:
            for _ in range(weight.ndim):
                compute = jax.vmap(compute)
            return compute(leaves)
        results = np.full((*weight.shape, *self.learnt.result), np.nan)
        for index in np.ndindex(weight.shape):
            if weight[index]:
                results[index] = _on_host(compute, leaves[index])
        return results

    def __str__(self) -> str:
        return self.full_name


def in_order(metric: Any, outputs: Mapping[str, Any]) -> dict[str, Any]:
    """The keywords in the order in which ``from_model_output`` names them, then the others."""
    named = list(inspect.signature(metric.from_model_output).parameters)
    order = sorted(outputs, key=lambda key: named.index(key) if key in named else len(named))
    return {key: outputs[key] for key in order}


def batch_size(outputs: Mapping[str, Any]) -> int | None:
    """How many examples there are: the leading dim of the first array that has one."""
    return next((one.shape[0] for one in outputs.values() if hasattr(one, "shape") and len(one.shape)), None)


def learn(accumulator: CluMetric, outputs: Mapping[str, Any]) -> CluMetric:
    """The accumulator with what its first value shows; nothing is computed.

    Args:
        accumulator: one that has not learnt.
        outputs: the keywords of ``from_model_output``; arrays may be traced.

    Raises:
        ValueError: the metric cannot be traced, or its state changes its shape, or is not merged but replaced.
    """
    metric = accumulator.metric
    outputs = {name: one for name, one in outputs.items() if name != WEIGHT}
    concrete: list[Any] = []

    def states(arrays: Mapping[str, Any]) -> Any:
        state = metric.from_model_output(**{**outputs, **arrays})
        concrete[:] = [None if isinstance(leaf, jax.core.Tracer) else leaf for leaf in jax.tree.leaves(state)]
        return state

    arrays = {
        name: jax.ShapeDtypeStruct(one.shape, one.dtype) for name, one in outputs.items() if hasattr(one, "shape")
    }
    with nowhere():
        state = _tried(accumulator, "from_model_output", lambda: jax.eval_shape(states, arrays), outputs)
        leaves, tree = jax.tree.flatten(state)
        shapes = [(leaf.shape, _wide(leaf.dtype)) for leaf in leaves]
        kinds = _kinds(accumulator, tree, shapes)
        constants = [_constant(value) if kind == "keep" else None for value, kind in zip(concrete, kinds, strict=True)]
        learnt = Learnt(
            tree,
            tuple(Leaf(tuple(s), str(d), c) for (s, d), c in zip(shapes, constants, strict=True)),
            all(kind == "add" or constant is not None for kind, constant in zip(kinds, constants, strict=True)),
            (),
        )
        if "replace" in kinds:
            raise ValueError(
                f"{accumulator}: its merge() does not join two states but takes one of them, so that devices have no "
                'common one.\n  For the latest value: "last".'
            )
        like = jax.ShapeDtypeStruct((learnt.size,), jnp.float32)
        result = _tried(accumulator, "compute", lambda: jax.eval_shape(functools.partial(_computed, learnt, jnp), like))
    if not isinstance(result, jax.ShapeDtypeStruct):
        raise ValueError(f"{accumulator}: its compute() gives {type(result).__name__}, and not one array.")
    return _with(accumulator, Learnt(tree, learnt.leaves, learnt.adds, tuple(result.shape)))


def relearn(accumulator: CluMetric, described: Mapping[str, Any]) -> CluMetric:
    """The accumulator with what another one of the same class had learnt, from its description."""
    leaves = tuple(
        Leaf(tuple(leaf["shape"]), leaf["dtype"], _constant(leaf["constant"])) for leaf in described["leaves"]
    )
    fix = "Let the object learn what they are: update it once, then metrics.reset(), and merge."
    try:
        own_leaves, tree = jax.tree.flatten(accumulator.metric.empty())
    except Exception as error:  # clu's own says NotImplementedError, and others want arguments
        raise NotLearntError(
            f"the snapshot has {len(leaves)} arrays of {accumulator}, and its empty(), which would show what they are, "
            f"fails: {type(error).__name__}: {error}\n  {fix}"
        ) from error
    if len(own_leaves) != len(leaves):
        raise NotLearntError(
            f"the snapshot has {len(leaves)} arrays of {accumulator}, and its empty() has {len(own_leaves)}.\n  {fix}"
        )
    return _with(accumulator, Learnt(tree, leaves, described["adds"], tuple(described["result"])))


def describe(learnt: Learnt) -> dict[str, Any]:
    """What was learnt, in JSON's types."""
    leaves = [{"shape": list(one.shape), "dtype": one.dtype, "constant": one.constant} for one in learnt.leaves]
    return {"leaves": leaves, "adds": learnt.adds, "result": list(learnt.result)}


def _with(accumulator: CluMetric, learnt: Learnt) -> CluMetric:
    return CluMetric(accumulator.metric, learnt, name=accumulator.name, labels=accumulator.labels)


def _tried(
    accumulator: CluMetric, method: str, function: Callable[[], Any], given: Mapping[str, Any] | None = None
) -> Any:
    """What a method of the metric gives in a trace; where that fails, the error says whose it is."""
    try:
        return function()
    except Exception as error:  # whatever a class that we do not know raises
        of_tracing = isinstance(error, _TRACING)
        text = "cannot be traced, so it cannot run on the devices" if of_tracing else "does not take these values"
        hint = '\n  "std" accumulates the standard deviation.' if accumulator.metric.__name__ == "Std" else ""
        strings = [name for name, one in (given or {}).items() if isinstance(one, str)]
        if strings:
            hint += f"\n  {strings[0]}= is a string, and strings cannot be accumulated on a device."
        shown = {} if of_tracing else given or {}
        of = f"\n  Given: {', '.join(f'{name}={_kind(one)}' for name, one in shown.items())}" if shown else ""
        raise ValueError(
            f"{accumulator}: its {method}() {text}. It says:\n  {type(error).__name__}: {error}{of}{hint}"
        ) from error


_TRACING = (
    jax.errors.ConcretizationTypeError,
    jax.errors.NonConcreteBooleanIndexError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
    jax.errors.UnexpectedTracerError,
)


def _kind(value: Any) -> str:
    return f"{value.dtype} {value.shape}" if hasattr(value, "dtype") else f"{value!r:.40}"


def _wide(dtype: Any) -> np.dtype:
    """In what a leaf is merged: as it is, or in float32 where it is a shorter float."""
    return np.dtype(np.float32) if jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize < 4 else np.dtype(dtype)


def _constant(value: Any) -> Any:
    """A number or nested tuples of numbers, which can be compared and hashed; None for what is not known."""
    if value is None or isinstance(value, jax.core.Tracer):
        return None

    def tupled(x: Any) -> Any:
        return tuple(map(tupled, x)) if isinstance(x, list | tuple) else x

    return tupled(np.asarray(value).tolist())


def _kinds(accumulator: CluMetric, tree: Any, shapes: Sequence[tuple[tuple[int, ...], np.dtype]]) -> list[str]:
    """What ``merge`` does with each leaf: "add", "keep" (the left one), "replace" (by the right one), or its "own".

    Found by merging small whole numbers, for which it shows exactly.
    """
    random = np.random.default_rng(0)

    def draw() -> list[np.ndarray]:
        ranges = {True: (0, 2), False: (1, 64)}
        return [np.asarray(random.integers(*ranges[d.kind == "b"], s)).astype(d) for s, d in shapes]

    def merge(a: Sequence[np.ndarray], b: Sequence[np.ndarray]) -> tuple[list[Any], Any]:
        with aside():
            leaves, merged = jax.tree.flatten(jax.tree.unflatten(tree, a).merge(jax.tree.unflatten(tree, b)))
            return [np.asarray(leaf) for leaf in leaves], merged

    kinds: list[set[str]] = [{"add", "keep", "replace"} for _ in shapes]
    for _ in range(4):
        mine, theirs = draw(), draw()
        leaves, merged_tree = _tried(accumulator, "merge", functools.partial(merge, mine, theirs))
        if merged_tree != tree or [np.shape(leaf) for leaf in leaves] != [shape for shape, _ in shapes]:
            raise ValueError(
                f"{accumulator}: merge() changes the shape of its state, so that it would grow with every update.\n"
                f"  Before: {[shape for shape, _ in shapes]}\n  After:  {[np.shape(leaf) for leaf in leaves]}"
            )
        for kind, out, a, b in zip(kinds, leaves, mine, theirs, strict=True):
            if a.dtype == bool or not np.array_equal(out, a + b):
                kind.discard("add")
            if not np.array_equal(out, a):
                kind.discard("keep")
            if not np.array_equal(out, b):
                kind.discard("replace")
    return [min(kind) if kind else "own" for kind in kinds]


def _packed(learnt: Learnt, leaves: Sequence[Any]) -> compensated.Pair:
    """The numbers of all leaves that are no constants, as one pair."""
    pairs = []
    for leaf, value in zip(learnt.leaves, leaves, strict=True):
        if leaf.constant is None:
            array = jnp.asarray(value)
            pair = compensated.integer_pair(array) if compensated.is_integer(array) else compensated.pair_of(array)
            pairs.append([part.reshape(-1) for part in pair])
    if not pairs:
        return jnp.zeros(0, jnp.float32), jnp.zeros(0, jnp.float32)
    high, low = (jnp.concatenate(parts) for parts in zip(*pairs, strict=True))
    return high, low


def _unpacked(learnt: Learnt, xp: Any, high: Any, low: Any) -> Any:
    """The state of the metric, from the numbers of its leaves as pairs ``(size,)``; ``low`` may be 0."""

    def values() -> Iterator[Any]:
        at = 0
        for leaf in learnt.leaves:
            if leaf.constant is not None:
                yield np.asarray(leaf.constant, leaf.dtype) if leaf.shape else leaf.constant
                continue
            words = (
                part if np.ndim(part) == 0 else part[at : at + leaf.size].reshape(leaf.shape) for part in (high, low)
            )
            yield _as_dtype(xp, np.dtype(leaf.dtype), *words)
            at += leaf.size

    return jax.tree.unflatten(learnt.tree, list(values()))


def _as_dtype(xp: Any, dtype: np.dtype, high: Any, low: Any) -> Any:
    total = high + low
    if dtype.kind not in "iu":
        return total if xp is np or dtype.kind == "f" else total.astype(dtype)
    if xp is jnp:  # it may be a sum of weights
        return total
    whole = np.array_equal(total, np.rint(total)) and np.all(np.abs(total) <= np.iinfo(dtype).max)
    return total.astype(dtype) if whole else total


def _computed(learnt: Learnt, xp: Any, numbers: Any) -> Any:
    """What the metric computes from the numbers of its leaves."""
    return _unpacked(learnt, xp, numbers[: learnt.size], xp.float32(0)).compute()


def _on_host(compute: Callable[[Any], Any], numbers: np.ndarray) -> np.ndarray:
    """Run ``compute``, which may launch device programs."""
    with aside():
        return np.asarray(compute(numbers), np.float64)


@functools.cache
def _own_merge(metric: Any, learnt: Learnt) -> Merge:
    """The merge of one metric by its own method. The last number tells whether there is a state at all."""

    def merged(method: str, xp: Any, a: Sequence[Any], b: Sequence[Any]) -> tuple[Any, Any]:
        states = [_unpacked(learnt, xp, *(part[: learnt.size] for part in x)) for x in (a, b)]
        leaves = jax.tree.leaves(getattr(states[0], method)(states[1]))
        return _packed(learnt, leaves)

    def total(method: str, theirs: np.ndarray, mine: np.ndarray) -> np.ndarray:
        pairs = merged(method, np, (mine, np.zeros_like(mine)), (theirs, np.zeros_like(theirs)))
        return np.asarray(pairs, np.float64).sum(0)

    def on_device(method: str) -> Callable[[Parts, Parts], Parts]:
        def combine(a: Parts, b: Parts) -> Parts:
            if a[0].ndim > 1:
                return jax.vmap(combine)(a, b)
            high, low = merged(method, jnp, a, b)
            both = (jnp.append(high, 1.0), jnp.append(low, 0.0))
            return tuple(
                jnp.where(a[0][-1] == 0, of_b, jnp.where(b[0][-1] == 0, of_a, of_both))
                for of_a, of_b, of_both in zip(a, b, both, strict=True)
            )

        return combine

    def on_host(method: str) -> Callable[[Numbers, Numbers], Numbers]:
        def combine(a: Numbers, b: Numbers) -> Numbers:
            result = np.empty_like(a[0])
            for index in np.ndindex(result.shape[:-1]):
                mine, theirs = a[0][index], b[0][index]
                if not mine[-1] or not theirs[-1]:
                    result[index] = theirs if not mine[-1] else mine
                else:
                    result[index] = np.append(_on_host(functools.partial(total, method, theirs), mine), 1.0)
            return (result,)

        return combine

    digest = hashlib.sha256(json.dumps(describe(learnt)).encode()).hexdigest()[:8]  # the same in all processes
    name = f"clu {metric.__module__}.{metric.__qualname__} {digest}"
    # Private: clu merges two devices by _reduce_merge, which is merge() unless a class says otherwise.
    return Merge(name, (Number("leaves"),), on_device("_reduce_merge"), on_host("_reduce_merge"),
                 follow=on_device("merge"), follow_numbers=on_host("merge"), by_slot=False)  # fmt: skip


def is_metric_class(what: Any) -> bool:
    """Whether this is a class of clu metrics. Who has one has imported clu already: it is not imported for this."""
    clu = sys.modules.get("clu.metrics")
    return clu is not None and isinstance(what, type) and issubclass(what, clu.Metric)


def hint(what: Any) -> str:
    """How to give what belongs to clu and is no metric class, if this is that; else nothing."""
    clu = sys.modules.get("clu.metrics")
    if clu is not None and isinstance(what, clu.Metric):
        return f"Give the class: {type(what).__name__}"
    if clu is not None and (
        isinstance(what, clu.Collection) or (isinstance(what, type) and issubclass(what, clu.Collection))
    ):
        return "Give its metrics one by one: DistributedMetrics(dict(Collection.__annotations__))"
    return ""


def accumulator_of(metric: Any) -> CluMetric:
    """The accumulator of a metric class.

    Raises:
        ValueError: it cannot be accumulated on devices, whatever its values are.
    """
    clu = sys.modules["clu.metrics"]
    name = f"{metric.__module__}.{metric.__qualname__}"
    if issubclass(metric, clu.CollectingMetric):
        raise ValueError(
            f"{name} collects all outputs on the host, and so grows with every update.\n"
            "  Collect them yourself, or take a metric with a state of a fixed size, such as metrax.AUCROC."
        )
    if issubclass(metric, clu.LastValue):
        raise ValueError(f'{name} keeps what the last device saw last.\n  Take "last", or "mean" of a window.')
    for method in ("from_model_output", "merge", "compute"):
        mine, base = getattr(metric, method), getattr(clu.Metric, method)
        if getattr(mine, "__func__", mine) is getattr(base, "__func__", base):
            raise ValueError(f"{name} has no {method}() of its own, so it cannot be accumulated.")
    return CluMetric(metric)
