"""Meshes, sharded batches, placed models and reduced gradients."""

import inspect
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from distributed_metrics import count_collectives, data_parallel
from distributed_metrics.data_parallel import DataParallel
from distributed_metrics.mesh import DeviceMeshManager

MESH = DeviceMeshManager().create_data_parallel_mesh()
MESH_2D = DeviceMeshManager().create_hybrid_mesh(data_parallel_size=4, model_parallel_size=2)
SHARDING = DataParallel.create_data_parallel_sharding_static(MESH)
BY_METHOD_AND_STATIC = pytest.mark.parametrize("suffix", ["", "_static"], ids=["method", "static"])


def parallel(name: str, suffix: str = ""):
    return getattr(DataParallel() if not suffix else DataParallel, name + suffix)


# --- DeviceMeshManager ---


def test_a_manager_has_all_devices_or_those_given():
    assert DeviceMeshManager().devices == jax.devices()
    assert DeviceMeshManager().num_devices == 8
    manager = DeviceMeshManager(devices=jax.devices()[2:5])
    assert manager.devices == jax.devices()[2:5]
    assert manager.num_devices == 3
    assert manager.create_data_parallel_mesh().devices.tolist() == jax.devices()[2:5]


def test_the_devices_of_a_manager_cannot_be_changed_from_outside():
    manager = DeviceMeshManager()
    manager.devices.clear()
    assert manager.num_devices == 8


@pytest.mark.parametrize("shape", [{"data": 2, "model": 3}, [("data", 2), ("model", 3)], (("data", 2), ("model", 3))])
def test_a_mesh_takes_the_first_devices_in_order(shape):
    mesh = DeviceMeshManager().create_device_mesh(shape)
    assert mesh.axis_names == ("data", "model")
    assert mesh.devices.tolist() == [jax.devices()[:3], jax.devices()[3:6]]


def test_a_mesh_can_have_devices_of_its_own():
    mesh = DeviceMeshManager().create_device_mesh({"data": 2}, devices=jax.devices()[4:])
    assert mesh.devices.tolist() == jax.devices()[4:6]


@pytest.mark.parametrize(
    ("mesh", "axes"),
    [
        (DeviceMeshManager().create_data_parallel_mesh(), {"data": 8}),
        (DeviceMeshManager().create_data_parallel_mesh(num_devices=2, axis_name="batch"), {"batch": 2}),
        (DeviceMeshManager().create_model_parallel_mesh(), {"model": 8}),
        (DeviceMeshManager().create_model_parallel_mesh(num_devices=1, axis_name="tensor"), {"tensor": 1}),
        (DeviceMeshManager().create_hybrid_mesh(), {"data": 1, "model": 1}),
        (DeviceMeshManager().create_hybrid_mesh(4, 2), {"data": 4, "model": 2}),
        (DeviceMeshManager().create_hybrid_mesh(2, 3, data_axis="d", model_axis="m"), {"d": 2, "m": 3}),
    ],
)
def test_a_mesh_has_the_axes_asked_for(mesh, axes):
    assert DeviceMeshManager().get_mesh_info(mesh) == {"total_devices": int(np.prod(list(axes.values()))), "axes": axes}
    assert list(mesh.shape) == list(axes)
    assert set(mesh.axis_types) == {AxisType.Auto}
    with jax.set_mesh(mesh):
        pass


def test_a_size_may_be_a_numpy_integer():
    assert DeviceMeshManager().create_device_mesh({"data": np.prod([2, 2])}).devices.shape == (4,)


def test_the_info_holds_builtin_numbers():
    info = DeviceMeshManager().get_mesh_info(MESH_2D)
    assert type(info["total_devices"]) is int
    assert type(info["axes"]) is dict
    assert all(type(size) is int for size in info["axes"].values())


@pytest.mark.parametrize(
    ("make", "axes", "needed"),
    [
        (lambda m: m.create_device_mesh([("data", 100)]), "data: 100", 100),
        (lambda m: m.create_device_mesh({"a": 3, "b": 3}), "a: 3 x b: 3", 9),
        (lambda m: m.create_data_parallel_mesh(num_devices=9), "data: 9", 9),
        (lambda m: m.create_model_parallel_mesh(num_devices=100), "model: 100", 100),
        (lambda m: m.create_hybrid_mesh(10, 10), "data: 10 x model: 10", 100),
    ],
)
def test_a_mesh_larger_than_the_devices_is_an_error(make, axes, needed):
    with pytest.raises(ValueError, match="Not enough devices") as error:
        make(DeviceMeshManager())
    assert str(error.value) == (
        f"Not enough devices: the mesh ({axes}) needs {needed} devices, and there are 8.\n"
        f"  Make it smaller, or give more devices. To try {needed} devices on a CPU, before JAX is imported:\n"
        f'  os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count={needed}"'
    )


