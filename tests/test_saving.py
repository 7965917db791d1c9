"""What was seen can be saved and carried on with: sums of snapshots, snapshots as dicts, and merge."""

import contextlib
import dataclasses
import functools
import itertools
import json
import os
import pathlib
import pickle
import subprocess
import sys
import warnings
from typing import Any

import clu.metrics
import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, serialization, struct
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import saved_format
from distributed_metrics import (
    Accumulator,
    DistributedMetrics,
    Histogram,
    Last,
    Max,
    Mean,
    Quantile,
    Snapshot,
    Std,
    Var,
    accumulators,
    count_collectives,
    portable,
)
from ways import SOME_WAYS, make_mesh

LABELS = ("cat", "a.b/c", "ü")
SPEC = {
    "loss": "mean",
    "a/b": "sum",
    "ü": "count",
    "x.y": ("max", "min"),
    "0": "ratio",
    "train": {"reward": ("var", "std", Var(ddof=1, name="unbiased")), "1": {"lr": "last"}, "p%2F": "mean"},
    "ms": Histogram((-np.inf, 0.1, 0.7, 1.0, 2.0)),
    "q": Quantile((0.5, 0.99), 0.05, labels=("p50", "p99")),
    "accuracy": Mean(shape=(3,), labels=LABELS),
    "unseen": ("mean", "sum", "max", "last", "var"),
}
EXACT = {"a/b", "ü", "x.y/max", "x.y/min", "train/1/lr", "ms", "q", "unseen/sum"}
EXAMPLES = 120  # what 1, 2, 3, 5 and 8 devices divide
DEVICES = (1, 3, 8)  # one row, rows that are filled up to an even number, and as many as there are
SMALL = {"x": ("mean", "max", "last", "count")}  # where many programs are compiled: variances take the longest
SMALL_EXACT = ("x/max", "x/last", "x/count")


def mesh_of(devices: int, explicit: bool = False) -> Mesh:
    kind = AxisType.Explicit if explicit else AxisType.Auto
    return Mesh(np.array(jax.devices()[:devices]), ("data",), axis_types=(kind,))


def made(spec: Any = SPEC, devices: int = 8, **kwargs: Any) -> DistributedMetrics:
    return DistributedMetrics(spec, mesh=mesh_of(devices), **kwargs)


@functools.cache
def batch(step: int) -> dict[str, Any]:
    """A batch of every value: some integers, some floats, a scalar."""
    rng = np.random.default_rng(step)
    x = rng.lognormal(size=EXAMPLES).astype(np.float32)
    integers = rng.integers(0, 2**20, EXAMPLES).astype(np.int32)
    reward = {"reward": x + 100, "1": {"lr": 0.5**step}, "p%2F": x}
    classes = rng.lognormal(size=(EXAMPLES, 3)).astype(np.float32)
    return {
        "loss": x, "a/b": integers, "ü": x, "x.y": x, "0": (x, integers), "train": reward, "ms": x, "q": x,
        "accuracy": classes,
    }  # fmt: skip


def see(metrics: DistributedMetrics, *steps: int) -> DistributedMetrics:
    for step in steps:
        metrics.update(batch(step), weight={"ü": batch(step)["ü"] > 1})
    return metrics


def saw(*steps: int, devices: int = 8) -> Snapshot:
    return see(made(devices=devices), *steps).compute()


def restored(snapshot: Snapshot) -> Snapshot:
    return Snapshot.from_dict(snapshot.to_dict())


def assert_same(snapshot: Snapshot, whole: Snapshot, exact: Any = EXACT, rtol: float = 2**-45) -> None:
    """Exact where it can be, else to the digits that a sum has."""
    assert list(snapshot) == list(whole)
    one, other = (s.flatten(empty="nan") for s in (snapshot, whole))
    assert list(one) == list(other)
    for name, expected in other.items():
        if any(name == e or name.startswith(f"{e}/") for e in exact):
            np.testing.assert_equal(one[name], expected, name)
        else:
            np.testing.assert_allclose(one[name], expected, rtol, err_msg=name)
    np.testing.assert_equal(dict(snapshot.count), dict(whole.count))
    np.testing.assert_equal(dict(snapshot.outside), dict(whole.outside))


def identical(snapshot: Snapshot, other: Snapshot) -> None:
    """To the last bit, in every field."""
    one, two = snapshot.to_dict(), other.to_dict()
    assert one["spec"].tobytes() == two["spec"].tobytes()
    jax.tree.map(np.testing.assert_array_equal, one, two)


@pytest.fixture(scope="module")
def windows() -> list[Snapshot]:
    return [saw(step) for step in range(4)]


@pytest.fixture(scope="module")
def epoch() -> Snapshot:
    return saw(0, 1, 2, 3)


# --- adding ---


@pytest.mark.parametrize("left", ["live", "restored"])
@pytest.mark.parametrize("right", ["live", "restored"])
def test_a_sum_of_windows_is_one_object_that_saw_both(windows, left, right):
    a, b = (restored(s) if kind == "restored" else s for s, kind in zip(windows, (left, right), strict=False))
    assert_same(a + b, saw(0, 1))
    assert isinstance(a + b, Snapshot)


def test_a_sum_of_all_windows_is_the_epoch_however_it_is_bracketed(windows, epoch):
    a, b, c, d = windows
    for total in (sum(windows), (a + b) + (c + d), a + (b + (c + d)), sum(map(restored, windows))):
        assert_same(total, epoch)


def test_what_saw_nothing_changes_no_bit(windows):
    nothing, window = saw(), restored(windows[0])
    for total in (nothing + window, window + nothing, restored(nothing) + window, 0 + window):
        identical(total, window)


def test_adding_leaves_both_sides_as_they_were(windows):
    before = [window.to_dict() for window in windows[:2]]
    windows[0] + windows[1]
    jax.tree.map(np.testing.assert_array_equal, before, [window.to_dict() for window in windows[:2]])


def test_windows_add_up_in_a_trace(windows):
    """Of the whole spec restored ones, for compiling the merge of eight rows of so many takes its time."""
    kept = [restored(window) for window in windows[:2]]
    whole = saw(0, 1)
    assert_same(jax.jit(sum)(kept), whole)
    assert_same(jax.jit(lambda a: a + kept[1])(kept[0]), whole)  # one is a constant of the program
    results = jax.jit(lambda a, b: {name: (a + b)[name] for name in ("loss", "train", "ms")})(*kept)
    assert float(results["loss"]) == pytest.approx(whole["loss"], rel=2**-22)
    assert float(results["train"]["1"]["lr"]) == 0.5
    np.testing.assert_array_equal(results["ms"], whole["ms"])


@pytest.mark.parametrize("axes", [{"data": 8}, {"data": 4, "model": 2}], ids=["1d", "2d"])
def test_windows_add_up_in_a_trace_on_explicit_axes(axes):
    mesh = make_mesh(axes, explicit=True)
    parts = []
    for low in (0.0, 100.0):
        metrics = DistributedMetrics(SMALL, mesh=mesh)
        metrics.update(x=np.arange(16.0) + low)
        parts.append(metrics.flush())
    traced = jax.jit(lambda a, b: a + b)(*parts)
    assert_same(traced, parts[0] + parts[1], SMALL_EXACT)


def test_scanned_windows_add_up(epoch):
    """A running total in the carry of a scan keeps its type."""
    stacked = jax.tree.map(lambda *words: np.stack(words), *(restored(saw(step)) for step in range(4)))
    first, rest = (jax.tree.map(lambda x, part=part: x[part], stacked) for part in (0, slice(1, None)))
    total, _ = jax.jit(lambda a, b: jax.lax.scan(lambda total, window: (total + window, None), a, b))(first, rest)
    assert_same(total, epoch)


