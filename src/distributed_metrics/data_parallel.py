"""What data parallelism needs around a train step: a sharded batch, a placed model, reduced gradients."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from distributed_metrics import reducers
from distributed_metrics.naming import did_you_mean
from distributed_metrics.view import axes_size, is_traced, mapped_axes, spec_axes, varying_axes

_REDUCTIONS: dict[str, Callable[..., Any]] = {"mean": reducers.reduce_mean, "sum": reducers.reduce_sum}


def create_data_parallel_sharding(mesh: Mesh | AbstractMesh, data_axis: str = "data") -> NamedSharding:
    """The sharding of a batch whose leading dim is split over one axis of a mesh.

    Args:
        mesh: the mesh.
        data_axis: the axis to split over.

    Returns:
        ``NamedSharding(mesh, P(data_axis))``.

    Raises:
        ValueError: the mesh has no such axis.

    >>> import jax
    >>> tuple(create_data_parallel_sharding(jax.make_mesh((1,), ("data",))).spec)
    ('data',)
    """
    if data_axis not in mesh.axis_names:
        raise ValueError(
            f"create_data_parallel_sharding(data_axis={data_axis!r}): the mesh has the axes "
            f"{', '.join(map(repr, mesh.axis_names))}.{did_you_mean(str(data_axis), mesh.axis_names)}\n"
            f"  Name one of them: create_data_parallel_sharding(mesh, data_axis={mesh.axis_names[0]!r})"
        )
    return NamedSharding(mesh, P(data_axis))


def shard_batch(batch: Any, sharding: NamedSharding) -> Any:
    """Put a batch on the devices, in one transfer.

    In several processes each of them gives the whole batch. Where each loads a part of its own, use
    ``jax.make_array_from_process_local_data(sharding, part)``.

    Args:
        batch: a pytree of arrays (JAX or NumPy) with the examples along the leading dim. An array of fewer dims than
            the sharding names takes as much of it as it has, so a scalar is replicated. Python numbers, strings and
            whatever else is no array pass unchanged.
        sharding: for example that of ``create_data_parallel_sharding``.

    Returns:
        The same structure, of JAX arrays that are sharded.

    Raises:
        TypeError: ``sharding`` is no ``NamedSharding``.
        ValueError: a dim of an array does not divide by the number of its shards.

    >>> import jax, numpy as np
    >>> sharding = create_data_parallel_sharding(jax.make_mesh((1,), ("data",)))
    >>> batch = shard_batch({"image": np.zeros((8, 3)), "name": "train"}, sharding)
    >>> tuple(batch["image"].sharding.spec), batch["name"]
    (('data',), 'train')
    """
    if not isinstance(sharding, NamedSharding):
        raise TypeError(
            f"shard_batch() takes a jax.sharding.NamedSharding, got {type(sharding).__name__}: {sharding!r}.\n"
            "  Make one of a mesh: shard_batch(batch, create_data_parallel_sharding(mesh))"
        )
    for path, leaf in jax.tree.leaves_with_path(batch):
        if _is_array(leaf):
            _check_divides(path, leaf, sharding)
    return _placed(batch, lambda leaf: NamedSharding(sharding.mesh, P(*sharding.spec[: leaf.ndim])))


def shard_model_state(state: Any, mesh: Mesh, param_sharding: Literal["replicate", "shard"] = "replicate") -> Any:
    """Put the parameters (or an optimizer's state) on the devices of a mesh, in one transfer.

    Args:
        state: an ``nnx.State``, an ``nnx.Module`` or any other pytree. Leaves that are no arrays pass unchanged.
        mesh: the mesh.
        param_sharding: ``"replicate"``: a copy on every device. ``"shard"``: each array is split over the first axis of
            the mesh, along its first dim that divides by that axis's size; an array without such a dim is replicated.

    Returns:
        The same structure, of JAX arrays on the mesh.

    Raises:
        ValueError: an unknown ``param_sharding``.

    >>> import jax, numpy as np
    >>> mesh = jax.make_mesh((1,), ("data",))
    >>> tuple(shard_model_state({"kernel": np.zeros((3, 4))}, mesh, "shard")["kernel"].sharding.spec)
    ('data',)
    """
    known: dict[str, Callable[[Any, Mesh], P]] = {"replicate": lambda leaf, mesh: P(), "shard": _split_first_dim}
    if param_sharding not in known:
        raise ValueError(
            f"shard_model_state(param_sharding={param_sharding!r}): known are {', '.join(map(repr, known))}."
            f"{did_you_mean(str(param_sharding), known)}"
        )
    return _placed(state, lambda leaf: NamedSharding(mesh, known[param_sharding](leaf, mesh)))


def replicate_params(params: Any, mesh: Mesh) -> Any:
    """A copy of the parameters on every device: ``shard_model_state(params, mesh, "replicate")``."""
    return shard_model_state(params, mesh, "replicate")


def all_reduce_gradients(gradients: Any, reduce_type: Literal["mean", "sum"] = "mean", axis_name: str = "batch") -> Any:
    """Reduce gradients across devices; under ``jit`` with a global view they are returned as they are.

    In code that is mapped over devices (``pmap``, ``shard_map``) each device has the gradients of its own part of the
    batch, and they are reduced as by ``reduce_mean`` or ``reduce_sum``. In traced code where no axis is mapped they are
    those of the whole batch already. (The axis of a ``vmap`` is seen only if ``axis_name`` names it.)

    Under ``shard_map`` with ``check_vma`` on, which is the default, ``jax.grad`` itself sums the gradients of
    replicated parameters (``in_specs=P()``) over the devices. For each device's own gradients, make the parameters vary
    first: ``params = jax.lax.pcast(params, "data", to="varying")``.

    Args:
        gradients: a pytree of arrays. Leaves that are no arrays pass unchanged.
        reduce_type: ``"mean"`` or ``"sum"``.
        axis_name: the mapped axis. If it is ``"batch"``, which is not mapped here, and exactly one axis is, that one is
            used.

    Returns:
        The same structure, reduced.

    Raises:
        ValueError: an unknown ``reduce_type``, or gradients that are the same on all devices already.
        NameError: other axes are mapped here, or the code is not traced at all.

    >>> import jax, jax.numpy as jnp
    >>> reduce = jax.vmap(lambda g: all_reduce_gradients({"w": g}), axis_name="batch")
    >>> reduce(jnp.array([1.0, 2.0]))["w"].tolist()
    [1.5, 1.5]
    """
    if reduce_type not in _REDUCTIONS:
        raise ValueError(
            f"Unsupported reduce_type: {reduce_type!r}. all_reduce_gradients() knows "
            f"{', '.join(map(repr, _REDUCTIONS))}.{did_you_mean(str(reduce_type), _REDUCTIONS)}"
        )
    is_global = not mapped_axes() and not reducers.is_mapped(axis_name)
    if is_global and any(map(is_traced, jax.tree.leaves(gradients))):
        return gradients
    try:
        reduced = _REDUCTIONS[reduce_type](gradients, axis_name)
    except NameError as error:
        raise _not_mapped(axis_name) from error
    _check_each_its_own(gradients, reduce_type, axis_name)
    return reduced


class DataParallel(nnx.Module):
    """Data-parallel training: ``distributed_metrics.data_parallel``'s functions as methods and static methods.

    >>> import jax, numpy as np
    >>> parallel = DataParallel()
    >>> sharding = parallel.create_data_parallel_sharding(jax.make_mesh((1,), ("data",)))
    >>> parallel.shard_batch({"x": np.zeros((8, 3))}, sharding)["x"].shape
    (8, 3)
    """

    # Above the methods: below them these names would be the methods.
    create_data_parallel_sharding_static = staticmethod(create_data_parallel_sharding)
    shard_batch_static = staticmethod(shard_batch)
    all_reduce_gradients_static = staticmethod(all_reduce_gradients)

    def create_data_parallel_sharding(self, mesh: Mesh | AbstractMesh, data_axis: str = "data") -> NamedSharding:
        """As the function ``distributed_metrics.data_parallel.create_data_parallel_sharding``."""
        return create_data_parallel_sharding(mesh, data_axis)

    def shard_batch(self, batch: Any, sharding: NamedSharding) -> Any:
        """As the function ``distributed_metrics.data_parallel.shard_batch``."""
        return shard_batch(batch, sharding)

    def shard_model_state(
        self, state: Any, mesh: Mesh, param_sharding: Literal["replicate", "shard"] = "replicate"
    ) -> Any:
        """As the function ``distributed_metrics.data_parallel.shard_model_state``."""
        return shard_model_state(state, mesh, param_sharding)

    def all_reduce_gradients(
        self, gradients: Any, reduce_type: Literal["mean", "sum"] = "mean", axis_name: str = "batch"
    ) -> Any:
        """As the function ``distributed_metrics.data_parallel.all_reduce_gradients``."""
        return all_reduce_gradients(gradients, reduce_type, axis_name)

    def replicate_params(self, params: Any, mesh: Mesh) -> Any:
        """As the function ``distributed_metrics.data_parallel.replicate_params``."""
        return replicate_params(params, mesh)


def _is_array(leaf: Any) -> bool:
    """Whether a leaf has a place of its own: a JAX array, or a NumPy array or scalar."""
    return isinstance(leaf, jax.Array | np.ndarray | np.number | np.bool_)


def _placed(tree: Any, sharding_of: Callable[[Any], NamedSharding]) -> Any:
    """The tree with its arrays where ``sharding_of`` says."""
    leaves, structure = jax.tree.flatten(tree)
    arrays = [leaf for leaf in leaves if _is_array(leaf)]
    placed = iter(jax.device_put(arrays, [sharding_of(array) for array in arrays]))
    return jax.tree.unflatten(structure, [next(placed) if _is_array(leaf) else leaf for leaf in leaves])


def _split_first_dim(leaf: Any, mesh: Mesh) -> P:
    """The partition over the mesh's first axis of the first dim that divides by its size."""
    axis = mesh.axis_names[0]
    for dim, size in enumerate(leaf.shape):
        if size and size % mesh.shape[axis] == 0:
            return P(*(None,) * dim, axis)
    return P()


def _check_divides(path: Any, leaf: Any, sharding: NamedSharding) -> None:
    """Raise an error that names the leaf unless its dims divide by the number of their shards."""
    for dim, (size, entry) in enumerate(zip(leaf.shape, sharding.spec, strict=False)):
        shards = axes_size(sharding.mesh, spec_axes(P(entry)))
        if size % shards:
            where = f"batch{jax.tree_util.keystr(path)}"
            which = "the leading dim" if dim == 0 else f"dim {dim}"
            raise ValueError(
                f"shard_batch(): {where} has the shape {leaf.shape}, and {which}, {size}, does not divide into "
                f"{shards} shards (sharding {sharding.spec}).\n"
                f"  Make it {max(size // shards, 1) * shards}; or pad it to {-(-size // shards) * shards} and give "
                "metrics.update() a weight of 0 for what was added; or replicate this array: "
                "jax.device_put(x, NamedSharding(mesh, P()))"
            )


def _check_each_its_own(gradients: Any, reduce_type: str, axis_name: str) -> None:
    """Raise an error that names a leaf which is the same on all devices, where types show it (``check_vma``)."""
    asked = {axis_name} if isinstance(axis_name, str) else set(axis_name)
    axes = tuple(axis for axis in mapped_axes() if axis in asked or not reducers.is_mapped(axis_name))
    if not axes or not varying_axes(jax.lax.pcast(np.float32(0), axes, to="varying")):
        return
    for path, leaf in jax.tree.leaves_with_path(gradients):
        same = [axis for axis in axes if is_traced(leaf) and axis not in varying_axes(leaf)]
        if same:
            where = f"gradients{jax.tree_util.keystr(path)}"
            raise ValueError(
                f"all_reduce_gradients(reduce_type={reduce_type!r}): {where} is the same on all devices along "
                f"{same[0]!r}, not each device's own. Under shard_map with check_vma, jax.grad sums the gradients of "
                "replicated parameters over the devices by itself; reduced again they would come out wrong.\n"
                f"  For each device's own gradients, before jax.grad: "
                f'params = jax.lax.pcast(params, {same[0]!r}, to="varying")\n'
                "  If the loss is reduced (jax.lax.pmean) before jax.grad, they are right as they are: leave this call "
                "out."
            )


def _not_mapped(axis_name: str) -> NameError:
    here = mapped_axes()
    if here:
        shown = f"the axes mapped here are {', '.join(map(repr, here))}"
        fix = f"Name one: all_reduce_gradients(gradients, axis_name={here[0]!r})"
    else:
        shown = "no axis is mapped here"
        fix = (
            "Call it in the train step, inside shard_map, pmap or jit. Gradients from jax.grad of a sharded batch "
            "outside of these are those of the whole batch already."
        )
    return NameError(f"all_reduce_gradients(axis_name={axis_name!r}): {shown}.\n  {fix}")