def test_devices_given_to_one_mesh_are_all_that_it_has():
    with pytest.raises(ValueError, match="needs 8 devices, and there are 3"):
        DeviceMeshManager().create_device_mesh({"data": 8}, devices=jax.devices()[:3])


@pytest.mark.parametrize(
    ("shape", "kind", "text"),
    [
        ({"data": 0}, ValueError, "the axis 'data' has the size 0; sizes are 1 or more.\n  For as many as there are: "),
        ({"data": 4, "model": -1}, ValueError, "the axis 'model' has the size -1; sizes are 1 or more."),
        ({"data": 2.0}, TypeError, "the size of the axis 'data' must be an integer, got 2.0 (float)."),
        ({"data": True}, TypeError, "the size of the axis 'data' must be an integer, got True (bool)."),
        ({"data": None}, TypeError, "the size of the axis 'data' must be an integer, got None (NoneType)."),
        ([("data", 2), ("data", 4)], ValueError, "the axis 'data' is there twice, with the sizes 2 and 4."),
        ({"": 2}, ValueError, "create_device_mesh({'': 2}): the axis of size 2 has an empty name."),
        ({3: 2}, TypeError, "the name of an axis must be a string, got 3 (int).\n  For example: {'3': 2}"),
        ({}, ValueError, 'create_device_mesh({}): no axes.\n  For example: {"data": 1}'),
        ([2, 4], TypeError, "create_device_mesh() takes names to sizes, got [2, 4].\n  For example: "),
        (["ab", "cd"], TypeError, "create_device_mesh() takes names to sizes, got ['ab', 'cd']."),
        ([("data", (2, 3))], TypeError, "the size of the axis 'data' must be an integer, got (2, 3) (tuple)."),
        ([("data", 2, 3)], TypeError, "create_device_mesh() takes names to sizes, got [('data', 2, 3)]."),
        ("data", TypeError, "create_device_mesh() takes names to sizes, got 'data'."),
        (8, TypeError, "create_device_mesh() takes names to sizes, got 8."),
    ],
)
def test_a_shape_that_makes_no_mesh_is_an_error(shape, kind, text):
    with pytest.raises(kind) as error:
        DeviceMeshManager().create_device_mesh(shape)
    assert text in str(error.value)


def test_zero_devices_are_an_error_and_not_the_default():
    with pytest.raises(ValueError, match="the axis 'data' has the size 0"):
        DeviceMeshManager().create_data_parallel_mesh(num_devices=0)
    with pytest.raises(ValueError, match="the axis 'model' has the size 0"):
        DeviceMeshManager().create_model_parallel_mesh(num_devices=0)


def test_a_manager_without_devices_is_an_error():
    with pytest.raises(ValueError, match=r"DeviceMeshManager\(devices=\[\]\): there are no devices"):
        DeviceMeshManager(devices=[])


# --- DataParallel: shardings and batches ---


def test_data_parallel_is_a_module_without_state():
    assert isinstance(DataParallel(), nnx.Module)
    assert jax.tree.leaves(nnx.state(DataParallel())) == []


@pytest.mark.parametrize("name", ["create_data_parallel_sharding", "shard_batch", "all_reduce_gradients"])
def test_a_static_twin_has_the_signature_of_its_method(name):
    static, method = parallel(name, "_static"), parallel(name)
    assert inspect.signature(static) == inspect.signature(method)
    assert static is getattr(data_parallel, name)


@BY_METHOD_AND_STATIC
def test_the_sharding_splits_the_leading_dim(suffix):
    create = parallel("create_data_parallel_sharding", suffix)
    assert create(MESH) == NamedSharding(MESH, P("data"))
    assert create(MESH_2D, data_axis="model") == NamedSharding(MESH_2D, P("model"))


@BY_METHOD_AND_STATIC
def test_an_axis_that_the_mesh_does_not_have_is_an_error(suffix):
    with pytest.raises(ValueError, match="data_axis") as error:
        parallel("create_data_parallel_sharding", suffix)(MESH_2D, data_axis="dta")
    assert str(error.value) == (
        "create_data_parallel_sharding(data_axis='dta'): the mesh has the axes 'data', 'model'. Did you mean 'data'?\n"
        "  Name one of them: create_data_parallel_sharding(mesh, data_axis='data')"
    )


