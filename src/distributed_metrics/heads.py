"""What every process says of itself when it flushes, and the check that all of them say the same.

In several processes each launches its own part of a flush, and nothing but the order of launching decides which parts
meet. So the buffer that a flush gathers carries a head in each row: it tells of which object it is, and which flush of
how many. Numbers come out only where all heads agree. Heads are whole numbers of 16 bits in float32 words, and the spec
stands at the end of the row, if there is room, as text for people.
"""

import functools
import hashlib
import json
import weakref
import zlib
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import jax
import numpy as np

from distributed_metrics import portable
from distributed_metrics.gathering import Gathering
from distributed_metrics.plan import Plan
from distributed_metrics.view import Layout

HEAD_WORDS = 20
"""The words of a head."""

_MAGIC = 0xD157  # says that a row is one of ours
_LEAST_WORDS = 1024
"""Rows are filled up to this many words, doubled where that is not enough: as a rule the buffers of two specs are then
of one size, and meet in peace. Where sizes differ, the transport ends the processes before a head is seen."""


class OutOfStepError(RuntimeError):
    """The processes did not make the same flush."""


@dataclass(frozen=True)
class Head:
    """What one process says of a flush (or compute).

    Attributes:
        process: its index.
        flush: whether the accumulators start afresh.
        number: of the flush of this object, from 1; of a compute, that of the flush to come.
        launched: how many such programs this process has launched on this mesh.
        updates: how many updates and merges of this object were made outside of any program, since the last flush.
        given: a checksum of what these were given: names, shapes, and the numbers that came from the host.
        step: of the training loop, where it is known.
        digest: of the spec and the mesh.
        shown: spec and mesh, for people.
    """

    process: int
    flush: bool
    number: int
    launched: int
    updates: int
    given: int
    step: int | None
    digest: int
    shown: str

    def to_bytes(self) -> bytes:
        """As JSON."""
        return json.dumps(asdict(self)).encode()

    @staticmethod
    def from_bytes(given: bytes) -> "Head":
        """What ``to_bytes`` gave."""
        return Head(**json.loads(given))


class Record:
    """What this process did with an object, for its heads. It is no attribute of the object: those are part of its
    graphdef, and programs would be traced anew whenever they change."""

    def __init__(self) -> None:
        self.flushes = 0
        self.updates = 0
        self.given = 0

    def updated(self, given: Any) -> None:
        """An update or a merge outside of any program was given a tree of arrays and numbers."""
        leaves, tree = jax.tree.flatten(given)
        self.updates += 1
        self.given = zlib.crc32(_structure(tree), self.given)
        for leaf in leaves:
            self.given = zlib.crc32(_seen(leaf), self.given)

    def flushed(self) -> None:
        """The accumulators start afresh, as after a flush that all processes made."""
        self.flushes += 1
        self.reset()

    def reset(self) -> None:
        """The accumulators start afresh."""
        self.updates = self.given = 0


@functools.lru_cache(maxsize=1024)
def _structure(tree: jax.tree_util.PyTreeDef) -> bytes:
    return str(tree).encode()


def _seen(value: Any) -> bytes:
    """What a process can tell of a value without waiting: of a global array its shape, of a number all of it."""
    if isinstance(value, jax.Array):
        return f"{value.shape} {value.dtype}".encode()
    array = np.asarray(value)
    if array.dtype.kind in "biuf" and not array.ndim:
        array = array.astype(np.float64)  # 1, 1.0 and np.float32(1) are one number
    elif array.dtype == object:
        return repr(value).encode()
    return f"{array.shape} {array.dtype}".encode() + array.tobytes()


_RECORDS: "weakref.WeakKeyDictionary[Any, Record]" = weakref.WeakKeyDictionary()
_LAUNCHED: dict[tuple[int, ...], int] = {}  # by the processes that meet


def record_of(metrics: Any) -> Record:
    """The record of an object, in this process."""
    record = _RECORDS.get(metrics)
    if record is None:
        record = _RECORDS[metrics] = Record()
    return record


def head_of(plan: Plan, layout: Layout, record: Record, process: int, flush: bool, step: int | None) -> Head:
    """The head of the flush that this process is about to make."""
    shown, digest = _described(plan, layout)
    number, launched = record.flushes + 1, _LAUNCHED.get(layout.processes, 0) + 1
    return Head(process, flush, number, launched, record.updates, record.given, step, digest, shown)


def launched(layout: Layout, record: Record, head: Head) -> None:
    """The program of a head was launched."""
    _LAUNCHED[layout.processes] = head.launched
    if head.flush:
        record.flushed()


@functools.lru_cache(maxsize=1024)
def _described(plan: Plan, layout: Layout) -> tuple[str, int]:
    assert layout.mesh is not None
    mesh = {"axes": dict(layout.mesh.shape), "rows over": layout.axes}
    text = json.dumps([portable.describe(plan), mesh])
    digest = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=6).digest(), "big")
    spec = ", ".join(f"{metric.name}: {metric.accumulator}" for metric in plan.metrics)
    ignores = ', nan_policy="ignore"' if plan.ignores else ""
    return f"{{{spec}}}{ignores} on a mesh of {mesh['axes']}, rows over {', '.join(layout.axes)}", digest


# --- a head in float32 words ---