@pytest.mark.parametrize("traced", [False, True], ids=["eager", "traced"])
def test_the_later_value_is_the_right_one(traced):
    def of(*values):
        metrics = made({"x": Last()})
        for value in values:
            metrics.update(x=0.0 if value is None else value, weight=value is not None)
        return restored(metrics.compute())

    add = jax.jit(lambda a, b: a + b) if traced else lambda a, b: a + b
    assert add(of(1.0), of(2.0))["x"] == 2.0
    assert add(of(2.0), of(1.0))["x"] == 1.0
    assert add(of(1.0, 5.0, 3.0), of(2.0))["x"] == 2.0, "fewer updates are no reason to be earlier"
    assert add(of(1.0), of(None))["x"] == 1.0, "what counted nothing is not the latest"
    assert add(of(1.0), of())["x"] == 1.0
    assert add(of(None, 7.0, None), of(None, None))["x"] == 7.0
    assert add(add(of(None, 7.0), of(None)), of(8.0, None))["x"] == 8.0
    assert np.isnan(add(of(None), of(None))["x"])


def test_sums_beyond_the_range_are_infinite_and_not_a_warning():
    metrics = made({"x": ("sum", "mean", "max", "var")})
    metrics.update(x=np.full(8, 3e38))
    window = metrics.compute()
    for snapshot in (restored(window), window + window, restored(window) + restored(window)):
        assert snapshot["x"]["sum"] == np.inf
        assert snapshot["x"]["max"] == np.float32(3e38)


# --- as dicts ---


def lists(d: Any) -> Any:
    return jax.tree.map(np.ndarray.tolist, d)


def through_orbax(checkpointer: str, target: str | None, d: Any, path: pathlib.Path) -> Any:
    import orbax.checkpoint as orbax

    params = {"dense": {"kernel": jnp.ones((3, 4)), "bias": jnp.zeros(4)}, "metrics": jnp.arange(3)}
    state = {"params": params, "step": 7, "metrics": d}
    with warnings.catch_warnings(), getattr(orbax, checkpointer)() as writer:
        # Restoring without a target reads the shardings from the checkpoint, and says so.
        warnings.filterwarnings("ignore", message="Sharding info not provided when restoring", category=UserWarning)
        writer.save(path / "checkpoint", state)
        if target is None:
            back = writer.restore(path / "checkpoint")
        else:
            sharding = NamedSharding(mesh_of(5), P())
            like = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(np.shape(x), np.asarray(x).dtype, sharding=sharding), state
            )
            back = writer.restore(path / "checkpoint", like)
    assert back["step"] == 7
    np.testing.assert_array_equal(back["params"]["metrics"], [0, 1, 2])
    return back["metrics"]


def through_orbax_manager(d: Any, path: pathlib.Path) -> Any:
    import orbax.checkpoint as orbax

    with orbax.CheckpointManager(path) as manager:
        params = orbax.args.StandardSave({"kernel": jnp.ones((3, 4))})
        manager.save(3, args=orbax.args.Composite(params=params, seen=orbax.args.StandardSave(d)))
        manager.wait_until_finished()
        return manager.restore(3, args=orbax.args.Composite(seen=orbax.args.StandardRestore()))["seen"]


def through_npz(d: Any, path: pathlib.Path) -> Any:
    leaves, structure = jax.tree.flatten(d)
    np.savez(path / "seen.npz", *leaves)
    with np.load(path / "seen.npz") as file:  # refuses what is not numeric
        return jax.tree.unflatten(structure, [file[f"arr_{i}"] for i in range(len(leaves))])


def inside_a_train_state(d: Any, path: pathlib.Path) -> Any:
    @struct.dataclass
    class TrainState:
        params: Any
        metrics: Any

    state = TrainState({"w": jnp.ones(3)}, d)
    (path / "state").write_bytes(serialization.to_bytes(state))
    empty = jax.tree.map(np.zeros_like, state)
    return serialization.from_bytes(empty, (path / "state").read_bytes()).metrics


def test_a_train_state_with_the_object_in_it_is_saved_under_the_names_of_its_metrics():
    @struct.dataclass
    class TrainState:
        params: Any
        metrics: DistributedMetrics

    eight, two = (make_mesh({"data": n}, explicit=False) for n in (8, 2))
    metrics = DistributedMetrics({"a": ("mean", "max"), "b": "sum"}, mesh=eight)
    metrics.update(a=np.arange(16.0), b=3)
    saved = serialization.to_bytes(TrainState(jnp.ones(3), metrics))
    other = DistributedMetrics({"a": ("mean", "max"), "b": "sum"}, mesh=two)
    other.update(a=99.0)
    restored = serialization.from_bytes(TrainState(jnp.zeros(3), other), saved)
    restored.metrics.update(b=1)
    assert restored.metrics.flush().flatten() == {"a/mean": 7.5, "a/max": 15.0, "b": 4.0}
    assert other.flush()["a"]["max"] == 99.0, "the template is left alone"
    renamed = TrainState(jnp.zeros(3), DistributedMetrics({"a": ("mean", "max"), "c": "sum"}, mesh=two))
    with pytest.raises(ValueError, match="the snapshot is of another spec"):
        serialization.from_bytes(renamed, saved)


THROUGH = {
    "nothing": lambda d, path: d,
    "json": lambda d, path: json.loads(json.dumps(lists(d))),
    "msgpack": lambda d, path: serialization.msgpack_restore(serialization.msgpack_serialize(d)),
    "flax bytes": inside_a_train_state,
    "flax state dict": lambda d, path: serialization.from_state_dict(d, serialization.to_state_dict(d)),
    "orbax pytree": functools.partial(through_orbax, "PyTreeCheckpointer", None),
    "orbax standard": functools.partial(through_orbax, "StandardCheckpointer", None),
    "orbax onto a mesh": functools.partial(through_orbax, "StandardCheckpointer", "mesh"),
    "orbax manager": through_orbax_manager,
    "pickle": lambda d, path: pickle.loads(pickle.dumps(d)),
    "npz": through_npz,
    "jax arrays": lambda d, path: jax.tree.map(jnp.asarray, d),
    "float64": lambda d, path: jax.tree.map(lambda x: x.astype(np.float64) if x.dtype == np.float32 else x, d),
    "a frozen dict": lambda d, path: flax.core.freeze(d),
    "a sorted dict": lambda d, path: jax.tree.map(lambda x: x, d),
}


@pytest.mark.parametrize("kind", ["seen", "nan and inf"])
@pytest.mark.parametrize("way", THROUGH)
def test_a_snapshot_comes_back_the_same(way, kind, tmp_path, windows):
    if kind == "seen":
        snapshot = windows[0]
    else:
        metrics = made({"x": tuple(SMALL["x"]), "y": "sum", "z": "max"})
        metrics.update(x=np.nan, y=np.inf, z=-np.inf)
        snapshot = metrics.compute()
    back = Snapshot.from_dict(THROUGH[way](snapshot.to_dict(), tmp_path))
    identical(back, snapshot)
    assert list(back) == list(snapshot)
    assert len(back) == len(snapshot)
    assert list(back.flatten()) == list(snapshot.flatten())
    assert list(back.count) == list(snapshot.count)
    assert jax.tree.map(np.shape, dict(back)) == jax.tree.map(np.shape, dict(snapshot))
    # What rows merge to in float64 has a few more bits than two words, of which a variance shows the last one.
    assert_same(back, snapshot, (*EXACT, "x", "y", "z"), rtol=2**-47)
    assert_same(restored(back), back, tuple(back.count))
    if kind != "nan and inf":
        identical(back + snapshot, restored(snapshot) + snapshot)


def test_the_words_of_a_number_add_up_to_it(windows):
    total = windows[0].to_dict()["metrics"]["a/b"]["total"].astype(np.float64)
    assert total.sum() == windows[0]["a/b"] == int(batch(0)["a/b"].sum())
    assert abs(total[1]) <= np.spacing(np.float32(total[0])) / 2