@BY_METHOD_AND_STATIC
def test_a_batch_is_split_along_its_leading_dim(suffix):
    batch = {"image": np.arange(48, dtype=np.float32).reshape(16, 3), "label": [jnp.arange(16), np.arange(8) > 3]}
    sharded = parallel("shard_batch", suffix)(batch, SHARDING)
    assert jax.tree.structure(sharded) == jax.tree.structure(batch)
    for one, other in zip(jax.tree.leaves(sharded), jax.tree.leaves(batch), strict=True):
        assert one.sharding == SHARDING
        np.testing.assert_array_equal(one, other)
        for i, shard in enumerate(one.addressable_shards):
            each = len(other) // 8
            assert shard.device == MESH.devices[i]
            np.testing.assert_array_equal(shard.data, other[i * each : (i + 1) * each])


def test_a_lone_array_is_a_batch():
    assert DataParallel().shard_batch(jnp.ones((8, 2)), SHARDING).sharding == SHARDING


def test_scalars_are_replicated_and_what_is_no_array_passes_unchanged():
    others = {"name": "train", "step": 7, "rate": 0.5, "nothing": None}
    batch = {"array": jnp.float32(2), "zero_d": np.array(3), "numpy": np.float32(4), **others}
    sharded = DataParallel().shard_batch(batch, SHARDING)
    for name in ("array", "zero_d", "numpy"):
        assert sharded[name].sharding == NamedSharding(MESH, P())
        assert sharded[name] == batch[name]
    assert {name: sharded[name] for name in others} == others
    assert type(sharded["step"]) is int


def test_an_array_takes_as_much_of_a_sharding_as_it_has_dims():
    sharding = NamedSharding(MESH_2D, P("data", "model"))
    batch = {"tokens": np.zeros((4, 6)), "label": np.zeros(4)}
    sharded = DataParallel().shard_batch(batch, sharding)
    assert sharded["tokens"].sharding.spec == P("data", "model")
    assert sharded["label"].sharding.spec == P("data")


def test_a_batch_may_be_split_over_several_axes():
    sharded = DataParallel().shard_batch(np.zeros((16, 2)), NamedSharding(MESH_2D, P(("data", "model"))))
    assert {shard.data.shape for shard in sharded.addressable_shards} == {(2, 2)}


def test_a_batch_is_put_in_one_transfer_under_a_transfer_guard():
    batch = {f"x{i}": np.ones((8, 2), np.float32) for i in range(5)}
    with jax.transfer_guard("disallow"), mock.patch("jax.device_put", wraps=jax.device_put) as device_put:
        DataParallel().shard_batch(batch, SHARDING)
    assert device_put.call_count == 1


@BY_METHOD_AND_STATIC
def test_a_leading_dim_that_does_not_divide_is_an_error(suffix):
    batch = {"good": np.zeros((16, 2)), "images": {"left": np.zeros((10, 4))}}
    with pytest.raises(ValueError, match="does not divide") as error:
        parallel("shard_batch", suffix)(batch, SHARDING)
    text = str(error.value).replace("PartitionSpec", "P")
    assert text == (
        "shard_batch(): batch['images']['left'] has the shape (10, 4), and the leading dim, 10, does not divide into "
        "8 shards (sharding P('data',)).\n"
        "  Make it 8; or pad it to 16 and give metrics.update() a weight of 0 for what was added; or replicate this "
        "array: jax.device_put(x, NamedSharding(mesh, P()))"
    )


def test_another_dim_that_does_not_divide_is_named():
    with pytest.raises(ValueError, match=r"batch has the shape \(4, 3\), and dim 1, 3, does not divide into 2 shards"):
        DataParallel().shard_batch(np.zeros((4, 3)), NamedSharding(MESH_2D, P("data", "model")))


def test_a_mesh_instead_of_a_sharding_is_an_error():
    with pytest.raises(TypeError, match="NamedSharding, got Mesh") as error:
        DataParallel().shard_batch(np.zeros(8), MESH)
    assert "shard_batch(batch, create_data_parallel_sharding(mesh))" in str(error.value)


# --- DataParallel: parameters ---


