"""Snapshots: a mapping on the host, a pytree in a trace."""

import copy
import json
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import distributed_metrics.snapshot
from distributed_metrics import DistributedMetrics, Mean, Snapshot
from ways import make_mesh

SPEC = {"loss": "mean", "train": {"n": "count", "reward": ("mean", "max")}, "unseen": ("sum", "min")}
FLAT = {"loss": 2.0, "train/n": 4.0, "train/reward/mean": 5.0, "train/reward/max": 8.0}
X = np.arange(1.0, 5.0, dtype=np.float32)


@pytest.fixture
def mesh():
    return make_mesh({"data": 8}, explicit=False)


@pytest.fixture
def metrics(mesh):
    metrics = DistributedMetrics(SPEC, mesh=mesh)
    metrics.update({"loss": X[:3], "train": {"n": X, "reward": 2 * X}})
    return metrics


def test_a_snapshot_is_a_mapping_with_the_structure_of_the_spec(metrics):
    snapshot = metrics.compute()
    assert list(snapshot) == ["loss", "train", "unseen"]
    assert len(snapshot) == 3
    assert snapshot["loss"] == 2.0
    assert type(snapshot["loss"]) is float
    assert snapshot["train"] == {"n": 4.0, "reward": {"mean": 5.0, "max": 8.0}}
    assert snapshot["unseen"]["sum"] == 0.0
    assert np.isnan(snapshot["unseen"]["min"])
    assert "loss" in snapshot
    assert "n" not in snapshot
    assert dict(snapshot).keys() == SPEC.keys()
    assert json.loads(json.dumps(snapshot["train"])) == snapshot["train"]
    with pytest.raises(TypeError):
        snapshot["loss"] = 1.0  # type: ignore[index]


def test_a_missing_name_is_an_error_that_names_the_nearest(metrics):
    with pytest.raises(KeyError, match=r"'lss': this snapshot has 'loss', 'train', 'unseen'. Did you mean 'loss'\?"):
        metrics.compute()["lss"]
    with pytest.raises(KeyError, match=r"read by one key at a time: snapshot\['train'\]\['reward'\]\['mean'\]"):
        metrics.compute()["train/reward/mean"]
    with pytest.raises(KeyError, match=r"Did you mean 'train/reward/mean'\?"):
        metrics.compute().per_device("train/reward/men")
    with pytest.raises(KeyError, match="this snapshot has"):
        metrics.compute().count["nothing"]


def test_flatten_gives_builtin_floats_and_leaves_out_what_saw_nothing(metrics):
    flat = metrics.compute().flatten()
    assert flat == FLAT
    assert all(type(value) is float for value in flat.values())
    kept = metrics.compute().flatten(sep=".", prefix="eval", empty="nan")
    assert list(kept) == [
        "eval.loss", "eval.train.n", "eval.train.reward.mean", "eval.train.reward.max", "eval.unseen.sum",
        "eval.unseen.min",
    ]  # fmt: skip
    assert kept["eval.unseen.sum"] == 0.0
    assert np.isnan(kept["eval.unseen.min"])
    with pytest.raises(ValueError, match="empty is 'skip' or 'nan'"):
        metrics.compute().flatten(empty="zero")


def test_vectors_flatten_to_one_float_per_element_zero_padded():
    metrics = DistributedMetrics({"acc": Mean(shape=(101,)), "grid": Mean(shape=(2, 3))})
    metrics.update(acc=np.arange(202.0).reshape(2, 101), grid=np.arange(6.0).reshape(2, 3))
    flat = metrics.compute().flatten()
    assert flat["acc/003"] == 53.5
    assert flat["grid/1/2"] == 5.0
    assert len(flat) == 107
    assert metrics.compute()["acc"].shape == (101,)
    assert metrics.compute()["acc"].dtype == np.float64


def test_labels_name_the_elements_and_name_the_member_of_a_tuple():
    spec = {"acc": Mean(3, labels=["cat", "dog", "emu"]), "x": (Mean(), Mean(name="again"), Mean(name="third"))}
    metrics = DistributedMetrics(spec)
    metrics.update(acc=np.arange(3.0), x=5.0)
    assert metrics.compute().flatten() == {
        "acc/cat": 0.0, "acc/dog": 1.0, "acc/emu": 2.0, "x/mean": 5.0, "x/again": 5.0, "x/third": 5.0,
    }  # fmt: skip
    assert metrics.compute()["x"]["again"] == 5.0
    with pytest.raises(ValueError, match=r"mean\[3\]: 2 labels for results of shape \(3,\): 'cat', 'dog'"):
        Mean(3, labels=["cat", "dog"])
    with pytest.raises(ValueError, match="holds the control character"):
        DistributedMetrics({"acc": Mean(1, labels=["a\nb"])})
    with pytest.raises(ValueError, match="holds the control character"):
        DistributedMetrics({"acc": (Mean(name="a\nb"),)})


