"""Every way of running: each calls ``body(metrics, values)`` in its own kind of program.

What ``body`` returns must be a pytree
that is the same on all devices (a ``Snapshot``), or None.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from distributed_metrics import DistributedMetrics

AXES_1D = {"data": 8}
AXES_2D = {"data": 4, "model": 2}


def make_mesh(axes: dict[str, int], explicit: bool) -> Mesh:
    kind = AxisType.Explicit if explicit else AxisType.Auto
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(kind,) * len(axes))


@dataclass(frozen=True)
class Program:
    """A body in its way of running: called, it returns the metrics (perhaps new ones) and the body's output."""

    call: Callable[[DistributedMetrics, Any], tuple[DistributedMetrics, Any]]
    lower: Callable[[DistributedMetrics, Any], Any] | None = None

    def __call__(self, metrics: DistributedMetrics, values: Any) -> tuple[DistributedMetrics, Any]:
        return self.call(metrics, values)


@dataclass(frozen=True)
class Way:
    """One way of running.

    Attributes:
        name: shown in the test's id.
        step: turns a body into a program.
        axes: of the mesh that the object lives on; None for an object without a mesh.
        explicit: the axis types.
        context: whether ``jax.set_mesh`` is in force.
        mapped: whether the body sees one device's values.
        spec: how the leading dim of the values is partitioned.
        program: whether the way compiles one program, that can be counted.
        stacked: whether the values are given as two steps, stacked along a new leading dim.
        copies: how often the body stands in the program.
    """

    name: str
    step: Callable[["Way", Callable[..., Any]], Program]
    axes: dict[str, int] | None = field(default_factory=lambda: AXES_1D)
    explicit: bool = False
    context: bool = False
    mapped: bool = False
    program: bool = True
    stacked: bool = False
    copies: int = 1

    @property
    def mesh(self) -> Mesh | None:
        return None if self.axes is None else make_mesh(self.axes, self.explicit)

    @property
    def spec(self) -> P:
        return P(tuple(self.axes or ()))

    def make(self, reduce_fn: dict[str, Any], **kwargs: Any) -> DistributedMetrics:
        if self.context:
            return DistributedMetrics(reduce_fn, **kwargs)
        return DistributedMetrics(reduce_fn, mesh=self.mesh, **kwargs)

    def place(self, values: Any) -> Any:
        """NumPy arrays as this way's programs take them: split along the leading dim."""
        if self.stacked:
            values = jax.tree.map(lambda x: x.reshape(2, len(x) // 2, *x.shape[1:]), values)
        mesh = self.mesh
        if mesh is None:
            return jax.tree.map(jnp.asarray, values)
        sharding = NamedSharding(mesh, P(None, *self.spec) if self.stacked else self.spec)
        return jax.tree.map(lambda x: jax.device_put(x, sharding), values)

    def scope(self) -> contextlib.AbstractContextManager[Any]:
        return jax.set_mesh(self.mesh) if self.context else contextlib.nullcontext()


def _eager(way: Way, body):
    return Program(lambda metrics, values: (metrics, body(metrics, values)))


def _in_place(transform):
    """Ways whose transform propagates the changes of an nnx object."""

    def step(way: Way, body):
        jitted = transform(way, body)
        return Program(lambda metrics, values: (metrics, jitted(metrics, values)), getattr(jitted, "lower", None))

    return step


def _in_and_out(transform):
    """Ways in which the object goes in and comes out."""

    def step(way: Way, body):
        def both(metrics, values):
            output = body(metrics, values)
            return metrics, output

        jitted = transform(way, both)
        return Program(jitted, jitted.lower)

    return step


def _split_merge(transform):
    """The functional style: a state in, a state out."""

    def step(way: Way, body):
        programs: dict[Any, Any] = {}

        def program_of(graphdef):
            def pure(state, values):
                inner = nnx.merge(graphdef, state)
                output = body(inner, values)
                return nnx.state(inner), output

            return programs.setdefault(graphdef, transform(way, pure))

        def call(metrics, values):
            graphdef, state = nnx.split(metrics)
            state, output = program_of(graphdef)(state, values)
            nnx.update(metrics, state)
            return metrics, output

        def lower(metrics, values):
            graphdef, state = nnx.split(metrics)
            return program_of(graphdef).lower(state, values)

        return Program(call, lower)

    return step


def _jax_shard_map(way: Way, pure) -> Any:
    mesh: Any = way.mesh
    return jax.jit(jax.shard_map(pure, mesh=mesh, in_specs=(way.spec, way.spec), out_specs=(way.spec, P())))


def _nnx_shard_map(way: Way, body) -> Any:
    mesh: Any = way.mesh
    return nnx.jit(nnx.shard_map(body, mesh=mesh, in_specs=(way.spec, way.spec), out_specs=P()))


def _over_devices(inner):
    """pmap takes values of shape (devices, batch / devices, ...)."""

    def per_device(values):
        return jax.tree.map(lambda x: np.asarray(x).reshape(8, -1, *x.shape[1:]), values)

    def step(way: Way, body):
        program = inner(way, body)
        lower = program.lower
        return Program(
            lambda metrics, values: program(metrics, per_device(values)),
            lower and (lambda metrics, values: lower(metrics, per_device(values))),
        )

    return step


def _jax_pmap(way: Way, pure):
    return jax.pmap(pure, axis_name="batch", out_axes=(0, None))


def _nnx_pmap(way: Way, body):
    return nnx.pmap(body, in_axes=(0, 0), out_axes=None)


def _scan_carry(way: Way, body):
    """Two steps in a scan that carries the object."""

    def both(metrics, values):
        def one(metrics, value):
            return metrics, body(metrics, value)

        _, outputs = nnx.scan(one, in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))(metrics, values)
        return jax.tree.map(lambda x: x[-1], outputs)

    return nnx.jit(both)


def _cond(way: Way, body):
    """The same body in both branches."""
    jitted = nnx.jit(lambda metrics, values, flag: nnx.cond(flag, body, body, metrics, values))
    flag = np.asarray(True)
    return Program(lambda m, v: (m, jitted(m, v, flag)), lambda m, v: jitted.lower(m, v, flag))


def _cached_partial(way: Way, body):
    cached = {}
    jitted = nnx.jit(body)

    def call(metrics, values):
        if id(metrics) not in cached:
            cached[id(metrics)] = nnx.cached_partial(jitted, metrics)
        return metrics, cached[id(metrics)](values)

    return Program(call, jitted.lower)


class _Bigger(nnx.Module):
    def __init__(self, metrics):
        self.weights = nnx.Param(jnp.ones(3))
        self.metrics = metrics


def _inside_bigger(way: Way, body):
    jitted = nnx.jit(lambda bigger, values: body(bigger.metrics, values))
    return Program(lambda m, v: (m, jitted(_Bigger(m), v)), lambda m, v: jitted.lower(_Bigger(m), v))


def _ahead_of_time(way: Way, body):
    """Compiled once, from shapes and shardings alone."""
    compiled: dict[int, Any] = {}

    def pure(metrics, values):
        output = body(metrics, values)
        return metrics, output

    jitted = jax.jit(pure)

    def call(metrics, values):
        if not compiled:
            shapes = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), (metrics, values)
            )
            compiled[0] = jitted.lower(*shapes).compile()
        return compiled[0](metrics, values)

    return Program(call, jitted.lower)


