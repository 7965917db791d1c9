"""What a compiled program sends: so that a test can hold a train step to it."""

import collections
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax
import jax
from flax import nnx

from distributed_metrics import hlo, rows
from distributed_metrics.origins import Sent, arguments_of, as_code, likely, sent_by

_COLLECTIVE = re.compile(rf"= (?P<type>.*?) (?P<operation>{hlo.COLLECTIVES})(?:-start)?\(")
_MOST_SHOWN = 6


def _compiled(fn: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, Any]:
    """The function lowered and compiled.

    Raises:
        ValueError: a shape whose sharding is not known: XLA would choose one for which nothing has to be sent.
    """
    jitted = fn if hasattr(fn, "lower") else nnx.jit(fn)
    try:
        lowered = jitted.lower(*args, **kwargs)
        lowered = getattr(lowered, "lowered", lowered)  # equinox.filter_jit wraps it
    except flax.errors.TraceContextError as error:
        error.add_note(
            "The function holds nnx objects (of a closure, or of nnx.cached_partial): give them as arguments."
        )
        raise
    compiled = lowered.compile()
    _require_shardings(args, kwargs, lowered, compiled)
    return lowered, compiled


def _require_shardings(args: Sequence[Any], kwargs: Mapping[str, Any], lowered: Any, compiled: Any) -> None:
    given = jax.tree.leaves_with_path((args, kwargs))
    unsaid = [path for path, one in given if isinstance(one, jax.ShapeDtypeStruct) and one.shape and not one.sharding]
    if not unsaid or not any(len(one.device_set) > 1 for one in jax.tree.leaves(compiled.input_shardings)):
        return
    signature = re.search(r"func public @main\((.*)\) ->", lowered.as_text())
    taken = re.split(r"%arg\d+: ", signature[1])[1:] if signature else []
    if any("sharding" not in one for one in taken):  # in_shardings= has not said it either
        name = jax.tree_util.keystr(unsaid[0][1:])
        raise ValueError(
            f"The argument {name} is a shape without a sharding: XLA would choose one for which nothing is sent.\n"
            "  Say how it lies: jax.ShapeDtypeStruct(shape, dtype, sharding=...), or in_shardings= of the function; of "
            "an object\n  nnx.eval_shape(lambda: DistributedMetrics({...}, mesh=mesh)), which keeps shardings."
        )