def test_count_and_per_device(metrics):
    snapshot = metrics.compute()
    assert dict(snapshot.count) == {
        "loss": 3.0, "train/n": 4.0, "train/reward/mean": 4.0, "train/reward/max": 4.0, "unseen/sum": 0.0,
        "unseen/min": 0.0,
    }  # fmt: skip
    assert snapshot.count["train/reward"] == 4.0
    metrics.reset()
    metrics.update(loss=np.arange(16.0))
    np.testing.assert_array_equal(metrics.compute().per_device("loss"), np.arange(16.0).reshape(8, 2).mean(1))
    assert np.isnan(metrics.compute().per_device("train/reward/max")).all()


def test_compute_changes_nothing_flush_and_reset_start_afresh(metrics):
    assert metrics.compute().flatten() == metrics.compute().flatten() == FLAT
    assert metrics.flush().flatten() == FLAT
    assert metrics.flush().flatten() == {}
    metrics.update(loss=1.0)
    metrics.reset()
    assert metrics.compute().flatten() == {}


def test_a_snapshot_is_fetched_lazily_and_in_one_copy(metrics, monkeypatch):
    copies = []
    fetch = distributed_metrics.snapshot.on_host
    monkeypatch.setattr(distributed_metrics.snapshot, "on_host", lambda x: (copies.append(x), fetch(x))[1])
    snapshot = metrics.flush()
    assert copies == []
    snapshot.flatten(), snapshot["train"], snapshot.count["loss"], snapshot.per_device("loss")
    assert len(copies) == 1
    assert len(jax.tree.leaves(copies)) == 1
    assert snapshot.is_ready()


def test_a_snapshot_outlives_updates_flushes_and_donation(metrics):
    snapshot = metrics.compute()
    nnx.jit(lambda m: m.update(loss=100.0), donate_argnums=0)(metrics)
    metrics.flush()
    assert snapshot.flatten() == FLAT
    one = DistributedMetrics({"x": "count"})  # a single slot: its packed copy could be the table itself
    one.update(x=1.0)
    early = one.compute()
    traced = nnx.jit(lambda m: m.compute())(one)
    nnx.jit(lambda m: m.update(x=2.0), donate_argnums=0)(one)
    assert early["x"] == traced["x"] == 1.0
    jax.jit(lambda m: (m.update(x=2.0), m)[1], donate_argnums=0)(one)
    with pytest.raises(RuntimeError, match="these accumulators were donated"):
        one.compute()
    with pytest.raises(RuntimeError, match="these accumulators were donated"):
        one.update(x=jnp.ones(3))


def test_a_jitted_step_returns_a_snapshot(metrics):
    def step(metrics):
        snapshot = metrics.flush()
        assert isinstance(snapshot["loss"], jax.Array)
        return snapshot, snapshot["loss"], snapshot["train"]["reward"]["max"], snapshot.count["loss"]

    snapshot, loss, largest, count = nnx.jit(step)(metrics)
    assert isinstance(snapshot, Snapshot)
    assert snapshot.flatten() == FLAT
    assert (float(loss), float(largest), float(count)) == (2.0, 8.0, 3.0)
    assert loss.dtype == jnp.float32
    with pytest.raises(ValueError, match=r"made in a trace, a sum of snapshots, or .*: the rows are merged"):
        snapshot.per_device("loss")
    with pytest.raises(TypeError, match="in a trace there are none yet"):
        nnx.jit(lambda m: m.compute().flatten())(metrics)


def test_an_eager_snapshot_may_enter_a_trace(metrics):
    snapshot = metrics.compute()
    assert jax.jit(lambda s: s["train"]["reward"])(snapshot) == {"mean": 5.0, "max": 8.0}


def test_traced_results_equal_the_host_ones_to_float32(mesh):
    metrics = DistributedMetrics({"x": ("mean", "sum", "count", "max", "min"), "r": "ratio"}, mesh=mesh)
    x = np.random.default_rng(0).lognormal(size=64).astype(np.float32)
    metrics.update(x=x, r=(x, 3.0))
    traced = nnx.jit(lambda m: dict(m.compute()))(metrics)
    host = dict(metrics.compute())
    for one, other in zip(jax.tree.leaves(traced), jax.tree.leaves(host), strict=True):
        assert float(one) == pytest.approx(other, rel=2**-22)


