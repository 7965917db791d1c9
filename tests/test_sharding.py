"""Values of any sharding: counted once in the global view, and never moved."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from distributed_metrics import DistributedMetrics, count_collectives
from distributed_metrics.audit import compiled_text
from ways import make_mesh

AXES = {"data": 2, "fsdp": 2, "context": 2, "tensor": 1, "expert": 1}
SPEC = {"x": ("mean", "sum", "max", "min"), "mask": ("mean", "count"), "integers": "sum"}
SHAPE = (16, 8)
rng = np.random.default_rng(0)
X = rng.lognormal(size=SHAPE).astype(np.float32)
MASK = rng.random(SHAPE) < 0.5
WEIGHT = rng.random(SHAPE).astype(np.float32)
INTEGERS = rng.integers(-(2**31), 2**31, SHAPE).astype(np.int32)

SHARDINGS = [
    P(("data", "fsdp"), "context"),
    P(("context", "data"), "fsdp"),
    P(),
    *(
        pytest.param(spec, marks=pytest.mark.slow)
        for spec in (P("data"), P(None, "context"), P(("data", "fsdp", "context")))
    ),
]


def step(metrics, x, mask, integers, weight, *, spec=None):
    y = 2 * x - x  # an intermediate, whose sharding nobody states
    metrics.update({"x": y, "mask": mask, "integers": integers}, weight={"x": weight}, spec=spec)


def assert_right(flat, rel):
    weight, x = WEIGHT.astype(np.float64), X.astype(np.float64)
    assert flat["x/mean"] == pytest.approx((weight * x).sum() / weight.sum(), rel=rel)
    assert flat["x/sum"] == pytest.approx((weight * x).sum(), rel=rel)
    assert (flat["x/max"], flat["x/min"]) == (X.max(), X.min())
    assert (flat["mask/mean"], flat["mask/count"]) == (MASK.mean(), MASK.size)
    assert flat["integers"] == INTEGERS.sum(dtype=np.int64)


def placed(mesh, spec):
    return [jax.device_put(array, NamedSharding(mesh, spec)) for array in (X, MASK, INTEGERS, WEIGHT)]


def collective_lines(text):
    return [line for line in text.splitlines() if re.search(r"(all-|collective-|reduce-scatter)[a-z-]*\(", line)]


@pytest.mark.parametrize("spec", SHARDINGS, ids=str)
def test_explicit_axes_of_any_sharding_are_silent_and_counted_once(spec):
    mesh = make_mesh(AXES, explicit=True)
    metrics = DistributedMetrics(SPEC, mesh=mesh)
    program = nnx.jit(step)
    values = placed(mesh, spec)
    program(metrics, *values)
    assert_right(metrics.flush().flatten(), rel=2**-45)
    assert count_collectives(program, metrics, *values) == {}


@pytest.mark.parametrize("spec", SHARDINGS, ids=str)
def test_auto_axes_with_spec_are_silent_and_counted_once(spec):
    mesh = make_mesh(AXES, explicit=False)
    metrics = DistributedMetrics(SPEC, mesh=mesh)
    program = nnx.jit(lambda metrics, *values: step(metrics, *values, spec=spec))
    values = placed(mesh, spec)
    program(metrics, *values)
    assert_right(metrics.flush().flatten(), rel=2**-45)
    assert count_collectives(program, metrics, *values) == {}


@pytest.mark.parametrize("spec", SHARDINGS, ids=str)
def test_auto_axes_without_spec_reduce_to_accumulators_and_move_no_value(spec):
    mesh = make_mesh(AXES, explicit=False)
    metrics = DistributedMetrics(SPEC, mesh=mesh)
    program = nnx.jit(step)
    values = placed(mesh, spec)
    program(metrics, *values)
    assert_right(metrics.flush().flatten(), rel=3e-7)
    assert set(count_collectives(program, metrics, *values)) <= {"all-reduce"}
    for line in collective_lines(compiled_text(program, metrics, *values)):
        types = line.split(" = ")[1].split(" all-reduce")[0]
        shapes = re.findall(r"\[([\d,]*)\]", types)
        assert shapes, line
        assert all(shape == "" for shape in shapes), f"more than scalars is sent: {line}"


@pytest.mark.parametrize("spec", SHARDINGS, ids=str)
def test_values_alike_are_not_moved_to_be_reduced_together(spec):
    mesh = make_mesh(AXES, explicit=False)
    metrics = DistributedMetrics(dict.fromkeys("abcd", "mean"), mesh=mesh)
    program = nnx.jit(lambda metrics, values: metrics.update(values))
    values = {name: jax.device_put(X, NamedSharding(mesh, spec)) for name in "abcd"}
    assert set(count_collectives(program, metrics, values)) <= {"all-reduce"}
    for line in collective_lines(compiled_text(program, metrics, values)):
        assert "f32[16" not in line
        assert "f32[4" not in line.split(" all-reduce")[0]


@pytest.mark.parametrize("spec", SHARDINGS, ids=str)
@pytest.mark.parametrize("explicit", [False, True], ids=["auto", "explicit"])
def test_eager_values_of_any_sharding_count_once(spec, explicit):
    mesh = make_mesh(AXES, explicit)
    metrics = DistributedMetrics(SPEC, mesh=mesh)
    x, mask, integers, weight = placed(mesh, spec)
    metrics.update({"x": x, "mask": mask, "integers": integers}, weight={"x": weight})
    assert_right(metrics.flush().flatten(), rel=2**-45)


@pytest.mark.parametrize("devices", [0, 8])
def test_a_host_buffer_may_be_refilled_after_an_update(devices):
    """JAX alone would read some of it later on a CPU, where it may share the memory."""
    metrics = DistributedMetrics({"a": "mean"}, mesh=make_mesh({"data": 8}, explicit=False) if devices else None)
    buffer = np.empty(2**20, np.float32)
    for i in range(20):
        buffer[:] = i
        metrics.update(a=buffer)
    buffer[:] = -1
    assert metrics.flush()["a"] == pytest.approx(9.5, rel=1e-6)


def test_eager_values_from_elsewhere_count_once():
    """One device of the mesh, another mesh on the same devices, the host; each in full, each once."""
    mesh = make_mesh({"data": 8}, explicit=False)
    other = make_mesh({"a": 2, "b": 4}, explicit=False)
    metrics = DistributedMetrics({"x": ("sum", "count")}, mesh=mesh)
    x = np.arange(24.0, dtype=np.float32)
    for value in (
        jnp.asarray(x),
        jax.device_put(x, jax.devices()[3]),
        jax.device_put(x, NamedSharding(other, P("a"))),
        jax.device_put(x, NamedSharding(other, P())),
        jax.pmap(lambda x: x)(x.reshape(8, 3)),
        x,
        x[:7],
        jnp.float32(1.0),
        2,
    ):
        metrics.update(x=value)
        size = np.size(value)
        snapshot = metrics.flush()
        assert snapshot["x"] == {"sum": float(np.sum(np.asarray(value, np.float64))), "count": size}


@pytest.mark.parametrize("leading", [1, 3, 7, 9, 12])
@pytest.mark.parametrize("explicit", [False, True], ids=["auto", "explicit"])
def test_leading_dims_that_the_rows_do_not_divide_count_once(leading, explicit):
    mesh = make_mesh({"data": 8}, explicit)
    metrics = DistributedMetrics({"x": ("sum", "count", "max")}, mesh=mesh)
    x = jax.device_put(np.arange(leading * 5, dtype=np.float32).reshape(leading, 5), NamedSharding(mesh, P()))
    nnx.jit(lambda m, x: m.update(x=x))(metrics, x)
    metrics.update(x=x)
    assert metrics.compute()["x"] == {"sum": 2 * float(x.sum()), "count": 10 * leading, "max": 5 * leading - 1}


@pytest.mark.parametrize("explicit", [False, True], ids=["auto", "explicit"])
def test_replicated_values_scalars_and_constants_count_once_in_the_global_view(explicit):
    mesh = make_mesh({"data": 4, "model": 2}, explicit)
    metrics = DistributedMetrics({"a": "sum", "b": "sum", "c": "sum", "d": "count", "e": "sum"}, mesh=mesh)
    x = jax.device_put(np.ones(16, np.float32), NamedSharding(mesh, P("data")))
    constant = rng.lognormal(size=800)

    @nnx.jit
    def program(metrics, x):
        metrics.update(a=jnp.sum(x), b=0.1, c=np.int64(2**40), d=np.ones((3, 5)), e=constant)

    program(metrics, x)
    program(metrics, x)
    snapshot = metrics.flush()
    assert snapshot["b"] == pytest.approx(0.2, rel=2**-45)
    assert snapshot["e"] == pytest.approx(2 * constant.sum(), rel=2**-45)
    assert (snapshot["a"], snapshot["c"], snapshot["d"]) == (32.0, 2.0**41, 30.0)


@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
def test_a_spec_for_all_values_says_nothing_of_scalars(jitted):
    metrics = DistributedMetrics({"x": "sum", "a": "sum", "b": "sum"}, mesh=make_mesh({"data": 8}, explicit=False))
    x = jax.device_put(X, NamedSharding(make_mesh({"data": 8}, explicit=False), P("data")))

    def update(metrics, x, a):
        metrics.update(x=x, a=a, b=2.0, spec=P("data"))

    (nnx.jit(update) if jitted else update)(metrics, x, jnp.float32(3.0))
    assert metrics.compute()["x"] == pytest.approx(X.sum(dtype=np.float64), rel=2**-45)
    assert (metrics.compute()["a"], metrics.compute()["b"]) == (3.0, 2.0)


@pytest.mark.parametrize("spec", [P(), P("data"), P("model")], ids=str)
def test_a_weight_on_explicit_axes_may_lie_otherwise_than_its_value(spec):
    mesh = make_mesh({"data": 4, "model": 2}, explicit=True)
    metrics = DistributedMetrics({"x": "sum"}, mesh=mesh)
    x, weight = (jax.device_put(one, NamedSharding(mesh, s)) for one, s in ((X, P("data", "model")), (WEIGHT, spec)))
    nnx.jit(lambda metrics, x, weight: metrics.update(x=x, weight=weight))(metrics, x, weight)
    expected = (X.astype(np.float64) * WEIGHT).sum()
    assert metrics.compute()["x"] == pytest.approx(expected, rel=2**-45)


@pytest.mark.parametrize("explicit", [False, True], ids=["auto", "explicit"])
def test_values_of_one_shape_on_a_device_that_lie_differently_count_each_in_its_way(explicit):
    mesh = make_mesh({"data": 8}, explicit)
    metrics = DistributedMetrics({"a": "sum", "b": "sum"}, mesh=mesh)
    specs = {"a": P("data"), "b": P()}
    values = {"a": np.arange(16, dtype=np.float32), "b": np.ones(2, np.float32)}
    values = {name: jax.device_put(value, NamedSharding(mesh, specs[name])) for name, value in values.items()}
    nnx.jit(lambda m, v: m.update(v, spec=None if explicit else specs))(metrics, values)
    assert dict(metrics.compute()) == {"a": 120.0, "b": 2.0}


def test_axis_name_spreads_rows_over_some_axes_only():
    """Devices along the other axes share a row: what they hold alike counts once, what they share out is merged."""
    mesh = make_mesh({"data": 4, "model": 2}, explicit=True)
    metrics = DistributedMetrics({"x": ("sum", "max")}, mesh=mesh, axis_name="data")
    assert [v.shape[0] for v in jax.tree.leaves(nnx.state(metrics))] == [4, 4]
    for spec in (P("data"), P("data", "model"), P(None, "model"), P()):
        x = jax.device_put(X, NamedSharding(mesh, spec))
        nnx.jit(lambda m, x: m.update(x=x))(metrics, x)
        metrics.update(x=x)
        total = X.sum(dtype=np.float64)
        assert metrics.flush()["x"] == {"sum": pytest.approx(2 * total, rel=2**-45), "max": X.max()}
    x = jax.device_put(X, NamedSharding(mesh, P("data")))
    assert count_collectives(nnx.jit(lambda m, x: m.update(x=x)), metrics, x) == {}


def test_ratio_parts_may_be_sharded_differently():
    mesh = make_mesh({"data": 8}, explicit=True)
    metrics = DistributedMetrics({"r": "ratio"}, mesh=mesh)
    x = jax.device_put(X, NamedSharding(mesh, P("data")))
    nnx.jit(lambda m, x: m.update(r=(x, jnp.float32(100.0))))(metrics, x)
    metrics.update(r=(x, 100))
    metrics.update(r=(x, 100), weight=0.5)
    metrics.update(r=(x, 100), weight=np.array(True))
    snapshot = metrics.flush()
    assert snapshot["r"] == pytest.approx(X.sum(dtype=np.float64) / 100, rel=2**-45)
    assert snapshot.count["r"] == 350


def test_partly_mapped_code_spreads_over_the_axes_that_are_left():
    """A shard_map over some axes only: each of its devices' values count, and once along the others."""
    mesh = make_mesh({"data": 4, "model": 2}, explicit=False)
    metrics = DistributedMetrics({"x": ("sum", "count")}, mesh=mesh)
    x = jax.device_put(X, NamedSharding(mesh, P("data")))

    @jax.jit
    def program(metrics, x):
        graphdef, state = nnx.split(metrics)

        def local(state, x):
            inner = nnx.merge(graphdef, state)
            inner.update(x=jnp.sum(x))
            inner.update(x=x, spec=P(None, "model"))
            return nnx.state(inner)

        state = jax.shard_map(
            local, mesh=mesh, in_specs=(P("data"), P("data")), out_specs=P("data"), axis_names={"data"}
        )(state, x)
        return nnx.merge(graphdef, state)

    metrics = program(metrics, x)
    assert metrics.flush()["x"] == {"sum": pytest.approx(2 * X.sum(dtype=np.float64), rel=1e-6), "count": 4 + X.size}


