"""Event files, for TensorBoard."""

import os
import time
import weakref
from collections.abc import Mapping
from typing import Any

import numpy as np

from distributed_metrics.writers._protocol import require

FLUSH_SECONDS = 5.0


class TensorBoardWriter:
    """Writes event files that TensorBoard reads: scalars and histograms.

    A name is a tag exactly as it stands, whatever is in it, so that two names are two tags; it is part of no path. The
    first write makes the directory and a file, as does the first after ``close()``. What was written is on the disk
    after ``flush()``, ``close()`` and the end of the interpreter, and else at the first write that comes five seconds
    after the last flush. Values are stored as float32; NaN and infinities are kept.

    Args:
        logdir: the directory; TensorBoard shows each one as a run. ``tensorboard --logdir`` takes it or its parent.

    Raises:
        ImportError: tensorboardX is missing.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as logdir:
    ...     writer = TensorBoardWriter(logdir)
    ...     writer.write_scalars(100, {"train/loss": 0.5})
    ...     writer.close()
    """

    # tensorboardX's SummaryWriter queues events for a thread of its own, and its flush() leaves out what is still in
    # the queue; it renames tags, and logs a warning for each NaN. Its EventsWriter, beneath, does none of these.

    def __init__(self, logdir: str | os.PathLike[str]):
        self.logdir = os.fspath(logdir)
        self._library = require("tensorboardX", type(self).__name__)
        self._events: Any = None
        self._close: Any = None
        self._flushed = 0.0

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Write the values of one step, as one event."""
        value = self._library.summary.Summary.Value
        self._write(step, [value(tag=_text(name), simple_value=scalars[name]) for name in scalars])

    def write_binned(self, step: int, histograms: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> None:
        """Write histograms of one step that are binned already; one that counts nothing is left out.

        Args:
            step: the step.
            histograms: by name ``(counts, edges)``, of shapes ``(bins,)`` and ``(bins + 1,)``. A bin that reaches to
                infinity is drawn as wide as its neighbour.
        """
        values: list[Any] = []
        for name, (counts, edges) in histograms.items():
            if np.any(counts):
                values.extend(self._library.summary.histogram_raw(_text(name), **_histogram(counts, edges)).value)
        self._write(step, values)

    def _write(self, step: int, values: list[Any]) -> None:
        if not values:
            return
        if self._close is None:
            self._open()
        event = self._library.proto.event_pb2.Event(wall_time=time.time(), step=step)
        event.summary.value.extend(values)
        self._events.write_event(event)
        if time.monotonic() - self._flushed > FLUSH_SECONDS:
            self.flush()

    def _open(self) -> None:
        self._library.record_writer.directory_check(self.logdir)
        # The library names a file by the second, and would overwrite that of a writer closed within the same one.
        suffix = f".{time.time_ns()}.{os.getpid()}"
        self._events = self._library.event_file_writer.EventsWriter(os.path.join(self.logdir, "events"), suffix)
        self._close = weakref.finalize(self, self._events.close)
        self._flushed = time.monotonic()

    def flush(self) -> None:
        """Put everything written so far on the disk."""
        if self._close is not None:
            self._events.flush()
            self._flushed = time.monotonic()

    def close(self) -> None:
        """Flush and close the event file. A later write makes another one."""
        if self._close is not None:
            self._close()
            self._close = self._events = None


def _text(name: str) -> str:
    """The name, without the lone surrogates that a protocol buffer refuses."""
    return name.encode("utf-8", "backslashreplace").decode()


def _histogram(counts: np.ndarray, edges: np.ndarray) -> dict[str, Any]:
    """What TensorBoard stores of a histogram. Moments are those of the middles of the bins."""
    finite = edges[np.isfinite(edges)] if np.isfinite(edges).any() else np.zeros(1)
    widths = np.diff(finite) if finite.size > 1 else np.ones(1)
    edges = np.nan_to_num(edges, neginf=finite[0] - widths[0], posinf=finite[-1] + widths[-1])
    middles = (edges[:-1] + edges[1:]) / 2
    occupied = np.flatnonzero(counts)
    return {
        "min": float(edges[occupied[0]]),
        "max": float(edges[occupied[-1] + 1]),
        "num": float(counts.sum()),
        "sum": float(counts @ middles),
        "sum_squares": float(counts @ middles**2),
        "bucket_limits": edges[1:].tolist(),
        "bucket_counts": counts.tolist(),
    }