def label(head: Head, gathering: Gathering, rows: int) -> np.ndarray:
    """The head, and what stands behind the tables: float32 words, of which ``HEAD_WORDS`` come first."""
    used = gathering.used(rows)
    width = _LEAST_WORDS
    while width < used:
        width *= 2
    text = np.frombuffer(head.shown.encode()[: width - used], np.uint8)
    step = 0 if head.step is None else head.step + 1
    words = [
        _MAGIC, len(text), *_digits(head.process, 2), int(head.flush), *_digits(head.number, 2),
        *_digits(head.launched, 3), *_digits(head.updates, 2), *_digits(step, 3), *_digits(head.digest, 3),
        *_digits(head.given, 2),
    ]  # fmt: skip
    tail = np.zeros(width - used, np.float32)
    tail[len(tail) - len(text) :] = text  # at the end, where it is found in a buffer of another layout
    return np.concatenate([np.array(words, np.float32), tail])


def _digits(number: int, count: int) -> list[int]:
    return [number >> 16 * i & 0xFFFF for i in range(count)]


def _number(digits: Sequence[int]) -> int:
    return sum(digit << 16 * i for i, digit in enumerate(digits))


def _read(row: np.ndarray) -> Head | None:
    """The head of a row of the buffer; None where there is none."""
    words = row[:HEAD_WORDS]
    if not (np.isfinite(words).all() and (words == np.floor(words)).all() and (words >= 0).all()):
        return None
    if words[0] != _MAGIC or words.max() > 0xFFFF:
        return None
    numbers = words.astype(np.int64).tolist()
    length, process, flush, number = numbers[1], _number(numbers[2:4]), bool(numbers[4]), _number(numbers[5:7])
    launched, updates, step = _number(numbers[7:10]), _number(numbers[10:12]), _number(numbers[12:15])
    text = row[len(row) - length :].astype(np.uint8).tobytes().decode(errors="replace")
    digest, given = _number(numbers[15:18]), _number(numbers[18:20])
    return Head(process, flush, number, launched, updates, given, step - 1 if step else None, digest, text)


# --- the check ---


def require_one_flush(gathering: Gathering, buffer: np.ndarray) -> None:
    """Nothing, where the heads of all rows agree, or where there are none.

    Raises:
        OutOfStepError: they differ.
    """
    if not gathering.head:
        return
    rows = buffer.reshape(-1, *buffer.shape[-2:])[0]
    heads = [_read(row) for row in rows]
    require_agreement([head for head in heads if head is not None], strangers=heads.count(None))


def require_agreement(heads: Iterable[Head], strangers: int = 0) -> None:
    """Nothing, where all heads are of one flush.

    Args:
        heads: of several processes.
        strangers: how many rows came without a head: those of another program.

    Raises:
        OutOfStepError: they differ, or some have none.
    """
    by_process = {head.process: head for head in heads}
    of_one: dict[tuple[Any, ...], list[int]] = {}
    for process, head in sorted(by_process.items()):
        of_one.setdefault(tuple(value for name, value in asdict(head).items() if name != "process"), []).append(process)
    if len(of_one) <= 1 and not strangers:
        return
    lines = ["metrics.flush(): the processes did not make the same flush, so there is no right number."]
    differs = _differences([by_process[processes[0]] for processes in of_one.values()])
    for processes in of_one.values():
        who = "Process" if len(processes) == 1 else "Processes"
        lines.append(f"  {who} {', '.join(map(str, processes))}: {_show(by_process[processes[0]], 'given' in differs)}")
    if strangers:
        lines.append(f"  {strangers} rows came from a program that is no flush: a training step, say.")
    if differs:
        lines.append(f"  They differ in {', '.join(_DIFFERENCES[name] for name in differs)}.")
    raise OutOfStepError("\n".join([*lines, _advice(differs)]))


def _show(head: Head, given: bool = False) -> str:
    what = f"flush {head.number}" if head.flush else f"a compute() before flush {head.number}"
    at = "" if head.step is None else f" after step {head.step}"
    updates = f"{head.updates} eager update{'' if head.updates == 1 else 's'}"
    if given:  # what differs cannot be shown, but that it does
        updates += f" of values with the checksum {head.given:08x}"
    return f"{what}{at}, with {updates}, the {_ordinal(head.launched)} on this mesh, of {head.shown}"


def _ordinal(number: int) -> str:
    ending = "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"


_DIFFERENCES = {
    "digest": "the spec or mesh",
    "flush": "whether they flush or compute",
    "number": "the number of the flush of this object",
    "step": "the step",
    "updates": "the number of eager updates",
    "given": "what eager updates were given: names, shapes, or numbers of the host",
    "launched": "the number of flushes on this mesh",
}


def _differences(heads: Sequence[Head]) -> list[str]:
    differs = [name for name in _DIFFERENCES if len({getattr(head, name) for head in heads}) > 1]
    return [name for name in differs if name != "given" or "updates" not in differs]  # more updates are given more


def _advice(differs: Collection[str]) -> str:
    if differs == ["digest"]:
        return "  Make the object alike in every process: the same names and accumulators, on the same mesh."
    if differs == ["given"]:
        return (
            "  Python and NumPy values of an eager update are one value, the same in every process. Where each process "
            "has its own, make\n  one array of them all, or update inside the jitted step:\n"
            '      sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))\n'
            "      metrics.update(loss=jax.make_array_from_process_local_data(sharding, losses_of_this_process))"
        )
    return (
        "  Every process makes the same calls in the same order. Probably one flushes alone, or at other steps:\n"
        "      if jax.process_index() == 0: print(metrics.flush())\n"
        "  Flush in all of them, and write in one:\n"
        "      window = metrics.flush()\n      if jax.process_index() == 0: print(window)"
    )
