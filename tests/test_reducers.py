"""The stateless reducers: equal to ``lax`` on each leaf, but packed; which axis they take; what passes unchanged."""

import functools
import re
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import distributed_metrics
from distributed_metrics import (
    DistributedMetrics,
    all_gather,
    collect_from_devices,
    count_collectives,
    reduce_custom,
    reduce_max,
    reduce_mean,
    reduce_min,
    reduce_sum,
)

REDUCERS = {
    "all_gather": (all_gather, lax.all_gather),
    "reduce_mean": (reduce_mean, lax.pmean),
    "reduce_sum": (reduce_sum, lax.psum),
    "reduce_max": (reduce_max, lax.pmax),
    "reduce_min": (reduce_min, lax.pmin),
}


def mesh_1d() -> Mesh:
    return Mesh(np.array(jax.devices()), ("data",))


def mesh_2d(kind: AxisType = AxisType.Auto) -> Mesh:
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind, kind))


def leaves(devices: int = 8):
    """A metric of many shapes and dtypes for each device, several of each dtype, from one seed."""
    rng = np.random.default_rng(7)

    def normal(*shape, dtype=jnp.float32):
        return jnp.asarray(rng.normal(size=(devices, *shape)).astype(np.float32)).astype(dtype)

    def integers(*shape, dtype=np.int32):
        return rng.integers(0, 100, (devices, *shape)).astype(dtype)

    return {
        "loss": normal(),
        "nested": {"matrix": normal(2, 3), "empty": normal(0), "list": [normal(), normal(4)]},
        "half": [normal(dtype=jnp.bfloat16), normal(3, 2, dtype=jnp.bfloat16)],
        "lone": normal(2, dtype=jnp.float16),
        "count": integers(),
        "counts": integers(5),
        "bytes": [integers(dtype=np.uint8), integers(2, dtype=np.uint8)],
        "flags": [rng.random(devices) < 0.5, rng.random((devices, 3)) < 0.5],
    }


def shard_mapped(fn, mesh=None, out_specs=None, **kwargs):
    """Each device gets its own slice, without the leading dim; the result must be the same on all, and typed so."""
    mesh = mesh or mesh_1d()

    def own(tree):
        return fn(jax.tree.map(lambda x: x[0], tree))

    specs = {"in_specs": P(mesh.axis_names), "out_specs": P() if out_specs is None else out_specs}
    return jax.jit(jax.shard_map(own, mesh=mesh, **specs, **kwargs))


WAYS = {
    "shard_map": shard_mapped,
    "pmap-bare": lambda fn: jax.pmap(fn, out_axes=None),
    "pmap-named": lambda fn: jax.pmap(fn, axis_name="batch", out_axes=None),
    "pmap-other-name": lambda fn: jax.pmap(fn, axis_name="devices", out_axes=None),
    "vmap": lambda fn: jax.jit(lambda tree: jax.tree.map(lambda x: x[3], jax.vmap(fn, axis_name="batch")(tree))),
}
AXIS = {
    "shard_map": "data",
    "pmap-bare": "_named_for_lax",
    "pmap-named": "batch",
    "pmap-other-name": "devices",
    "vmap": "batch",
}


def by_lax(way: str, function):
    """``function`` of ``lax``, leaf by leaf; a bare ``pmap`` is given a name, since ``lax`` needs one."""
    axis = AXIS[way]

    def each(tree):
        return jax.tree.map(lambda x: function(x, axis_name=axis), tree)

    if way == "pmap-bare":
        return jax.pmap(each, axis_name=axis, out_axes=None)
    if way == "shard_map":
        return shard_mapped(each, check_vma=False)
    return WAYS[way](each)