def test_settings_of_every_accumulator_come_back():
    spec = {
        "a": Var(ddof=0.5, name="v"),
        "b": (Mean(), Mean(name="again"), Max(name="top")),
        "c": Histogram([0.1, 0.2, 0.3, np.inf], shape=2, labels=["low", "mid", "high"]),
        "d": Quantile(0.1, 0.2, shape=(2, 1)),
        "e": Quantile([0.25, 0.5], labels=["p25", "p50"], name="q"),
        "f": Mean(3),
        "g": Mean((2, 3), labels="xyz"),
        "h": Last((1,)),
    }
    metrics = DistributedMetrics(spec)
    metrics.update(
        a=np.arange(4.0), b=1.0, c=np.full((5, 2), 0.25), d=np.ones((3, 2, 1)), e=np.arange(9.0), f=np.arange(3.0),
        g=np.arange(6.0).reshape(1, 2, 3), h=np.ones((2, 1)),
    )  # fmt: skip
    snapshot = metrics.compute()
    back = restored(snapshot)
    assert back.flatten() == snapshot.flatten()
    assert back.flatten()["c/0/mid"] == 5.0
    identical(back + snapshot, snapshot + back)
    metrics.merge(back)
    identical(metrics.compute(), snapshot + snapshot)


def test_settings_may_be_numpy_scalars():
    """Each with a shape of its own: accumulators that compare equal may share what was made of the first one."""
    settings = {"a": np.int32(2), "b": np.int64(1), "c": np.float32(0.5), "d": np.float64(0.5)}
    metrics = DistributedMetrics({name: Var(i, ddof=ddof) for i, (name, ddof) in enumerate(settings.items(), start=1)})
    metrics.update({name: np.arange(4.0 * i).reshape(4, i) for i, name in enumerate(settings, start=1)})
    back = restored(metrics.compute())
    for i, (name, ddof) in enumerate(settings.items(), start=1):
        np.testing.assert_array_equal(back[name], metrics.compute()[name])
        np.testing.assert_allclose(back[name], 5.0 * i**2 / (4 - float(ddof)), rtol=1e-12)
    metrics.merge(back)
    assert all((count == 8).all() for count in metrics.compute().count.values())


def test_what_was_left_out_as_not_finite_comes_back_and_adds_up():
    metrics, other = made(SMALL, nan_policy="ignore"), made(SMALL, devices=3, nan_policy="ignore")
    metrics.update(x=np.array([1.0, np.nan, 3.0, np.inf, 4.0, 5.0, 6.0, -np.inf]))
    snapshot = metrics.compute()
    back = restored(snapshot)
    assert dict(back.nonfinite) == dict(snapshot.nonfinite)
    assert back.nonfinite["x"] == 3.0
    assert (back + snapshot).nonfinite["x/max"] == 6.0
    other.merge(back)
    other.update(x=np.array([np.nan, 9.0]))
    assert other.compute().nonfinite["x"] == 4.0
    assert other.compute()["x"]["max"] == other.compute()["x"]["last"] == 9.0
    with pytest.raises(ValueError, match=r'DistributedMetrics\({...}, nan_policy="ignore"\)'):
        restored(saw()).nonfinite["loss"]


def test_equal_specs_give_equal_bytes_wherever_they_were_seen():
    specs = {devices: saw(devices=devices).to_dict()["spec"].tobytes() for devices in DEVICES}
    assert len(set(specs.values())) == 1
    assert json.loads(specs[1])["nan_policy"] == "propagate"


def test_a_snapshot_in_a_trace_is_not_saved():
    def save(metrics):
        metrics.compute().to_dict()

    with pytest.raises(TypeError, match=r"Snapshot\.to_dict\(\) gives NumPy arrays, and in a trace there are none yet"):
        nnx.jit(save)(made(SMALL))


# --- carrying on ---


@pytest.mark.parametrize("devices", DEVICES)
def test_a_run_carries_on_with_any_number_of_devices(devices, windows, epoch):
    metrics = made(devices=devices)
    metrics.merge(restored(windows[0] + windows[1]))
    see(metrics, 2, 3)
    assert_same(metrics.compute(), epoch)
    metrics.update(loss=1.0)
    assert metrics.compute().count["loss"] == 4 * EXAMPLES + 1


def test_merging_into_what_has_seen_something_is_a_sum(windows):
    metrics = see(made(devices=3), 0)
    metrics.merge(windows[1])
    metrics.merge(restored(windows[2]))
    assert_same(metrics.compute(), sum(windows[:3]))


def test_merging_several_times_counts_several_times(windows):
    metrics, window = made(devices=5), restored(windows[1])
    for times in range(1, 4):
        metrics.merge(window)
        assert_same(metrics.compute(), sum([window] * times))


def test_an_object_may_merge_its_own_snapshot(windows):
    metrics = see(made(), 0)
    metrics.merge(metrics.compute())
    assert_same(metrics.compute(), windows[0] + windows[0])
    metrics.merge(metrics.flush())
    assert_same(metrics.compute(), windows[0] + windows[0])


def test_the_first_row_takes_it_and_the_others_stay(windows):
    metrics = see(made(), 0)
    before = metrics.compute().per_device("ü")
    metrics.merge(windows[1])
    after = metrics.compute().per_device("ü")
    np.testing.assert_array_equal(after[1:], before[1:])
    assert after[0] == before[0] + windows[1]["ü"]


@pytest.mark.parametrize("devices", DEVICES)
def test_what_is_merged_is_later_and_what_follows_is_later_still(devices):
    def of(*values, devices=8):
        metrics = made({"x": "last"}, devices=devices)
        for value in values:
            metrics.update(x=value)
        return metrics

    metrics = of(1.0, 2.0, 3.0, devices=devices)
    metrics.merge(restored(of(9.0).compute()))
    assert metrics.compute()["x"] == 9.0
    metrics.update(x=5.0)
    assert metrics.compute()["x"] == 5.0
    metrics.merge(of().compute())
    assert metrics.compute()["x"] == 5.0
    metrics.update(x=np.arange(8.0), weight=np.arange(8) < 4)  # not in the first row only
    assert metrics.compute()["x"] == 3.0
    metrics.merge(of(7.0, 8.0).compute())
    metrics.update(x=np.arange(16.0))
    assert metrics.compute()["x"] == 15.0


@pytest.mark.parametrize("way", SOME_WAYS, ids=lambda way: way.name)
def test_merge_in_every_way_of_running(way):
    """Before, between and after updates of the same program; the snapshot is a constant of it."""
    earlier = made(SMALL, devices=3)
    earlier.update(x=np.arange(6.0))
    saved = restored(earlier.compute())

    def body(metrics, values):
        metrics.update(x=values)
        metrics.merge(saved)
        metrics.update(x=2 * values)
        return metrics.compute()

    x = np.arange(32.0, dtype=np.float32)
    parts = np.split(x, 2) if way.stacked else [x]
    whole = made(SMALL)
    for part in parts:
        whole.update(x=part)
        whole.merge(saved)
        whole.update(x=2 * part)
    with way.scope():
        metrics, inside = way.step(way, body)(way.make(SMALL), way.place(x))
        after = metrics.compute()
    expected = whole.compute()
    assert after.count["x"] == 2 * 32 + 6 * len(parts)
    exact = ("x/max", "x/last", "x/count", "x/mean")
    assert_same(after, expected, exact)
    assert_same(inside, expected, exact)


def merge(metrics: DistributedMetrics, *snapshots: Snapshot) -> None:
    for snapshot in snapshots:
        metrics.merge(snapshot)


def types_of(metrics: DistributedMetrics) -> list[Any]:
    leaves = jax.tree.leaves(nnx.state(metrics))
    return [(jax.typeof(x), x.weak_type, x.sharding, x.committed) for x in leaves]


@pytest.mark.parametrize("explicit", [False, True], ids=["auto", "explicit"])
def test_merge_keeps_shapes_dtypes_and_shardings_and_nothing_is_compiled_again(explicit, caplog):
    mesh = mesh_of(8, explicit)
    metrics = DistributedMetrics(SMALL, mesh=mesh)
    x = jax.device_put(np.arange(16.0, dtype=np.float32), NamedSharding(mesh, P("data")))
    step = nnx.jit(lambda metrics, x: metrics.update(x=x))
    before = types_of(metrics)
    graphdef = nnx.graphdef(metrics)
    metrics.update(x=x)
    step(metrics, x)
    metrics.merge(metrics.compute())
    saved = restored(metrics.flush())
    with jax.log_compiles():
        for snapshot in (saved, metrics.compute(), saved + saved):
            metrics.merge(snapshot)
            assert types_of(metrics) == before
            assert nnx.graphdef(metrics) == graphdef
            metrics.update(x=x)
            step(metrics, x)
            metrics.flush().flatten()
    assert not [record.getMessage() for record in caplog.records]
    nnx.jit(lambda metrics, s: metrics.merge(s))(metrics, saved)
    assert types_of(metrics) == before