@pytest.mark.parametrize("explicit", [False, True], ids=["auto", "explicit"])
def test_code_that_is_mapped_over_all_axes_of_the_rows_has_a_global_view_of_the_others(explicit):
    mesh = make_mesh({"data": 4, "model": 2}, explicit)
    metrics = DistributedMetrics({"x": ("sum", "count", "max", "last")}, mesh=mesh, axis_name="data")
    x = jax.device_put(X, NamedSharding(mesh, P("data", "model")))

    @jax.jit
    def program(metrics, x):
        def local(metrics, x):
            metrics.update(x=x)
            before = metrics.flush()
            metrics.update(x=x, spec=P(None, "model"))
            metrics.update(x=2.0)
            return metrics, before, metrics.compute()

        split = P("data")
        return jax.shard_map(
            local, mesh=mesh, in_specs=(split, split), out_specs=(split, P(), P()), axis_names={"data"}
        )(metrics, x)

    metrics, first, second = program(metrics, x)
    total = X.sum(dtype=np.float64)
    once = {"sum": pytest.approx(total, rel=1e-6), "count": X.size, "max": X.max(), "last": X[-1, -1]}
    assert first["x"] == once
    for snapshot in (second, metrics.compute()):
        assert snapshot["x"] == {**once, "sum": pytest.approx(total + 8, rel=1e-6), "count": X.size + 4, "last": 2.0}


