"""The text of a compiled program as a graph: what each instruction was computed from, and where in the source.

XLA prints computations of instructions, ``%name = type operation(%operands), attributes``, and tables of stack frames.
"""

import math
import re
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

_INSTRUCTION = re.compile(
    r"\s*(?P<root>ROOT )?%?(?P<name>[\w.\-]+) = (?P<type>.*?) (?P<operation>[a-z][\w\-]*)\((?P<rest>.*)$"
)
_COMPUTATION = re.compile(r"(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) \(.*\{$")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|branch_computations|true_computation|false_computation|called_computations)="
    r"(?:\{(?P<many>[^}]*)\}|%?(?P<one>[\w.\-]+))"
)
_OP_NAME = re.compile(r'op_name="((?:[^"\\]|\\.)*)"')
_FRAME = re.compile(r"stack_frame_id=(\d+)")
COLLECTIVES = (
    "all-reduce|all-gather|all-to-all|ragged-all-to-all|reduce-scatter|collective-permute|collective-broadcast"
)
_COLLECTIVE = re.compile(rf"({COLLECTIVES})(?:-start)?")
_ARRAY = re.compile(r"[a-z]\w*\[[\d,<=]*\]")
_CALLS = {"fusion", "call", "async-start", "custom-call"}
"""Operations whose called computation takes their operands and gives their result. (That of a reduction does not.)"""


@dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
        type: its dtype, shape and layout, or a tuple of these.
        operands: names of instructions of the same computation.
        number: of a parameter or of the element of a tuple; else 0.
        called: names of computations that give its result.
        op_name: its path in the traced program; of a parameter of the entry, the argument as its caller would write it.
        frame: an id for ``Program.frames``; 0 where there is none.
    """

    name: str
    type: str
    operation: str
    operands: tuple[str, ...]
    number: int
    called: tuple[str, ...]
    op_name: str
    frame: int

    @property
    def collective(self) -> str | None:
        """The kind of collective that this is; None where it is none."""
        match = _COLLECTIVE.fullmatch(self.operation)
        return match and match[1]

    @property
    def types(self) -> list[str]:
        """The dtype and shape of each part of its result, ``f32[4,8]``."""
        return _ARRAY.findall(self.type)


class Node(NamedTuple):
    """The result of an instruction, or one element of it, where that is a tuple."""

    computation: str
    instruction: str
    element: int | None = None


class Frame(NamedTuple):
    """One line of the source that an instruction came from."""

    file: str
    function: str
    line: int


@dataclass
class Program:
    """A compiled program.

    Attributes:
        computations: the instructions of each computation by name.
        roots: the name of the last instruction of each.
        entry: the name of the computation that is the program.
    """

    computations: dict[str, dict[str, Instruction]] = field(default_factory=dict)
    roots: dict[str, str] = field(default_factory=dict)
    entry: str = ""
    _frames: dict[int, tuple[Frame, int]] = field(default_factory=dict)

    def __getitem__(self, node: Node) -> Instruction:
        return self.computations[node.computation][node.instruction]

    def collectives(self) -> list[Node]:
        """All collectives, of loops and branches as well."""
        return [
            Node(computation, name)
            for computation, instructions in self.computations.items()
            for name, instruction in instructions.items()
            if instruction.collective
        ]

    def frames(self, instruction: Instruction) -> Iterator[Frame]:
        """The lines of the source that it came from, the innermost first."""
        at = instruction.frame
        while at in self._frames:
            frame, at = self._frames[at]
            yield frame

    @cached_property
    def callers(self) -> dict[str, list[tuple[str, Instruction, int]]]:
        """For each computation: where it is called, by which instruction, as which of its computations."""
        callers = defaultdict(list)
        for computation, instructions in self.computations.items():
            for instruction in instructions.values():
                for position, called in enumerate(instruction.called):
                    callers[called].append((computation, instruction, position))
        return dict(callers)

    def before(self, node: Node) -> list[Node]:
        """What a node was computed from, one step back; elements of tuples are followed one by one where possible."""
        computation, _, element = node
        instruction = self[node]
        results = [Node(called, self.roots[called], element) for called in instruction.called]
        operands = [Node(computation, operand) for operand in instruction.operands]
        match instruction.operation:
            case "parameter":
                return self._given(computation, instruction.number, element)
            case "get-tuple-element":
                return [operands[0]._replace(element=instruction.number)]
            case "while":
                return [operands[0]._replace(element=element), *results]
            case "conditional":
                return results
            case "dynamic-slice":  # the others say where
                return operands[:1]
            case "optimization-barrier" | "copy":
                return [operands[0]._replace(element=element)]
            case "tuple" | "all-reduce" | "all-gather" | "all-reduce-start" if (
                element is not None and len(operands) > 1
            ):
                return [operands[element]] if element < len(operands) else operands
            case operation if operation in _CALLS and results:
                return results
        return operands

    def _given(self, computation: str, number: int, element: int | None) -> list[Node]:
        given = []
        for caller, instruction, position in self.callers.get(computation, ()):
            if instruction.operation == "while":  # its first value, and that of the round before
                given += [
                    Node(caller, instruction.operands[0], element),
                    Node(computation, self.roots[computation], element),
                ]
            elif instruction.operation == "conditional":
                given.append(Node(caller, instruction.operands[position + 1], element))
            else:
                given.append(Node(caller, instruction.operands[number], element))
        return given

    def following(self, node: Node) -> list[Node]:
        """What was computed from a node, one step on."""
        return self._after.get(node, [])

    def results(self, node: Node) -> list[Node]:
        """A node and, where it is a tuple, its elements, as far as anything is computed from them."""
        number = len(self[node].types)
        return [one for element in (None, *range(number)) if (one := node._replace(element=element)) in self._after]

    def reached(
        self,
        starts: Iterable[Node],
        step: Callable[[Node], list[Node]],
        through: Callable[[Instruction], bool] = lambda _: True,
    ) -> list[Node]:
        """The nodes that ``step`` leads to, the nearest first; it goes on from those that ``through`` lets pass."""
        seen = dict.fromkeys(starts)
        waiting = deque(seen)
        while waiting:
            node = waiting.popleft()
            for one in step(node) if through(self[node]) else ():
                if one not in seen:
                    seen[one] = None
                    waiting.append(one)
        return list(seen)

    @cached_property
    def _after(self) -> dict[Node, list[Node]]:
        """The other way round: for each node that matters to a result, the nodes that were computed from it."""
        after: dict[Node, list[Node]] = defaultdict(list)
        for node in self.reached([Node(self.entry, self.roots[self.entry]), *self.collectives()], self.before):
            for source in self.before(node):
                after[source].append(node)
        return dict(after)


def bytes_of(type: str) -> int:
    """The size of an array, or of all in a tuple.

    >>> bytes_of("(f32[4,8]{1,0}, /*index=1*/bf16[], pred[3]{0})")
    133
    """
    total = 0
    for one in _ARRAY.findall(type):
        dtype, _, dims = one.rstrip("]").partition("[")
        bits = re.search(r"\d+", dtype)
        total += math.prod(int(dim) for dim in re.findall(r"\d+", dims)) * (int(bits[0]) if bits else 8) // 8
    return total


def parsed(text: str) -> Program:
    """The program of an optimized HLO text."""
    program = Program()
    instructions: dict[str, Instruction] = {}
    computation = ""
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            computation = match["name"]
            instructions = program.computations[computation] = {}
            if match["entry"]:
                program.entry = computation
        elif computation and (match := _INSTRUCTION.match(line)):
            instructions[match["name"]] = _instruction(match)
            if match["root"]:
                program.roots[computation] = match["name"]
    program._frames = _frames(text)
    return program


def _instruction(match: re.Match[str]) -> Instruction:
    inside, attributes = _split_at_bracket(match["rest"])
    index = re.search(r"\bindex=(\d+)", attributes) if match["operation"] == "get-tuple-element" else None
    number = inside if match["operation"] == "parameter" else index[1] if index else "0"
    called: list[str] = []
    if match["operation"] in {*_CALLS, "while", "conditional"}:
        for one in _CALLED.finditer(attributes):
            called += re.findall(r"[\w.\-]+", one["many"] or one["one"] or "")
    op_name, frame = _OP_NAME.search(attributes), _FRAME.search(attributes)
    return Instruction(
        name=match["name"],
        type=match["type"],
        operation=match["operation"],
        operands=tuple(re.findall(r"%([\w.\-]+)", inside)),
        number=int(number),
        called=tuple(called),
        op_name=re.sub(r"\\(.)", r"\1", op_name[1]) if op_name else "",
        frame=int(frame[1]) if frame else 0,
    )


def _split_at_bracket(rest: str) -> tuple[str, str]:
    """What stands before the bracket that closes the operands, and what after."""
    depth = 1
    for match in re.finditer(r"[()]", rest):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return rest[: match.start()], rest[match.end() :]
    return rest, ""


def _frames(text: str) -> dict[int, tuple[Frame, int]]:
    """The table of frames, each with the id of the frame that called it (0: none)."""

    def table(title: str, row: str) -> list[Any]:
        section = re.search(rf"^{title}\n(.*?)\n\n", text, flags=re.MULTILINE | re.DOTALL)
        return re.findall(row, section[1], flags=re.MULTILINE) if section else []

    named = r'^(\d+) "(.*)"$'
    files: dict[str, str] = dict(table("FileNames", named))
    functions: dict[str, str] = dict(table("FunctionNames", named))
    located = r"^(\d+) \{file_name_id=(\d+) function_name_id=(\d+) line=(\d+)"
    locations = {
        at: Frame(files.get(file, ""), functions.get(function, ""), int(line))
        for at, file, function, line in table("FileLocations", located)
    }
    frames = table("StackFrames", r"^(\d+) \{file_location_id=(\d+)(?: parent_frame_id=(\d+))?")
    return {
        int(at): (locations[location], int(parent or 1) - 1) for at, location, parent in frames if location in locations
    }
