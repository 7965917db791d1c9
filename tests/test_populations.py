"""Seeds over devices: an object with ``axis_name=()`` is a row of its own, whatever devices are mapped around it."""

import functools
import json

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from distributed_metrics import DistributedMetrics, Histogram, Quantile, count_collectives
from processes import run

SPEC = {
    "x": ("mean", "sum", "max", "min", "std", "last", "count"),
    "ratio": "ratio",
    "bins": Histogram((0.0, 50.0, 400.0)),
    "median": Quantile(0.5),
}
SEEDS, WINDOWS, STEPS = 16, 3, 4
X = np.random.default_rng(0).uniform(0, 400, (SEEDS, WINDOWS, STEPS)).astype(np.float32)


def train(x):
    """Of one seed: its windows, and all of it."""

    def window(metrics, x):
        metrics.update({"x": x, "ratio": (x, 2 * x), "bins": x, "median": x}, weight=x > 40)
        return metrics, metrics.compute()

    metrics, windows = jax.lax.scan(window, DistributedMetrics(SPEC, axis_name=()), x)
    return metrics.flush(), windows


def mesh_of(kind):
    return jax.make_mesh((8,), ("seeds",), axis_types=(kind,))


def mapped(kind, check_vma):
    mesh = mesh_of(kind)
    return jax.jit(
        jax.shard_map(
            jax.vmap(train), mesh=mesh, in_specs=P("seeds"), out_specs=P("seeds"), check_vma=check_vma
        )
    ), jax.device_put(X, NamedSharding(mesh, P("seeds")))  # fmt: skip


def under_set_mesh(*args):
    with jax.set_mesh(mesh_of(AxisType.Auto)):
        return jax.jit(jax.vmap(train))(*args)


WAYS = {
    "eager vmap": lambda: (jax.vmap(train), X),
    "jit": lambda: (jax.jit(jax.vmap(train)), X),
    "jit of sharded seeds": lambda: (
        jax.jit(jax.vmap(train)),
        jax.device_put(X, NamedSharding(mesh_of(AxisType.Auto), P("seeds"))),
    ),
    "jit with in_shardings": lambda: (
        jax.jit(jax.vmap(train), in_shardings=NamedSharding(mesh_of(AxisType.Auto), P("seeds"))),
        X,
    ),
    "set_mesh": lambda: (under_set_mesh, jax.device_put(X, NamedSharding(mesh_of(AxisType.Auto), P("seeds")))),
    "pmap": lambda: (jax.pmap(jax.vmap(train)), X.reshape(8, 2, WINDOWS, STEPS)),
    "shard_map": lambda: mapped(AxisType.Auto, True),
    "shard_map on explicit axes": lambda: mapped(AxisType.Explicit, True),
    "shard_map without types": lambda: mapped(AxisType.Auto, False),
}


@pytest.mark.parametrize("way", WAYS)
def test_each_seed_has_the_numbers_of_its_own_and_nothing_is_sent(way):
    program, x = WAYS[way]()
    if hasattr(program, "lower"):
        assert count_collectives(program, x) == {}
    whole, windows = program(x)
    values, counted = X.astype(np.float64).reshape(SEEDS, -1), (X > 40).reshape(SEEDS, -1)

    def of(result):
        return np.asarray(result).reshape(SEEDS, -1)[:, 0]

    expected = [values[i][counted[i]] for i in range(SEEDS)]
    for name, function in {"mean": np.mean, "sum": np.sum, "max": np.max, "min": np.min, "std": np.std}.items():
        np.testing.assert_allclose(of(whole["x"][name]), [function(one) for one in expected], rtol=1e-6)
    np.testing.assert_array_equal(of(whole["x"]["last"]), [one[-1] for one in expected])
    np.testing.assert_array_equal(of(whole["x"]["count"]), [len(one) for one in expected])
    np.testing.assert_array_equal(of(whole["ratio"]), 0.5)
    np.testing.assert_array_equal(of(whole["bins"]), [np.histogram(one, (0, 50, 400))[0][0] for one in expected])
    medians = [np.quantile(one, 0.5, method="lower") for one in expected]
    np.testing.assert_allclose(of(whole["median"]), medians, rtol=0.01)
    assert np.size(windows["x"]["mean"]) == SEEDS * WINDOWS
    np.testing.assert_array_equal(
        np.asarray(windows["x"]["count"]).reshape(SEEDS, WINDOWS)[:, 0], (X[:, 0] > 40).sum(axis=-1)
    )