def compiled_text(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    """The optimized HLO of ``fn(*args, **kwargs)``; nothing is run.

    Args:
        fn: a function of arrays and nnx objects, jitted (``jax.jit``, ``nnx.jit``, ``jax.pmap``, ...) or not; or what
            was compiled of one: ``jax.jit(f).lower(x).compile()``.
        *args, **kwargs: its arguments, or their shapes (``jax.ShapeDtypeStruct``); none of what is compiled.
    """
    if isinstance(fn, jax.stages.Lowered):
        fn = fn.compile()
    compiled = fn if isinstance(fn, jax.stages.Compiled) else _compiled(fn, args, kwargs)[1]
    return str(compiled.as_text())


def count_collectives(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> dict[str, int]:
    """How many collectives of each kind the compiled ``fn(*args, **kwargs)`` holds; nothing is run.

    Args:
        fn: a function of arrays and nnx objects, jitted (``jax.jit``, ``nnx.jit``, ``jax.pmap``, ...) or not; or what
            was compiled of one: ``jax.jit(f).lower(x).compile()``.
        *args, **kwargs: its arguments, or their shapes (``jax.ShapeDtypeStruct``); none of what is compiled.

    Returns:
        Kinds to numbers; a collective of several arrays is one. Empty where the program sends nothing, and else for
        example ``{"all-reduce": 1}``. A collective inside a loop counts once.

    >>> import jax.numpy as jnp
    >>> from distributed_metrics import DistributedMetrics
    >>> metrics = DistributedMetrics({"loss": "mean"})
    >>> count_collectives(lambda m, x: m.update(loss=x), metrics, jnp.ones(8))
    {}
    """
    return _counted(compiled_text(fn, *args, **kwargs))


def collective_bytes(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> dict[str, int]:
    """How many bytes the collectives of each kind bring to a device in the compiled ``fn(*args, **kwargs)``.

    To hold a whole train step to what it sends without metrics: XLA packs small arrays into a collective that is there
    already, which ``count_collectives`` does not show.

    Args:
        fn: a function of arrays and nnx objects, jitted (``jax.jit``, ``nnx.jit``, ``jax.pmap``, ...) or not; or what
            was compiled of one: ``jax.jit(f).lower(x).compile()``.
        *args, **kwargs: its arguments, or their shapes (``jax.ShapeDtypeStruct``); none of what is compiled.

    Returns:
        Kinds to the sizes of what these collectives result in. Empty where the program sends nothing, and else for
        example ``{"all-reduce": 1040}``. A collective inside a loop counts once.

    >>> import jax
    >>> from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
    >>> x = jax.device_put(jax.numpy.ones(16), NamedSharding(Mesh(jax.devices(), ("data",)), P("data")))
    >>> collective_bytes(jax.numpy.sum, x)
    {'all-reduce': 4}
    """
    sizes: collections.Counter[str] = collections.Counter()
    for match in _COLLECTIVE.finditer(compiled_text(fn, *args, **kwargs)):
        sizes[match["operation"]] += hlo.bytes_of(match["type"])
    return dict(sizes)


def _counted(text: str) -> dict[str, int]:
    return dict(collections.Counter(match["operation"] for match in _COLLECTIVE.finditer(text)))


def assert_silent(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """Assert that the compiled ``fn(*args, **kwargs)`` holds no collective; nothing is run.

    It is for an update on its own. A whole train step has collectives of its own: compare ``collective_bytes`` of the
    step with and without metrics, and ask this function about the update where they differ.

    Args:
        fn: a function of arrays and nnx objects, jitted (``jax.jit``, ``nnx.jit``, ``jax.pmap``, ...) or not.
        *args, **kwargs: its arguments, or their shapes (``jax.ShapeDtypeStruct`` with their sharding).

    Raises:
        AssertionError: it holds some. The message shows what each moves, the arguments that this was computed from and
            how they lie, the line that asked for it, and, where the metrics did, what would keep it still.

    >>> import jax
    >>> from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
    >>> from distributed_metrics import DistributedMetrics
    >>> mesh = Mesh(jax.devices(), ("data",))
    >>> metrics = DistributedMetrics({"loss": "mean"}, mesh=mesh)
    >>> loss = jax.device_put(jax.numpy.ones(16), NamedSharding(mesh, P("data")))
    >>> assert_silent(lambda metrics, loss: metrics.update(loss=loss), metrics, loss)
    """
    lowered, compiled = _compiled(fn, args, kwargs)
    counts = _counted(compiled.as_text())
    if not counts:
        return
    program = hlo.parsed(compiled.as_text())
    arguments = arguments_of(fn, args, lowered, compiled, program)
    sent = collections.Counter(
        _described(one) for node in program.collectives() for one in sent_by(program, node, arguments)
    )
    shown = ", ".join(f"{number} {operation}{'s' * (number > 1)}" for operation, number in counts.items())
    raise AssertionError(
        f"assert_silent({getattr(fn, '__name__', 'fn')}): the compiled program holds {shown}.\n"
        "Each array that is sent:\n\n"
        + "\n\n".join(one.replace(": ", f" ({times} times): " if times > 1 else ": ", 1) for one, times in sent.items())
    )


def _described(sent: Sent) -> str:
    """One paragraph of the message."""
    what = f"metrics.update() of {' and '.join(f'{n!r}, shape {s}' for n, s in sent.values)}" if sent.values else ""
    context = ", ".join(part for part in (what, sent.where) if part)
    lines = [f"  {sent.operation} of {sent.type}: {context or 'nothing shows where'}"]
    shown = sorted(sent.sources, key=lambda one: not one.spec)[:_MOST_SHOWN]
    hidden = len(sent.sources) - len(shown)
    if not shown:
        lines.append("    computed from constants of the program alone")
    elif sent.computed or len(sent.sources) > 1:
        lines.append("    an intermediate, computed from")
    else:
        lines.append("    the argument")
    lines += [f"      {source}" for source in shown] + [f"      and {hidden} more"] * bool(hidden)
    return "\n".join([*lines, *(f"    {line}" for line in _advice(sent))])


def _advice(sent: Sent) -> list[str]:
    """What would keep a value still; where the metrics did not ask for it, that they did not."""
    if rows.merged_over.__name__ in sent.functions:
        return [
            "Devices that share a row hold different parts of the value. Give each device a row, by leaving out",
            "axis_name=: DistributedMetrics({...}, mesh=mesh)",
        ]
    if sent.one_row:
        return [
            "The object has one row, and the value lies on several devices. Give each device a row:",
            "  DistributedMetrics({...}, mesh=mesh)",
        ]
    if sent.values:
        return _spec_advice(sent)
    if sent.functions and sent.functions[-1] != "DistributedMetrics.update":
        call = sent.functions[-1].removeprefix("DistributedMetrics.")  # the outermost
        return [f"It is what {call}() sends; spec= would not change it."]
    if sent.where and not sent.functions:
        return ["It is not sent by the metrics: spec= would not change it."]
    return [
        "Nothing shows what it is for. If it is a value of an update, or the weight of one, say how the value lies:",
        '  metrics.update(..., spec={"name": P(...)})',
    ]


def _spec_advice(sent: Sent) -> list[str]:
    found_of = {name: likely(shape, sent.sources) for name, shape in sent.values}
    specs: dict[str, Any] = {}
    for name, found in found_of.items():
        *outer, last = name.split("/")
        inside = specs
        for one in outer:
            inside = inside.setdefault(one, {})
        inside[last] = as_code(found[0]) if found else "P(...)"
    as_one = sorted({found[1].name for found in found_of.values() if found})
    condition = f"If it lies as {' and '.join(as_one)}, say so" if as_one else "Say how it lies"
    return [
        f"On Auto axes JAX does not show how it lies. {condition}, and it is not moved:",
        f"  metrics.update(..., spec={_nested_code(specs)})",
    ]


def _nested_code(specs: Mapping[str, Any]) -> str:
    inside = (
        f"{json.dumps(name)}: {one if isinstance(one, str) else _nested_code(one)}" for name, one in specs.items()
    )
    return "{" + ", ".join(inside) + "}"
