"""Guards, traces within traces, other configurations: what surrounds an object while it lives."""

import os
import pathlib
import re
import subprocess
import sys

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from distributed_metrics import DistributedMetrics, Histogram, Quantile, count_collectives, programs
from distributed_metrics.audit import compiled_text
from ways import make_mesh

SPEC = {"x": ("mean", "max"), "n": "sum"}


@pytest.fixture(params=[False, True], ids=["auto", "explicit"])
def mesh(request):
    return make_mesh({"data": 8}, explicit=request.param)


def test_nothing_is_transferred_implicitly(mesh):
    x = jax.device_put(np.arange(16, dtype=np.float32), NamedSharding(mesh, P("data")))
    scalar = jax.device_put(np.float32(2.0), NamedSharding(mesh, P()))
    with jax.transfer_guard("disallow"):
        metrics = DistributedMetrics(SPEC, mesh=mesh)
        single = DistributedMetrics(SPEC)
        metrics.update(x=x, n=scalar)
        metrics.update(x=0.5, n=np.int64(3), weight={"x": 2.0})
        metrics.update(x=np.ones(16), weight=np.ones(16, bool))
        single.update(x=0.5, n=3)
        nnx.jit(lambda m, x: m.update(x=x, n=1))(metrics, x)
        assert metrics.compute().flatten() == {"x/mean": 257.0 / 50, "x/max": 15.0, "n": 6.0}
        assert metrics.flush()["n"] == 6.0
        assert single.flush()["n"] == 3.0
        metrics.reset()


def test_update_and_flush_do_not_wait_for_the_device():
    """While the device is busy, update and flush return, and the snapshot is not ready."""
    metrics = DistributedMetrics({"x": "mean"})

    @jax.jit
    def slow(x):
        return jax.lax.fori_loop(0, 400, lambda i, x: jnp.tanh(x @ x), x)[0, 0]

    x = jnp.eye(400)
    metrics.update(x=slow(x))
    metrics.flush()["x"]
    busy = slow(x)
    metrics.update(x=busy)
    snapshot = metrics.flush()
    was_ready = snapshot.is_ready() or busy.is_ready()
    assert np.isfinite(snapshot["x"])
    assert not was_ready
    assert snapshot.is_ready()


@pytest.mark.parametrize("fresh", [False, True], ids=["compute", "flush"])
def test_eager_flush_costs_no_collective(mesh, fresh):
    """The one program that an eager compute() or flush() runs."""
    metrics = DistributedMetrics(SPEC, mesh=mesh)
    tables = metrics._tables()
    program = programs.read(metrics._plan, metrics._situation(tables).view, fresh)
    assert count_collectives(program, tables) == {}
    words, new = program(tables)
    assert len(jax.tree.leaves(words)) == 1
    assert words.sharding.is_equivalent_to(NamedSharding(mesh, P("data")), words.ndim)
    assert (new is not None) == fresh


@pytest.mark.parametrize(
    "transform",
    [
        lambda metrics, x: jax.grad(lambda x: (metrics.update(x=x), x)[1])(x),
        lambda metrics, x: nnx.value_and_grad(lambda x: (metrics.update(x=x), x)[1])(x),
        lambda metrics, x: jax.vmap(lambda x: metrics.update(x=x))(x[None]),
        lambda metrics, x: jax.lax.scan(lambda c, x: (metrics.update(x=x), (c, c))[1], 0, x[None])[0],
        lambda metrics, x: jax.lax.cond(x > 0, lambda: metrics.update(x=x), lambda: None),
        lambda metrics, x: jax.jit(lambda: metrics.update(x=1.0))(),
        lambda metrics, x: jax.jit(lambda x: metrics.update(x=x))(x),
        lambda metrics, x: jax.jit(lambda: metrics.reset())(),
        lambda metrics, x: jax.jit(lambda: metrics.flush()["n"])(),
    ],
    ids=[
        "grad",
        "value_and_grad",
        "vmap",
        "scan",
        "cond",
        "captured",
        "captured-traced",
        "captured-reset",
        "captured-flush",
    ],
)
@pytest.mark.parametrize("outer", [lambda f: f, nnx.jit], ids=["eager", "nnx.jit"])
@pytest.mark.parametrize("rows", [1, 8])
def test_an_update_inside_an_inner_trace_is_an_error_that_shows_the_way_out(transform, outer, rows):
    metrics = DistributedMetrics(SPEC, mesh=make_mesh({"data": 8}, explicit=False) if rows == 8 else None)
    metrics.update(x=3.0)
    with pytest.raises(flax.errors.TraceContextError) as error:
        outer(transform)(metrics, jnp.float32(1.0))
    assert "the accumulators belong to an outer trace" in str(error.value)
    assert re.search(r"has_aux=True|nnx.jit\(lambda metrics: metrics.(reset|flush)\(\)\)\(metrics\)", str(error.value))
    assert metrics.compute().flatten() == {"x/mean": 3.0, "x/max": 3.0}