def test_scan_stacks_windows(mesh):
    """A whole loop in one jit: its windows come out as ys, each window in front of every result."""
    metrics = DistributedMetrics({"x": ("mean", "max"), "v": Mean(shape=(2,))}, mesh=mesh)
    values = np.random.default_rng(0).normal(size=(5, 4, 16)).astype(np.float32)  # windows, steps, batch

    @nnx.jit
    def run(metrics, values):
        def window(metrics, steps):
            def step(metrics, x):
                metrics.update(x=x, v=x.reshape(8, 2))
                return metrics

            metrics = nnx.scan(step, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(metrics, steps)
            return metrics, metrics.flush()

        return nnx.scan(window, in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))(metrics, values)[1]

    windows = run(metrics, jax.device_put(values, NamedSharding(mesh, P(None, None, "data"))))
    np.testing.assert_allclose(windows["x"]["mean"], values.astype(np.float64).mean((1, 2)), rtol=1e-12)
    np.testing.assert_array_equal(windows["x"]["max"], values.max((1, 2)))
    assert windows["v"].shape == (5, 2)
    assert windows.flatten()["x/mean/3"] == windows["x"]["mean"][3]
    assert windows.flatten()["v/3/1"] == windows["v"][3, 1]
    third = jax.tree.map(lambda x: x[3], windows)
    assert third["x"]["mean"] == windows["x"]["mean"][3]
    assert metrics.compute().flatten() == {}


@pytest.mark.parametrize("rows", [1, 8])
def test_a_population_keeps_its_dims_in_every_result(mesh, rows):
    seeds, seen = 3, np.random.default_rng(0).normal(size=(3, 16)).astype(np.float32)

    def make(_):
        return DistributedMetrics({"x": ("mean", "max", "count")}, mesh=mesh if rows == 8 else None)

    def update(metrics, x):
        metrics.update(x=x)
        return metrics

    metrics = jax.vmap(make)(jnp.arange(seeds))
    metrics = jax.jit(jax.vmap(update))(metrics, seen)
    metrics = jax.vmap(update)(metrics, seen)
    for snapshot in (
        metrics.compute(),
        nnx.jit(lambda m: m.compute())(metrics),
        jax.vmap(lambda m: m.compute())(metrics),
    ):
        np.testing.assert_allclose(snapshot["x"]["mean"], seen.astype(np.float64).mean(1), rtol=1e-12)
        np.testing.assert_array_equal(snapshot["x"]["max"], seen.max(1))
        np.testing.assert_array_equal(snapshot.count["x"], [32, 32, 32])
        assert snapshot.flatten()["x/max/2"] == seen[2].max()
    assert metrics.compute().per_device("x/count").shape == (seeds, rows)
    with pytest.raises(ValueError, match="these accumulators are a population"):
        metrics.update(x=seen)
    metrics.flush()
    assert metrics.compute().flatten() == {}
    metrics = jax.vmap(update)(metrics, seen)
    np.testing.assert_array_equal(metrics.compute()["x"]["count"], [16, 16, 16])
    nested = nnx.vmap(nnx.vmap(lambda _: make(_)))(jnp.zeros((2, 3)))
    nested = jax.vmap(jax.vmap(update))(nested, np.stack([seen, seen + 1]))
    np.testing.assert_array_equal(nested.flush()["x"]["max"], np.stack([seen.max(1), (seen + 1).max(1)]))
    assert nested.compute().flatten() == {}


def test_snapshots_survive_tree_operations_without_arrays(metrics):
    snapshot = metrics.compute()
    structure = jax.tree.structure(snapshot)
    assert "loss" in repr(jax.tree.unflatten(structure, [None]))
    shapes = jax.eval_shape(lambda s: s, snapshot)
    assert "loss" in repr(shapes)
    assert "2.0" in repr(snapshot)
    assert jax.tree.structure(copy.copy(snapshot)) == structure


def test_snapshots_pickle(metrics):
    snapshot = metrics.compute()
    assert pickle.loads(pickle.dumps(snapshot)).flatten() == FLAT


def test_objects_can_be_copied(metrics):
    other = copy.deepcopy(metrics)
    clone = nnx.clone(metrics)
    metrics.reset()
    assert other.compute().flatten() == clone.compute().flatten() == FLAT