@pytest.mark.parametrize("explicit", [False, True], ids=["auto", "explicit"])
@pytest.mark.parametrize("axes", [{"data": 8}, {"data": 4, "model": 2}], ids=["1d", "2d"])
def test_merge_sends_nothing(axes, explicit):
    metrics = DistributedMetrics(SMALL, mesh=make_mesh(axes, explicit))
    saved = restored(metrics.compute())
    assert count_collectives(lambda metrics, snapshot: metrics.merge(snapshot), metrics, saved) == {}


def test_merge_with_64_bit_types_on():
    metrics = made(SMALL)
    metrics.update(x=np.arange(16.0))
    saved = restored(metrics.compute())
    with jax.enable_x64(True):
        metrics.merge(saved)
        metrics.update(x=np.arange(16.0))
        metrics.merge(Snapshot.from_dict(jax.tree.map(jnp.asarray, saved.to_dict())))
        nnx.jit(lambda m, s: m.merge(s))(metrics, saved)
        snapshot = metrics.compute()
        assert_same(snapshot, sum([saved] * 5), ("x/mean", "x/max", "x/last", "x/count"))
        assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(metrics))} == {np.dtype(np.float32)}
        identical(restored(snapshot), snapshot)


def test_not_finite_numbers_stay_so_through_a_merge():
    for value in (np.nan, np.inf, -np.inf):
        metrics, other = (made({"x": ("sum", "max", "min"), "y": "sum"}, devices) for devices in (8, 3))
        metrics.update(x=value, y=1.0)
        other.merge(restored(metrics.compute()))
        other.update(x=1.0, y=1.0)
        result = other.compute()["x"]
        np.testing.assert_equal(result["sum"], value)
        np.testing.assert_equal(result["max"], np.maximum(value, 1.0))
        np.testing.assert_equal(result["min"], np.minimum(value, 1.0))
        assert other.compute()["y"] == 2.0


# --- what is refused ---


@contextlib.contextmanager
def refused(metrics: DistributedMetrics, error: type[Exception], *texts: str):
    """What is called here raises, says so, and loses nothing."""
    before = metrics.compute().to_dict()
    with pytest.raises(error) as raised:
        yield
    for text in texts:
        assert text in str(raised.value)
    jax.tree.map(np.testing.assert_array_equal, before, metrics.compute().to_dict())


SPECS = {
    "another accumulator": ({"x": "mean"}, {"x": "sum"}, ["'x': mean() and sum()"]),
    "a missing name": ({"x": "mean", "y": "mean"}, {"x": "mean"}, ["only the first has 'y'"]),
    "an extra name": ({"x": "mean"}, {"x": "mean", "a/b": "sum"}, ["only the second has 'a/b'"]),
    "names on both sides": (
        {"x": "mean", "y": "mean"},
        {"x": "mean", "ü": "mean"},
        ["only the first has 'y'", "only the second has 'ü'"],
    ),
    "twelve names": (
        {"x": "mean"},
        {"x": "mean", **{f"n{i:02}": "mean" for i in range(12)}},
        ["only the second has 'n00', ", "'n09' and 2 more"],
    ),
    "a shape": ({"x": Mean(3)}, {"x": Mean(4)}, ["'x': mean(shape=[3]) and mean(shape=[4])"]),
    "a shape of the same size": (
        {"x": Mean((2, 3))},
        {"x": Mean((3, 2))},
        ["'x': mean(shape=[2, 3]) and mean(shape=[3, 2])"],
    ),
    "labels": (
        {"x": Mean(2, labels="ab")},
        {"x": Mean(2, labels="ba")},
        ["labels=['a', 'b']) and mean(shape=[2], labels=['b', 'a'])"],
    ),
    "edges": (
        {"x": Histogram([0, 1, 2])},
        {"x": Histogram([0, 1, 3])},
        ["'x': histogram(edges=[0.0, 1.0, 2.0]) and histogram(edges=[0.0, 1.0, 3.0])"],
    ),
    "a precision": (
        {"x": Quantile(0.5, 0.05)},
        {"x": Quantile(0.5, 0.1)},
        ["'x': quantile(q=0.5, relative_error=0.05) and quantile(q=0.5, relative_error=0.1)"],
    ),
    "ddof": ({"x": Var()}, {"x": Var(ddof=1)}, ["'x': var(ddof=0.0) and var(ddof=1.0)"]),
    "order of a tuple": (
        {"x": ("mean", "max")},
        {"x": ("max", "mean")},
        ["the metrics are the same, in another order: x/mean, x/max and x/max, x/mean"],
    ),
    "order of names": (
        {"x": "mean", "y": "max"},
        {"y": "max", "x": "mean"},
        ["the metrics are the same, in another order: x, y and y, x"],
    ),
    "a tuple": ({"x": "mean"}, {"x": ("mean",)}, ["only the first has 'x'\n  only the second has 'x/mean'"]),
    "nesting": ({"x": {"y": "mean"}}, {"x/y": "mean"}, ["'x/y': mean() at ['x', 'y'] and mean()"]),
    "deeper nesting": (
        {"x": {"y": {"z": "mean"}}},
        {"x": {"y/z": "mean"}},
        ["'x/y/z': mean() at ['x', 'y', 'z'] and mean() at ['x', 'y/z']"],
    ),
}


@pytest.mark.parametrize("case", SPECS)
@pytest.mark.parametrize("kind", ["live", "restored"])
def test_snapshots_of_other_specs_are_refused(case, kind):
    mine, theirs, texts = SPECS[case]
    metrics, other = DistributedMetrics(mine), DistributedMetrics(theirs)
    snapshot = other.compute() if kind == "live" else restored(other.compute())
    what = "metrics.merge(): the snapshot is of another spec. The accumulators first, the snapshot second:"
    with refused(metrics, ValueError, what, *texts):
        metrics.merge(snapshot)
    with refused(metrics, ValueError, what, *texts):
        nnx.jit(lambda m, s: m.merge(s))(metrics, snapshot)
    what = "Snapshot + Snapshot: they are of different specs. The left first, the right second:"
    with refused(metrics, ValueError, what, *texts):
        metrics.compute() + snapshot


@pytest.mark.parametrize("turned", [False, True])
def test_another_nan_policy_is_refused(turned):
    policies = ("ignore", "propagate") if turned else ("propagate", "ignore")
    metrics, other = (made(SMALL, nan_policy=policy) for policy in policies)
    metrics.update(x=1.0)
    text = "nan_policy: {!r} and {!r}".format(*policies)
    for snapshot in (other.compute(), restored(other.compute())):
        with refused(metrics, ValueError, text):
            metrics.merge(snapshot)
        with refused(metrics, ValueError, text):
            metrics.compute() + snapshot


def test_what_is_no_snapshot_is_refused():
    metrics, d = made(SMALL), saw(0).to_dict()
    metrics.update(x=1.0)
    for wrong, texts in (
        (d, ("takes a Snapshot, got dict", "For example: Snapshot.from_dict(d)")),
        (dict(metrics.compute()), ("got dict",)),
        (metrics, ("got DistributedMetrics", "For example: other.compute()")),
        (None, ("got NoneType",)),
        (metrics.compute().flatten, ("got method",)),
        ([metrics.compute()], ("got list",)),
    ):
        with refused(metrics, TypeError, "metrics.merge()", *texts):
            metrics.merge(wrong)
    with pytest.raises(TypeError, match="merge"):
        metrics.merge()
    with pytest.raises(ValueError, match=r"metrics\.merge\(\): this object has no accumulators"):
        DistributedMetrics().merge(metrics.compute())


def test_a_captured_object_refuses_to_merge():
    metrics = made(SMALL)
    metrics.update(x=1.0)
    saved = restored(metrics.compute())
    for traced in (lambda: metrics.merge(saved), lambda: metrics.merge(metrics.compute())):
        with refused(metrics, flax.errors.TraceContextError, "metrics.merge(): the accumulators belong to an outer"):
            jax.jit(traced)()
    with refused(metrics, flax.errors.TraceContextError, "metrics.merge()"):
        jax.jit(lambda s: metrics.merge(s))(saved)


