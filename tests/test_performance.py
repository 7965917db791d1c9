"""What speed rests on, without a clock: programs, variables, instructions, copies."""

import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import distributed_metrics.metrics
import distributed_metrics.snapshot
from distributed_metrics import DistributedMetrics, Histogram, eager, hlo
from distributed_metrics.audit import compiled_text
from ways import make_mesh

MESH = make_mesh({"data": 8}, explicit=False)


def put(array, spec=None):
    return jax.device_put(jnp.asarray(array, jnp.float32), NamedSharding(MESH, P("data") if spec is None else spec))


def names(k):
    return [f"m{i}" for i in range(k)]


def programs():
    """How many update programs have been made so far: of the quick way and of the careful one."""
    return eager.program.cache_info().misses, distributed_metrics.programs.update.cache_info().misses


def held(metrics):
    return nnx.state(metrics, nnx.metrics.MetricState)


# --- the quick way of an eager update, and the careful one ---

QUICK = {
    "arrays": lambda x, whole: {"a": x, "b": {"c": 2 * x}},
    "numbers": lambda x, whole: {"a": 0.1, "b": {"c": 7}},
    "both, NumPy scalars, booleans": lambda x, whole: {"a": x, "b": {"c": np.float64(0.3)}, "d": True},
    "in another order": lambda x, whole: {"d": np.int64(3), "a": 2**53},
    "replicated": lambda x, whole: {"a": whole(np.arange(5)), "b": {"c": whole(3.0)}},
    "a ratio of arrays": lambda x, whole: {"ratio": (x, 2 * x)},
    "a ratio of numbers": lambda x, whole: {"ratio": (0.1, 8)},
    "a ratio as a list": lambda x, whole: {"ratio": [whole(3.0), 8.0]},
    "flax Variables": lambda x, whole: {"a": nnx.Variable(x), "b": {"c": nnx.Variable(whole(3.0))}},
    "not finite": lambda x, whole: {"a": float("nan"), "d": float("inf"), "b": {"c": 1e300}},
}
WEIGHTS = {"none": None, "a mask": put(np.arange(16) % 3) > 0, "by name": {"a": 0.25}}
SPEC = {"a": ("mean", "max", "last"), "b": {"c": "sum"}, "d": "min", "ratio": "ratio"}


