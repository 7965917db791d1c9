"""Random histories of an object, in ways of running that change from step to step, against NumPy over all that it saw.

hypothesis draws the steps: updates, reads, resets, merges, saving and going on with other devices. Every batch has the
same shapes, and every program is built once, so that a step takes milliseconds and thousands of them run.
"""

import collections
import functools
import json
import math
import random
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, multiple, precondition, rule
from hypothesis.stateful import run_state_machine_as_test as run_histories
from jax.sharding import PartitionSpec as P

from distributed_metrics import DistributedMetrics, Histogram, Mean, Quantile, Snapshot
from ways import WAYS, Program

EDGES = (-2.0, 0.0, 1.0, 4.0)
QUANTILE = Quantile((0.1, 0.5, 1.0), 0.3)
SPEC = {
    "x": ("mean", "var", "max", "last"),
    "n": ("sum", "count", "min"),
    "r": "ratio",
    "h": (Histogram(EDGES), QUANTILE),
    "s": "std",
    "column": Mean(shape=(3,)),
}
SIZE = 16
LONGEST = 500  # updates in one history, where merging a snapshot into what it came from doubles it

# --- values: batches, and the updates that name some of them ---


@functools.cache
def batch(seed: int) -> dict[str, np.ndarray]:
    """Values of all names, and weights of a few bits, so that weighted sums of integers are exact in any order."""
    rng = np.random.default_rng(seed)
    mask = rng.random(SIZE) < (0.0, 0.3, 0.7, 1.0)[seed % 4]
    weight = rng.choice([0, 0.25, 0.5, 1, 3], SIZE).astype(np.float32)
    gate = (0, 1, 2)[seed // 4 % 3]
    values = {
        "x": rng.normal((0, 1, 1000)[seed % 3], 1, SIZE),
        "s": rng.lognormal(size=SIZE),
        "h": rng.choice([*rng.normal(0, 2, SIZE), *EDGES], SIZE),
        "r": rng.normal(size=SIZE),
        "column": rng.normal(size=(SIZE, 3)),
    }
    junk = [np.nan, np.inf, -np.inf][seed % 3]
    values["x"][~mask & (weight == 0)] = junk  # behind both kinds of weights
    values["h"][~mask] = junk
    values["s"][weight == 0] = junk
    if gate == 0:
        values["r"][:] = junk
    if seed in (5, 10):  # not behind a weight: it reaches this column only
        values["column"][3, 1] = junk
    return {
        **{name: value.astype(np.float32) for name, value in values.items()},
        "n": rng.integers(-(2**28), 2**28, (SIZE, 2), dtype=np.int32),
        "tokens": rng.integers(1, 100, SIZE, dtype=np.int32),
        "mask": mask,
        "weight": weight,
        "gate": np.full(SIZE, gate, np.float32),
    }


UPDATES: dict[str, Callable[[Any], tuple[dict[str, Any], Any]]] = {  # values and weights of a batch
    "masked": lambda v: ({name: v[name] for name in "xnh"}, {"x": v["mask"], "n": v["mask"][:, None], "h": v["mask"]}),
    "weighted": lambda v: ({name: v[name] for name in ("x", "s", "column")}, v["weight"]),
    "gated": lambda v: (
        {"n": v["n"], "r": (v["r"], v["tokens"]), "h": v["h"]},
        {"n": v["gate"].max(), "r": v["gate"].max(), "h": v["gate"] * v["mask"]},
    ),
    "numbers": lambda v: ({"x": 0.1, "n": 2**33 + 1, "r": (0.3, 2)}, {}),
}
BAD: dict[str, Callable[[Any], tuple[dict[str, Any], Any]]] = {
    "unknown name": lambda v: ({"x": v["x"], "y": v["x"]}, None),
    "shape": lambda v: ({"x": v["x"], "column": v["n"]}, None),
    "weight": lambda v: ({"n": v["n"], "x": v["x"]}, {"x": v["n"]}),
    "text": lambda v: ({"x": v["x"], "s": "text"}, None),
    "no pair": lambda v: ({"h": v["h"], "r": v["r"]}, None),
}

# --- the model: all that was seen, in float64 ---

Seen = tuple[dict[str, list[np.ndarray]], ...]
"""For each update, in order: by name, the elements of nonzero weight (of a ratio two arrays), and their weights."""


@functools.cache
def told(update: str, seed: int) -> dict[str, list[np.ndarray]]:
    values, weights = UPDATES[update](batch(seed))
    seen = {}
    for name, value in values.items():
        parts = [np.asarray(part, np.float64) for part in (value if name == "r" else [value])]
        weight = np.asarray(weights.get(name, 1) if isinstance(weights, dict) else weights, np.float64)
        arrays = np.broadcast_arrays(*parts, weight.reshape(weight.shape + (1,) * (parts[0].ndim - weight.ndim)))
        for i in range(3) if name == "column" else (None,):
            of_one = arrays if i is None else [array[:, i] for array in arrays]
            seen[name if i is None else f"column/{i}"] = [array[of_one[-1] != 0] for array in of_one]
    return seen


def elements(seen: Seen, name: str) -> list[np.ndarray]:
    """All elements of a name, and their weights, in order."""
    batches = [[np.empty(0)] * (3 if name == "r" else 2), *(update[name] for update in seen if name in update)]
    return [np.concatenate(part) for part in zip(*batches, strict=True)]


def numpy_results(seen: Seen) -> dict[str, tuple[float, float]]:
    """The flat results, computed at once from all elements, and how far off each may be."""
    (x, x_weight), (n, n_weight), (h, h_weight), s = (elements(seen, name) for name in "xnhs")
    deviation, off = (math.sqrt(number) for number in variance(*s))
    wanted: dict[str, tuple[float, float]] = {
        "x/mean": ratio(x, 1, x_weight),
        "x/var": variance(x, x_weight),
        "x/max": (float(np.float32(x.max())) if x.size else math.nan, 0),
        "x/last": (x[-1], 2**-46 * abs(x[-1])) if x.size else (math.nan, 0),
        "n/sum": ((n * n_weight).sum(), 0),
        "n/count": (n_weight.sum(), 0),
        "n/min": (float(np.float32(n.min())) if n.size else math.nan, 0),
        "r": ratio(*elements(seen, "r")),
        "h/histogram/underflow": (h_weight[h < EDGES[0]].sum(), 0),
        "h/histogram/overflow": (h_weight[h > EDGES[-1]].sum(), 0),
        "h/histogram/nan": (0, 0),
        "s": (deviation, off**2 / deviation if deviation else off),
        **{f"column/{i}": ratio(x, 1, weight) for i in range(3) for x, weight in [elements(seen, f"column/{i}")]},
    }
    for i, count in enumerate(np.histogram(h, EDGES, weights=h_weight)[0]):
        wanted[f"h/histogram/{i}"] = (count, 0)
    for i, q in enumerate(QUANTILE.q):
        number = np.quantile(np.repeat(h, h_weight.astype(int)), q, method="lower") if h.size else math.nan
        wanted[f"h/quantile/{i}"] = (number, QUANTILE.relative_error * abs(number))
    return wanted


def ratio(a: np.ndarray, b: Any, weight: np.ndarray) -> tuple[float, float]:
    """The ratio of two weighted sums, and how far off it may be; with b = 1 the mean."""
    total = (weight * b).sum()
    size = np.where(np.isfinite(a), abs(a), 0)
    return ((weight * a).sum() / total, 2**-44 * (weight * size).sum() / total) if total else (math.nan, 0)


def variance(x: np.ndarray, weight: np.ndarray) -> tuple[float, float]:
    """The variance, and how far off it may be: where all elements are one, only their own last bits are left."""
    result = ratio((x - ratio(x, 1, weight)[0]) ** 2, 1, weight)[0]
    return result, 1e-8 * result + 2**-44 * (x**2).max(initial=0)


def assert_right(snapshot: Snapshot, seen: Seen) -> None:
    with np.errstate(invalid="ignore"):  # inf - inf
        wanted = numpy_results(seen)
    flat = snapshot.flatten(empty="nan")
    assert flat.keys() == wanted.keys()
    wrong = {
        name: (flat[name], number)
        for name, (number, tolerance) in wanted.items()
        if not (flat[name] == number or abs(flat[name] - number) <= tolerance)
        and not (math.isnan(flat[name]) and math.isnan(number))
    }
    assert not wrong
    for name in ("x/mean", "n/sum", "h/histogram", "h/quantile", "s"):
        assert snapshot.count[name] == elements(seen, name[0])[-1].sum(), name


# --- ways of running ---

READS = ("compute", "flush", "reset", "merge")
OFFERED: dict[str, tuple[str, ...]] = {
    "eager-1-device": ("masked", "numbers", *READS),
    "nnx.jit-1-device": ("masked", "reset", "merge"),
    "eager-3-devices": ("masked", "numbers", *READS),
    "eager-8-devices": ("masked", "weighted", "numbers", *READS),
    "nnx.jit-auto": ("gated", "weighted", "flush", "reset", "merge"),
    "nnx.scan": ("weighted", "reset"),
    "jax.jit-donated": ("gated", "compute", "reset"),
    "nnx.shard_map": ("masked", "numbers", "flush", "reset", "merge"),
    "jax.pmap": ("weighted", "reset"),
    "eager-pmap": ("numbers", *READS),
    "eager-explicit": ("weighted", *READS),
    "nnx.jit-explicit": ("masked", "flush", "reset"),
    "eager-2d": ("numbers", "gated", *READS),
    "nnx.jit-2d": ("masked", "reset"),
    "jax.shard_map-2d": ("weighted", "reset"),
}
"""What is asked of each way: everything somewhere, but not everywhere, for most of the time goes into compiling."""

FEW = ("eager-1-device", "eager-3-devices", "eager-8-devices", "nnx.jit-auto")

WAY = {way.name: way for way in WAYS}
WAY["eager-3-devices"] = replace(WAY["eager-8-devices"], name="eager-3-devices", axes={"data": 3})
# pmap lays rows by a mesh of its own, for which other programs compile anew: an object for it and a few of them.
WAY["jax.pmap"] = replace(WAY["jax.pmap"], axes={"batch": 8})
WAY["eager-pmap"] = replace(WAY["eager-8-devices"], name="eager-pmap", axes={"batch": 8})
WAY["nnx.jit-2d"] = replace(WAY["nnx.jit-auto"], name="nnx.jit-2d", axes=WAY["eager-2d"].axes)


def layout(way: str) -> tuple[Any, bool]:
    """Ways of one layout take one object in turn."""
    return WAY[way].axes, WAY[way].explicit


@functools.cache
def program(name: str, body: str) -> Program:
    way = WAY[name]
    if body == "merge":
        if not way.mapped:
            return way.step(way, lambda metrics, snapshot: metrics.merge(snapshot))
        mesh: Any = way.mesh
        specs = (way.spec, P())  # the snapshot is the same everywhere
        merge = nnx.jit(nnx.shard_map(lambda m, s: m.merge(s), mesh=mesh, in_specs=specs, out_specs=P()))
        return Program(lambda metrics, snapshot: (metrics, merge(metrics, snapshot)))
    if body not in UPDATES:
        return way.step(way, lambda metrics, _: getattr(metrics, body)())
    spec = way.spec if name == "nnx.jit-2d" else None  # types do not show it on several Auto axes

    def update(metrics: DistributedMetrics, given: Any) -> None:
        values, weight = UPDATES[body](given)
        metrics.update(values, weight=weight, spec=spec)

    return way.step(way, update)


@functools.cache
def placed(way: str, seed: int) -> Any:
    return batch(seed) if way == "eager-3-devices" else WAY[way].place(batch(seed))


def restored(snapshot: Snapshot, through_json: bool = False) -> Snapshot:
    saved: Any = snapshot.to_dict()
    return Snapshot.from_dict(json.loads(json.dumps(jax.tree.map(np.ndarray.tolist, saved))) if through_json else saved)


# --- histories ---


def varied(options: Callable[["History"], Iterable[Any]]) -> st.SearchStrategy[Any]:
    """One of the options at this step. hypothesis likes to repeat a number; with the step it gives another option."""

    def draw(history: "History") -> st.SearchStrategy[Any]:
        here = list(options(history))
        return st.integers(0, 999).map(lambda number: random.Random(f"{number} at {history.steps}").choice(here))

    return st.runner().flatmap(draw)


def calls(*bodies: str) -> st.SearchStrategy[tuple[str, str]]:
    """A way that takes the object as it lies, and what is done in it."""
    return varied(lambda history: history.possible(bodies))


seeds = varied(lambda _: range(24))


class History(RuleBasedStateMachine):
    """One object at a time, the snapshots taken so far, and what the object and each of the snapshots have seen.

    Args:
        ways: that take part.
        driven: counts the steps, and what they reached: rules, ways, bodies.
    """

    snapshots: Bundle[tuple[Snapshot, Seen]] = Bundle("snapshots")
    metrics: DistributedMetrics
    seen: Seen
    layout: tuple[Any, bool]

    def __init__(self, ways: tuple[str, ...], driven: collections.Counter[str]) -> None:
        super().__init__()
        self.ways, self.driven = ways, driven
        self.steps = 0

    def possible(self, bodies: tuple[str, ...]) -> list[tuple[str, str]]:
        here = [way for way in self.ways if layout(way) == self.layout]
        return [(way, body) for way in here for body in bodies if body in OFFERED[way]]

    def count(self, *reached: str) -> None:
        self.steps += 1
        self.driven.update(["steps", *reached])

    def call(self, call: tuple[str, str], values: Any) -> Any:
        self.count(*call)
        self.metrics, output = program(*call)(self.metrics, values)
        return output

    def check(self, snapshot: Snapshot, seen: Seen) -> None:
        self.driven["several updates checked"] += len(seen) > 1
        assert_right(snapshot, seen)

    @initialize(way=varied(lambda history: history.ways))
    def start(self, way: str) -> None:
        self.metrics, self.layout, self.seen = WAY[way].make(SPEC), layout(way), ()

    @rule(call=calls(*UPDATES), seed=seeds)
    def update(self, call: tuple[str, str], seed: int) -> None:
        way, update = call
        self.call(call, placed(way, seed))
        times = 8 if update == "numbers" and WAY[way].mapped else 1  # a constant counts once on each device
        self.seen += (told(update, seed),) * times

    @precondition(lambda self: self.seen)
    @rule(target=snapshots, call=calls("compute"), now=st.booleans())
    def compute(self, call: tuple[str, str], now: bool) -> tuple[Snapshot, Seen]:
        taken = self.call(call, placed(call[0], 0)), self.seen
        if now:  # or after the object has gone on
            self.check(*taken)
        return taken

    @precondition(lambda self: self.seen)
    @rule(target=snapshots, call=calls("flush"))
    def flush(self, call: tuple[str, str]) -> tuple[Snapshot, Seen]:
        seen, self.seen = self.seen, ()
        return self.call(call, placed(call[0], 0)), seen

    @precondition(lambda self: self.seen)
    @rule(call=calls("reset"))
    def reset(self, call: tuple[str, str]) -> None:
        self.call(call, placed(call[0], 0))
        self.seen = ()

    @rule(taken=snapshots)
    def read_later(self, taken: tuple[Snapshot, Seen]) -> None:
        self.count("read later")
        self.check(*taken)

    @rule(call=calls("merge"), taken=snapshots)
    def merge(self, call: tuple[str, str], taken: tuple[Snapshot, Seen]) -> None:
        snapshot, seen = taken
        if len(self.seen) + len(seen) <= LONGEST:
            self.call(call, snapshot if "eager" in call[0] else restored(snapshot))  # of one shape: no new program
            self.seen += seen

    @rule(target=snapshots, earlier=snapshots, later=snapshots)
    def add(self, earlier: tuple[Snapshot, Seen], later: tuple[Snapshot, Seen]) -> Any:
        total, seen = earlier[0] + later[0], earlier[1] + later[1]
        self.count("add")
        self.check(total, seen)
        return (total, seen) if len(seen) <= LONGEST else multiple()

    @rule(target=snapshots, taken=snapshots, through_json=st.booleans())
    def save(self, taken: tuple[Snapshot, Seen], through_json: bool) -> tuple[Snapshot, Seen]:
        self.count("save", "JSON" if through_json else "arrays")
        back = restored(taken[0], through_json)
        self.check(back, taken[1])
        return back, taken[1]

    @rule(taken=snapshots, way=varied(lambda history: history.ways))
    def go_on_elsewhere(self, taken: tuple[Snapshot, Seen], way: str) -> None:
        self.count("go on elsewhere")
        self.start(way)
        self.metrics.merge(taken[0])
        self.seen = taken[1]

    @precondition(lambda self: self.steps % 2)  # now and then: tracing takes its time
    @rule(wrong=varied(lambda _: BAD), seed=seeds, traced=st.booleans())
    def refused(self, wrong: str, seed: int, traced: bool) -> None:
        self.count("refused", wrong)
        before = words_of(self.metrics)
        values, weight = BAD[wrong](batch(seed))

        def update(metrics: DistributedMetrics) -> None:
            metrics.update(values, weight=weight)

        with pytest.raises((ValueError, TypeError), match=r"metrics\.update"):
            (nnx.jit(update) if traced else update)(self.metrics)
        assert words_of(self.metrics) == before

    def teardown(self) -> None:
        self.check(self.metrics.compute(), self.seen)


def words_of(metrics: DistributedMetrics) -> list[bytes]:
    return [np.asarray(table).tobytes() for table in jax.tree.leaves(nnx.state(metrics))]


RULES = (*UPDATES, *READS, "add", "save", "JSON", "arrays", "read later", "go on elsewhere", "refused")


@pytest.mark.parametrize(
    ("ways", "histories", "steps", "refused"),
    [(FEW, 40, 500, ()), pytest.param(tuple(OFFERED), 150, 2500, tuple(BAD), marks=pytest.mark.slow)],
    ids=["few ways", "all ways"],
)
def test_any_history_gives_what_numpy_gives_of_all_that_was_seen(ways, histories, steps, refused):
    driven: collections.Counter[str] = collections.Counter()
    machine: Any = functools.partial(History, ways, driven)
    some = settings(max_examples=histories, stateful_step_count=25, suppress_health_check=list(HealthCheck))
    run_histories(machine, settings=some)
    assert driven["steps"] >= steps
    assert driven["several updates checked"] >= steps / 10
    assert [what for what in (*RULES, *ways, *refused) if not driven[what]] == []
