"""Where the values of an update lie, and how they are partitioned: the order of decisions is in ``placed``."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, Sharding
from jax.sharding import PartitionSpec as P

from distributed_metrics.view import (
    Layout,
    View,
    axes_size,
    full_spec,
    is_traced,
    look,
    spec_axes,
    varying_axes,
)

Value = jax.Array | np.ndarray


@dataclass(frozen=True)
class Situation:
    """Where an update happens.

    Attributes:
        layout, view: of the object, here.
        eager: whether nothing is traced, so that values must be brought to the devices of the mesh.
        elsewhere: whether it is eager, and this process owns no devices of the mesh.
        rows_vary: the axes over which the types of the rows vary; empty where types do not show it.
    """

    layout: Layout
    view: View
    eager: bool
    elsewhere: bool
    rows_vary: frozenset[str]


def situation_of(layout: Layout, table: Any, dims: int) -> Situation:
    """Where code runs that sees one of the tables of an object, which has so many dims: see ``view.look``."""
    view = look(layout, table, dims)
    eager = not is_traced(table)
    rows = table.shape[table.ndim - dims] if eager and view.row_dim else layout.rows
    if rows != layout.rows:
        raise ValueError(
            f"DistributedMetrics: these accumulators have {rows} of the {layout.rows} rows of their mesh.\n"
            "  The function that returned the object took it for the same on all devices: return it as it came in, "
            f"jax.shard_map(..., out_specs=P({', '.join(map(repr, layout.axes))}))"
        )
    elsewhere = eager and bool(layout.processes) and jax.process_index() not in layout.processes
    return Situation(layout, view, eager, elsewhere, varying_axes(table) if view.mapped else frozenset())


def placed(name: str, array: Value, shape: tuple[int, ...], asked: Any, situation: Situation) -> tuple[Value, P | None]:
    """The array where the rows can read it, and its partition over the global axes (None: not known)."""
    view = situation.view
    if asked is not None and not isinstance(asked, P):
        raise TypeError(
            f"metrics.update(spec=...): {name!r} got {asked!r}; a spec is a jax.sharding.PartitionSpec.\n"
            '  For example: spec=P(("data", "fsdp"), "context")'
        )
    if not view.global_axes:
        told = asked is not None and not spec_axes(asked)
        whole = situation.layout.mesh is not None or _is_on_one_device(name, array, situation.layout.alone or told)
        return array, P() if whole else None
    own = _own_spec(name, array, situation)
    if asked is not None and len(shape):
        asked = _checked_spec(name, shape, asked, situation)
    elif asked is not None:
        asked = P()
    if view.explicit and not situation.eager:
        if asked is not None and own is not None and full_spec(asked, array.ndim) != own:
            raise ValueError(
                f"metrics.update(spec=...): {name!r} was said to be partitioned as {asked}, and its type says {own}.\n"
                "  On a mesh of Explicit axes leave spec out: it is read off the value."
            )
        return array, own if own is not None else P()
    if own is not None:
        return array, own
    if not isinstance(array, jax.Array) and not situation.eager:
        return array, P()  # a constant of the program is everywhere
    spec = asked if asked is not None else _guessed_spec(shape, situation)
    if situation.eager:
        spec = P() if spec is None else spec
        mesh = _concrete_mesh(situation)
        padded = full_spec(spec, array.ndim)  # the words of a pair are not partitioned
        return _put(array, NamedSharding(mesh, padded)), padded
    return array, spec


def _own_spec(name: str, array: Value, situation: Situation) -> P | None:
    """The partition that the array itself shows: its type on Explicit axes, its sharding where it is concrete."""
    view = situation.view
    if not isinstance(array, jax.Array):
        return None
    if not situation.eager:
        if not view.explicit:
            return None
        sharding = jax.typeof(array).sharding
        if sharding.mesh.empty:
            return full_spec(P(), array.ndim)
        if not set(view.global_axes) <= set(sharding.mesh.axis_names):
            raise _other_devices(name, sharding.mesh, situation)
        return full_spec(sharding.spec, array.ndim)
    sharding, mesh = array.sharding, _concrete_mesh(situation)
    if isinstance(sharding, NamedSharding) and sharding.mesh == mesh:
        return full_spec(sharding.spec, array.ndim)
    if not sharding.device_set <= set(mesh.devices.flat):
        shown = sharding.mesh if isinstance(sharding, NamedSharding) else sorted(map(str, sharding.device_set))
        raise _other_devices(name, shown, situation)
    return None


def _other_devices(name: str, shown: Any, situation: Situation) -> ValueError:
    mesh = situation.layout.mesh
    alike = isinstance(shown, Mesh) and isinstance(mesh, Mesh) and set(shown.devices.flat) == set(mesh.devices.flat)
    where = "another mesh" if alike else "other devices"
    return ValueError(
        f"metrics.update(): {name!r} lies on {where} than the accumulators.\n"
        f"  The value:        {shown}\n  The accumulators: {situation.layout.mesh}\n"
        "  Make the object with the mesh of its values: DistributedMetrics({...}, mesh=mesh)"
    )


def _checked_spec(name: str, shape: tuple[int, ...], spec: P, situation: Situation) -> P:
    mesh = situation.view.mesh_here()
    unknown = [axis for axis in spec_axes(spec) if axis not in situation.view.global_axes]
    if unknown:
        raise ValueError(
            f"metrics.update(spec={spec}): {name!r}: {unknown[0]!r} is no axis of the mesh; "
            f"its axes are {situation.view.global_axes}."
        )
    if len(spec) > len(shape):
        raise ValueError(
            f"metrics.update(spec={spec}): {name!r} has shape {shape}: {len(shape)} dims for {len(spec)} entries.\n"
            f'  Give each value its own: spec={{"{name}": P(...)}}'
        )
    for size, entry in zip(shape, spec, strict=False):
        parts = axes_size(mesh, spec_axes(P(entry)))
        if size % parts:
            raise ValueError(
                f"metrics.update(spec={spec}): {name!r} has shape {shape}, and {size} is not divisible by {parts} "
                f"({entry!r}).\n  Pad it and give the padding weight 0, or leave spec out."
            )
    return full_spec(spec, len(shape))


def _guessed_spec(shape: tuple[int, ...], situation: Situation) -> P | None:
    """Where JAX does not show it: on a mesh of one axis the leading dim is taken to be the partitioned one."""
    view, mesh = situation.view, situation.view.mesh_here()
    if not shape:
        return P()
    wide = [axis for axis in view.global_axes if mesh.shape[axis] > 1]
    one_axis = len(wide) <= 1 and set(wide) <= set(view.spread)
    if shape[0] % axes_size(mesh, view.spread) == 0 and (one_axis or situation.eager):
        return full_spec(P(view.spread), len(shape))
    return None


def _concrete_mesh(situation: Situation) -> Mesh:
    mesh = situation.view.mesh if situation.view.mesh is not None else situation.layout.mesh
    return mesh if isinstance(mesh, Mesh) else jax.sharding.get_mesh()


def _is_on_one_device(name: str, array: Value, is_told: bool) -> bool:
    """Whether a value for an object of one row lies on one device.

    Under ``jit`` on Auto axes several devices may hold it (they are seen, its partition is not): XLA then reduces it,
    unless we are told that each has it whole, as the members of a population have.

    Raises:
        ValueError: it is seen to be held by several devices, each of which should have a row.
    """
    if not isinstance(array, jax.Array):
        return True
    if is_traced(array):
        mesh = jax.typeof(array).sharding.mesh
        devices = 1 if mesh.empty else mesh.size
        explicit = not mesh.empty and AxisType.Explicit in mesh.axis_types
        if is_told and not explicit:
            return True
        if is_told and devices > 1:
            raise ValueError(
                f"metrics.update(): {name!r} lies on the Explicit axes {mesh.axis_names}, and a vmap hides which.\n"
                f"  Map the members over them: jax.shard_map(jax.vmap(train), in_specs=P({mesh.axis_names[0]!r}), "
                f"out_specs=P({mesh.axis_names[0]!r}))"
            )
        if devices > 1 and all(kind == AxisType.Auto for kind in mesh.axis_types):
            return False
    else:
        devices = len(array.sharding.device_set)
    if devices > 1:
        raise ValueError(
            f"metrics.update(): {name!r} lives on {devices} devices, and this object has one row, on one device.\n"
            "  Give each device a row: DistributedMetrics({...}, mesh=mesh), or make the object under "
            "jax.set_mesh(mesh). (A member of a population, axis_name=(), is updated under vmap or shard_map.)"
        )
    return True


def on_device(array: Value, situation: Situation) -> Value:
    """Host numbers, and weights from elsewhere, on the devices: put there explicitly, for ``jax.transfer_guard``."""
    if not situation.eager or is_traced(array):  # traced: put in a trace that captured the object, which is refused
        return array
    if not situation.view.global_axes:
        return array if isinstance(array, jax.Array) else jax.device_put(np.array(array))  # its own: see _put
    mesh = _concrete_mesh(situation)
    if isinstance(array, jax.Array) and isinstance(array.sharding, NamedSharding) and array.sharding.mesh == mesh:
        return array
    return _put(array, NamedSharding(mesh, P()))


def on_host(array: jax.Array) -> np.ndarray:
    """The array, fetched explicitly, for ``jax.transfer_guard``; ``jax.device_get`` takes 10 microseconds more."""
    with jax.transfer_guard_device_to_host("allow"):
        return np.asarray(array)


def of_this_process(value: Any) -> Any:
    """In several processes: an array that this one alone can read, as a host number, which all must give alike.

    ``jax.device_put`` would compare it with those of the others over the network, at every update.
    """
    value = value.get_value() if isinstance(value, nnx.Variable) else value
    return on_host(value) if isinstance(value, jax.Array) and value.is_fully_addressable else value


def _put(array: Value, sharding: NamedSharding) -> jax.Array:
    """``jax.device_put``, which in several processes would compare NumPy arrays over the network, and never find NaN
    equal to itself: there each process puts its own shards."""
    if isinstance(array, np.ndarray):
        array = np.array(array)  # a CPU device may read the memory of the original later, when a loader has refilled it
    if isinstance(array, jax.Array) or sharding.is_fully_addressable:
        return jax.device_put(array, sharding)
    shards = [
        jax.device_put(array[index], device)
        for device, index in sharding.addressable_devices_indices_map(array.shape).items()
    ]
    return jax.make_array_from_single_device_arrays(array.shape, sharding, shards, dtype=array.dtype)


def partitions_of(layout: Layout, of_rows: Sharding, shardings: Sequence[Sharding]) -> list[P] | None:
    """How concrete arrays are partitioned over the devices of the rows; None where one has to be put there first."""
    if not of_rows.addressable_devices:
        return None
    partitions = []
    for one in shardings:
        if layout.mesh is not None and isinstance(one, NamedSharding):
            if not isinstance(of_rows, NamedSharding) or one.mesh != of_rows.mesh:
                return None
            partitions.append(one.spec)
        elif len(of_rows.device_set) == 1 and one.device_set == of_rows.device_set:
            partitions.append(P())
        else:
            return None
    return partitions


def row_sharding(tables: Mapping[str, jax.Array]) -> NamedSharding:
    """How rows lie that several processes own."""
    sharding = next(iter(tables.values())).sharding
    assert isinstance(sharding, NamedSharding)  # only named shardings span processes here
    return sharding


def by_process(label: np.ndarray, rows: int, tables: Mapping[str, jax.Array]) -> jax.Array:
    """An array ``(rows, *label.shape)`` of which the devices of each process hold its own label."""
    sharding = row_sharding(tables)
    spec = next(entry for entry in sharding.spec if entry is not None)
    by_row = NamedSharding(sharding.mesh, P(spec))
    shape = (rows, *label.shape)
    shards = [jax.device_put(label[None], device) for device in by_row.addressable_devices_indices_map(shape)]
    return jax.make_array_from_single_device_arrays(shape, by_row, shards)
