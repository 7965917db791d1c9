"""What ``PeriodicFlush`` hands to its thread, the thread, and the writers at its end: windows on their way."""

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distributed_metrics.naming import SEPARATOR, element, flattened
from distributed_metrics.snapshot import Snapshot
from distributed_metrics.writers import BinnedWriter, MetricWriter

_LOG = logging.getLogger(__name__)

MOST_WAITING = 16
"""How many windows wait for the writers; one that comes on top is added to the last of them."""

Derive = Callable[[dict[str, float], Any], Mapping[str, float] | None]
"""Makes more numbers of the flat floats, by name, and the snapshot they came from."""


@dataclass(eq=False)
class Moment:
    """When the devices had come so far: noted by whoever first sees that these arrays are ready."""

    arrays: Any
    at: float | None = None

    def poll(self) -> None:
        """Look whether it has come, without waiting."""
        if self.at is None and all(array.is_deleted() or array.is_ready() for array in self.arrays):
            self.at = time.perf_counter()

    def wait(self) -> None:
        """Until it has come. An array that was donated since then is not waited for."""
        with contextlib.suppress(RuntimeError):
            jax.block_until_ready(self.arrays)
        self.poll()


@dataclass(eq=False)
class Window:
    """Some steps in a row, and what was seen in them.

    Attributes:
        step: the last of them.
        steps: how many there are.
        parts: snapshots that add up to the window.
        host: what the host gave, by name.
        begun, ended: when the results of the window before, and of this one, were ready; ``begun`` is None for the
            first window.
        paused: seconds in between that do not count.
        numbers, stop: its flat floats, once they are known, and what ``derive`` raised; worked out under ``lock``.
    """

    step: int = -1
    steps: int = 0
    parts: list[Snapshot] = field(default_factory=list)
    host: dict[str, float] = field(default_factory=dict)
    begun: Moment | None = None
    ended: Moment | None = None
    paused: float = 0.0
    lock: threading.Lock = field(default_factory=threading.Lock)
    numbers: dict[str, float] | None = None
    stop: Exception | None = None

    def followed_by(self, later: "Window") -> "Window":
        """This window and the next as one."""
        return Window(
            later.step,
            self.steps + later.steps,
            [*self.parts, *later.parts],
            self.host | later.host,
            self.begun,
            later.ended,
            self.paused + later.paused,
        )

    def snapshot(self) -> Snapshot:
        """All of it. Waits for the devices where there are several parts."""
        self.parts[:] = [sum(self.parts[1:], self.parts[0])]
        return self.parts[0]

    def seconds(self) -> float | None:
        """How long it took, once its results were read; None for the first window."""
        if self.begun is None or self.ended is None or self.begun.at is None or self.ended.at is None:
            return None
        return self.ended.at - self.begun.at - self.paused


@dataclass(eq=False)
class Written:
    """Numbers that the loop gave to be written as they are."""

    step: int
    numbers: Snapshot | Mapping[str, Any]
    prefix: str
    derive: Derive | None = None


Delivered = Window | Written | Moment


def add_ready(parts: list[Snapshot]) -> None:
    """Add up the leading snapshots that the devices are done with, in place, so that a list stays short."""
    while len(parts) > 1 and parts[0].is_ready() and parts[1].is_ready():
        parts[:2] = [parts[0] + parts[1]]


class Total:
    """The sum of an epoch's windows: a short list, of which the head is summed up while nobody waits."""

    def __init__(self) -> None:
        self._parts: list[Snapshot] = []
        self._lock = threading.Lock()

    def add(self, snapshot: Snapshot) -> None:
        """One more window."""
        with self._lock:
            self._parts.append(snapshot)
            if len(self._parts) > MOST_WAITING:
                add_ready(self._parts)

    def shorten(self) -> None:
        """Sum up what is ready."""
        with self._lock:
            add_ready(self._parts)

    def plus(self, rest: Snapshot) -> Snapshot:
        """The sum, with what no window has yet."""
        with self._lock:
            return sum([*self._parts[1:], rest], self._parts[0]) if self._parts else rest


class Background:
    """A thread that delivers what it is given, in order; windows that had to wait long come as one."""

    def __init__(self, deliver: Callable[[Delivered], None]) -> None:
        self._deliver = deliver
        self._waiting: deque[Delivered] = deque()
        self._changed = threading.Condition()
        self._finishing = False
        self._thread = threading.Thread(target=self._run, name="PeriodicFlush", daemon=True)
        self._thread.start()

    def put(self, what: Delivered) -> None:
        """Deliver this after what was put before. Does not wait."""
        with self._changed:
            if len(self._waiting) >= MOST_WAITING:
                if isinstance(what, Moment):  # a thread so far behind would not see when it comes
                    return
                last = self._waiting[-1]
                if isinstance(last, Window) and isinstance(what, Window):
                    what = last.followed_by(what)
                    add_ready(what.parts)
                    self._waiting.pop()
            self._waiting.append(what)
            self._changed.notify()

    def finish(self) -> None:
        """Wait until all is delivered, and end the thread."""
        with self._changed:
            self._finishing = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._finishing)
                if not self._waiting:
                    return
                what = self._waiting.popleft()
            self._deliver(what)