def test_in_code_that_is_mapped_over_the_rows_a_value_over_other_axes_is_merged_and_not_moved():
    mesh = make_mesh({"data": 4, "model": 2}, explicit=False)
    metrics = DistributedMetrics({"x": ("sum", "count", "max", "last")}, mesh=mesh, axis_name="data")
    x = jax.device_put(X, NamedSharding(mesh, P("data", "model")))

    @jax.jit
    def program(metrics, x):
        def local(metrics, x):
            metrics.update(x=x, spec=P(None, "model"))
            return metrics

        split = P("data")
        return jax.shard_map(local, mesh=mesh, in_specs=(split, split), out_specs=split, axis_names={"data"})(
            metrics, x
        )

    (line,) = collective_lines(compiled_text(program, metrics, x))
    assert "f32[4," not in line, f"more than accumulators is sent: {line}"
    assert program(metrics, x).compute()["x"]["sum"] == pytest.approx(X.sum(dtype=np.float64), rel=2**-45)


def test_in_code_that_is_mapped_over_the_rows_types_say_how_values_lie_over_explicit_axes():
    mesh = make_mesh({"data": 4, "model": 2}, explicit=True)
    metrics = DistributedMetrics({"x": "sum"}, mesh=mesh, axis_name="data")

    @jax.jit
    def program(metrics, x):
        def local(metrics, x):
            metrics.update(x=jax.sharding.reshard(x, P(None, "model")))
            return metrics

        split = P("data")
        return jax.shard_map(local, mesh=mesh, in_specs=(split, split), out_specs=split, axis_names={"data"})(
            metrics, x
        )

    metrics = program(metrics, jax.device_put(X, NamedSharding(mesh, P("data"))))
    assert metrics.compute()["x"] == pytest.approx(X.sum(dtype=np.float64), rel=2**-45)


