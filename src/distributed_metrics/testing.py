"""The laws that every accumulator keeps, and one function that holds an accumulator to them: ``check_accumulator``."""

import functools
import itertools
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from distributed_metrics.accumulators import Accumulator
from distributed_metrics.contributions import Feed, Source, contributed
from distributed_metrics.merging import Parts
from distributed_metrics.metrics import DistributedMetrics
from distributed_metrics.plan import Plan
from distributed_metrics.snapshot import Snapshot
from distributed_metrics.tables import join_words

_SIZES = (5, 3, 5, 3, 5, 3)
"""Of the batches that are made here: uneven, of two sizes, since each size is a program to compile, and 24 elements in
all, which 2, 3 and 8 devices divide."""

_ROWS = (1, 2, 3, 8)


def check_accumulator(
    accumulator: Accumulator,
    batches: Sequence[Any] | None = None,
    *,
    weights: Sequence[Any] | None = None,
    tolerance: float = 1e-9,
    traced_tolerance: float = 1e-5,
    seed: int = 0,
) -> None:
    """Hold an accumulator to the laws; the first one that it breaks is an error that shows both numbers.

    The laws, in the order in which they are tried:

    - "empty": what has seen nothing results in ``empty``, in the shape ``result_shape()``.
    - "reset": after ``reset`` and ``flush`` an object is as new, and its state has the same shapes and dtypes.
    - "state": it keeps its shapes and dtypes in ``jit``, in ``scan``, behind ``lax.cond``, with values of any dtype.
      Results in a trace are those of the host, to float32.
    - "neutral element": merging what has seen nothing changes nothing, on either side.
    - "weight 0": elements of weight 0 are left out, NaN included; an update of weight 0 changes no result.
    - "order": the order of elements, updates, snapshots and rows does not matter. Not asked of an accumulator with a
      merge that has a ``follow``, which says that order is meant.
    - "split equals whole": one batch, several updates, 1 to 8 rows, sums of snapshots, saved and merged ones give one
      result; on the devices there are as well. Rows of a merge that has a ``follow`` come from these devices only.
    - "populations": results of several objects, and of several metrics in one, do not mix.

    Args:
        accumulator: one of yours, or of ours.
        batches: a list of values as ``update`` takes them, of any number of elements: arrays ``(..., *S)``, or tuples
            of them, of as many elements each, where the accumulator has several ``inputs``. One batch alone is cut up.
            By default 24 positive float32 elements in six batches, so that logarithms and square roots work.
        weights: for each batch None or its weights, numbers or booleans, which align with its leading dims. By default
            random ones are tried as well.
        tolerance: how far results may differ, relative to the largest number of a result. An accumulator that adds in
            plain float32 needs about 1e-6.
        traced_tolerance: the same between float32 results in a trace and those of the host. A formula that cancels in
            float32 needs more.
        seed: of all that is drawn.

    Raises:
        AssertionError: a law is broken. It names the law, both numbers and a probable cause.
        TypeError: no accumulator, or no values that ``update`` takes.
        ValueError: the same; or no elements, or parts of different lengths.

    >>> import jax.numpy as jnp
    >>> import distributed_metrics as dm
    >>> class GeometricMean(dm.Accumulator):
    ...     fields = {"log_total": "sum"}
    ...
    ...     def contribution(self, batch):
    ...         return {"log_total": batch.map(jnp.log).sum()}
    ...
    ...     def result(self, xp, weight, log_total):
    ...         return xp.exp(log_total / weight)
    >>> check_accumulator(GeometricMean())
    """
    if not isinstance(accumulator, Accumulator):
        raise TypeError(
            f"check_accumulator() takes an accumulator, got {accumulator!r} ({type(accumulator).__name__}).\n"
            "  For example: check_accumulator(Mean())"
        )
    random = np.random.default_rng(seed)
    subject = _Subject(accumulator, _given(accumulator, batches, weights, random), batches is None, random)
    subject.seen(subject.whole)  # what is wrong with its very definition is an error of its own
    for law in _LAWS:
        broken = f'{accumulator} breaks the law "{law.name}"'
        try:
            for claim in law.claims(subject):
                if lines := claim.refuted(traced_tolerance if claim.traced else tolerance, law.cause):
                    raise AssertionError("\n  ".join([f"{broken}.", *lines]))
        except (TypeError, ValueError, IndexError) as error:  # also what JAX raises for types and tracers
            raise AssertionError(
                f"{broken}, by an error:\n  {type(error).__name__}: {error}\n  Probable cause: {law.cause}"
            ) from error