class Model(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.hidden = nnx.Linear(3, 16, rngs=rngs)
        self.out = nnx.Linear(16, 5, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)


def shards(tree) -> dict[str, P]:
    return {jax.tree_util.keystr(path): leaf.sharding.spec for path, leaf in jax.tree.leaves_with_path(tree)}


@pytest.mark.parametrize(
    "place",
    [
        lambda state: DataParallel().shard_model_state(state, MESH),
        lambda state: DataParallel().shard_model_state(state, MESH, param_sharding="replicate"),
        lambda state: DataParallel().replicate_params(state, MESH),
    ],
    ids=["default", "replicate", "replicate_params"],
)
@pytest.mark.parametrize("kind", ["state", "module", "dict"])
def test_parameters_are_replicated(place, kind):
    model = Model(nnx.Rngs(0))
    tree = {"state": nnx.state(model), "module": model, "dict": {"w": [jnp.ones(3), np.ones((8, 2))]}}[kind]
    placed = place(tree)
    assert type(placed) is type(tree)
    assert jax.tree.structure(placed) == jax.tree.structure(tree)
    for one, other in zip(jax.tree.leaves(placed), jax.tree.leaves(tree), strict=True):
        assert one.sharding.is_fully_replicated
        assert one.sharding.device_set == set(jax.devices())
        if not jnp.issubdtype(one.dtype, jax.dtypes.prng_key):
            np.testing.assert_array_equal(one, other)


def test_parameters_are_split_along_the_first_dim_that_divides():
    state = {
        "first": np.zeros((16, 8)),
        "second": jnp.zeros((3, 24, 8)),
        "none": np.zeros((3, 5)),
        "scalar": np.zeros(()),
        "empty": np.zeros((0, 8)),
        "name": "linear",
    }
    placed = DataParallel().shard_model_state(state, MESH, param_sharding="shard")
    assert placed.pop("name") == "linear"
    assert {key: x.sharding.spec for key, x in placed.items()} == {
        "first": P("data"),
        "second": P(None, "data"),
        "none": P(),
        "scalar": P(),
        "empty": P(None, "data"),
    }


def test_parameters_are_split_over_the_first_axis_of_the_mesh():
    placed = DataParallel().shard_model_state({"w": np.zeros((2, 4))}, MESH_2D, param_sharding="shard")
    assert placed["w"].sharding == NamedSharding(MESH_2D, P(None, "data"))


def test_the_state_of_a_model_and_its_optimizer_can_be_split():
    model = Model(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)
    placed = DataParallel().shard_model_state(nnx.state((model, optimizer)), MESH, param_sharding="shard")
    nnx.update((model, optimizer), placed)
    assert model.hidden.kernel[...].sharding.spec == P(None, "data")
    assert model.out.kernel[...].sharding.spec == P("data")
    assert model.out.bias[...].sharding.spec == P()
    assert optimizer.step[...].sharding.spec == P()
    moments = [spec for path, spec in shards(nnx.state(optimizer)).items() if "mu" in path and "hidden" in path]
    assert sorted(moments, key=str) == sorted([P("data"), P(None, "data")], key=str)


def test_an_unknown_way_to_place_parameters_is_an_error():
    with pytest.raises(ValueError, match="param_sharding") as error:
        DataParallel().shard_model_state({}, MESH, param_sharding="replicated")
    assert str(error.value) == (
        "shard_model_state(param_sharding='replicated'): known are 'replicate', 'shard'. Did you mean 'replicate'?"
    )


# --- DataParallel: gradients ---

RNG = np.random.default_rng(3)
WEIGHTS = {"w": RNG.normal(size=(3, 2)).astype(np.float32), "b": np.zeros(2, np.float32)}
BATCH = {"x": RNG.normal(size=(32, 3)).astype(np.float32), "y": RNG.normal(size=(32, 2)).astype(np.float32)}


def loss(weights, batch):
    return jnp.mean((batch["x"] @ weights["w"] + weights["b"] - batch["y"]) ** 2)


def gradients_by_numpy():
    weights, batch = jax.tree.map(lambda x: np.asarray(x, np.float64), (WEIGHTS, BATCH))
    error = 2 * (batch["x"] @ weights["w"] + weights["b"] - batch["y"]) / batch["y"].size
    return {"w": batch["x"].T @ error, "b": error.sum(0)}


def own_gradients(weights, batch, axes="data"):
    """Each device's own, also under check_vma."""
    return jax.grad(loss)(lax.pcast(weights, axes, to="varying"), batch)


def assert_gradients(gradients, times=1):
    for name, expected in gradients_by_numpy().items():
        np.testing.assert_allclose(gradients[name], times * expected, rtol=1e-5, atol=1e-6)


@BY_METHOD_AND_STATIC
@pytest.mark.parametrize(("reduce_type", "times"), [("mean", 1), ("sum", 8)])
def test_gradients_are_reduced_in_shard_map(suffix, reduce_type, times):
    reduce = parallel("all_reduce_gradients", suffix)
    program = jax.shard_map(
        lambda w, b: reduce(own_gradients(w, b), reduce_type), mesh=MESH, in_specs=(P(), P("data")), out_specs=P()
    )
    assert_gradients(jax.jit(program)(WEIGHTS, BATCH), times)
    assert count_collectives(jax.jit(program), WEIGHTS, BATCH) == {"all-reduce": 1}


def test_gradients_are_reduced_without_check_vma():
    program = jax.shard_map(
        lambda w, b: DataParallel().all_reduce_gradients(jax.grad(loss)(w, b), axis_name="data"),
        mesh=MESH,
        in_specs=(P(), P("data")),
        out_specs=P(),
        check_vma=False,
    )
    assert_gradients(jax.jit(program)(WEIGHTS, BATCH))


@pytest.mark.parametrize("axis", [None, "batch", "devices"])
def test_gradients_are_reduced_in_pmap(axis):
    def step(weights, batch):
        return DataParallel().all_reduce_gradients(jax.grad(loss)(weights, batch))

    batch = jax.tree.map(lambda x: x.reshape(8, 4, -1), BATCH)
    assert_gradients(jax.pmap(step, axis_name=axis, in_axes=(None, 0), out_axes=None)(WEIGHTS, batch))


def test_gradients_of_a_module_are_reduced():
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    graphdef, state = nnx.split(model)

    def gradients(state, batch):
        return nnx.grad(lambda model: jnp.mean((model(batch["x"]) - batch["y"]) ** 2))(nnx.merge(graphdef, state))

    def step(state, batch):
        return DataParallel().all_reduce_gradients(gradients(lax.pcast(state, "data", to="varying"), batch))

    reduced = jax.shard_map(step, mesh=MESH, in_specs=(P(), P("data")), out_specs=P())(state, BATCH)
    expected = gradients(state, BATCH)
    assert jax.tree.structure(reduced) == jax.tree.structure(expected)
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6), reduced, expected)