def spec_of(d: dict[str, Any], change: Any) -> None:
    described = json.loads(d["spec"].tobytes())
    change(described)
    d["spec"] = np.frombuffer(json.dumps(described).encode(), np.uint8)


TAMPERED = {
    "newer": (
        lambda d: d.update(format_version=np.asarray(2)),
        ["the format version is 2, and this library reads up to 1", "newer", "pip install --upgrade"],
    ),
    "much newer": (lambda d: d.update(format_version=99), ["version is 99", "newer"]),
    "no version": (lambda d: d.pop("format_version"), ["It has:   'metrics', 'spec'", "Expected: 'format_version', "]),
    "no spec": (lambda d: d.pop("spec"), ["It has:   'format_version', 'metrics'", "Expected: "]),
    "no metrics": (lambda d: d.pop("metrics"), ["It has:   'format_version', 'spec'"]),
    "more": (lambda d: d.update(step=3), ["'step'", "Expected: 'format_version', 'metrics', 'spec'"]),
    "a metric missing": (lambda d: d["metrics"].pop("x/max"), ["Missing: 'x/max'", "Extra:   none"]),
    "a metric too many": (lambda d: d["metrics"].update(y={}), ["Missing: none", "Extra:   'y'"]),
    "a metric renamed": (
        lambda d: d["metrics"].update(y=d["metrics"].pop("x/max")),
        ["the metrics are not those of its spec", "Missing: 'x/max'", "Extra:   'y'"],
    ),
    "a field missing": (
        lambda d: d["metrics"]["x/mean"].pop("total"),
        ["the fields of 'x/mean'", "Missing: 'total'", "Extra:   none"],
    ),
    "a field too many": (lambda d: d["metrics"]["x/mean"].update(extra=0), ["Extra:   'extra'"]),
    "a field renamed": (
        lambda d: d["metrics"]["x/mean"].update(sum=d["metrics"]["x/mean"].pop("total")),
        ["Missing: 'total'", "Extra:   'sum'"],
    ),
    "a word too many": (
        lambda d: d["metrics"]["x/mean"].update(total=np.ones(3)),
        ["the field 'total' of 'x/mean' has the shape (3,), and its spec says (2,)"],
    ),
    "a number for a field": (
        lambda d: d["metrics"]["x/mean"].update(total=1.0),
        ["the field 'total' of 'x/mean' has the shape (), and its spec says (2,)"],
    ),
    "a leading dim": (
        lambda d: d["metrics"]["x/mean"].update(total=np.ones((1, 2))),
        ["the field 'total' of 'x/mean' has the shape (1, 2), and its spec says (2,)"],
    ),
    "a vector's shape": (
        lambda d: d["metrics"]["v"].update(total=np.ones((4, 2))),
        ["the field 'total' of 'v' has the shape (4, 2), and its spec says (3, 2)"],
    ),
    "a vector's dims": (
        lambda d: d["metrics"]["v"].update(total=np.ones((2, 3))),
        ["the field 'total' of 'v' has the shape (2, 3), and its spec says (3, 2)"],
    ),
    "the buckets": (
        lambda d: d["metrics"]["h"].update(bins=np.ones((4, 2))),
        ["the field 'bins' of 'h' has the shape (4, 2), and its spec says (5, 2)"],
    ),
    "another spec": (
        lambda d: d.update(spec=DistributedMetrics({"y": "mean"}).compute().to_dict()["spec"]),
        ["the metrics are not those of its spec", "Missing: 'y'", "Extra:   ", "'x/mean'"],
    ),
    "edges in the spec": (
        lambda d: spec_of(d, lambda s: s["metrics"][-1]["settings"].update(edges=[0, 1])),
        [
            "other fields of 'h', histogram",
            "The dict:     weight [] by 'sum', words '2', bins [5]",
            "bins [4] by 'bins'",
        ],
    ),
    "a merge in the spec": (
        lambda d: spec_of(d, lambda s: s["metrics"][1]["fields"][1].__setitem__(1, "maximum")),
        ["other fields of 'x/max', max", "largest [] by 'maximum', words '1'", "largest [] by 'max', words '1'"],
    ),
    "words in the spec": (
        lambda d: spec_of(d, lambda s: s["metrics"][1]["fields"][1].__setitem__(2, "2")),
        ["other fields of 'x/max', max", "largest [] by 'max', words '2'", "largest [] by 'max', words '1'"],
    ),
    "a new setting": (
        lambda d: spec_of(d, lambda s: s["metrics"][0]["settings"].update(method="kahan")),
        ["settings of 'x/mean', mean", "does not know: 'method'.", "Known: 'shape', 'name'", "pip install --upgrade"],
    ),
    "a new policy": (
        lambda d: spec_of(d, lambda s: s.update(nan_policy="zero")),
        ["the nan_policy 'zero'", "knows 'propagate' and 'ignore'", "pip install --upgrade"],
    ),
    "a setting left out": (
        lambda d: spec_of(d, lambda s: s["metrics"][2]["settings"].pop("shape")),
        ["d['spec'], metric 2, 'v' is damaged: there is no 'shape'", "leave d['spec'] as to_dict() wrote it"],
    ),
    "a checkpoint around it": (
        lambda d: d.update(seen=dict(d)),
        ["It has:   'format_version', 'metrics', 'seen', 'spec'", "Snapshot.from_dict(d['seen'])"],
    ),
    "half a version": (
        lambda d: d.update(format_version=1.5),
        ["no format version 1.5", "d['format_version'] as a whole number, 1 or more; now it is 1"],
    ),
    "a field of windows": (
        lambda d: [one.update(weight=np.ones((3, *np.shape(one["weight"])))) for one in d["metrics"].values()],
        ["has the shape (5, 2), and its spec says (3, 5, 2), with (3,) in front", "Leave d['metrics']['", "unstack()"],
    ),
}


@pytest.fixture(scope="module")
def victim() -> Snapshot:
    metrics = DistributedMetrics({"x": ("mean", "max"), "v": Mean(3), "h": Histogram([0, 1, 2])})
    metrics.update(x=np.arange(4.0), v=np.ones((2, 3)), h=0.5)
    return metrics.compute()


@pytest.mark.parametrize("case", TAMPERED)
def test_dicts_that_to_dict_did_not_give_are_refused(case, victim):
    change, texts = TAMPERED[case]
    d = victim.to_dict()
    change(d)
    for tampered in (d, jax.tree.map(np.asarray, d)):
        with pytest.raises(ValueError, match=r"^Snapshot\.from_dict\(\)") as error:
            Snapshot.from_dict(tampered)
        for text in texts:
            assert text in str(error.value)