@pytest.mark.parametrize("context", [jax.disable_jit, lambda: jax.enable_x64(False)], ids=["disable_jit", "eager"])
def test_an_object_may_be_made_where_only_vmap_is(context):
    def seed(x):
        metrics = DistributedMetrics({"x": ("mean", "max")})
        metrics.update(x=x)
        return metrics.flush()

    with context():
        windows = jax.vmap(seed)(np.arange(6.0).reshape(3, 2))
    assert windows["x"]["mean"].tolist() == [0.5, 2.5, 4.5]


def test_an_object_of_shapes_says_that_it_is_one():
    shapes = jax.eval_shape(lambda: DistributedMetrics({"loss": "mean"}))
    for call in (shapes.flush, shapes.reset, lambda: shapes.update(loss=1.0)):
        with pytest.raises(RuntimeError, match=r"shapes only, of jax.eval_shape or nnx.eval_shape.\n  Make a real one"):
            call()


def test_all_accumulators_lie_as_the_object_says(mesh):
    spec = {"x": ("mean", "max", "std", "last"), "h": Histogram((0.0, 1.0))}
    metrics = DistributedMetrics(spec, mesh=mesh)
    for table in jax.tree.leaves(nnx.state(metrics)):
        assert table.sharding.is_equivalent_to(metrics.sharding, table.ndim)
    x = jax.device_put(np.arange(16, dtype=np.float32), NamedSharding(mesh, P("data")))
    step = jax.jit(
        lambda metrics, x: (metrics.update(x=x, h=x), metrics)[1],
        in_shardings=(metrics.sharding, x.sharding),
        out_shardings=metrics.sharding,
        donate_argnums=0,
    )
    assert count_collectives(step, metrics, x) == {}
    assert step(metrics, x).flush()["x"]["mean"] == 7.5
    assert DistributedMetrics(spec).sharding is None


def test_compute_inside_a_jitted_function_that_captured_the_object_is_a_constant_of_it():
    metrics = DistributedMetrics(SPEC, mesh=make_mesh({"data": 8}, explicit=False))
    metrics.update(x=3.0)
    captured = jax.jit(lambda: metrics.compute()["x"]["mean"])
    assert captured() == 3.0


def test_an_object_with_a_mesh_is_garbage_collected():
    import gc
    import weakref

    metrics = DistributedMetrics(SPEC, mesh=make_mesh({"data": 8}, explicit=False))
    metrics.update(x=1.0)
    metrics.flush()
    gone = weakref.ref(metrics)
    del metrics
    gc.collect()
    assert gone() is None


def test_the_state_is_a_few_variables_whatever_the_number_of_metrics():
    for k in (1, 20, 500):
        metrics = DistributedMetrics({f"m{i}": "mean" for i in range(k)})
        assert len(jax.tree.leaves(nnx.state(metrics))) == 1
    metrics = DistributedMetrics({f"m{i}": ("mean", "sum", "max", "min", "count") for i in range(50)} | {"r": "ratio"})
    assert len(jax.tree.leaves(nnx.state(metrics))) == 2


def test_two_objects_of_equal_specs_share_compiled_programs():
    traces = []

    @nnx.jit
    def step(metrics, x):
        traces.append(1)
        metrics.update(x=x)

    for _ in range(3):
        metrics = DistributedMetrics({"x": "mean"})
        step(metrics, jnp.ones(3))
        metrics.flush()
        step(metrics, jnp.ones(3))
        assert metrics.compute()["x"] == 1.0
    assert len(traces) == 1


def test_the_state_does_not_depend_on_the_order_of_a_spec():
    """Processes whose dicts are in different orders still mean the same by a slot."""
    one = DistributedMetrics({"a": "mean", "b": ("max", "sum"), "c": "mean"})
    other = DistributedMetrics({"c": "mean", "b": ("sum", "max"), "a": "mean"})
    one.update(a=1.0, b=2.0, c=3.0)
    nnx.update(other, nnx.state(one))
    assert other.compute().flatten() == one.compute().flatten() == {"a": 1.0, "b/max": 2.0, "b/sum": 2.0, "c": 3.0}