def test_gradients_are_reduced_over_the_axis_of_a_vmap():
    batch = jax.tree.map(lambda x: x.reshape(8, 4, -1), BATCH)
    step = jax.vmap(
        lambda b: DataParallel().all_reduce_gradients(jax.grad(loss)(WEIGHTS, b), axis_name="shards"),
        axis_name="shards",
    )
    assert_gradients(jax.tree.map(lambda x: x[5], jax.jit(step)(batch)))


def test_a_vmap_inside_of_shard_map_is_not_taken_for_devices():
    """The gradients are the same along "data" there, but they are reduced over "batch"."""

    def step(weights, batch):
        parts = jax.tree.map(lambda x: x.reshape(4, 8, -1), batch)
        each = jax.vmap(
            lambda b: DataParallel().all_reduce_gradients(jax.grad(loss)(weights, b), axis_name="batch"),
            axis_name="batch",
        )
        return jax.tree.map(lambda x: x[0], each(parts))

    with mock.patch("jax.lax.pmean", wraps=lambda x, axis_name: x) as pmean:  # of a vmap in shard_map JAX has none
        jax.eval_shape(jax.shard_map(step, mesh=MESH, in_specs=P(), out_specs=P()), WEIGHTS, BATCH)
    assert {call.kwargs["axis_name"] for call in pmean.call_args_list} == {"batch"}


@BY_METHOD_AND_STATIC
@pytest.mark.parametrize("reduce_type", ["mean", "sum"])
def test_gradients_of_a_jitted_step_are_those_of_the_whole_batch_already(suffix, reduce_type):
    reduce = parallel("all_reduce_gradients", suffix)
    step = jax.jit(lambda w, b: reduce(jax.grad(loss)(w, b), reduce_type=reduce_type))
    weights = DataParallel().replicate_params(WEIGHTS, MESH)
    assert_gradients(step(weights, DataParallel().shard_batch(BATCH, SHARDING)))


@BY_METHOD_AND_STATIC
@pytest.mark.parametrize(("reduce_type", "function", "value"), [("mean", "pmean", 2.0), ("sum", "psum", 8.0)])
def test_a_replaced_lax_function_is_called_outside_of_any_trace(suffix, reduce_type, function, value):
    gradient = jnp.array(4.0)
    with mock.patch(f"jax.lax.{function}", return_value=jnp.array(value)) as replaced:
        reduced = parallel("all_reduce_gradients", suffix)(gradient, reduce_type)
    assert float(reduced) == value
    assert replaced.call_args == mock.call(gradient, axis_name="batch")