def test_the_last_element_is_that_of_the_last_device_also_where_xla_reduces():
    mesh = make_mesh({"data": 2, "fsdp": 2, "model": 2}, explicit=False)
    metrics = DistributedMetrics({"x": "last"}, mesh=mesh)
    x = jax.device_put(X, NamedSharding(mesh, P("data")))
    split = P("data")

    def local(metrics, x):
        metrics.update(x=x)
        return metrics

    mapped = jax.shard_map(local, mesh=mesh, in_specs=(split, split), out_specs=split, axis_names={"data"})
    assert jax.jit(mapped)(metrics, x).compute()["x"] == X[-1, -1]


def test_mesh_is_that_of_set_mesh_eagerly_and_in_a_trace():
    mesh = make_mesh({"data": 8}, explicit=True)
    with jax.set_mesh(mesh):
        outside = DistributedMetrics({"x": "sum"})
        inside = nnx.jit(lambda: DistributedMetrics({"x": "sum"}))()
    for metrics in (outside, inside):
        (rows,) = jax.tree.leaves(nnx.state(metrics))
        assert rows.sharding.spec[0] == "data"
        metrics.update(x=jax.device_put(X, NamedSharding(mesh, P("data"))))
        assert metrics.flush()["x"] == pytest.approx(X.sum(dtype=np.float64), rel=2**-45)