def assert_same(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert (one.shape, one.dtype, one.weak_type) == (other.shape, other.dtype, other.weak_type)
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", REDUCERS)
def test_equal_to_lax_on_each_leaf(name, way):
    ours, theirs = REDUCERS[name]
    result = WAYS[way](ours)(leaves())
    assert_same(result, by_lax(way, theirs)(leaves()))


@pytest.mark.parametrize(
    ("name", "by_numpy"),
    [
        ("all_gather", lambda x: x),
        ("reduce_mean", lambda x: x.mean(0)),
        ("reduce_sum", lambda x: x.sum(0)),
        ("reduce_max", lambda x: x.max(0)),
        ("reduce_min", lambda x: x.min(0)),
    ],
)
def test_equal_to_numpy(name, by_numpy):
    tree = {"a": leaves()["loss"], "b": leaves()["nested"]["matrix"], "c": leaves()["counts"]}
    result = shard_mapped(REDUCERS[name][0])(tree)
    for key, x in tree.items():
        np.testing.assert_allclose(result[key], by_numpy(np.asarray(x, np.float64)), rtol=1e-6)


@pytest.mark.parametrize("name", REDUCERS)
def test_over_some_axes_of_a_mesh_equal_to_lax(name):
    ours, theirs = REDUCERS[name]
    for axis in ("model", ("data", "model")):
        out = P("data") if axis == "model" else P()
        given = jax.tree.map(lambda x: x.reshape(4, 2, *x.shape[1:]), {"a": leaves()["loss"], "b": leaves()["counts"]})

        def run(reduce, given=given, out=out):
            def own(tree):
                return jax.tree.map(lambda x: x[None], reduce(jax.tree.map(lambda x: x[0, 0], tree)))

            specs = {"in_specs": P("data", "model"), "out_specs": out}
            return jax.jit(jax.shard_map(own, mesh=mesh_2d(), **specs, check_vma=reduce is not by_leaf))(given)

        def by_leaf(tree, axis=axis):
            return jax.tree.map(lambda x: theirs(x, axis_name=axis), tree)

        assert_same(run(functools.partial(ours, axis_name=axis)), run(by_leaf))


# --- packing ---

MANY = {
    "scalars": [np.arange(8, dtype=np.float32) + i for i in range(20)],
    "integers": [np.arange(8, dtype=np.int32) + i for i in range(5)],
    "half": [jnp.ones((8, 3), jnp.bfloat16), jnp.ones((8, 2, 2), jnp.bfloat16)],
}


def collectives_asked_for(program, *args) -> int:
    """Those of the program as written: XLA joins all-reduces of one dtype by itself, but makes no single buffer."""
    return len(re.findall(r"stablehlo\.all_(?:reduce|gather)\b", program.lower(*args).as_text()))


@pytest.mark.parametrize("name", REDUCERS)
def test_one_collective_for_each_dtype(name):
    program = shard_mapped(REDUCERS[name][0])
    assert collectives_asked_for(program, MANY) == 3
    compiled = count_collectives(program, MANY)
    if name == "all_gather":
        assert compiled == {"all-gather": 3}
    else:
        assert compiled.keys() == {"all-reduce"}
        assert compiled["all-reduce"] <= 3


def test_one_collective_for_each_operation_and_dtype():
    operations = {"scalars": "mean", "integers": "sum", "half": "max"}
    program = shard_mapped(lambda x: reduce_custom(x, operations))
    assert collectives_asked_for(program, MANY) == 3
    assert count_collectives(program, MANY) == {"all-reduce": 3}


def test_a_buffer_holds_every_leaf_of_its_dtype():
    with mock.patch("jax.lax.pmean", wraps=lax.pmean) as pmean:
        shard_mapped(reduce_mean).lower(MANY)
    sent = sorted((str(call.args[0].dtype), call.args[0].shape) for call in pmean.call_args_list)
    assert sent == [("bfloat16", (7,)), ("float32", (20,)), ("int32", (5,))]


def test_large_arrays_are_not_copied_into_a_buffer():
    shapes = [(2**16,), (4,), (2**16 + 1,), (2, 2**16)]
    with mock.patch("jax.lax.pmean", wraps=lax.pmean) as pmean:
        shard_mapped(reduce_mean).lower([np.zeros((8, *shape), np.float32) for shape in shapes])
    sent = sorted(call.args[0].shape for call in pmean.call_args_list)
    assert sent == [(2, 2**16), (2**16 + 1,), (2**16 + 4,)]


def test_a_lone_leaf_goes_to_lax_as_it_is():
    seen = []

    def step(x):
        seen.append(x)
        return reduce_mean({"loss": x, "name": "train"})["loss"]

    with mock.patch("jax.lax.pmean", wraps=lax.pmean) as pmean:
        shard_mapped(step).lower(np.ones((8, 2, 3), np.float32))
    assert pmean.call_args == mock.call(seen[0], axis_name="data")
    assert pmean.call_args.args[0] is seen[0]


@pytest.mark.parametrize("name", ["reduce_mean", "all_gather"])
def test_packing_keeps_over_which_other_axes_a_result_varies(name):
    """One metric is the same along "model" already, another is not: the first may still leave with P()."""
    reduce = REDUCERS[name][0]

    def step(x):
        reduced = reduce({"same": lax.psum(x[0, 0], "model"), "own": x[0, 0]}, axis_name="data")
        return reduced["same"], reduced["own"][None]

    x = np.arange(8, dtype=np.float32).reshape(4, 2)
    program = jax.shard_map(step, mesh=mesh_2d(), in_specs=P("data", "model"), out_specs=(P(), P("model")))
    same, own = jax.jit(program)(x)
    if name == "reduce_mean":
        np.testing.assert_array_equal(same, x.sum(1).mean())
        np.testing.assert_array_equal(own, x.mean(0))
    else:
        np.testing.assert_array_equal(same, x.sum(1))
        np.testing.assert_array_equal(own, x.T)


def test_what_is_the_same_along_the_reduced_axis_shares_a_buffer():
    program = shard_mapped(lambda x: reduce_sum({"own": x, "same": jnp.ones(2, jnp.float32), "also own": 2 * x}))
    x = np.arange(8, dtype=np.float32)
    result = program(x)
    np.testing.assert_array_equal(result["same"], [8.0, 8.0])
    np.testing.assert_array_equal(result["own"], x.sum())
    assert collectives_asked_for(program, x) == 1


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_arrays_that_are_sharded_over_axes_not_mapped_here_are_not_gathered(kind):
    mesh = mesh_2d(kind)
    x = np.arange(64, dtype=np.float32).reshape(4, 4, 4)
    given = jax.device_put(x, NamedSharding(mesh, P("data", None, "model")))

    def step(x):
        return reduce_mean({"a": x[0], "b": 2 * x[0], "c": x[0].sum(), "d": x[0].max()})

    with jax.set_mesh(mesh):
        program = jax.jit(jax.shard_map(step, in_specs=P("data"), out_specs=P(), axis_names={"data"}))
        result = program(given)
        assert collectives_asked_for(program, given) == 3  # "a", "b", and the scalars together
    np.testing.assert_allclose(result["a"], x.mean(0))
    np.testing.assert_allclose(result["c"], x.sum((1, 2)).mean())
    np.testing.assert_allclose(result["d"], x.max((1, 2)).mean())
    assert result["a"].sharding.spec == result["b"].sharding.spec == P(None, "model")


# --- the axis ---


def test_the_axis_asked_for_is_taken_before_the_only_one_there_is():
    """The vmap axis is "batch" here, though "data" is the only axis of the shard_map."""
    x = np.arange(24, dtype=np.float32).reshape(8, 3)
    inner = jax.vmap(lambda x: reduce_sum({"x": x})["x"], axis_name="batch")
    result = shard_mapped(lambda x: inner(x)[None], out_specs=P("data"), check_vma=False)(x)
    np.testing.assert_array_equal(result, np.broadcast_to(x.sum(1, keepdims=True), (8, 3)))


@pytest.mark.parametrize("name", [*REDUCERS, "reduce_custom"])
def test_of_two_mapped_axes_none_is_guessed(name):
    reduce = getattr(distributed_metrics, name)
    with pytest.raises(NameError) as error:
        shard_mapped(lambda x: reduce({"loss": x}), mesh_2d()).lower(np.ones(8, np.float32))
    assert str(error.value) == (
        f"{name}(axis_name='batch'): the axes mapped here are 'data', 'model'.\n"
        f"  Name it: {name}(metrics, axis_name='data')"
    )


def test_only_the_default_axis_is_replaced():
    with pytest.raises(NameError, match=r"reduce_mean\(axis_name='dta'\): the axes mapped here are 'data'\."):
        shard_mapped(lambda x: reduce_mean({"loss": x}, axis_name="dta")).lower(np.ones(8, np.float32))


@pytest.mark.parametrize("name", [*REDUCERS, "reduce_custom"])
@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
def test_where_no_axis_is_mapped_the_error_says_so(name, jitted):
    reduce = getattr(distributed_metrics, name)
    run = (jax.jit if jitted else lambda f: f)(lambda x: reduce({"loss": x}))
    with pytest.raises(NameError) as error:
        run(jnp.ones(3))
    text = str(error.value)
    assert text.startswith(f"{name}(axis_name='batch'): no axis is mapped here.\n  Call it inside shard_map or pmap")


# --- leaves that are no arrays ---


@pytest.mark.parametrize("name", REDUCERS)
def test_leaves_that_are_no_arrays_pass_unchanged(name):
    others = {"epoch": 5, "lr": 0.001, "name": "train", "nothing": None, "flag": True, "scalar": np.float32(2)}
    seen = {}

    def step(x):
        result = REDUCERS[name][0]({"loss": x, **others})
        seen.update({key: result[key] for key in others})
        return result["loss"]

    shard_mapped(step).lower(np.ones(8, np.float32))
    assert all(seen[key] is value for key, value in others.items())


@pytest.mark.parametrize("name", REDUCERS)
def test_without_arrays_nothing_needs_to_be_mapped(name):
    assert REDUCERS[name][0]({"epoch": 5}) == {"epoch": 5}
    assert REDUCERS[name][0]({}) == {}


def test_numpy_arrays_are_reduced():
    assert shard_mapped(lambda x: reduce_sum({"x": x, "ones": np.ones(2, np.float32)})["ones"])(
        np.ones(8, np.float32)
    ).tolist() == [8.0, 8.0]


# --- reduce_custom ---

X = np.array([3, 1, 4, 1, 5, 9, 2, 6], np.float32)


def test_custom_reduces_each_metric_in_its_own_way():
    operations = {"sum": "sum", "max": "max", "min": "min", "mean": "mean"}
    result = shard_mapped(
        lambda x: reduce_custom(dict.fromkeys(["mean", "sum", "max", "min", "other"], x), operations)
    )(X)
    assert {name: float(x) for name, x in result.items()} == {
        "mean": X.mean(), "sum": X.sum(), "max": 9, "min": 1, "other": X.mean(),
    }  # fmt: skip


def test_custom_without_operations_is_the_mean():
    assert float(shard_mapped(lambda x: reduce_custom({"x": x})["x"])(X)) == X.mean()


def test_custom_leaves_alone_what_is_none():
    result = shard_mapped(lambda x: reduce_custom({"x": x, "y": x}, {"x": None})["x"][None], out_specs=P("data"))(X)
    np.testing.assert_array_equal(result, X)


def test_custom_applies_an_operation_to_the_whole_subtree():
    def step(x):
        return reduce_custom({"norms": {"encoder": x, "decoder": [2 * x, 7]}, "loss": x}, {"norms": "max"})

    result = shard_mapped(step)(X)
    assert float(result["norms"]["encoder"]) == 9
    assert [float(x) for x in result["norms"]["decoder"]] == [18, 7]
    assert float(result["loss"]) == X.mean()


def test_custom_reduces_a_number_only_if_it_is_named():
    def step(x):
        metrics = {"samples": 4, "numpy": np.int64(5), "flag": True, "ratio": 0.25, "epoch": 3, "loss": x}
        named = {"samples": "sum", "numpy": "sum", "flag": "max", "ratio": "mean"}
        result = reduce_custom(metrics, named)
        assert result["epoch"] == 3
        assert type(result["epoch"]) is int
        return {name: result[name] for name in named}

    result = shard_mapped(step)(X)
    assert jax.tree.map(lambda x: x.tolist(), result) == {"samples": 32, "numpy": 40, "flag": True, "ratio": 0.25}


@pytest.mark.skipif(jnp.asarray(1).dtype == np.int64, reason="there it fits")
def test_custom_refuses_a_number_that_does_not_fit():
    for number in (2**40, np.int64(2**40)):
        with pytest.raises(OverflowError, match="1099511627776"):
            shard_mapped(lambda x, n=number: reduce_custom({"x": x, "n": n}, {"n": "sum"})).lower(X)


def test_custom_keeps_the_order_of_the_metrics():
    order = []

    def step(x):
        order.extend(reduce_custom({"b": x, "a": x, "c": x}, {"a": "sum"}))
        return x

    shard_mapped(step, out_specs=P("data"), check_vma=False).lower(np.ones((8, 1), np.float32))
    assert order == ["b", "a", "c"]


def test_custom_refuses_an_unknown_operation():
    with pytest.raises(ValueError, match="reduce_custom") as error:
        reduce_custom({"loss": jnp.ones(3)}, {"loss": "maen"})
    assert str(error.value) == (
        "reduce_custom(): 'loss' asks for 'maen', which is no known operation.\n"
        "  Known: 'mean', 'sum', 'max', 'min', or None to leave a metric alone. Did you mean 'mean'?"
    )


def test_custom_refuses_a_name_that_is_no_metric():
    with pytest.raises(ValueError, match="reduce_custom") as error:
        reduce_custom({"loss": jnp.ones(3), "tokens": 3}, {"lss": "mean"})
    assert str(error.value) == (
        "reduce_custom(): reduce_fn names 'lss', and the metrics are 'loss', 'tokens'. Did you mean 'loss'?"
    )


# --- collect_from_devices ---


def test_collect_gives_one_value_for_each_device():
    losses = jax.pmap(lambda x: {"loss": 2 * x, "nested": {"vector": jnp.stack([x, x + 1])}})(X)
    collected = collect_from_devices(losses)
    assert type(collected["loss"]) is list
    assert [float(x) for x in collected["loss"]] == (2 * X).tolist()
    np.testing.assert_array_equal(collected["nested"]["vector"], np.stack([X, X + 1], 1))
    assert all(isinstance(x, np.ndarray) and x.shape == (2,) for x in collected["nested"]["vector"])


def test_collect_takes_numpy_arrays_and_leaves_the_rest():
    scalar = jnp.float32(3)
    others = {"accuracy": 0.95, "name": "eval", "nothing": None, "scalar": scalar, "numpy": np.float32(1)}
    collected = collect_from_devices({"x": np.arange(3), **others})
    assert collected["x"] == [0, 1, 2]
    assert all(collected[key] is value for key, value in others.items())


def test_collect_fetches_everything_in_one_go():
    metrics = {f"m{i}": jax.device_put(X + i, NamedSharding(mesh_1d(), P("data"))) for i in range(20)}
    with mock.patch("jax.device_get", wraps=jax.device_get) as device_get:
        collected = collect_from_devices(metrics)
    assert device_get.call_count == 1
    assert [float(x) for x in collected["m3"]] == (X + 3).tolist()


# --- what replaces a function of jax.lax is called ---


@pytest.mark.parametrize(("name", "function"), [(name, lax_fn.__name__) for name, (_, lax_fn) in REDUCERS.items()])
def test_a_replaced_lax_function_is_called_outside_of_any_trace(name, function):
    """Code that replaces ``lax.pmean`` and its siblings, to run without devices, must be seen."""
    x = jnp.array(3.0)
    methods = [getattr(DistributedMetrics(), name), getattr(DistributedMetrics, f"{name}_static"), REDUCERS[name][0]]
    for reduce in methods:
        with mock.patch(f"jax.lax.{function}", return_value=jnp.array(2.0)) as replaced:
            result = reduce({"loss": x, "lr": 0.5}, axis_name="mine")
        assert result == {"loss": 2.0, "lr": 0.5}
        assert replaced.call_args == mock.call(x, axis_name="mine")


def test_replaced_lax_functions_are_called_by_reduce_custom():
    values = {"pmean": 2.0, "psum": 6.0, "pmax": 4.0, "pmin": 1.0}
    with (
        mock.patch("jax.lax.pmean", return_value=jnp.array(2.0)),
        mock.patch("jax.lax.psum", return_value=jnp.array(6.0)),
        mock.patch("jax.lax.pmax", return_value=jnp.array(4.0)),
        mock.patch("jax.lax.pmin", return_value=jnp.array(1.0)),
    ):
        metrics = {name: jnp.array(9.0) for name in values}
        result = reduce_custom(metrics, {"psum": "sum", "pmax": "max", "pmin": "min"})
    assert result == values
