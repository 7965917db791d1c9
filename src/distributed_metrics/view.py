"""Where this code runs: which axes are mapped here, which rows this program sees, and how a value is laid out.

There is one way to accumulate: every device merges what it sees into its own row. Code that is already mapped over the
devices (``shard_map``, ``pmap``) does just that; code with a global view (eager, ``jit``) enters a ``shard_map`` first.
A ``View`` says which of the two, and over which axes.
"""

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

AnyMesh = Mesh | AbstractMesh


@dataclass(frozen=True)
class Layout:
    """Where the accumulators of an object live: a static attribute of it.

    Attributes:
        mesh: the mesh, or None for a single row on whatever device the values are.
        axes: the mesh axes that rows spread over.
        alone: whether that row is one of many of a population, and devices that are mapped here have nothing to do with
            each other.
    """

    mesh: AnyMesh | None
    axes: tuple[str, ...]
    alone: bool = False

    @property
    def rows(self) -> int:
        """How many rows there are: one for each position along ``axes``."""
        return axes_size(self.mesh, self.axes) if self.mesh is not None else 1

    @property
    def processes(self) -> tuple[int, ...]:
        """The processes that own devices of the mesh; empty where there is none, or where only its shape is known."""
        return processes_of(self.mesh) if isinstance(self.mesh, Mesh) else ()


@dataclass(frozen=True)
class View:
    """What the code that runs now sees of a layout.

    Attributes:
        mapped: the axes of the rows that are mapped here: each device sees its own values.
        spread: the axes of the rows that are not: a ``shard_map`` goes over these (and the mesh's other axes).
        mesh: the mesh for that ``shard_map``; None where the mesh of the context is to be used.
        others: axes of the mesh that are neither mapped here nor spread over by rows.
        explicit: whether the types of arrays show their sharding here.
        row_dim: whether an accumulator has its leading dim: ``pmap`` takes it away.
    """

    mapped: tuple[str, ...] = ()
    spread: tuple[str, ...] = ()
    mesh: AnyMesh | None = None
    others: tuple[str, ...] = ()
    explicit: bool = False
    row_dim: bool = True

    def mesh_here(self) -> AnyMesh:
        """The mesh of the ``shard_map`` that a global view enters: its own, or that of the code around it."""
        return self.mesh if self.mesh is not None else jax.sharding.get_abstract_mesh()

    @property
    def global_axes(self) -> tuple[str, ...]:
        """The axes of the ``shard_map`` that a global view enters; empty where there is none to enter.

        Code that is mapped over all axes of the rows has a global view of the others, along which rows are copies.
        """
        return self.spread + self.others if self.spread or self.mapped else ()


@functools.lru_cache(maxsize=1024)
def processes_of(mesh: Mesh) -> tuple[int, ...]:
    """The processes that own devices of a mesh."""
    return tuple(sorted({device.process_index for device in mesh.devices.flat}))


def axes_size(mesh: AnyMesh, axes: Iterable[str]) -> int:
    """How many positions a mesh has along some axes."""
    return int(np.prod([mesh.shape[axis] for axis in axes], dtype=np.int64))