DAMAGED = {
    "cut off": lambda d: d.update(spec=d["spec"][:-7]),
    "no UTF-8": lambda d: d.update(spec=np.full(8, 255, np.uint8)),
    "empty": lambda d: d.update(spec=np.zeros(0, np.uint8)),
    "another kind of JSON": lambda d: d.update(spec=np.frombuffer(b"[1, 2]", np.uint8)),
    "text": lambda d: d.update(spec=d["spec"].tobytes().decode()),
    "no bytes": lambda d: d.update(spec=[300, -1]),
    "no metrics in the spec": lambda d: spec_of(d, lambda s: s.pop("metrics")),
    "no policy in the spec": lambda d: spec_of(d, lambda s: s.pop("nan_policy")),
    "a setting that is none": lambda d: spec_of(d, lambda s: s["metrics"][0]["settings"].update(foo=1)),
    "a setting that is wrong": lambda d: spec_of(d, lambda s: s["metrics"][-1]["settings"].update(edges=[1, 0])),
    "a kind with no fields": lambda d: spec_of(d, lambda s: s["metrics"][0].update(kind="theirs.Mean", fields=[])),
    "version 0": lambda d: d.update(format_version=0),
    "no version": lambda d: d.update(format_version=None),
    "two versions": lambda d: d.update(format_version=[1, 1]),
    "metrics that are none": lambda d: d.update(metrics=None),
    "a metric that is none": lambda d: d["metrics"].update(v=None),
    "a metric that is an array": lambda d: d["metrics"].update(v=np.ones(2)),
    "a field of text": lambda d: d["metrics"]["v"].update(total="ab"),
    "a ragged field": lambda d: d["metrics"]["v"].update(total=[[1, 2], [3]]),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_dicts_are_refused_in_words_of_this_library(case, victim):
    d = victim.to_dict()
    DAMAGED[case](d)
    with pytest.raises((ValueError, TypeError)) as error:
        Snapshot.from_dict(d)
    what, *_, fix = str(error.value).split("\n  ")
    assert what.startswith("Snapshot.from_dict()")
    assert "d['" in fix or fix.endswith("pip install --upgrade distributed-metrics")


@pytest.mark.parametrize("wrong", [None, 3, "x", [1], np.ones(3)], ids=lambda x: type(x).__name__)
def test_what_is_no_dict_is_refused(wrong):
    with pytest.raises(
        TypeError, match=rf"takes what to_dict\(\) gave, got {type(wrong).__name__}(.|\n)*For example: "
    ):
        Snapshot.from_dict(wrong)


def test_what_was_not_made_a_dict_yet_is_refused_with_the_call_that_makes_it(victim):
    for wrong, error, fix in (
        (DistributedMetrics({"x": "mean"}), TypeError, "metrics.compute().to_dict()"),
        (json.dumps(lists(victim.to_dict())), TypeError, "Snapshot.from_dict(json.loads(text))"),
        (victim, ValueError, "saved = snapshot.to_dict(); Snapshot.from_dict(saved)"),
        ({"step": 3, "seen": victim.to_dict()}, ValueError, "Snapshot.from_dict(d['seen'])"),
    ):
        with pytest.raises(error) as raised:
            Snapshot.from_dict(wrong)
        assert f"For example: {fix}" in str(raised.value)


# --- accumulators of one's own ---


class GeometricMean(Accumulator):
    """The geometric mean of positive numbers."""

    fields = {"log_total": "sum"}

    def contribution(self, batch):
        return {"log_total": batch.map(jnp.log).sum()}

    def result(self, xp, weight, log_total):
        return xp.exp(log_total / weight)


@dataclasses.dataclass(frozen=True)
class Powers(Accumulator):
    """Means of the values and of their squares, scaled."""

    fields = {"total": "sum", "squares": "sum", "largest": "max"}
    scale: Any = 1.0

    def contribution(self, batch):
        return {"total": batch.sum(), "squares": batch.squared().sum(), "largest": batch.max()}

    def result(self, xp, weight, total, squares, largest):
        return xp.stack([total / weight, squares / weight, largest], axis=-1) * self.scale

    def result_shape(self):
        return (*self.shape, 3)


@dataclasses.dataclass(frozen=True)
class OfPairs(GeometricMean):
    """Which has a shape without being asked for one."""

    shape: Any = (2,)


OWN = {"mine": GeometricMean(), "powers": (Powers(scale=2.0), "mean"), "loss": "mean", "vector": GeometricMean(2)}
OWN_VALUES = {
    "mine": np.array([1.0, 10.0, 100.0]), "powers": np.arange(4.0), "loss": 5.0, "vector": np.array([[1.0, 2], [4, 8]]),
}  # fmt: skip


def own(devices: int = 8, **kwargs: Any) -> DistributedMetrics:
    metrics = made(OWN, devices, **kwargs)
    metrics.update(OWN_VALUES)
    return metrics


@pytest.mark.parametrize("way", ["nothing", "json", "msgpack", "orbax standard", "jax arrays"])
def test_an_accumulator_of_ones_own_is_kept_as_stored(way, tmp_path):
    snapshot = own().compute()
    back = Snapshot.from_dict(THROUGH[way](snapshot.to_dict(), tmp_path))
    assert list(back) == list(snapshot)
    assert back.flatten() == {"powers/mean": 1.5, "loss": 5.0}
    assert back["loss"] == 5.0
    np.testing.assert_equal(dict(back.count), dict(snapshot.count))
    for name, kind in (("mine", "GeometricMean"), ("powers", "Powers"), ("vector", "GeometricMean")):
        with pytest.raises(TypeError, match=rf"does not hold the code of .*{kind}") as error:
            back[name]
        assert "metrics = DistributedMetrics({...}); metrics.merge(snapshot)" in str(error.value)
    for devices in (1, 3):
        metrics = made(OWN, devices)
        metrics.merge(back)
        np.testing.assert_equal(dict(metrics.compute()), dict(snapshot))
        metrics.merge(back)
        metrics.update(OWN_VALUES)
        assert metrics.compute()["mine"] == pytest.approx(snapshot["mine"], rel=1e-12)
        assert metrics.compute().count["powers"] == 12.0
    assert_same(snapshot, snapshot + made(OWN).compute(), OWN)


def test_what_is_stored_can_be_saved_again_added_pickled_and_traced():
    snapshot = own().compute()
    back = restored(snapshot)
    identical(back, snapshot)
    identical(restored(back), snapshot)
    identical(pickle.loads(pickle.dumps(back)), snapshot)
    for total in (back + restored(back), jax.jit(lambda a, b: a + b)(back, back)):
        identical(total, snapshot + snapshot)
        metrics = made(OWN, 2)
        metrics.merge(total)
        np.testing.assert_equal(metrics.compute().count["vector"], np.array([4.0, 4.0]))
    metrics = made(OWN, 8)
    nnx.jit(lambda m, s: m.merge(s))(metrics, back)
    nnx.jit(lambda m: m.merge(back))(metrics)
    np.testing.assert_equal(dict(metrics.compute()), dict(snapshot + snapshot))
    with pytest.raises(TypeError, match="does not hold the code of"):
        jax.jit(lambda s: s["mine"])(back)
    assert float(jax.jit(lambda s: s["loss"])(back)) == 5.0


def test_stored_settings_are_told_apart():
    metrics = made({"x": Powers(scale=2.0)})
    metrics.update(x=1.0)
    for other, text in (
        (Powers(scale=3.0), f"Powers(scale=2.0) and {__name__}.Powers(scale=3.0)"),
        (GeometricMean(), f"Powers(scale=2.0) and {__name__}.GeometricMean()"),
        ("mean", "Powers(scale=2.0) and mean()"),
    ):
        with refused(metrics, ValueError, text):
            metrics.merge(restored(made({"x": other}).compute()))


def test_labels_of_results_with_a_shape_of_their_own_are_kept():
    metrics = DistributedMetrics({"x": Powers(labels=("mean", "squares", "max"))})
    metrics.update(x=np.arange(4.0))
    back = restored(metrics.compute())
    assert back.count["x"] == 4.0
    metrics.merge(back)
    assert metrics.compute().flatten()["x/squares"] == 3.5


@pytest.mark.parametrize("policy", ["propagate", "ignore"])
def test_a_class_with_a_shape_of_its_own_is_kept(policy):
    metrics = DistributedMetrics({"x": OfPairs()}, nan_policy=policy)
    metrics.update(x=np.array([[1.0, 2.0], [4.0, 8.0]]))
    metrics.merge(restored(metrics.compute()))
    np.testing.assert_allclose(metrics.compute()["x"], [2, 4], rtol=1e-6)


def test_settings_of_ones_own_may_be_anything_that_is_plain():
    scales = [float("nan"), float("inf"), (1.0, (2.0, 3.0)), None, "text", np.float32(0.5)]
    metrics = DistributedMetrics({str(scale): Powers(scale=scale) for scale in scales})
    metrics.update({str(scale): np.arange(4.0) for scale in scales})
    metrics.merge(restored(metrics.compute()))
    assert dict(metrics.compute().count) == {str(scale): 8.0 for scale in scales}


ELSEWHERE = """
import json, pathlib, sys
import jax, numpy as np
from distributed_metrics import DistributedMetrics, Snapshot

path = pathlib.Path(sys.argv[1])
snapshot = Snapshot.from_dict(json.loads(path.read_text()))
try:
    snapshot["mine"]
except TypeError as error:
    told = str(error)
both = snapshot + snapshot
path.with_name("both.json").write_text(json.dumps(jax.tree.map(np.ndarray.tolist, both.to_dict())))
print(json.dumps({"flat": snapshot.flatten(), "count": snapshot.count["mine"], "told": told}))
"""


def test_another_process_reads_it_without_the_class(tmp_path):
    snapshot = own().compute()
    (tmp_path / "saved.json").write_text(json.dumps(lists(snapshot.to_dict())))
    (tmp_path / "elsewhere.py").write_text(ELSEWHERE)
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
    result = subprocess.run(
        [sys.executable, str(tmp_path / "elsewhere.py"), str(tmp_path / "saved.json")],
        capture_output=True, text=True, timeout=90, env=environment,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    printed = json.loads(result.stdout.splitlines()[-1])
    assert printed["flat"] == {"powers/mean": 1.5, "loss": 5.0}
    assert printed["count"] == 3.0
    assert f"does not hold the code of {__name__}.GeometricMean" in printed["told"]
    metrics = made(OWN, 5)
    metrics.merge(Snapshot.from_dict(json.loads((tmp_path / "both.json").read_text())))
    np.testing.assert_equal(dict(metrics.compute()), dict(snapshot + snapshot))


def test_a_class_may_give_its_fields_and_settings_another_order():
    def powers(order):
        """The same class, of another version of a user's module."""
        fields = [("scale", Any, 1.0), ("base", Any, 2)]
        kind = dataclasses.make_dataclass("Ordered", fields[::order], bases=(Powers,), frozen=True)
        kind.__module__ = __name__
        kind.fields = dict(list(Powers.fields.items())[::order])  # type: ignore[attr-defined]
        return kind()

    metrics, other = made({"x": powers(1)}), made({"x": powers(-1)})
    metrics.update(x=np.arange(4.0))
    other.merge(restored(metrics.compute()))
    np.testing.assert_array_equal(other.compute()["x"], metrics.compute()["x"])


class NoRepr:
    """Of which Python shows the address."""


def test_settings_read_the_same_in_every_process():
    """An address, or the order of a set of strings, is another one in each."""
    for one, other in ((NoRepr(), NoRepr()), (frozenset("abc"), frozenset("cab")), (len, len)):
        metrics = made({"x": Powers(scale=one)}, 1)
        spec = json.loads(metrics.compute().to_dict()["spec"].tobytes())
        assert spec == json.loads(made({"x": Powers(scale=other)}, 1).compute().to_dict()["spec"].tobytes())
    assert "0x" not in str(spec)


# --- what other versions wrote ---


def format_1() -> Any:
    """Written once, and never again: see saved_format.py."""
    return json.loads((pathlib.Path(__file__).parent / "data" / "format_1.json").read_text())


@pytest.mark.parametrize("case", saved_format.MADE)
def test_what_an_older_version_saved_reads_as_it_did(case):
    old = format_1()[case]
    back = Snapshot.from_dict(old["saved"])
    numbers, expected = saved_format.numbers_of(back), old["numbers"]
    stored = {"own", "owns/logtotal", "accuracy", "largest"}  # read below, by an object that has their classes
    expected["flat"] = {
        name: number for name, number in expected["flat"].items()
        if not any(name == one or name.startswith(f"{one}/") for one in stored)
    }  # fmt: skip
    assert list(numbers["flat"]) == list(expected["flat"])
    assert_numbers(numbers, expected)


@pytest.mark.parametrize("case", saved_format.MADE)
@pytest.mark.parametrize("seen", ["nothing", "as much"])
def test_a_run_goes_on_with_what_an_older_version_saved(case, seen):
    old = format_1()[case]
    windows = Snapshot.from_dict(old["saved"])
    stacked = case == "stacked windows"
    for i, window in enumerate(windows.unstack() if stacked else [windows]):
        metrics = saved_format.MADE[case](*([] if seen == "nothing" else [saved_format.X]))
        before = metrics.compute()
        metrics.merge(window)
        after = metrics.compute()
        of_old = {name: number[i] if stacked else number for name, number in arrays(old["numbers"]["count"]).items()}
        count = {name: number + np.asarray(before.count[name]) for name, number in of_old.items()}
        np.testing.assert_equal(dict(after.count), count)
        if seen == "nothing" and not stacked:
            assert_numbers(saved_format.numbers_of(after), old["numbers"])


@pytest.mark.parametrize("case", saved_format.MADE)
def test_this_version_saves_as_an_older_one_did(case):
    """The same keys, shapes, dtypes, and every letter of the spec."""
    old, new = format_1()[case]["saved"], saved_format.snapshot_of(case).to_dict()
    assert bytes(old["spec"]).decode() == new["spec"].tobytes().decode()
    old = {**old, "spec": np.array(old["spec"], np.uint8), "format_version": np.array(old["format_version"], np.int32)}
    old["metrics"] = arrays(old["metrics"], np.float32)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), new) == jax.tree.map(lambda x: (x.shape, x.dtype), old)
    for name, fields in old["metrics"].items():
        for field, words in fields.items():
            np.testing.assert_allclose(
                new["metrics"][name][field], words, rtol=1e-6, atol=1e-6, err_msg=f"{name} {field}"
            )