@pytest.mark.parametrize("explicit", [False, True], ids=["auto", "explicit"])
@pytest.mark.parametrize("check_vma", [True, False])
def test_made_inside_a_shard_map(explicit, check_vma):
    mesh = make_mesh({"data": 4, "model": 2}, explicit)
    x = jax.device_put(X, NamedSharding(mesh, P(("data", "model"))))

    def local(x):
        metrics = DistributedMetrics({"x": ("sum", "max")})
        jax.lax.fori_loop(0, 1, lambda i, m: (m.update(x=x), m)[1], metrics)
        metrics.update(x=x)
        return metrics, metrics.compute()

    both = P(("data", "model"))
    program = jax.shard_map(local, mesh=mesh, in_specs=both, out_specs=(both, P()), check_vma=check_vma)
    metrics, snapshot = jax.jit(program)(x)
    wanted = {"sum": pytest.approx(X.sum(dtype=np.float64), rel=2**-45), "max": X.max()}
    assert snapshot["x"] == wanted
    assert metrics.compute()["x"] == wanted
    metrics.update(x=x)
    nnx.jit(lambda m, x: m.update(x=x, spec=None if explicit else both))(metrics, x)
    assert metrics.flush()["x"]["sum"] == pytest.approx(3 * X.sum(dtype=np.float64), rel=2**-45)
    assert metrics.flush()["x"]["sum"] == 0


def test_annotations_give_shardings_without_touching_a_device():
    mesh = make_mesh({"data": 4, "model": 2}, explicit=False)
    abstract = nnx.eval_shape(lambda: DistributedMetrics({"x": ("mean", "max")}, mesh=mesh))
    specs: Any = nnx.get_partition_spec(nnx.state(abstract))
    shapes = nnx.state(abstract)
    variable: Any
    for name, variable in shapes.items():
        assert isinstance(variable.get_raw_value(), jax.ShapeDtypeStruct)
        spec = P(("data", "model"), *(None,) * (len(variable.shape) - 1))
        assert specs[name].get_raw_value() == spec
        assert variable.get_raw_value().sharding == NamedSharding(mesh, spec)
    states = nnx.state(abstract, nnx.metrics.MetricState)
    assert len(states) == len(shapes) == 2