def make_layout(mesh: AnyMesh | None, axis_name: str | Iterable[str] | None) -> Layout:
    """The layout that the arguments of ``DistributedMetrics`` ask for.

    Raises:
        TypeError: ``mesh`` is no mesh.
        ValueError: an axis that the mesh does not have.
    """
    if axis_name is not None and not isinstance(axis_name, str) and not tuple(axis_name):
        if mesh is not None:
            raise ValueError(
                "DistributedMetrics(axis_name=()): one row, wherever its member of a population is; so leave mesh= out."
            )
        return Layout(None, (), alone=True)
    if mesh is None:
        mesh = _context_mesh()
        if mesh is None and axis_name is not None:
            raise ValueError(
                f"DistributedMetrics(axis_name={axis_name!r}): there is no mesh that could have this axis.\n"
                f"  Give it: DistributedMetrics({{...}}, mesh=mesh, axis_name={axis_name!r}), or make the object under "
                "jax.set_mesh(mesh)."
            )
        if mesh is None:
            return Layout(None, ())
    if not isinstance(mesh, Mesh | AbstractMesh):
        raise TypeError(
            f"DistributedMetrics(mesh=...) takes a jax.sharding.Mesh, got {type(mesh).__name__}: {mesh!r}.\n"
            '  For example: mesh=jax.make_mesh((jax.device_count(),), ("data",))'
        )
    axes = mesh.axis_names if axis_name is None else (axis_name,) if isinstance(axis_name, str) else tuple(axis_name)
    unknown = [axis for axis in axes if axis not in mesh.axis_names]
    if unknown or len(set(axes)) != len(axes):
        raise ValueError(
            f"DistributedMetrics(axis_name={axis_name!r}): the mesh has the axes {mesh.axis_names}.\n"
            f"  Name one or some of them, each once, or leave axis_name out to use all."
        )
    return Layout(mesh, tuple(axes))


def _context_mesh() -> AnyMesh | None:
    """The mesh of ``jax.set_mesh``, or that of the ``shard_map`` this runs in; None where there is neither."""
    abstract = jax.sharding.get_abstract_mesh()
    if abstract.empty:
        return None
    if abstract.manual_axes:
        return AbstractMesh(abstract.axis_sizes, abstract.axis_names)
    try:
        return jax.sharding.get_mesh()
    except ValueError:  # in a trace only the abstract mesh is known
        return abstract


def look(layout: Layout, rows: Any, dims: int) -> View:
    """What the code that runs now sees.

    Args:
        layout: of the object.
        rows: the array of one of its tables: concrete or traced.
        dims: how many dims that array has, the row dim included, without dims that ``vmap`` put in front.

    Raises:
        ValueError: the rows are not split as the mapped code asks for.
    """
    context = jax.sharding.get_abstract_mesh()
    if layout.alone and rows.ndim >= dims and (here := rows.shape[rows.ndim - dims]) != 1:
        raise ValueError(
            f"DistributedMetrics: an object with axis_name=() is one row, and this one has {here}: those of several "
            "devices were put together.\n"
            "  Give members a dim of their own: jax.shard_map(jax.vmap(step), ...). For one object over all devices "
            "leave axis_name out."
        )
    if context.manual_axes and not layout.alone:
        return _look_mapped(layout, rows, dims, context)
    if rows.ndim < dims:
        raise ValueError(
            "DistributedMetrics: the accumulators came here without their row dim: shape "
            f"{rows.shape}, {layout.rows} row(s) expected.\n"
            "  vmap over them only makes populations: make the object under jax.vmap (or nnx.vmap), not its rows."
        )
    if layout.mesh is None:
        return View()
    known: AnyMesh
    mesh: AnyMesh | None
    if not context.empty and all(context.shape.get(a) == layout.mesh.shape[a] for a in layout.mesh.axis_names):
        known, mesh = context, None
    else:
        known = mesh = layout.mesh if isinstance(layout.mesh, Mesh) else _mesh_of(rows, layout)
    return View(
        spread=layout.axes,
        mesh=mesh,
        others=tuple(axis for axis in known.axis_names if axis not in layout.axes),
        explicit=all(kind == AxisType.Explicit for kind in known.axis_types),
    )


def look_fresh(layout: Layout) -> tuple[View, tuple[str, ...]]:
    """The view of new rows where they are made, and the axes over which the types of rows vary there."""
    context = jax.sharding.get_abstract_mesh()
    mapped = tuple(axis for axis in layout.axes if axis in context.manual_axes)
    spread = tuple(axis for axis in layout.axes if axis not in mapped)
    known = not context.empty and all(axis in context.axis_names for axis in layout.axes)
    varying = tuple(context.manual_axes) if layout.alone else mapped + spread
    return View(mapped, spread, None if known else layout.mesh), varying