@BY_METHOD_AND_STATIC
def test_an_unknown_reduction_is_an_error(suffix):
    with pytest.raises(ValueError, match="Unsupported reduce_type") as error:
        parallel("all_reduce_gradients", suffix)(jnp.array(1.0), reduce_type="men")
    assert str(error.value) == (
        "Unsupported reduce_type: 'men'. all_reduce_gradients() knows 'mean', 'sum'. Did you mean 'mean'?"
    )


def test_outside_of_any_trace_the_error_says_what_to_do():
    with pytest.raises(NameError) as error:
        DataParallel().all_reduce_gradients({"w": jnp.ones(3)})
    assert str(error.value) == (
        "all_reduce_gradients(axis_name='batch'): no axis is mapped here.\n  Call it in the train step, inside "
        "shard_map, pmap or jit. Gradients from jax.grad of a sharded batch outside of these are those of the whole "
        "batch already."
    )


def test_gradients_from_jax_grad_of_a_sharded_batch_are_those_of_the_whole_batch():
    """What the error above says."""
    batch = DataParallel().shard_batch(BATCH, SHARDING)
    assert_gradients(jax.grad(jax.jit(loss))(DataParallel().replicate_params(WEIGHTS, MESH), batch))


def test_of_two_mapped_axes_none_is_guessed():
    program = jax.shard_map(
        lambda w, b: DataParallel().all_reduce_gradients(own_gradients(w, b, ("data", "model"))),
        mesh=MESH_2D,
        in_specs=(P(), P(("data", "model"))),
        out_specs=P(),
    )
    with pytest.raises(NameError) as error:
        jax.eval_shape(program, WEIGHTS, BATCH)
    assert str(error.value) == (
        "all_reduce_gradients(axis_name='batch'): the axes mapped here are 'data', 'model'.\n"
        "  Name one: all_reduce_gradients(gradients, axis_name='data')"
    )


@pytest.mark.parametrize("axis", ["batch", "data"])
@pytest.mark.parametrize("reduce_type", ["mean", "sum"])
def test_gradients_that_jax_has_summed_already_are_an_error(axis, reduce_type):
    """Under check_vma those of replicated parameters are; their mean would be eight times too large."""

    def step(weights, batch):
        return DataParallel().all_reduce_gradients(jax.grad(loss)(weights, batch), reduce_type, axis_name=axis)

    with pytest.raises(ValueError, match="same on all devices") as error:
        jax.eval_shape(jax.shard_map(step, mesh=MESH, in_specs=(P(), P("data")), out_specs=P()), WEIGHTS, BATCH)
    text = str(error.value)
    assert text.startswith(
        f"all_reduce_gradients(reduce_type='{reduce_type}'): gradients['b'] is the same on all devices along 'data', "
        "not each device's own."
    )
    assert "params = jax.lax.pcast(params, 'data', to=\"varying\")" in text
    assert "leave this call out" in text


def test_gradients_are_reduced_over_several_axes():
    def step(weights, batch):
        own = own_gradients(weights, batch, ("data", "model"))
        return DataParallel().all_reduce_gradients(own, axis_name=("data", "model"))

    program = jax.shard_map(step, mesh=MESH_2D, in_specs=(P(), P(("data", "model"))), out_specs=P())
    assert_gradients(jax.jit(program)(WEIGHTS, BATCH))


def test_gradients_of_a_reduced_loss_need_no_reduction():
    """What the error above says."""
    program = jax.shard_map(
        lambda w, b: jax.grad(lambda w: lax.pmean(loss(w, b), "data"))(w),
        mesh=MESH,
        in_specs=(P(), P("data")),
        out_specs=P(),
    )
    assert_gradients(jax.jit(program)(WEIGHTS, BATCH))


def test_leaves_that_are_no_arrays_pass_unchanged():
    def step(x):
        reduced = DataParallel().all_reduce_gradients({"w": x, "frozen": None, "scale": 3})
        assert reduced["frozen"] is None
        assert reduced["scale"] == 3
        return reduced["w"]

    mesh = Mesh(np.array(jax.devices()), ("data",))
    x = np.arange(8, dtype=np.float32)
    np.testing.assert_array_equal(jax.shard_map(step, mesh=mesh, in_specs=P("data"), out_specs=P())(x), [x.mean()])