def test_a_step_compiles_ahead_of_time_from_annotations_alone():
    mesh = make_mesh({"data": 8}, explicit=False)
    abstract = nnx.eval_shape(lambda: DistributedMetrics({"x": "mean"}, mesh=mesh))
    x = jax.device_put(X, NamedSharding(mesh, P("data")))

    def program(metrics, x):
        metrics.update(x=x)
        return metrics

    shape = jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
    compiled = jax.jit(program).lower(abstract, shape).compile()
    metrics = compiled(DistributedMetrics({"x": "mean"}, mesh=mesh), x)
    metrics = compiled(metrics, x)
    assert metrics.flush()["x"] == pytest.approx(X.mean(dtype=np.float64), rel=2**-45)


def test_state_shardings_serve_as_in_and_out_shardings():
    mesh = make_mesh({"data": 4, "model": 2}, explicit=False)
    metrics = DistributedMetrics({"x": "mean"}, mesh=mesh)
    graphdef, state = nnx.split(metrics)
    shardings = nnx.get_named_sharding(state, mesh)
    batch = NamedSharding(mesh, P("data"))

    def program(state, x):
        inner = nnx.merge(graphdef, state)
        inner.update(x=x, spec=P("data"))
        return nnx.state(inner)

    jitted = jax.jit(program, in_shardings=(shardings, batch), out_shardings=shardings, donate_argnums=0)
    state = jitted(state, jax.device_put(X, batch))
    nnx.update(metrics, state)
    assert metrics.flush()["x"] == pytest.approx(X.mean(dtype=np.float64), rel=2**-45)


def test_mixed_axis_types_are_counted_once():
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Explicit, AxisType.Auto))
    metrics = DistributedMetrics({"x": ("sum", "count")}, mesh=mesh)
    x = jax.device_put(X, NamedSharding(mesh, P("data")))
    nnx.jit(lambda m, x: m.update(x=x))(metrics, x)
    assert metrics.flush()["x"] == {"sum": pytest.approx(X.sum(dtype=np.float64), rel=1e-6), "count": X.size}


@pytest.mark.parametrize("shape", [(64,), (16, 4), ()], ids=str)
def test_one_row_under_jit_on_auto_axes_reduces_and_moves_no_value(shape):
    mesh = make_mesh({"data": 8}, explicit=False)
    metrics = DistributedMetrics({"x": ("mean", "max")})
    values = np.random.default_rng(0).lognormal(size=shape).astype(np.float32)
    x = jax.device_put(values, NamedSharding(mesh, P("data") if shape else P()))
    program = nnx.jit(lambda m, x: m.update(x=2 * x - x))
    program(metrics, x)
    program(metrics, x)
    assert metrics.compute()["x"] == {
        "mean": pytest.approx(values.mean(dtype=np.float64), rel=3e-7),
        "max": values.max(),
    }
    assert set(count_collectives(program, metrics, x)) <= {"all-reduce"}


@pytest.mark.parametrize(
    ("axes", "of_denominator", "spec"),
    [({"data": 8}, 3, None), ({"data": 4, "model": 2}, 16, {"r": (P("data"), None)})],
    ids=["guessed", "given"],
)
def test_of_a_ratio_how_one_part_lies_may_be_all_that_is_known(axes, of_denominator, spec):
    mesh = make_mesh(axes, explicit=False)
    metrics = DistributedMetrics({"r": "ratio"}, mesh=mesh)
    x = jax.device_put(X, NamedSharding(mesh, P("data")))
    y = jax.device_put(np.ones(of_denominator, np.float32), NamedSharding(mesh, P()))
    nnx.jit(lambda m, x, y: m.update(r=(x, y), spec=spec))(metrics, x, y)
    assert metrics.compute()["r"] == pytest.approx(X.sum(dtype=np.float64) / of_denominator, rel=1e-6)