# --- what the laws are tried on ---


@dataclass(frozen=True)
class _Elements:
    """Some elements: for each input an array ``(n, *S)``, and weights ``(n,)`` or None."""

    parts: tuple[np.ndarray, ...]
    weight: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.parts[0])

    def __getitem__(self, index: Any) -> "_Elements":
        return _Elements(tuple(p[index] for p in self.parts), None if self.weight is None else self.weight[index])

    @property
    def value(self) -> Any:
        return self.parts[0] if len(self.parts) == 1 else self.parts

    def map(self, function: Callable[[np.ndarray], np.ndarray]) -> "_Elements":
        return replace(self, parts=tuple(function(part) for part in self.parts))


def _joined(batches: Sequence[_Elements]) -> _Elements:
    parts = tuple(np.concatenate(same) for same in zip(*(batch.parts for batch in batches), strict=True))
    if all(batch.weight is None for batch in batches):
        return _Elements(parts)
    return _Elements(parts, np.concatenate([_weights_of(batch) for batch in batches]))


def _weights_of(batch: _Elements) -> np.ndarray:
    return np.ones(len(batch), bool) if batch.weight is None else batch.weight


def _given(
    accumulator: Accumulator, batches: Sequence[Any] | None, weights: Sequence[Any] | None, random: np.random.Generator
) -> list[_Elements]:
    """The batches of a check, each of one leading dim.

    Raises:
        TypeError, ValueError: there are no elements, or ``update`` does not take them.
    """
    if batches is None:
        shape = (sum(_SIZES), *accumulator.shape)
        parts = tuple(random.lognormal(size=shape).astype(np.float32) for _ in accumulator.inputs)
        return _cut(_Elements(parts), _SIZES)
    given = weights if weights is not None else [None] * len(batches)
    if len(given) != len(batches):
        raise ValueError(f"check_accumulator(): {len(batches)} batches, and weights for {len(given)}.")
    metrics = DistributedMetrics({"x": accumulator})
    elements = []
    for value, weight in zip(batches, given, strict=True):
        metrics.update({"x": value}, weight=weight)
        elements.append(_elements(accumulator, value, weight))
    elements = [one for one in elements if len(one)]
    if not elements:
        raise ValueError("check_accumulator(batches=...): there is no element in them.")
    if len(elements) == 1:
        n = len(elements[0])
        sizes = [n * size // sum(_SIZES) for size in _SIZES]
        return [batch for batch in _cut(elements[0], [*sizes, n - sum(sizes)]) if len(batch)]
    return elements


def _elements(accumulator: Accumulator, value: Any, weight: Any) -> _Elements:
    """A value and its weight with all leading dims as one."""
    parts = [np.asarray(part) for part in (value if len(accumulator.inputs) > 1 else (value,))]
    leading = parts[0].shape[: parts[0].ndim - len(accumulator.shape)]
    if weight is not None:
        aligned = np.asarray(weight).reshape(np.shape(weight) + (1,) * (len(leading) - np.ndim(weight)))
        weight = np.broadcast_to(aligned, leading).reshape(-1)
    parts = [part.reshape(-1, *accumulator.shape) for part in parts]
    if len({len(part) for part in parts}) > 1:
        raise ValueError(
            f"check_accumulator(batches=...): a value of {accumulator} has parts of "
            f"{' and '.join(str(len(part)) for part in parts)} elements.\n"
            "  They are split together, so each needs as many."
        )
    return _Elements(tuple(parts), weight)


def _cut(elements: _Elements, sizes: Sequence[int]) -> list[_Elements]:
    ends = np.cumsum(sizes)
    return [elements[end - size : end] for size, end in zip(sizes, ends, strict=True)]


class _Subject:
    """An accumulator with the data that it is tried on.

    Attributes:
        accumulator: it.
        batches: the updates, with the weights that the user gave.
        whole: the same as one batch.
        both: the updates, and the same with drawn weights; of weights that the user gave, these alone.
        samples: the whole, and where the data are made here, the negated whole.
        random: what draws.
        ordered: whether the accumulator says that order matters.
    """

    def __init__(self, accumulator: Accumulator, batches: list[_Elements], made: bool, random: np.random.Generator):
        self.accumulator, self.batches, self.whole, self.random = accumulator, batches, _joined(batches), random
        self.both = [batches]
        if self.whole.weight is None:
            drawn = random.uniform(0.25, 4, len(self.whole)).astype(np.float32)
            self.both.append(_cut(replace(self.whole, weight=drawn), list(map(len, batches))))
        self.samples = [self.whole, self.whole.map(np.negative)] if made else [self.whole]
        self.ordered = any(merge.follow or merge.follow_numbers for merge in accumulator.merges().values())

    def new(self, mesh: Mesh | None = None) -> DistributedMetrics:
        return DistributedMetrics({"x": self.accumulator}, mesh=mesh)

    def seen(self, *batches: _Elements, by: DistributedMetrics | None = None) -> DistributedMetrics:
        """An object, by default a new one, after these updates."""
        metrics = self.new() if by is None else by
        for batch in batches:
            metrics.update({"x": batch.value}, weight=batch.weight)
        return metrics

    def snapshot(self, *batches: _Elements) -> Snapshot:
        return self.seen(*batches).compute()

    def merged_in_trace(self, snapshots: Sequence[Snapshot]) -> Snapshot:
        """The merge of rows on a device; with rows that have seen nothing, so that one program does for any number."""
        return _merged_in_trace(_as_rows([*snapshots, *[self.snapshot()] * (max(_ROWS) - len(snapshots))]))

    def windows(self, number: int) -> list[_Elements]:
        """Parts of the whole, without weights, in a device's dtypes; all of the size of the smallest batch."""
        size = min(map(len, self.batches))
        starts = np.linspace(0, len(self.whole) - size, number).astype(int)
        parts = tuple(part.astype(jax.dtypes.canonicalize_dtype(part.dtype)) for part in self.whole.parts)
        return [_Elements(parts)[start : start + size] for start in starts]


def _as_rows(snapshots: Sequence[Snapshot]) -> Snapshot:
    """Snapshots of one row each, as the rows of one object."""
    words = np.concatenate([np.asarray(one._words) for one in snapshots], axis=-2)
    return Snapshot(snapshots[0]._plan, words, snapshots[0]._gathering)


def _dealt(batches: Sequence[_Elements], rows: int) -> list[Sequence[_Elements]]:
    """The batches in uneven runs, one for each row; of many rows some get none."""
    ends = [int(len(batches) * (i / rows) ** 1.5) for i in range(rows + 1)]
    return [batches[start:end] for start, end in itertools.pairwise(ends)]


# --- what is compared ---


@dataclass(frozen=True)
class _Claim:
    """Two ways to the same numbers.

    Attributes:
        one, other: what was done, and the numbers by name that came of it.
        cause: a probable one, if this fails; by default that of the law.
        traced: whether one of them is a float32 result.
    """

    one: tuple[str, Mapping[str, Any]]
    other: tuple[str, Mapping[str, Any]]
    cause: str | None = None
    traced: bool = False

    def refuted(self, tolerance: float, cause: str) -> list[str]:
        """What differs, both sides of it, and why; empty where nothing does."""
        (done, numbers), (done_instead, others) = self.one, self.other
        width = max(len(done), len(done_instead)) + 1
        for name, number in numbers.items():
            if different := _difference(number, others[name], tolerance):
                mine, theirs, relative = different
                lines = [f"{name}, {done + ':':{width}} {mine}", f"{name}, {done_instead + ':':{width}} {theirs}"]
                if np.isfinite(relative):
                    lines.append(f"They differ by {relative:.1e}, relative; {tolerance:.0e} is allowed.")
                rounded = relative < 1e-5 and not self.traced
                return [*lines, f"Probable cause: {_ROUNDING if rounded else self.cause or cause}"]
        return []


_ROUNDING = "something is added in plain float32, and batch.sum() is not. Where that is meant: tolerance=1e-6."


def _difference(one: Any, other: Any, tolerance: float) -> tuple[str, str, float] | None:
    """Both as text, and by how much they differ (NaN where that is no number); None where they agree."""
    if isinstance(one, str):
        return None if one == other else (one, other, np.nan)
    a, b = np.asarray(one, np.float64), np.asarray(other, np.float64)
    if a.shape != b.shape:
        return f"shape {a.shape}", f"shape {b.shape}", np.nan
    with np.errstate(invalid="ignore"):  # inf - inf
        apart = np.where((a == b) | (np.isnan(a) & np.isnan(b)), 0.0, np.abs(a - b))
    sizes = np.maximum(np.abs(a), np.abs(b))
    size = np.max(sizes, where=np.isfinite(sizes), initial=0.0)
    wrong = ~(apart <= tolerance * size)
    if not wrong.any():
        return None
    at = tuple(int(i) for i in np.argwhere(wrong)[0])
    where = f" at {list(at)}" if at else ""
    return f"{float(a[at])!r}{where}", f"{float(b[at])!r}{where}", float(apart[at] / size) if size else np.inf


def _numbers(snapshot: Snapshot) -> dict[str, Any]:
    """All that a user reads of a metric."""
    return {"result": snapshot["x"], "count": snapshot.count["x"], **snapshot.outside["x"]}


def _state(snapshot: Snapshot) -> dict[str, Any]:
    """All that is stored of a metric."""
    return snapshot.to_dict()["metrics"]["x"]


def _types(metrics: DistributedMetrics) -> dict[str, str]:
    """The shapes and dtypes of the state."""
    leaves = jax.tree_util.tree_leaves_with_path(metrics)
    return {f"state{jax.tree_util.keystr(path)}": f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves}


# --- programs; jitted here, once for each accumulator ---


@jax.jit
def _merged_in_trace(snapshot: Snapshot) -> Snapshot:
    return Snapshot(snapshot._plan, join_words(snapshot._plan, snapshot._merged_parts(), jnp))


@jax.jit
def _computed_in_trace(metrics: DistributedMetrics) -> Snapshot:
    return metrics.compute()


@jax.jit
def _results_in_trace(metrics: DistributedMetrics) -> dict[str, Any]:
    return dict(metrics.compute())


@jax.jit
def _scanned(
    metrics: DistributedMetrics, flags: jax.Array, values: Any, others: Any
) -> tuple[DistributedMetrics, dict[str, Any]]:
    """A loop that carries the object, and updates it with one or the other value as the flags say; traced results."""

    def step(metrics: DistributedMetrics, given: Any) -> tuple[DistributedMetrics, None]:
        flag, value, other = given
        update, update_other = (
            (lambda metrics, a, b: _updated(metrics, a)),
            (lambda metrics, a, b: _updated(metrics, b)),
        )
        return lax.cond(flag, update, update_other, metrics, {"x": value}, {"x": other}), None

    metrics, _ = lax.scan(step, metrics, (flags, values, others))
    return metrics, _numbers(metrics.compute())


def _updated(metrics: DistributedMetrics, values: Any) -> DistributedMetrics:
    metrics.update(values)
    return metrics


_updated_population = jax.jit(jax.vmap(_updated))


@functools.partial(jax.jit, static_argnums=0)
def _contributed(plan: Plan, parts: tuple[jax.Array, ...]) -> dict[str, Parts]:
    """What a batch contributes to each field."""
    sources = tuple(Source(i, P(), False) for i in range(len(parts)))
    feed = Feed((0,), sources, (None,) * len(parts))
    (block,) = contributed(plan, [feed], [parts], (), (), split=True)
    return block.fields


@functools.partial(jax.jit, static_argnums=0)
def _around_identity(plan: Plan, fields: dict[str, Parts]) -> dict[str, dict[str, Parts]]:
    """Each field merged with the identity in every way. A program of its own, so that the words are what they are."""
    merged = {}
    for name, words in fields.items():
        merge = plan.groups[0].fields[name].merge
        nothing = tuple(jnp.full_like(word, one) for word, one in zip(words, merge.identity, strict=True))
        merged[name] = {
            "merged with the identity": merge.combine(words, nothing),
            "the identity merged with it": merge.combine(nothing, words),
            "after the identity": merge.after(nothing, words),
            "before the identity": merge.after(words, nothing),
        }
    return merged


# --- the laws ---


def _empty(subject: _Subject) -> Iterator[_Claim]:
    accumulator, numbers = subject.accumulator, _numbers(subject.snapshot())
    shape, kept = accumulator.result_shape(), accumulator.shape
    result = numbers["result"]
    yield _Claim(
        ("what result_shape() says", {"shape": str(shape)}), ("of the result", {"shape": str(np.shape(result))})
    )
    leading = str(shape[: len(kept)])
    yield _Claim(("S", {"shape": str(kept)}), ("what result_shape() starts with", {"shape": leading}))
    nothing = ("of what has seen nothing", numbers)
    if accumulator.empty is not None:
        yield _Claim(("that empty declares", {"result": np.full(shape, accumulator.empty)}), nothing)
    elif np.isnan(result).any():
        yield _Claim(("where empty is None", {"result": "a number"}), ("of what has seen nothing", {"result": "nan"}))
    yield _Claim(("of no elements", {"count": np.zeros(accumulator.field_shape("weight"))}), nothing)


def _reset(subject: _Subject) -> Iterator[_Claim]:
    metrics, some = subject.new(), subject.batches[0]
    new, types = _state(metrics.compute()), _types(metrics)
    first = _numbers(subject.seen(some, by=metrics).compute())
    for method, start_afresh in (("reset", metrics.reset), ("flush", metrics.flush)):
        _numbers(subject.seen(*subject.batches, by=metrics).compute())
        start_afresh()
        yield _Claim(("of a new object", new), (f"after {method}", _state(metrics.compute())))
        yield _Claim(("of a new object", types), (f"after {method}", _types(metrics)))
        again = _numbers(subject.seen(some, by=metrics).compute())
        yield _Claim(("of one batch in a new object", first), (f"of the same batch after {method}", again))


def _types_and_traces(subject: _Subject) -> Iterator[_Claim]:
    types = ("in a new object", _types(subject.new()))
    yield _Claim(types, ("after an update", _types(subject.seen(subject.whole))))
    flags = np.array([True, False, False, True])
    windows = [window.map(_whole_numbers) for window in subject.windows(2 * len(flags))]
    values, others = windows[: len(flags)], windows[len(flags) :]
    chosen = [value if flag else other for flag, value, other in zip(flags, values, others, strict=True)]
    expected = ("of eager updates of float32", _numbers(subject.snapshot(*chosen)))
    done = "of bfloat16 or int32, in a cond in a scan"
    metrics, traced = _scanned(subject.new(), flags, _stacked(values, jnp.bfloat16), _stacked(others, jnp.int32))
    yield _Claim(types, ("after a scan", _types(metrics)))
    yield _Claim(expected, (done, _numbers(metrics.compute())))
    yield _Claim(expected, (f"{done}, in a trace", jax.device_get(traced)), traced=True)


def _whole_numbers(part: np.ndarray) -> np.ndarray:
    """Numbers near these that float32, bfloat16 and int32 hold alike."""
    part = np.where(np.isfinite(part), part, 1).astype(np.float32)
    return np.clip(np.ceil(part), -(2.0**30), 2.0**30).astype(jnp.bfloat16).astype(np.float32)


def _neutral(subject: _Subject) -> Iterator[_Claim]:
    whole, empty = subject.snapshot(subject.whole), subject.snapshot()
    for sample in subject.samples:
        fields = _contributed(whole._plan, tuple(map(jnp.asarray, sample.parts)))
        for field, ways in _around_identity(whole._plan, fields).items():
            merge = whole._plan.groups[0].fields[field].merge
            alone = merge.widen([np.asarray(word)[0] for word in fields[field]])
            numbers = {way: merge.widen([np.asarray(word)[0] for word in words]) for way, words in ways.items()}
            nothing = tuple(np.full_like(x, number.identity) for x, number in zip(alone, merge.numbers, strict=True))
            with np.errstate(all="ignore"):
                numbers |= {
                    "merged with the identity on the host": merge.combine_numbers(alone, nothing),
                    "the identity merged with it on the host": merge.combine_numbers(nothing, alone),
                    "after the identity on the host": merge.after_numbers(nothing, alone),
                    "before the identity on the host": merge.after_numbers(alone, nothing),
                }
            names = [f"{field} ({number.name})" for number in merge.numbers]
            expected = ("of one batch", dict(zip(names, alone, strict=True)))
            for way, merged in numbers.items():
                yield _Claim(expected, (way, dict(zip(names, merged, strict=True))))
    expected = (f"of {len(subject.whole)} elements", _numbers(whole))
    yield _Claim(expected, ("plus a snapshot of nothing", _numbers(whole + empty)))
    yield _Claim(expected, ("added to a snapshot of nothing", _numbers(empty + whole)))
    for rows in ([whole, empty], [empty, whole]):
        yield _Claim(expected, ("beside a row that has seen nothing", _numbers(_as_rows(rows))))
        yield _Claim(expected, ("the same, merged in a trace", _numbers(subject.merged_in_trace(rows))))
    for mine, theirs in ((subject.seen(subject.whole), empty), (subject.new(), whole)):
        mine.merge(theirs)
        yield _Claim(expected, ("after metrics.merge() with nothing", _numbers(mine.compute())))


def _weight_zero(subject: _Subject) -> Iterator[_Claim]:
    for batches in subject.both:
        batch, smallest = max(batches, key=len), min(map(len, batches))
        number = smallest if smallest < len(batch) else len(batch) // 2
        kept = subject.random.permutation(len(batch)) < number
        weight = np.where(kept, _weights_of(batch), np.zeros((), _weights_of(batch).dtype))
        masked = replace(batch.map(functools.partial(_with_nan, where=~kept)), weight=weight)
        nothing = replace(masked, weight=np.zeros_like(weight))
        without = [batch[kept]] if number else []
        for before in ([], batches):
            yield _Claim(
                ("without some elements", _numbers(subject.snapshot(*before, *without))),
                ("with them, NaN of weight 0", _numbers(subject.snapshot(*before, masked))),
            )
            yield _Claim(
                (f"after {len(before)} updates", _numbers(subject.snapshot(*before))),
                ("after one more, all of weight 0", _numbers(subject.snapshot(*before, nothing))),
            )


def _with_nan(part: np.ndarray, where: np.ndarray) -> np.ndarray:
    if not jnp.issubdtype(part.dtype, jnp.floating):
        return part
    part = part.copy()
    part[where] = np.nan
    return part


def _order(subject: _Subject) -> Iterator[_Claim]:
    if subject.ordered:
        return
    permuted = subject.whole[subject.random.permutation(len(subject.whole))]
    yield _Claim(
        (f"of {len(subject.whole)} elements", _numbers(subject.snapshot(subject.whole))),
        ("of the same in another order", _numbers(subject.snapshot(permuted))),
    )
    for batches in subject.both:
        yield _Claim(
            (f"of {len(batches)} updates", _numbers(subject.snapshot(*batches))),
            ("of the same in the opposite order", _numbers(subject.snapshot(*batches[::-1]))),
        )
    snapshots = [subject.snapshot(*dealt) for dealt in _dealt(subject.batches, max(_ROWS))]
    for others in (snapshots[::-1], snapshots[3:] + snapshots[:3]):
        for what, merged in (
            (f"{len(snapshots)} rows", _as_rows),
            (f"{len(snapshots)} rows, merged in a trace", subject.merged_in_trace),
            (f"a sum of {len(snapshots)} snapshots", _sum),
        ):
            yield _Claim(
                (f"of {what}", _numbers(merged(snapshots))), ("of the same in another order", _numbers(merged(others)))
            )


def _sum(snapshots: Sequence[Snapshot]) -> Snapshot:
    return functools.reduce(operator.add, snapshots)


def _split(subject: _Subject) -> Iterator[_Claim]:
    for batches in subject.both:
        whole = _joined(batches)
        expected = (f"of {len(whole)} elements in one batch", _numbers(subject.snapshot(whole)))
        yield _Claim(expected, (f"in {len(batches)} updates", _numbers(subject.snapshot(*batches))))
        apart = [subject.snapshot(batch) for batch in batches]
        yield _Claim(expected, (f"as a sum of {len(apart)} snapshots", _numbers(_sum(apart))), _TWO_MERGES)
        for number in () if subject.ordered else _ROWS:
            rows = [subject.snapshot(*dealt) for dealt in _dealt(batches, number)]
            yield _Claim(expected, (f"in {number} rows", _numbers(_as_rows(rows))), _TWO_MERGES)
            yield _Claim(expected, (f"in {number} rows, merged in a trace", _numbers(subject.merged_in_trace(rows))))
    half = len(subject.batches) // 2
    expected = (f"of {len(subject.whole)} elements in one batch", _numbers(subject.snapshot(subject.whole)))
    parts = subject.snapshot(*subject.batches[:half]), subject.snapshot(*subject.batches[half:])
    for done, (earlier, later) in (
        ("in two snapshots, by metrics.merge()", parts),
        ("the same, from dicts", tuple(Snapshot.from_dict(part.to_dict()) for part in parts)),
    ):
        metrics = subject.new()
        metrics.merge(earlier)
        metrics.merge(later)
        yield _Claim(expected, (done, _numbers(metrics.compute())))
    yield from _on_devices(subject, expected)


def _on_devices(subject: _Subject, expected: tuple[str, dict[str, Any]]) -> Iterator[_Claim]:
    """The split over the devices that there are."""
    for number in (number for number in _ROWS if 1 < number <= jax.local_device_count()):
        metrics = subject.new(Mesh(np.array(jax.local_devices()[:number]), ("data",)))
        even = len(subject.whole) // number * number  # what is left over is on all devices, and counts once
        subject.seen(*(part for part in (subject.whole[:even], subject.whole[even:]) if len(part)), by=metrics)
        yield _Claim(expected, (f"on {number} devices", _numbers(metrics.compute())))
        if number == 2:  # the merge of more rows in a trace was tried without devices, and costs less there
            computed = _numbers(_computed_in_trace(metrics))
            yield _Claim(expected, (f"on {number} devices, computed in a trace", computed))


def _populations(subject: _Subject) -> Iterator[_Claim]:
    members, names = 3, ("x", "y")
    windows = subject.windows(members * len(names))
    of_name = dict(zip(names, (windows[:members], windows[members:]), strict=True))
    values = {name: _stacked(of_one) for name, of_one in of_name.items()}
    make = jax.vmap(lambda _: DistributedMetrics(dict.fromkeys(names, subject.accumulator)))
    population = _updated_population(make(jnp.arange(members)), values)
    host, traced = population.compute(), jax.device_get(_results_in_trace(population))
    for name, of_one in of_name.items():
        apart = np.stack([subject.snapshot(window)["x"] for window in of_one])
        expected = (f"of {members} objects apart", {"result": apart})
        yield _Claim(expected, ("of a population under vmap, with two metrics", {"result": host[name]}))
        yield _Claim(expected, ("the same, in a trace", {"result": traced[name]}), traced=True)


def _stacked(windows: Sequence[_Elements], dtype: Any = None) -> Any:
    """The values along a new leading dim, on the device."""
    return jax.tree.map(lambda *parts: jnp.asarray(np.stack(parts), dtype), *(window.value for window in windows))


_TWO_MERGES = "combine_numbers (or follow_numbers) of a Merge computes something else than its combine (or follow)."


@dataclass(frozen=True)
class _Law:
    """A law.

    Attributes:
        name: shown where it is broken.
        claims: what follows from it.
        cause: why an accumulator may break it, and what to do.
    """

    name: str
    claims: Callable[[_Subject], Iterator[_Claim]]
    cause: str


_LAWS = (
    _Law(
        "empty",
        _empty,
        "result() gives another shape than result_shape(), which is S unless it is overridden; or it divides by a "
        'weight of 0 while empty is None, and float("nan") would stand in for it.',
    ),
    _Law(
        "reset",
        _reset,
        "contribution() or result() keeps something on the Python object, where no reset finds it. Keep it in a field.",
    ),
    _Law(
        "state",
        _types_and_traces,
        "result() calls numpy instead of the xp that it is given; contribution() reads batch.value, which is a pair of "
        "floats and an array of integers (batch.elements is float32); or a combine changes dtypes.",
    ),
    _Law(
        "neutral element",
        _neutral,
        "the identity of a Number is not that of its merge: 0 of a sum, 1 of a product, inf of a minimum.",
    ),
    _Law(
        "weight 0",
        _weight_zero,
        "contribution() computes with batch.elements or batch.value, whatever their weights. The reductions of a Batch "
        "leave out what has weight 0; for your own there is batch.counted().",
    ),
    _Law(
        "order",
        _order,
        "contribution() or a merge looks at what comes first. Where that is meant, as of a latest value, the Merge "
        "needs a follow, and a combine that can tell.",
    ),
    _Law(
        "split equals whole",
        _split,
        "a field is no sum over the elements, but a mean of means or a square of a sum: keep sums, and divide in "
        "result().",
    ),
    _Law(
        "populations",
        _populations,
        "result() reduces over all dims. Fields have the shape (..., *field_shape): reduce over their last dims, "
        "total.sum(-1).",
    ),
)