def arrays(tree: Any, dtype: Any = np.float64) -> Any:
    return {name: arrays(one, dtype) if isinstance(one, dict) else np.asarray(one, dtype) for name, one in tree.items()}


def assert_numbers(numbers: Any, expected: Any) -> None:
    numbers, expected = arrays(numbers), arrays(expected)
    assert jax.tree.map(np.shape, numbers) == jax.tree.map(np.shape, expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, equal_nan=True), numbers, expected)


def test_every_accumulator_is_in_the_file_with_every_setting():
    """One that is new needs a case in saved_format.py, and its line in the file."""
    specs = [json.loads(bytes(one["saved"]["spec"])) for one in format_1().values()]
    kinds = {metric["kind"] for spec in specs for metric in spec["metrics"]}
    public = {name: getattr(accumulators, name) for name in accumulators.__all__}
    accumulator_classes = {
        name.lower(): one for name, one in public.items() if isinstance(one, type) and issubclass(one, Accumulator)
    }
    for abstract in ("accumulator", "clumetric"):
        del accumulator_classes[abstract]
    assert set(accumulator_classes) <= kinds
    assert {one.__name__.lower() for one in accumulators.BY_NAME.values()} <= kinds
    for metric in json.loads(saved_format.snapshot_of("every accumulator").to_dict()["spec"].tobytes())["metrics"]:
        names = {one.name for one in dataclasses.fields(accumulator_classes[metric["kind"]])}
        assert set(metric["settings"]) == names, metric["kind"]


def test_a_later_default_is_not_read_into_an_older_file(monkeypatch):
    old = format_1()["every accumulator"]
    for kind, later in ((Var, {"ddof": 1.0}), (Std, {"ddof": 1.0}), (Quantile, {"relative_error": 0.001})):
        monkeypatch.setattr(kind.__init__, "__kwdefaults__", {**(kind.__init__.__kwdefaults__ or {}), **later})
    assert Var().ddof == 1.0
    assert Snapshot.from_dict(old["saved"]).flatten(empty="nan")["x/var"] == old["numbers"]["flat"]["x/var"]


