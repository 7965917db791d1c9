"""What ``PeriodicFlush`` hands to its thread, and the thread: windows on their way to the writers, in order."""

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax

from distributed_metrics.snapshot import Snapshot

MOST_WAITING = 16
"""How many windows wait for the writers; one that comes on top is added to the last of them."""


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
    derive: Callable[[dict[str, float], Any], Mapping[str, float] | None] | None = None


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
            last = self._waiting[-1] if self._waiting else None
            if len(self._waiting) >= MOST_WAITING and isinstance(last, Window) and isinstance(what, Window):
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