@pytest.mark.parametrize("windows", [1, 5])
def test_windows_add_up_to_the_epoch(mesh, windows):
    spec = {"x": ("mean", "sum", "count", "max", "min"), "r": "ratio", "v": Mean(shape=(2,)), "unseen": ("mean", "max")}
    metrics, epoch = (DistributedMetrics(spec, mesh=mesh) for _ in range(2))
    values = np.random.default_rng(0).lognormal(size=(windows, 16)).astype(np.float32)
    parts = []
    for x in values:
        for each in (metrics, epoch):
            each.update(x=x, r=(x, 3), v=x.reshape(8, 2))
        parts.append(metrics.flush())
    total, whole = sum(parts), epoch.flush()
    assert isinstance(total, Snapshot)
    assert total.flatten() == pytest.approx(whole.flatten(), rel=2**-45)
    np.testing.assert_equal(dict(total.count), dict(whole.count))
    assert np.isnan(total["unseen"]["max"])
    traced = jax.jit(lambda parts: sum(parts[1:], parts[0]))(parts)
    assert traced.flatten() == pytest.approx(whole.flatten(), rel=2**-45)
    with pytest.raises(ValueError, match="made in a trace, a sum of snapshots"):
        (parts[0] + parts[0]).per_device("x/mean")


def test_adding_carries_nan_and_inf(mesh):
    metrics = DistributedMetrics({"x": ("sum", "max")}, mesh=mesh)
    parts = []
    for value in (np.inf, 1.0, -np.inf):
        metrics.update(x=value)
        parts.append(metrics.flush())
    assert (parts[0] + parts[1])["x"] == {"sum": np.inf, "max": np.inf}
    assert np.isnan(sum(parts)["x"]["sum"])
    assert sum(parts)["x"]["max"] == np.inf


def test_stacked_windows_add_member_by_member():
    metrics = jax.vmap(lambda _: DistributedMetrics({"x": "sum"}))(jnp.zeros(3))
    metrics = jax.vmap(lambda m, x: (m.update(x=x), m)[1])(metrics, jnp.arange(3.0))
    both = metrics.compute() + metrics.flush()
    np.testing.assert_array_equal(both["x"], [0, 2, 4])
    with pytest.raises(ValueError, match=r"the left one has the leading dims \(3,\), the right one \(\)"):
        both + jax.tree.map(lambda x: x[0], both)


def test_snapshots_of_different_specs_do_not_add():
    one, other = DistributedMetrics({"x": "mean"}).compute(), DistributedMetrics({"x": "sum"}).compute()
    with pytest.raises(TypeError, match="unsupported operand"):
        1 + one
    with pytest.raises(ValueError, match="they are of different specs") as error:
        one + other
    assert "'x': mean() and sum()" in str(error.value)
    with pytest.raises(TypeError):
        one + 1


def test_rows_of_opposite_infinities_are_nan_without_a_warning(mesh):
    metrics = DistributedMetrics({"x": ("sum", "mean")}, mesh=mesh)
    metrics.update(x=np.array([np.inf, -np.inf, 1, 1, 1, 1, 1, 1], np.float32))
    assert np.isnan(list(metrics.compute()["x"].values())).all()


@pytest.mark.parametrize("traced", [False, True])
def test_populations_of_other_sizes_do_not_add(traced):
    population = jax.vmap(lambda seed: DistributedMetrics({"loss": "mean"}))(jnp.arange(3)).compute()
    add = jax.jit(lambda a, b: a + b) if traced else (lambda a, b: a + b)
    with pytest.raises(ValueError, match=r"the left one has the leading dims \(3,\), the right one \(\)"):
        add(population, jax.tree.map(lambda x: x[0], population))
    with pytest.raises(ValueError, match=r"the left one has the leading dims \(3,\), the right one \(1,\)"):
        add(population, jax.tree.map(lambda x: x[:1], population))


def test_results_by_flat_name_are_a_mapping():
    metrics = DistributedMetrics({"r": ("mean", "max")})
    metrics.update(r=jnp.arange(3.0))
    count = metrics.compute().count
    assert dict(count) == {"r/mean": 3.0, "r/max": 3.0}
    assert "r" in count
    assert count["r"] == count.get("r") == 3.0
    assert "s" not in count
    with pytest.raises(KeyError, match="this snapshot has 'r/mean', 'r/max'"):
        count["s"]