def test_two_thousand_metrics_in_one_update():
    spec = {f"layer{i:04}": {"norm": "mean"} for i in range(2000)}
    metrics = DistributedMetrics(spec)
    values = {name: {"norm": np.float32(i)} for i, name in enumerate(spec)}
    nnx.jit(lambda m, v: m.update(v))(metrics, values)
    flat = metrics.flush().flatten()
    assert flat == {f"layer{i:04}/norm": float(i) for i in range(2000)}


def test_print_shows_a_table_of_names_accumulators_rows_and_mesh(mesh):
    shown = str(DistributedMetrics({"loss": "mean", "reward": ("max", "min")}, mesh=mesh))
    assert shown == (
        "DistributedMetrics, 8 rows over data of the mesh (data: 8)\n"
        "  loss        mean\n  reward/max  max\n  reward/min  min"
    )
    assert "1 row" in repr(DistributedMetrics({"loss": "mean"}))
    assert "stateless" in str(DistributedMetrics())
    assert "loss" in str(nnx.eval_shape(lambda: DistributedMetrics({"loss": "mean"}, mesh=mesh)))


def test_count_collectives_sees_those_of_any_program(mesh):
    x = jax.device_put(np.arange(16, dtype=np.float32), NamedSharding(mesh, P("data")))
    assert count_collectives(lambda x: jnp.sum(x), x) == {"all-reduce": 1}
    assert count_collectives(jax.jit(lambda x: x * 2), x) == {}
    mapped = jax.shard_map(
        lambda x: (jax.lax.all_gather(x, "data", to="invarying"), jax.lax.ppermute(x, "data", [(0, 1)])),
        mesh=mesh, in_specs=P("data"), out_specs=(P(), P("data")),
    )  # fmt: skip
    assert count_collectives(mapped, x) == {"all-gather": 1, "collective-permute": 1}
    assert count_collectives(jax.pmap(lambda x: jax.lax.psum(x, "i"), axis_name="i"), np.ones((8, 2))) == {
        "all-reduce": 1
    }
    many = jax.jit(lambda *xs: [jnp.sum(x) for x in xs])
    assert count_collectives(many, *[x * i for i in range(9)])["all-reduce"] >= 1
    assert "all-reduce" in compiled_text(
        lambda x: jnp.sum(x), jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
    )


HERE = pathlib.Path(__file__).parent
FEW_WAYS = "explicit-2d or jax.shard_map-2d"
NUMBERS = "shape_and_dtype and jit or weighted or removes or ten_million or exact or large or numbers_count"
STATISTICS = "certified and one or of_one_element or weight_in_each_bin or a_million_updates or float64-8 or 48_bits"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("environment", "chosen", "files"),
    [
        ({"JAX_ENABLE_X64": "1"}, f"({FEW_WAYS}) and float64_numpy or {NUMBERS}", ["test_ways.py", "test_values.py"]),
        (
            {"XLA_FLAGS": "--xla_cpu_enable_fast_math=true"},
            f"test_values and ({NUMBERS}) or test_statistics and ({STATISTICS})",
            ["test_values.py", "test_statistics.py"],
        ),
    ],
    ids=["x64", "fast-math"],
)
def test_the_numbers_are_the_same_in_other_configurations(environment, chosen, files):
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", chosen, *files]
    done = subprocess.run(
        command, cwd=HERE, env=os.environ | environment, timeout=400, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-5000:]
    assert " passed" in done.stdout


def test_updates_beside_gradients_are_refused_with_the_way_out_or_made_without_gradients():
    spec = {"a": "mean", "b": "max", "c": "var", "d": Histogram([0, 1]), "e": Quantile(0.5), "f": "last"}
    metrics = DistributedMetrics(spec)

    def captured(metrics, w):
        def loss_fn(w):
            loss = (w**2).sum()
            metrics.update(dict.fromkeys(spec, loss))
            return loss

        return jax.grad(loss_fn)(w)

    for way in (captured, jax.jit(captured), nnx.jit(captured)):
        with pytest.raises(flax.errors.TraceContextError, match=r"Of jax\.grad return the values"):
            way(metrics, jnp.ones(3))

    def made_inside(w):
        inside = DistributedMetrics(spec)
        loss = (w**2).sum()
        inside.update(dict.fromkeys(spec, loss))
        return loss, inside.flush()

    gradient, snapshot = jax.jit(jax.grad(made_inside, has_aux=True))(jnp.ones(3))
    assert gradient.tolist() == [2.0, 2.0, 2.0]
    assert snapshot["a"] == snapshot["b"] == snapshot["f"] == 3.0