def _look_mapped(layout: Layout, rows: Any, dims: int, context: AbstractMesh) -> View:
    manual = tuple(context.manual_axes)
    if rows.ndim < dims:  # pmap took the row dim away
        return View(mapped=manual, row_dim=False)
    here = rows.shape[rows.ndim - dims]
    if layout.mesh is None:
        raise ValueError(
            f"DistributedMetrics: this object has one row, and here {axes_size(context, manual)} devices are mapped "
            f"{_over(manual)}: they would overwrite each other.\n"
            "  Give each a row: DistributedMetrics({...}, mesh=mesh), split over the devices on the way in, by "
            + (f"in_specs=P({', '.join(map(repr, manual))})." if manual != _OF_PMAP else "in_axes=0.")
        )
    mapped = tuple(axis for axis in layout.axes if axis in manual)
    spread = tuple(axis for axis in layout.axes if axis not in manual)
    expected = layout.rows // axes_size(context, mapped)
    elsewhere = any(axis not in context.axis_names for axis in spread)
    if elsewhere and here != layout.rows:
        raise ValueError(
            f"DistributedMetrics: the rows spread over the axes {layout.axes}, and the axes mapped here are {manual}.\n"
            f"  Map over the same axes, or give the object the mesh of these: DistributedMetrics({{...}}, mesh=mesh)"
        )
    if elsewhere or here != expected:
        shown = ", ".join(map(repr, layout.axes))
        probably = (
            "Probably they came in whole, by in_specs=P() or flax.jax_utils.replicate, or the object was captured "
            "instead of passed in. "
            if here == layout.rows
            else ""
        )
        raise ValueError(
            f"DistributedMetrics: {here} rows of the accumulators entered code that is mapped {_over(manual)}; each "
            f"device owns {layout.rows // axes_size(context, manual) if elsewhere else expected} of {layout.rows}.\n"
            f"  {probably}Split them over all their axes: in_specs=P(({shown},)), and out_specs the same (pmap: "
            "in_axes=0). For rows along some axes only: DistributedMetrics({...}, mesh=mesh, axis_name=...)"
        )
    others = tuple(axis for axis in context.axis_names if axis not in manual and axis not in spread)
    kinds = [kind for axis, kind in zip(context.axis_names, context.axis_types, strict=True) if axis not in manual]
    return View(mapped, spread, None, others, bool(kinds) and all(kind == AxisType.Explicit for kind in kinds))


_OF_PMAP = ("_internal_pmap_axis_name",)  # as JAX calls it where the user gave no name: only for errors


def _over(axes: tuple[str, ...]) -> str:
    return "by pmap" if axes == _OF_PMAP else f"over {axes}"


def _mesh_of(rows: Any, layout: Layout) -> AnyMesh:
    """The mesh on which rows lie whose object was made in a trace, where only an abstract mesh was known."""
    sharding = jax.typeof(rows).sharding if is_traced(rows) else rows.sharding
    if isinstance(sharding, NamedSharding) and all(axis in sharding.mesh.axis_names for axis in layout.axes):
        return sharding.mesh
    assert layout.mesh is not None
    return layout.mesh


def mapped_axes() -> tuple[str, ...]:
    """The axes that ``shard_map`` or ``pmap`` maps over here."""
    return tuple(jax.sharding.get_abstract_mesh().manual_axes)


def is_traced(x: Any) -> bool:
    """Whether ``x`` is an array of a program that is being traced."""
    return isinstance(x, jax.core.Tracer)


def varying_axes(x: Any) -> frozenset[str]:
    """The mapped axes over which the type of ``x`` varies; none where types do not show it (``check_vma=False``)."""
    return frozenset(jax.typeof(x).manual_axis_type.varying)


def spec_axes(spec: PartitionSpec) -> tuple[str, ...]:
    """All mesh axes that a partition names."""
    axes: list[str] = []
    for entry in spec:
        axes.extend((entry,) if isinstance(entry, str) else entry or ())
    return tuple(axes)


def full_spec(spec: PartitionSpec, ndim: int) -> PartitionSpec:
    """A partition with an entry for every dim."""
    return PartitionSpec(*spec, *(None,) * (ndim - len(spec)))