@pytest.mark.parametrize(
    ("case", "nan_policy", "explicit"),
    [
        *((case, "propagate", False) for case in QUICK),
        *((case, "propagate", True) for case in ("arrays", "numbers", "replicated")),
        *((case, "ignore", False) for case in ("arrays", "not finite")),
    ],
)
def test_the_quick_way_gives_the_bits_of_the_careful_one(case, nan_policy, explicit, monkeypatch):
    mesh = make_mesh({"data": 4, "model": 2}, explicit=explicit)
    x = jax.device_put(jnp.arange(16.0) / 7, NamedSharding(mesh, P("data")))
    values = QUICK[case](x, lambda one: jax.device_put(jnp.asarray(one, jnp.float32), NamedSharding(mesh, P())))
    quick, careful = (DistributedMetrics(SPEC, mesh=mesh, nan_policy=nan_policy) for _ in range(2))
    for _ in range(3):
        before = programs()
        quick.update(values)
        assert programs()[1] == before[1], "it went the careful way"
    monkeypatch.setattr(eager, "quick_update", lambda *_: None)
    for _ in range(3):
        careful.update(values)
    for one, other in zip(jax.tree.leaves(held(quick)), jax.tree.leaves(held(careful)), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("given", WEIGHTS)
def test_weights_go_the_quick_way(given, monkeypatch):
    quick, careful = (DistributedMetrics({"a": ("mean", "count")}, mesh=MESH) for _ in range(2))
    before = programs()
    quick.update(a=put(np.arange(16)), weight=WEIGHTS[given])
    assert programs()[1] == before[1]
    monkeypatch.setattr(eager, "quick_update", lambda *_: None)
    careful.update(a=put(np.arange(16)), weight=WEIGHTS[given])
    assert quick.compute().flatten() == careful.compute().flatten()


def test_one_array_given_twice_is_not_taken_for_one_value_later():
    metrics = DistributedMetrics({"a": "sum", "b": "sum"}, mesh=MESH)
    x, y, weight = put(np.ones(8)), put(np.full(8, 2.0)), put(np.zeros(8))
    metrics.update(a=x, b=x, weight={"a": y, "b": y})
    metrics.update(a=x, b=y, weight={"a": y, "b": weight})
    assert metrics.flush().flatten() == {"a": 32.0, "b": 16.0}


@pytest.mark.parametrize(
    "number",
    [2**53 + 1, np.int64(-(2**53) - 1), np.arange(8.0), np.ones(8, np.float32)],
    ids=["int", "int64", "float64 array", "float32 array"],
)
def test_what_has_to_be_split_or_spread_on_the_host_goes_the_careful_way(number):
    metrics = DistributedMetrics({"a": "sum"}, mesh=MESH)
    before = programs()
    metrics.update(a=number)
    assert programs()[0] == before[0]
    assert metrics.flush()["a"] == np.asarray(number).sum(dtype=np.float64 if np.ndim(number) else None)


def test_a_mistake_is_traced_once_and_told_of_the_values_themselves(monkeypatch):
    metrics, tried = DistributedMetrics({"a": "sum"}, mesh=MESH), []
    feeds_of = eager.feeds_of
    monkeypatch.setattr(eager, "feeds_of", lambda *args: (tried.append(args), feeds_of(*args))[1])
    for _ in range(2):
        with pytest.raises(ValueError, match=r"the weight of 'a' has shape \(3,\)"):
            metrics.update(a=put(np.ones(16)), weight=put(np.ones(3), P()))
    assert len(tried) == 1
    metrics.update(a=put(np.ones(16)), weight=put(np.ones(16), P()))
    assert metrics.flush()["a"] == 16


def test_names_that_cannot_be_sorted_are_an_error_of_ours():
    metrics = DistributedMetrics({"a": "sum"}, mesh=MESH)
    with pytest.raises(ValueError, match="got '1', which this object does not accumulate"):
        metrics.update({"a": 1.0, 1: 2.0})


def test_values_that_lie_otherwise_than_before_are_still_counted_once():
    metrics = DistributedMetrics({"a": "sum"}, mesh=MESH)
    for spec in (P("data"), P(), P("data")):
        metrics.update(a=put(np.ones(16), spec))
    metrics.update(a=jnp.ones(16))  # on the first device
    with jax.set_mesh(MESH):
        metrics.update(a=put(np.ones(16)))
    metrics.update(a=put(np.ones((16, 2))))  # another shape
    assert metrics.flush()["a"] == 5 * 16 + 32


# --- how much of everything ---


@pytest.mark.parametrize("k", [1, 20, 200])
def test_means_of_any_number_are_one_variable_and_one_program(k):
    metrics, x = DistributedMetrics(dict.fromkeys(names(k), "mean"), mesh=MESH), put(np.ones(8))
    assert len(jax.tree.leaves(held(metrics))) == 1
    before = programs()
    for step in range(10):
        metrics.update(dict.fromkeys(names(k), x))
        if step % 4 == 3:
            metrics.flush()
        if step == 8:
            metrics.reset()
    assert (programs()[0] - before[0], programs()[1] - before[1]) == (1, 0)


def test_a_jitted_loop_traces_its_step_once():
    metrics, traced = DistributedMetrics({"a": ("mean", "var", "last"), "h": Histogram((0.0, 1.0))}, mesh=MESH), []

    @nnx.jit
    def step(metrics, x):
        traced.append(x)
        metrics.update(a=x, h=x)

    for i in range(10):
        step(metrics, put(np.full(8, i)))
        if i % 3 == 2:
            metrics.flush().flatten()
        if i == 5:
            metrics.merge(metrics.compute())
        if i == 7:
            metrics.reset()
    assert len(traced) == 1


def instructions(kind, k, batch=4096, weight=None):
    """What the compiled update of k metrics executes, each element of its entry that is no input or output."""
    metrics = DistributedMetrics(dict.fromkeys(names(k), kind), mesh=MESH)
    step = jax.jit(lambda m, v, w: (m.update(v, weight=w), m)[1])
    text = compiled_text(step, metrics, dict.fromkeys(names(k), put(np.ones(batch))), weight)
    found = re.findall(r" = .*? ([a-z-]+)\(", text[text.rindex("ENTRY") :])
    return len([one for one in found if one not in ("parameter", "constant", "tuple", "get-tuple-element", "bitcast")])


@pytest.mark.parametrize(
    ("kind", "most"), [("mean", 6), (("mean", "max"), 8), ("var", 14)], ids=["mean", "mean and max", "var"]
)
def test_an_update_executes_the_same_few_instructions_for_any_number_of_metrics(kind, most):
    assert instructions(kind, 20) == instructions(kind, 60) <= most


def test_one_weight_for_all_metrics_is_one_array_of_the_update():
    weight = put(np.ones(4096))
    assert instructions("mean", 20, weight=weight) == instructions("mean", 60, weight=weight)


@pytest.mark.parametrize("kind", ["mean", "std", "last"])
def test_updates_one_after_another_in_a_program_are_not_worked_out_again_in_each_other(kind):
    """Of microbatches in a Python loop, say: in one fusion XLA would repeat the first in each of the others."""
    metrics = DistributedMetrics({"x": kind}, mesh=MESH)

    def largest_computation(updates):
        def step(metrics, x):
            for k in range(updates):
                metrics.update(x=x + k)

        computations = hlo.parsed(compiled_text(step, metrics, put(np.zeros(64, np.float32)))).computations
        return max(len(instructions) for name, instructions in computations.items() if "fused" in name)

    assert largest_computation(6) < 2 * largest_computation(2)


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="XLA passes over the barrier: docs/performance.md")
def test_snapshots_that_are_added_in_a_program_are_not_worked_out_again_in_each_other():
    metrics = DistributedMetrics({"x": "std"})
    metrics.update(x=jnp.ones(3))
    windows = [jax.jit(lambda metrics: metrics.compute())(metrics)] * 6

    def largest_computation(windows):
        computations = hlo.parsed(compiled_text(jax.jit(sum), windows)).computations
        return max(len(instructions) for name, instructions in computations.items() if "fused" in name)

    assert largest_computation(windows) < 2 * largest_computation(windows[:2])