class Outlets:
    """The writers of a loop. One that raises has stopped, and the others go on; its error goes into ``failures``."""

    def __init__(self, writers: list[MetricWriter], failures: list[Exception], log_errors: bool) -> None:
        self._writers = writers
        self._failures = failures
        self._log_errors = log_errors

    def __bool__(self) -> bool:
        return bool(self._writers)

    def write(self, step: int, numbers: Mapping[str, float], snapshot: Snapshot | None, prefix: str) -> None:
        """Write flat floats, and the histograms of a snapshot to those that show them as such."""
        if not self._writers or not numbers:
            return
        histograms = {} if snapshot is None else snapshot.histograms()
        bins = {name for one in histograms.values() for name in one.names}
        scalars = {_joined(prefix, name): number for name, number in numbers.items()}
        others = {_joined(prefix, name): number for name, number in numbers.items() if name not in bins}
        binned = {_joined(prefix, name): (one.counts, one.edges) for name, one in histograms.items()}
        for writer in list(self._writers):
            with self._keeping_errors(writer):
                if isinstance(writer, BinnedWriter):
                    writer.write_scalars(step, others)
                    writer.write_binned(step, binned)
                else:
                    writer.write_scalars(step, scalars)

    def close(self) -> None:
        """Nothing more will come."""
        for writer in list(self._writers):
            with self._keeping_errors(writer):
                writer.flush()
                writer.close()

    @contextlib.contextmanager
    def _keeping_errors(self, writer: MetricWriter) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # the loop hears of it
            error.add_note(f"PeriodicFlush: raised by the writer {writer!r}, which has stopped.")
            self._writers.remove(writer)
            self._failures.append(error)
            if self._log_errors:
                _LOG.exception("PeriodicFlush: a writer has stopped")


def _joined(prefix: str, name: str) -> str:
    return prefix.removesuffix(SEPARATOR) + SEPARATOR + name if prefix else name


def derived(derive: Derive | None, numbers: dict[str, float], snapshot: Snapshot | None) -> dict[str, float]:
    """What ``derive`` adds to some numbers.

    Raises:
        TypeError: it gave no mapping, or something that is no number.
        ValueError: it gave a name that is taken.
        Exception: what it raised.
    """
    given = None if derive is None else derive(dict(numbers), snapshot)
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise TypeError(f"derive() gives a mapping of names to floats, or None; it gave {type(given).__name__}.")
    for name, number in given.items():
        if name in numbers:
            raise ValueError(f"derive() gave {name!r}, and that number is there already. Give it another name.")
        if np.ndim(number) or not _is_number(np.asarray(number)):
            kind = f"an array of shape {np.shape(number)}" if np.ndim(number) else type(number).__name__
            raise TypeError(
                f'derive() gave {name!r}, which is no number: {kind}.\n  Give floats: {{"{name}": float(x)}}'
            )
    return {str(name): float(number) for name, number in given.items()}


def leaves_of(numbers: Mapping[str, Any]) -> dict[str, Any]:
    """The leaves of a nested mapping by flat name; arrays of the host are copied, since they may change.

    Raises:
        TypeError: one of them is no number.
    """
    leaves = {}
    for name, value in flattened(numbers):
        leaves[name] = leaf = value if isinstance(value, jax.Array) else np.array(value)
        if not _is_number(leaf):
            raise TypeError(
                f"flusher.write(): {name!r} is no number: {type(value).__name__} {value!r:.80}\n"
                "  Leave it out: what goes to the writers are floats."
            )
    return leaves


def _is_number(array: np.ndarray | jax.Array) -> bool:
    return array.dtype == bool or (jnp.issubdtype(array.dtype, jnp.number) and not jnp.iscomplexobj(array))


def floats_of(leaves: Mapping[str, Any]) -> dict[str, float]:
    """Each element of some arrays as a float, by flat name. Waits for the devices."""
    flat = {}
    for name, leaf in leaves.items():
        array = np.asarray(jax.device_get(leaf))
        for index in np.ndindex(array.shape):
            flat[SEPARATOR.join((name, *element(index, array.shape)))] = float(array[index])
    return flat
