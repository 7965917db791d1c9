"""The stateless reducers of the specification: like ``lax.pmean`` and its siblings on every leaf, but packed.

Leaves of one dtype travel together, unless they are large: one collective for each operation and dtype. They work
inside ``shard_map``, ``pmap`` and ``vmap(axis_name=...)``, and return the same on every device, typed so.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax import Array, lax

from distributed_metrics import packing
from distributed_metrics.naming import did_you_mean
from distributed_metrics.view import is_traced, mapped_axes, varying_axes

DEFAULT_AXIS = "batch"

_MOST_PACKED_ELEMENTS = 2**16
"""Arrays larger than this travel in a collective of their own."""

_OPERATIONS: dict[str, str] = {"mean": "pmean", "sum": "psum", "max": "pmax", "min": "pmin"}
"""The reductions, and the functions of ``jax.lax`` that make them."""


def all_gather(metrics: dict[str, Any], axis_name: str = DEFAULT_AXIS) -> dict[str, Any]:
    """Gather metrics from all devices.

    Args:
        metrics: names to arrays (or pytrees of arrays), each device's own. Leaves that are no arrays pass unchanged.
        axis_name: the mapped axis to gather over. If it is ``"batch"``, which is not mapped here, and exactly one axis
            is, that one is used.

    Returns:
        The same structure; every array has a new leading dim, the devices.

    Raises:
        NameError: no such axis is mapped here.

    >>> import jax, jax.numpy as jnp
    >>> gather = jax.vmap(lambda x: all_gather({"x": x}), axis_name="batch")
    >>> gather(jnp.array([1.0, 2.0]))["x"].tolist()
    [[1.0, 2.0], [1.0, 2.0]]
    """
    return _collective("all_gather", metrics, axis_name, "all_gather")


def reduce_mean(metrics: dict[str, Any], axis_name: str = DEFAULT_AXIS) -> dict[str, Any]:
    """The mean of metrics across devices; arguments and errors as in ``all_gather``.

    >>> import jax, jax.numpy as jnp
    >>> mean = jax.vmap(lambda x: reduce_mean({"x": x}), axis_name="batch")
    >>> mean(jnp.array([1.0, 2.0]))["x"].tolist()
    [1.5, 1.5]
    """
    return _collective("pmean", metrics, axis_name, "reduce_mean")


def reduce_sum(metrics: dict[str, Any], axis_name: str = DEFAULT_AXIS) -> dict[str, Any]:
    """The sum of metrics across devices; arguments and errors as in ``all_gather``.

    >>> import jax, jax.numpy as jnp
    >>> jax.vmap(lambda x: reduce_sum({"x": x}), axis_name="batch")(jnp.array([1.0, 2.0]))["x"].tolist()
    [3.0, 3.0]
    """
    return _collective("psum", metrics, axis_name, "reduce_sum")


def reduce_max(metrics: dict[str, Any], axis_name: str = DEFAULT_AXIS) -> dict[str, Any]:
    """The maximum of metrics across devices; arguments and errors as in ``all_gather``.

    >>> import jax, jax.numpy as jnp
    >>> jax.vmap(lambda x: reduce_max({"x": x}), axis_name="batch")(jnp.array([1.0, 2.0]))["x"].tolist()
    [2.0, 2.0]
    """
    return _collective("pmax", metrics, axis_name, "reduce_max")


def reduce_min(metrics: dict[str, Any], axis_name: str = DEFAULT_AXIS) -> dict[str, Any]:
    """The minimum of metrics across devices; arguments and errors as in ``all_gather``.

    >>> import jax, jax.numpy as jnp
    >>> jax.vmap(lambda x: reduce_min({"x": x}), axis_name="batch")(jnp.array([1.0, 2.0]))["x"].tolist()
    [1.0, 1.0]
    """
    return _collective("pmin", metrics, axis_name, "reduce_min")


def reduce_custom(
    metrics: dict[str, Any], reduce_fn: dict[str, str | None] | None = None, axis_name: str = DEFAULT_AXIS
) -> dict[str, Any]:
    """Reduce each metric in its own way.

    Args:
        metrics: as in ``all_gather``. A Python or NumPy number is reduced too if ``reduce_fn`` names it.
        reduce_fn: names to ``"mean"``, ``"sum"``, ``"max"``, ``"min"``, or None, which leaves a metric alone; what it
            does not name gets the mean. An operation applies to the whole subtree under its name.
        axis_name: as in ``all_gather``.

    Returns:
        The same structure, reduced.

    Raises:
        ValueError: an unknown operation, or a name that is not among the metrics.
        NameError: no such axis is mapped here.

    >>> import jax, jax.numpy as jnp
    >>> step = lambda x: reduce_custom({"loss": x, "samples": 32}, {"samples": "sum"})
    >>> out = jax.vmap(step, axis_name="batch")(jnp.array([1.0, 2.0]))
    >>> out["loss"].tolist(), out["samples"].tolist()
    ([1.5, 1.5], [64, 64])
    """
    reduce_fn = reduce_fn or {}
    for name, operation in reduce_fn.items():
        if operation is not None and operation not in _OPERATIONS:
            raise ValueError(
                f"reduce_custom(): {name!r} asks for {operation!r}, which is no known operation.\n"
                f"  Known: {', '.join(map(repr, _OPERATIONS))}, or None to leave a metric alone."
                f"{did_you_mean(str(operation), _OPERATIONS)}"
            )
        if name not in metrics:
            raise ValueError(
                f"reduce_custom(): reduce_fn names {name!r}, and the metrics are "
                f"{', '.join(map(repr, metrics))}.{did_you_mean(str(name), metrics)}"
            )
    results = dict(metrics)
    for operation, function in _OPERATIONS.items():
        chosen = {}
        for name, value in metrics.items():
            if reduce_fn.get(name, "mean") == operation:
                chosen[name] = jax.tree.map(_number_as_array, value) if name in reduce_fn else value
        results.update(_collective(function, chosen, axis_name, "reduce_custom"))
    return results


def collect_from_devices(metrics: dict[str, Any]) -> dict[str, list[Any] | Any]:
    """The values of each device as lists; call it outside of the mapped function.

    Args:
        metrics: names to arrays (or pytrees of arrays) whose first dim is the devices. Scalars and leaves that are no
            arrays pass unchanged.

    Returns:
        The same structure, with lists of NumPy values, one for each device. Everything is fetched in one go.

    >>> import jax.numpy as jnp
    >>> [float(x) for x in collect_from_devices({"loss": jnp.array([1.0, 2.0])})["loss"]]
    [1.0, 2.0]
    """
    leaves, structure = jax.tree.flatten(metrics)
    fetched = iter(_fetch([leaf for leaf in leaves if isinstance(leaf, jax.Array)]))
    collected = []
    for leaf in leaves:
        array = next(fetched) if isinstance(leaf, jax.Array) else leaf
        is_batched = isinstance(leaf, jax.Array | np.ndarray) and leaf.ndim > 0
        collected.append(list(array) if is_batched else leaf)
    return jax.tree.unflatten(structure, collected)


def _fetch(arrays: list[jax.Array]) -> list[np.ndarray]:
    """One copy to the host for all arrays; what spans processes is replicated first, in one program."""
    far = [array for array in arrays if not (array.is_fully_addressable or array.is_fully_replicated)]
    if far:
        named: list[Any] = [array.sharding for array in far]  # what spans processes lies on a mesh
        shardings = [jax.sharding.NamedSharding(one.mesh, jax.sharding.PartitionSpec()) for one in named]
        near = iter(jax.jit(lambda *xs: xs, out_shardings=tuple(shardings))(*far))
        arrays = [next(near) if any(array is one for one in far) else array for array in arrays]
    return jax.device_get(arrays)


def _number_as_array(leaf: Any) -> Any:
    if isinstance(leaf, np.int64 | np.uint64):
        leaf = int(leaf)  # of a Python integer JAX says that it is too large; of these it keeps the low half, silently
    is_number = isinstance(leaf, int | float | np.number | np.bool_)
    return jax.numpy.asarray(leaf) if is_number else leaf


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray)


def _collective(function: str, metrics: Any, axis_name: str, method: str) -> Any:
    """``lax.<function>`` of all array leaves: a lone one as it is, several of one dtype in one buffer."""
    leaves, structure = jax.tree.flatten(metrics)
    arrays = [leaf for leaf in leaves if _is_array(leaf)]
    if not arrays:
        return metrics
    axis = _resolved_axis(axis_name, arrays, method)
    try:
        reduced = iter(_packed(lambda array: _call(function, array, axis), arrays, axis))
    except NameError as error:  # outside of every trace: JAX says that the axis is unbound
        raise _not_mapped(axis_name, (), method) from error
    return jax.tree.unflatten(structure, [next(reduced) if _is_array(leaf) else leaf for leaf in leaves])


def _packed(operation: Callable[[Array], Array], arrays: Sequence[Any], axis: str | tuple[str, ...]) -> list[Any]:
    """``operation`` once for each buffer. It may put dims in front of the buffer; they come in front of each array."""
    buffers: dict[Any, list[int]] = {}
    for i, array in enumerate(arrays):
        buffers.setdefault(_buffer_of(i, array, axis), []).append(i)
    results: list[Any] = [None] * len(arrays)
    for indices in buffers.values():
        same = [arrays[i] for i in indices]
        if len(same) == 1:
            results[indices[0]] = operation(same[0])
            continue
        (buffer,) = packing.pack(same).values()
        for i, result in zip(indices, packing.unpack_one(operation(buffer), same), strict=True):
            results[i] = result
    return results


def _buffer_of(i: int, array: Any, axis: str | tuple[str, ...]) -> tuple[Any, ...]:
    """What must be equal for two arrays to share a buffer: the dtype, and what else a result's type is to keep.

    That is the other mapped axes along which the array varies, and its sharding over axes of the mesh that are not
    mapped here: what may be sharded over them travels alone, since a buffer would gather it. So do large arrays
    (gradients), of which a copy costs more than a collective of their own.
    """
    context = jax.sharding.get_abstract_mesh()
    may_be_sharded = array.ndim > 0 and len(context.manual_axes) < len(context.axis_names)
    alone = may_be_sharded or array.size > _MOST_PACKED_ELEMENTS
    return np.dtype(array.dtype), varying_axes(array) - {*_as_tuple(axis)}, i if alone else None


def _call(function: str, array: Any, axis: str) -> Array:
    """The collective itself, looked up on ``jax.lax`` at the call."""
    if function == "all_gather" and set(_as_tuple(axis)) <= set(mapped_axes()):
        return lax.all_gather(array, axis_name=axis, to="invarying")
    return getattr(lax, function)(array, axis_name=axis)


def _as_tuple(axis: str | tuple[str, ...]) -> tuple[str, ...]:
    return (axis,) if isinstance(axis, str) else tuple(axis)


def is_mapped(axis: str | tuple[str, ...]) -> bool:
    """Whether a collective over ``axis`` would work here: ``shard_map``, ``pmap`` and ``vmap`` axes."""
    try:
        for one in _as_tuple(axis):
            lax.axis_size(one)
    except NameError:
        return False
    return True


def _resolved_axis(axis_name: str, arrays: Sequence[Any], method: str) -> str:
    """The axis to reduce over: the one asked for, or the only one there is.

    Outside of every trace nothing is mapped; there the name is returned as it is, so that JAX's own function is called
    and its error explained.
    """
    if is_mapped(axis_name):
        return axis_name
    here = mapped_axes()
    if axis_name == DEFAULT_AXIS and len(here) == 1:
        return here[0]
    if not here and not any(map(is_traced, arrays)):
        return axis_name
    raise _not_mapped(axis_name, here, method)


def _not_mapped(axis_name: str, here: Sequence[str], method: str) -> NameError:
    fix = (
        f"Name it: {method}(metrics, axis_name={here[0]!r})"
        if here
        else "Call it inside shard_map or pmap; under jit with a global view, an array's mean is already that of all "
        "devices."
    )
    shown = f"the axes mapped here are {', '.join(map(repr, here))}" if here else "no axis is mapped here"
    return NameError(f"{method}(axis_name={axis_name!r}): {shown}.\n  {fix}")