def test_a_flush_is_one_program_and_one_copy(monkeypatch):
    metrics, copies = DistributedMetrics(SPEC, mesh=MESH), []
    metrics.update(a=put(np.ones(8)), d=1.0)
    metrics.flush().flatten()
    fetch = distributed_metrics.snapshot.on_host
    monkeypatch.setattr(distributed_metrics.snapshot, "on_host", lambda x: (copies.append(x), fetch(x))[1])
    before = distributed_metrics.programs.read.cache_info()
    for _ in range(5):
        metrics.update(a=put(np.ones(8)), d=1.0)
        snapshot = metrics.flush()
        snapshot.flatten(), snapshot["a"], snapshot.count["a"]
    after = distributed_metrics.programs.read.cache_info()
    assert (after.misses - before.misses, after.hits - before.hits) == (0, 5)
    assert len(copies) == 5


# --- across processes ---

STEP = pathlib.Path(__file__).parent / "programs" / "compiled_step.py"


def test_a_step_compiles_to_the_same_program_in_every_process_and_is_found_in_the_cache(tmp_path):
    texts, hits = [], []
    for seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, STEP, tmp_path],
            env=os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True, text=True, timeout=120, check=True,
        )  # fmt: skip
        texts.append(done.stdout)
        hits.append(tuple(map(int, re.search(r"hits: (\d+), misses: (\d+)", done.stderr).groups())))
    assert texts[0] == texts[1]
    (_, missed), (found, missed_again) = hits
    assert missed_again == 0
    assert found >= missed > 0
    assert any(pathlib.Path(tmp_path).iterdir())
