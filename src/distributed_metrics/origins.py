"""Where what a compiled program sends comes from: arguments, a line of the source, a call of this package."""

import ast
import inspect
import itertools
import pathlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import flax
import jax
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from distributed_metrics import hlo
from distributed_metrics.rows import ONE_ROW

_QUOTED = r"""(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")"""
_SCOPE = re.compile(rf"update(\{{(?:{_QUOTED}: \([\d, ]*\)(?:, )?)+\}})")  # names may hold braces
_PACKAGE = pathlib.Path(__file__).parent
_LIBRARIES = tuple(str(pathlib.Path(module.__file__ or "").parent) for module in (flax, jax))
_PASSING = re.compile(
    r"parameter|tuple|get-tuple-element|fusion|call|while|conditional|copy|bitcast|bitcast-convert|convert|reshape"
    r"|transpose|slice|dynamic-slice|constant|iota|partition-id|concatenate|optimization-barrier|.*-start|.*-done|.*-update"
)
"""Operations whose result is (part of) their operand, or that of what they call; and constants."""
_REARRANGING = re.compile(r"dot|reduce|reduce-window|broadcast|convolution|gather|scatter|sort|custom-call")
"""Operations after which an element is no longer one of the value."""
_ASKED = re.compile(r".*\b(all_gather|all_gather_invariant|all_to_all|ppermute|sharding_constraint|reshard|device_put)")
"""What in a program asks for a collective, so that it does not come from how a value was given to ``update``."""


@dataclass(frozen=True)
class Argument:
    """An array that the program takes: as its caller would write it, and how it lies."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    spec: P | None

    def __str__(self) -> str:
        lies = "" if self.spec is None else f", {as_code(self.spec)}"
        return f"{self.name}: {self.dtype} {self.shape}{lies}"


@dataclass(frozen=True)
class Sent:
    """One value that a collective moves.

    Attributes:
        operation: the collective.
        type: of what one device sends.
        where: the line of the user's source; empty where it is not known.
        values: the values of an update that it comes from, with their shapes.
        one_row: whether the object that takes them has one row.
        functions: of this package that asked for it, the innermost first.
        sources: the arguments that it was computed from.
        computed: whether it was computed, rather than given.
    """

    operation: str
    type: str
    where: str
    values: tuple[tuple[str, tuple[int, ...]], ...]
    one_row: bool
    functions: tuple[str, ...]
    sources: tuple[Argument, ...]
    computed: bool


def arguments_of(
    fn: Callable[..., Any], args: Sequence[Any], lowered: Any, compiled: Any, program: hlo.Program
) -> dict[str, Argument]:
    """The arguments by the names of their instructions. (A program leaves out those that it does not need.)"""
    parameters = list(inspect.signature(fn).parameters)
    infos = jax.tree.leaves_with_path(lowered.args_info, is_leaf=lambda one: hasattr(one, "donated"))
    tree: Any = jax.tree.structure(lowered.args_info, is_leaf=lambda one: hasattr(one, "donated"))
    shardings = tree.flatten_up_to(compiled.input_shardings)  # None where the program does not take an argument
    known = {}
    for (path, info), sharding in zip(infos, shardings, strict=True):
        spec = sharding.spec if isinstance(sharding, NamedSharding) else None
        known[_written(path, parameters)] = (str(info.dtype), tuple(info.shape), spec)
    taken = [one for one in program.computations[program.entry].values() if one.operation == "parameter"]
    named = {}
    for one in taken:
        name = one.op_name
        if name.startswith("flat_args[") and len(taken) == len(known):  # pmap names them by number
            name = list(known)[one.number]
        unknown = (one.types[0].split("[")[0], _dims(one.types[0]), None)
        named[one.name] = Argument(_of_module(name, parameters, args), *known.get(name, unknown))
    return named


def _written(path: Sequence[Any], parameters: Sequence[str]) -> str:
    """An array of ``(args, kwargs)`` as the function's author would write it."""
    top = path[1]
    if isinstance(top, jax.tree_util.DictKey):
        name = str(top.key)
    else:
        name = parameters[top.idx] if top.idx < len(parameters) else f"args[{top.idx}]"
    return name + jax.tree_util.keystr(tuple(path[2:]))


def _of_module(name: str, parameters: Sequence[str], args: Sequence[Any]) -> str:
    """The attribute of an nnx object, of which ``nnx.jit`` gives a flat list of arrays to the program."""
    match = re.fullmatch(r"(\w+)\.states\[0\]\[(\d+)\]", name)
    if match is None or match[1] not in parameters[: len(args)]:
        return name
    paths = list(nnx.to_flat_state(nnx.state(args[parameters.index(match[1])])).paths)
    return ".".join([match[1], *map(str, paths[int(match[2])])])


def _dims(type_: str) -> tuple[int, ...]:
    return tuple(int(size) for size in re.findall(r"\d+", type_.split("[")[1]))


def sent_by(program: hlo.Program, node: hlo.Node, arguments: Mapping[str, Argument]) -> list[Sent]:
    """What a collective moves, value by value: XLA packs those of different origin into one collective."""
    collective = program[node]
    starts = [node._replace(instruction=operand) for operand in collective.operands]
    return list(dict.fromkeys(_sent_value(program, node, start, arguments) for start in starts))