WAYS = [
    Way("eager-1-device", _eager, axes=None, program=False),
    Way("eager-8-devices", _eager, program=False),
    Way("eager-explicit", _eager, explicit=True, program=False),
    Way("eager-2d", _eager, axes=AXES_2D, program=False),
    Way("eager-set_mesh", _eager, explicit=True, context=True, program=False),
    Way("nnx.jit-1-device", _in_place(lambda way, body: nnx.jit(body)), axes=None),
    Way("nnx.jit-auto", _in_place(lambda way, body: nnx.jit(body))),
    Way("nnx.jit-auto-set_mesh", _in_place(lambda way, body: nnx.jit(body)), context=True),
    Way("nnx.jit-explicit", _in_place(lambda way, body: nnx.jit(body)), explicit=True),
    Way("nnx.jit-explicit-set_mesh", _in_place(lambda way, body: nnx.jit(body)), explicit=True, context=True),
    Way("nnx.jit-explicit-2d", _in_place(lambda way, body: nnx.jit(body)), axes=AXES_2D, explicit=True),
    Way("nnx.jit-tree", _in_place(lambda way, body: nnx.jit(body, graph=False))),
    Way("nnx.jit-donated", _in_place(lambda way, body: nnx.jit(body, donate_argnums=0))),
    Way("nnx.cached_partial", _cached_partial),
    Way("nnx.cond", _cond, copies=2),
    Way("nnx.scan", _in_place(_scan_carry), stacked=True),
    Way("bigger-module", _inside_bigger),
    Way("jax.jit", _in_and_out(lambda way, both: jax.jit(both))),
    Way("jax.jit-donated", _in_and_out(lambda way, both: jax.jit(both, donate_argnums=0))),
    Way("jax.jit-split", _split_merge(lambda way, pure: jax.jit(pure))),
    Way("ahead-of-time", _ahead_of_time),
    Way("nnx.shard_map", _in_place(_nnx_shard_map), mapped=True),
    Way("nnx.shard_map-2d", _in_place(_nnx_shard_map), axes=AXES_2D, mapped=True),
    Way("jax.shard_map", _split_merge(_jax_shard_map), mapped=True),
    Way("jax.shard_map-2d", _split_merge(_jax_shard_map), axes=AXES_2D, mapped=True),
    Way("nnx.pmap", _over_devices(_in_place(_nnx_pmap)), mapped=True, program=False),
    Way("jax.pmap", _over_devices(_split_merge(_jax_pmap)), mapped=True),
]

SOME_WAYS = [
    way
    for way in WAYS
    if way.name
    in ("eager-8-devices", "nnx.jit-auto", "nnx.jit-explicit-2d", "nnx.scan", "jax.jit", "nnx.shard_map-2d", "jax.pmap")
]
"""One of each kind, for what goes through the same code as that which is tried in all of them."""