def test_a_batch_of_a_sharded_seed_is_summed_as_exactly_as_any():
    by_seed = NamedSharding(mesh_of(AxisType.Auto), P("seeds"))
    x = jax.device_put(np.tile(np.array([2.0**24, 1, 1, -(2.0**24)], np.float32), (8, 1)), by_seed)

    def seed(x, spec=None, **axes):
        metrics = DistributedMetrics({"x": "mean"}, **axes)
        metrics.update(x=x, spec=spec)
        return metrics.flush()

    np.testing.assert_array_equal(jax.jit(jax.vmap(lambda x: seed(x, axis_name=())))(x)["x"], 0.5)
    np.testing.assert_array_equal(jax.jit(jax.vmap(lambda x: seed(x, spec=P())))(x)["x"], 0.5)


def test_seeds_that_jit_would_have_to_follow_on_explicit_axes_are_an_error_that_shows_the_way():
    x = jax.device_put(X, NamedSharding(mesh_of(AxisType.Explicit), P("seeds")))
    with pytest.raises(
        ValueError, match=r"Map the members over them: jax.shard_map\(jax.vmap\(train\), in_specs=P\('s"
    ):
        jax.jit(jax.vmap(train))(x)


def test_members_that_were_put_one_behind_the_other_are_an_error_that_shows_the_way():
    mesh = mesh_of(AxisType.Auto)

    def member(x):
        metrics = DistributedMetrics({"x": "mean"}, axis_name=())
        metrics.update(x=x)
        return metrics

    mapped = functools.partial(jax.shard_map, mesh=mesh, in_specs=P("seeds"), out_specs=P("seeds"))
    with pytest.raises(
        ValueError, match=r"32 words, and one of this spec has 4: .*\n.*jax.shard_map\(jax.vmap\(step\)"
    ):
        dict(jax.jit(mapped(lambda x: member(x).flush()))(np.arange(16.0)))
    with pytest.raises(ValueError, match=r"is one row, and this one has 8: .*\n.*jax.shard_map\(jax.vmap\(step\)"):
        jax.jit(mapped(member))(np.arange(16.0)).flush()
    with pytest.raises(ValueError, match=r"is one row, and this one has 8"):
        jax.jit(mapped(jax.vmap(member), out_specs=P(None, "seeds")))(np.arange(16.0)).flush()
    with pytest.raises(ValueError, match=r"axis_name=\(\)\): one row, .* leave mesh= out"):
        DistributedMetrics({"x": "mean"}, mesh=mesh, axis_name=())
    sharded = jax.device_put(np.arange(16.0), NamedSharding(mesh, P("seeds")))
    with pytest.raises(ValueError, match=r"A member of a population, axis_name=\(\), is updated under vmap"):
        DistributedMetrics({"x": "mean"}, axis_name=()).update(x=sharded)


def test_unstack_gives_windows_of_seeds_that_add_up():
    whole, windows = jax.jit(jax.vmap(train))(X)
    of_seeds = windows.unstack()
    assert len(of_seeds) == SEEDS
    assert of_seeds[2].unstack()[1]["x"]["count"] == (X[2, :2] > 40).sum()
    together = sum(whole.unstack())
    assert together["x"]["max"] == X.max()
    assert together["x"]["mean"] == pytest.approx(X[X > 40].mean(dtype=np.float64), rel=1e-7)
    with pytest.raises(ValueError, match="this is one snapshot, with no dims in front"):
        together.unstack()


def test_unstack_in_a_trace():
    @jax.jit
    def both(x):
        metrics = jax.vmap(lambda _: DistributedMetrics({"x": ("mean", "max")}, axis_name=()))(x)
        population = jax.vmap(lambda metrics, x: (metrics.update(x=x), metrics)[1])(metrics, x).compute()
        return sum(population.unstack())

    assert both(X)["x"] == {"mean": pytest.approx(X.mean(dtype=np.float64), rel=1e-7), "max": X.max()}


def test_members_on_devices_of_several_processes_are_an_error_that_shows_the_way():
    for rank, printed in enumerate(run("sharded_seeds.py", processes=2)):
        error, numbers = json.loads(printed)
        assert "its members lie on devices of several processes" in error, rank
        assert "out_shardings=NamedSharding(mesh, P())" in error
        assert numbers == [0.5, 2.5, 4.5, 6.5]