@pytest.mark.parametrize("kind", ["trimmedmean", "their.module.TrimmedMean"])
def test_a_kind_that_this_version_does_not_know_is_kept(kind, victim):
    """Of a newer version, or of a module that is not imported: all else can be read, and nothing is lost."""
    d = victim.to_dict()
    fields = [["weight", "sum", "2", []], ["trimmed", "top", "12", [4]], ["largest", "max", "1", []]]
    setting = {"shape": [], "name": None, "labels": ["low", "high"], "cut": 0.1}
    spec_of(d, lambda s: s["metrics"][0].update(kind=kind, fields=fields, settings=setting, result=[2]))
    d["metrics"]["x/mean"] = {
        "weight": np.array([4, 0]),
        "trimmed": np.tile([1, 1, 0], (4, 1)),
        "largest": np.array([7]),
    }
    back = Snapshot.from_dict(d)
    assert back["v"].tolist() == victim["v"].tolist()
    assert back.count["x/mean"] == 4.0
    assert "x/mean" not in back.flatten()
    jax.tree.map(np.testing.assert_array_equal, back.to_dict(), d)
    fixes = [
        "a newer version",
        f"accumulator {kind!r}",
        "Known: 'count', ",
        "pip install --upgrade distributed-metrics",
    ]
    if "." in kind:
        fixes = [f"the code of {kind}", "metrics.merge(snapshot)"]
    with pytest.raises(TypeError) as error:
        back["x"]
    for text in fixes:
        assert text in str(error.value)
    with pytest.raises(ValueError, match=rf"'x/mean': mean\(\) at .* and {kind}\(cut=0.1, labels=\['low', 'high'\]\)"):
        victim + back


def test_every_merge_of_ours_is_known():
    """So that what is stored adds up without its class."""
    cases = ["every accumulator", "clu before its first value"]
    of_plans = [saved_format.snapshot_of(case)._plan.tables for case in cases]
    for name, merge in {name: merge for tables in of_plans for name, merge in tables.items()}.items():
        assert portable._KNOWN_MERGES[name] is merge


@pytest.mark.parametrize("way", ["json", "orbax pytree", "orbax standard"])
def test_a_clu_metric_is_saved_before_its_first_value(way, tmp_path):
    """Its leaves are no numbers yet: JSON would lose their shape, and Orbax refuses them."""
    snapshot = saved_format.snapshot_of("clu before its first value")
    back = Snapshot.from_dict(THROUGH[way](snapshot.to_dict(), tmp_path))
    identical(back, snapshot)
    metrics = saved_format.of_clu(saved_format.X)
    other = DistributedMetrics({"accuracy": clu.metrics.Accuracy, "loss": "mean"})
    other.merge(back)
    assert other.compute()["loss"] == snapshot["loss"]
    other.update(accuracy={"logits": saved_format.LOGITS, "labels": np.array([0, 1, 1, 0])})
    assert other.compute()["accuracy"] == metrics.compute()["accuracy"]


@flax.struct.dataclass
class WithoutEmpty(saved_format.Largest):
    @classmethod
    def empty(cls):
        raise NotImplementedError("Must override empty()")


def test_a_clu_metric_that_cannot_say_what_it_holds_asks_for_a_first_value():
    def fresh():
        return made({"x": WithoutEmpty}, 1)

    metrics, other = fresh(), fresh()
    metrics.update(x={"values": saved_format.X})
    saved = restored(metrics.compute())
    with refused(other, ValueError, "metrics.merge(): 'x': the snapshot has 2 arrays", "its empty()", "fails: NotImpl",
                 "Let the object learn what they are: update it once, then metrics.reset(), and merge."):  # fmt: skip
        other.merge(saved)
    other.update(x={"values": -saved_format.X})
    other.reset()
    other.merge(saved)
    assert other.compute()["x"] == metrics.compute()["x"] == 8.5


# --- windows and members ---


def scanned_windows() -> tuple[Snapshot, list[Snapshot]]:
    x = np.arange(24.0, dtype=np.float32).reshape(3, 8)

    def window(metrics, x):
        metrics.update(x=x)
        return metrics, metrics.flush()

    _, windows = jax.jit(lambda m, x: jax.lax.scan(window, m, x))(made(SMALL, 1), x)
    singles = [made(SMALL) for _ in x]
    for single, of_one in zip(singles, x, strict=True):
        single.update(x=of_one)
    return windows, [single.compute() for single in singles]


def population() -> tuple[Snapshot, list[Snapshot]]:
    x = np.arange(24.0, dtype=np.float32).reshape(3, 8)
    members = jax.vmap(lambda _: DistributedMetrics(SMALL))(jnp.arange(3))
    members = jax.vmap(lambda m, x: (m.update(x=x), m)[1])(members, x)
    singles = [made(SMALL) for _ in x]
    for single, of_one in zip(singles, x, strict=True):
        single.update(x=of_one)
    return members.compute(), [single.compute() for single in singles]


@pytest.mark.parametrize("way", ["json", "msgpack", "orbax standard", "npz"])
@pytest.mark.parametrize("of", [scanned_windows, population], ids=["stacked windows", "a population"])
def test_dims_in_front_come_back(of, way, tmp_path):
    snapshot, singles = of()
    back = Snapshot.from_dict(THROUGH[way](snapshot.to_dict(), tmp_path))
    identical(back, snapshot)
    np.testing.assert_array_equal(back["x"]["mean"], [single["x"]["mean"] for single in singles])
    np.testing.assert_array_equal(back.count["x/mean"], [8.0, 8.0, 8.0])
    for one, single in zip(back.unstack(), singles, strict=True):
        assert_same(one, single, SMALL_EXACT)
    metrics = made(SMALL, 3)
    metrics.merge(sum(back.unstack()))
    assert_same(metrics.compute(), sum(singles), SMALL_EXACT)
    identical(back + back, snapshot + snapshot)
    two = jax.tree.map(lambda x: np.stack([x, x]), back)
    identical(restored(two), two)
    with pytest.raises(ValueError, match=r"of stacked windows: \(3,\) in front"):
        metrics.merge(back)


# --- any way of cutting a run ---

CUT = {
    "n": ("sum", "count", "max", "min", "last"),
    "x": ("mean", "var"),
    "r": "ratio",
    "h": Histogram([-10, 0, 3, 10]),
    "q": Quantile(0.5, 0.2),
}
CUT_EXACT = {"n", "h", "q"}

batches = st.lists(
    st.tuples(st.lists(st.integers(-20, 20), min_size=8, max_size=8), st.lists(st.booleans(), min_size=8, max_size=8)),
    min_size=1,
    max_size=6,
)
cuts = st.lists(st.tuples(st.integers(0, 6), st.sampled_from(DEVICES), st.booleans()), max_size=4)


@pytest.mark.slow
@settings(max_examples=2, deadline=None)
@given(batches=batches, cuts=cuts, apart=st.booleans())
def test_any_way_of_cutting_a_run_gives_the_run(batches, cuts, apart):
    """Cut anywhere, saved, and carried on with on any number of devices, one after another or added up in the end."""
    whole = made(CUT)
    for x, kept in batches:
        tell(whole, x, kept)
    cuts = sorted((min(at, len(batches)), devices, live) for at, devices, live in cuts)
    starts = [(0, 8, True), *cuts]
    parts = []
    for (start, devices, live), (end, _, _) in itertools.pairwise([*starts, (len(batches), 0, True)]):
        metrics = made(CUT, devices)
        if parts and not apart:
            metrics.merge(parts.pop())
        for x, kept in batches[start:end]:
            tell(metrics, x, kept)
        snapshot = metrics.compute() if live else nnx.jit(lambda m: m.compute())(metrics)
        parts.append(Snapshot.from_dict(json.loads(json.dumps(lists(snapshot.to_dict())))))
    expected = whole.compute()
    total = sum(parts)
    merged = made(CUT, 3)
    for part in parts:
        merged.merge(part)
    for result in (total, merged.compute()):
        flat, wanted = (s.flatten(empty="nan") for s in (result, expected))
        for name, number in wanted.items():
            # A variance that is 0 but for the last bits has no digits to compare: its scale is that of the values.
            tolerance = 0 if name.split("/")[0] in CUT_EXACT else 400 * 2**-45
            np.testing.assert_allclose(flat[name], number, rtol=2**-45 * bool(tolerance), atol=tolerance, err_msg=name)
        np.testing.assert_equal(dict(result.count), dict(expected.count))
        np.testing.assert_equal(dict(result.outside), dict(expected.outside))


def tell(metrics: DistributedMetrics, x: list[int], kept: list[bool]) -> None:
    values = np.array(x, np.int32)
    floats = values * np.float32(0.7)
    update: dict[str, Any] = {"n": values, "x": floats, "r": (floats, 2.0), "h": values, "q": floats}
    mask = np.array(kept)
    metrics.update(update, weight={name: mask for name in update if name != "r"})