def _sent_value(program: hlo.Program, node: hlo.Node, start: hlo.Node, arguments: Mapping[str, Argument]) -> Sent:
    collective = program[node]
    ancestors = [program[one] for one in program.reached([start], program.before)]
    near = program.reached([start], program.before, lambda one: _is_passing(one) and not _values_of(one))
    labelled = [program[one] for one in near if _values_of(program[one])]
    frames = list(program.frames(collective))
    if len(collective.operands) > 1:  # its own frames are those of one of them
        origin = program.reached([start], program.before, lambda one: not one.frame or one.collective is not None)
        frames = next((list(program.frames(program[one])) for one in origin if program[one].frame), frames)
    inside = list(itertools.takewhile(lambda frame: not _is_users(frame), frames))
    functions = [frame.function for frame in inside if frame.file.startswith(str(_PACKAGE))]
    if not labelled and _is_resharding(collective):  # a value that is moved on its way to where it is reduced
        ends = program.reached(program.results(node), program.following, _keeps_elements)
        ends = [one for one in ends if _values_of(program[one])]
        whole = _taken(program, ends, arguments)
        shapes = [shape for one in ends for shape in _values_of(program[one]).values()]
        if functions or all(likely(shape, whole) for shape in shapes):  # else the user's own operations may need it
            labelled = [program[one] for one in ends]
    return Sent(
        operation=str(collective.collective),
        type=program[start].types[start.element or 0],
        where=_line(frames),
        values=tuple(sorted({value for one in labelled for value in _values_of(one).items()})),
        one_row=any(ONE_ROW in one.op_name for one in labelled),
        functions=tuple(functions),
        sources=tuple(_taken(program, [start], arguments)),
        computed=not all(_is_passing(one) or _values_of(one) for one in ancestors),
    )


def _taken(program: hlo.Program, nodes: Iterable[hlo.Node], arguments: Mapping[str, Argument]) -> list[Argument]:
    """The arguments that nodes were computed from."""
    reached = program.reached(nodes, program.before)
    taken = {one.instruction for one in reached if one.computation == program.entry} & set(arguments)
    return sorted((arguments[name] for name in taken), key=str)


def _is_passing(instruction: hlo.Instruction) -> bool:
    """Whether it hands a value on; what XLA adds of its own has no name."""
    handed = _PASSING.fullmatch(instruction.operation) or "/" not in instruction.op_name
    return instruction.collective is not None or bool(handed)


def _is_resharding(collective: hlo.Instruction) -> bool:
    """Whether XLA put it in to bring a value from one partition to another, unasked."""
    moves = collective.collective in {"all-gather", "all-to-all", "collective-permute"}
    return moves and not _ASKED.fullmatch(collective.op_name)


def _keeps_elements(instruction: hlo.Instruction) -> bool:
    return not _values_of(instruction) and not _REARRANGING.fullmatch(instruction.operation)


def _values_of(instruction: hlo.Instruction) -> dict[str, tuple[int, ...]]:
    """The values of an update that an instruction accumulates, with their shapes: from the label that it has."""
    match = _SCOPE.search(instruction.op_name)
    if match is None or instruction.collective or instruction.called:  # these have the label of one of their parts
        return {}
    try:
        return ast.literal_eval(match[1])
    except (SyntaxError, ValueError):  # a name with brackets in it
        return {}


def _line(frames: Iterable[hlo.Frame]) -> str:
    """The innermost line of the user: neither of this package nor of JAX or flax."""
    users = next(filter(_is_users, frames), None)
    return f"{pathlib.Path(users.file).name}:{users.line}, in {users.function}" if users else ""


def _is_users(frame: hlo.Frame) -> bool:
    return not frame.file.startswith((str(_PACKAGE), *_LIBRARIES))


def as_code(spec: P) -> str:
    def entry(one: Any) -> str:
        if isinstance(one, tuple):
            return "(" + ", ".join(f'"{axis}"' for axis in one) + ("," if len(one) == 1 else "") + ")"
        return "None" if one is None else f'"{one}"'

    return f"P({', '.join(map(entry, _trimmed(spec)))})"


def _trimmed(entries: Iterable[Any]) -> P:
    """A partition without what it need not say at its end."""
    kept = list(entries)
    while kept and not kept[-1]:
        kept.pop()
    return P(*kept)


def likely(shape: tuple[int, ...], sources: Sequence[Argument]) -> tuple[P, Argument] | None:
    """How a value probably lies: as the argument whose leading dims (or those within a loop) it shares.

    None where no argument is partitioned along them, or several are in different ways.
    """
    fits: dict[int, dict[P, Argument]] = {}
    for source in sources:
        for inner in (0, 1):
            entries = [*(source.spec or ()), *(None for _ in source.shape)][inner:]
            alike = [a == b for a, b in zip(shape, source.shape[inner:], strict=False)]
            shared = alike.index(False) if False in alike else len(alike)
            spec = _trimmed(entries[:shared])
            if len(spec) and (not inner or shared == len(shape)):
                fits.setdefault(shared, {}).setdefault(spec, source)
                break
    if not fits or len(fits[max(fits)]) > 1:
        return None
    return next(iter(fits[max(fits)].items()))
