"""``PeriodicFlush``: the numbers of a training loop, window by window, to where people look, without holding it up.

The loop's thread flushes the accumulators, which only launches a small program, and puts the snapshot into a queue. A
thread of its own waits for the devices, turns snapshots into floats and hands those to the writers.
"""

import contextlib
import itertools
import logging
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any

import jax
import numpy as np

from distributed_metrics import streaming
from distributed_metrics.delivery import (
    MOST_WAITING,
    Background,
    Delivered,
    Derive,
    Moment,
    Outlets,
    Total,
    Window,
    Written,
    derived,
    floats_of,
    leaves_of,
)
from distributed_metrics.heads import OutOfStepError
from distributed_metrics.meeting import checked_timeout
from distributed_metrics.metrics import DistributedMetrics
from distributed_metrics.naming import did_you_mean
from distributed_metrics.snapshot import Snapshot
from distributed_metrics.writers._protocol import as_writers

_LOG = logging.getLogger(__name__)

_OPEN: "weakref.WeakSet[PeriodicFlush]" = weakref.WeakSet()  # those whose block has been entered and not left


class PeriodicFlush:
    """Flush metrics every few steps of a training loop, and write the numbers in the background.

    One call a step, inside a ``with`` block. A window ends where ``(step + 1) % every_steps == 0``, also after a run
    was resumed; what is left is flushed when the block ends, also by an exception. No call waits for a device or for a
    writer; where writers cannot keep up, windows are added together, and nothing is dropped. The end of the block waits
    until all is written.

    In several processes all of them make the same calls, and the first one writes: of a mesh that some processes own,
    the first of these; in the others every call does nothing. There an error of a writer is logged, the others go on,
    and it is raised when the block ends.

    Args:
        metrics: the accumulators.
        every_steps: how many steps make a window.
        writers: where the numbers go, one or several: all that ``distributed_metrics.writers.as_writer`` takes. They
            are closed when the block ends.
        prefix: put before all names of a window, host scalars and derived numbers included, joined by ``/``.
        rates: flat names of sums and counts; each gives ``<name>_per_sec``, per second between the times at which
            results were ready. ``steps_per_sec`` is always there. The first window, which compiles, has neither.
        derive: called with the flat floats of a window (names without the prefix; what the window has not seen is left
            out) and its ``Snapshot``; returns more floats by name, or None. It runs in the background, in every
            process. An exception of it stops the run: a later call raises it; in several processes the one that ends
            the next window, in all of them, and for that it waits for the window before. Windows that were added
            together count as one, so keep no state in it.
        timeout: seconds that a call which ends a window waits for the other processes; None: no limit. See
            ``DistributedMetrics.flush``: if a process does not come, the call raises ``TimeoutError``, and the window
            goes on.

    Raises:
        TypeError, ValueError: no such metrics; a rate that is no sum or count; something that cannot write.
        RuntimeError: on entering the block, another block that is open flushes the same object.

    >>> from distributed_metrics.writers import MemoryWriter
    >>> metrics, memory = DistributedMetrics({"loss": "mean"}), MemoryWriter()
    >>> def derive(numbers, window):
    ...     return {"twice": 2 * numbers["loss"]}
    >>> with PeriodicFlush(metrics, 2, memory, derive=derive) as flusher:
    ...     for step in range(5):
    ...         metrics.update(loss=float(step))
    ...         flusher(step)
    >>> memory.to_dict()["loss"]
    {'step': [1, 3, 4], 'value': [0.5, 2.5, 4.0]}
    >>> memory.to_dict()["twice"]["value"]
    [1.0, 5.0, 8.0]
    """

    def __init__(
        self,
        metrics: DistributedMetrics,
        every_steps: int,
        writers: Any = (),
        *,
        prefix: str = "",
        rates: Iterable[str] = (),
        derive: Callable[[dict[str, float], Snapshot], Mapping[str, float] | None] | None = None,
        timeout: float | None = None,
    ) -> None:
        self._metrics = _require_metrics(metrics)
        if isinstance(every_steps, bool) or not isinstance(every_steps, int | np.integer) or every_steps < 1:
            raise ValueError(f"PeriodicFlush(every_steps={every_steps!r}): it is a whole number of steps, 1 or more.")
        self._every = int(every_steps)
        if not isinstance(prefix, str):
            raise TypeError(f"PeriodicFlush(prefix={prefix!r}): a string.")
        if derive is not None and not callable(derive):
            raise TypeError(
                f"PeriodicFlush(derive={derive!r}): a function of the numbers of a window and its Snapshot."
            )
        self._prefix = prefix
        self._rates = _known_rates(metrics, rates)
        self._own_names = {"steps_per_sec", *(f"{name}_per_sec" for name in self._rates)}
        for name in filter(metrics._plan.shows, sorted(self._own_names)):
            raise ValueError(
                f"PeriodicFlush(): the metric {name!r} has the name of a number that it adds to each window.\n"
                "  Rename it in the spec."
            )
        self._timeout = checked_timeout("PeriodicFlush", timeout)
        processes = metrics._processes()
        self._alone = len(processes) == 1
        self._writes = jax.process_index() == processes[0]
        self._elsewhere = jax.process_index() not in processes
        self._derive = None if self._elsewhere else derive
        self._thread: Background | None = None
        self._closed = False

        self._last_step: int | None = None
        self._window = Window()  # the one under way
        self._ended: Window | None = None  # the one before
        self._epoch = Total()
        self._moments: deque[Moment] = deque(maxlen=4 * MOST_WAITING)
        self._stops: list[Exception] = []  # what derive raised: the same in all processes
        self._failures: list[Exception] = []  # what writers raised
        self._outlets = Outlets(as_writers(writers), self._failures, log_errors=not self._alone)
        self._out_of_step: OutOfStepError | None = None
        self._warned = False
        self._warned_of_flush = False
        self._stopped = False  # by derive, which is not asked again

    # --- the loop ---

    def __enter__(self) -> "PeriodicFlush":
        if self._thread is not None:
            raise RuntimeError("PeriodicFlush: this one was entered before; make a new one for another loop.")
        self._require_for_itself(self._metrics)
        if self._metrics.mesh is None and jax.process_count() > 1:
            _LOG.warning(
                "PeriodicFlush: this object has no mesh, so each of the %d processes has numbers of its own, and those "
                "of process 0 are written. For one number of all: DistributedMetrics({...}, mesh=mesh)",
                jax.process_count(),
            )
        _OPEN.add(self)
        self._metrics._watch(self._note_flush)
        self._thread = Background(self._deliver)
        return self

    def __call__(self, step: int, metrics: DistributedMetrics | None = None, **host_scalars: float) -> None:
        """A step is done.

        Args:
            step: its number, from 0, as a Python integer; above that of the last call.
            metrics: the accumulators, where the step returned a new object. At the end of a window this very object is
                flushed, so the next step must get it, and no copy that was made before.
            **host_scalars: what only the host knows, the time of loading data for example; of a window the last one
                counts.

        Raises:
            TypeError: a step or a host scalar that is not on the host; inside a jitted function.
            ValueError: a step that is not above the last; a host scalar with the name of a metric.
            Exception: what a writer or ``derive`` raised in the background.
        """
        self._require_open()
        self._raise_out_of_step()
        step, last = _host_step(step), self._last_step
        if last is not None and step <= last:
            raise ValueError(
                f"flusher({step}): the last step was {last}, and steps rise.\n"
                "  Count them over all epochs; for another run make another PeriodicFlush."
            )
        scalars = {name: self._host_scalar(name, value) for name, value in host_scalars.items()}
        metrics = self._metrics if metrics is None else _require_metrics(metrics)
        if metrics._in_trace():
            raise TypeError(
                "flusher(): called inside a jitted function, where a window has no numbers yet.\n"
                "  Call it after the step: train_step(metrics, batch); flusher(step)"
            )
        if metrics is not self._metrics:
            self._require_for_itself(metrics)
            self._metrics._watch(None)
            self._metrics = metrics
            metrics._watch(self._note_flush)
        self._window.host |= scalars
        self._window.steps += 1 if last is None else step - last
        self._last_step = self._window.step = step
        self._poll()
        before = step if last is None else last + 1  # steps may be skipped, and with them the end of a window
        if (step + 1) // self._every > before // self._every:
            self._end_window()
        self._raise_failure()

    def write(
        self, step: int, numbers: Snapshot | Mapping[str, Any], prefix: str = "eval", *, derive: Derive | None = None
    ) -> None:
        """Write other numbers through the same writers, after what was handed over before.

        They wait where writers cannot keep up; unlike windows they are never added together.

        Args:
            step: the step that they belong to.
            numbers: a snapshot, or a (nested) mapping of names to numbers or arrays; read in the background.
            prefix: put before their names, in place of that of the windows.
            derive: called with the flat floats, by names without the prefix, and the snapshot (of a mapping: None), in
                the background of the process that writes; returns more floats by name, which get the prefix, or None.
                What it raises surfaces as what a writer raises.

        Raises:
            TypeError: neither of the two; something that is no number.
            Exception: what a writer or ``derive`` raised in the background.
        """
        thread = self._require_open()
        if not isinstance(numbers, Mapping):
            hint = "\n  Of metrics: metrics.flush()" if isinstance(numbers, DistributedMetrics) else ""
            raise TypeError(f"flusher.write() takes a Snapshot or a mapping, got {type(numbers).__name__}.{hint}")
        held = numbers if isinstance(numbers, Snapshot) else leaves_of(numbers)
        thread.put(Written(_host_step(step), held, prefix, derive))
        self._raise_failure()

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Time that does not count in rates: evaluation, a checkpoint.

        >>> metrics = DistributedMetrics({"loss": "mean"})
        >>> with PeriodicFlush(metrics, 10) as flusher:
        ...     with flusher.pause():
        ...         pass  # evaluate
        """
        done = Moment(self._metrics._arrays())  # the devices may still be at work on the steps before
        self._poll()
        done.poll()
        self._require_open().put(done)
        started = time.perf_counter()
        try:
            yield
        finally:
            done.poll()
            ended = time.perf_counter()
            self._window.paused += ended - (ended if done.at is None else max(done.at, started))

    def start_epoch(self, seen: Snapshot | None = None) -> None:
        """``total()`` counts from here on. The window that is under way goes on.

        Args:
            seen: what the epoch had seen before this run: the restored ``total()`` of a run that was interrupted.

        Raises:
            ValueError: a snapshot of another spec, or of a population.

        >>> metrics = DistributedMetrics({"loss": "mean"})
        >>> metrics.update(loss=1.0)
        >>> saved = metrics.flush().to_dict()
        >>> with PeriodicFlush(metrics, 10) as flusher:
        ...     flusher.start_epoch(Snapshot.from_dict(saved))
        ...     metrics.update(loss=2.0)
        ...     flusher.total()["loss"]
        1.5
        """
        self._require_open()
        if seen is not None:
            if not isinstance(seen, Snapshot):
                raise TypeError(
                    f"flusher.start_epoch() takes a Snapshot, got {type(seen).__name__}.\n"
                    "  For example: flusher.start_epoch(Snapshot.from_dict(saved))"
                )
            seen._require_fits(self._metrics._plan, "flusher.start_epoch")
        self._window.parts.append(self._flush())
        self._epoch = Total()
        if seen is not None:
            self._epoch.add(seen)

    def total(self) -> Snapshot:
        """All that was seen since ``start_epoch()``, or from the beginning; also what no window has yet.

        It waits for the devices. In several processes, all call it.
        """
        return self._epoch.plus(self._metrics.compute(timeout=self._timeout))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        thread = self._require_open()
        in_step = error is None and self._out_of_step is None
        everywhere = in_step or any(error is stop for stop in self._stops)
        try:
            if self._window.steps:
                if self._alone or everywhere:
                    self._flush_window(thread)
                else:  # the other processes may be at another step, and a flush waits for all
                    _LOG.warning("PeriodicFlush: left by an exception in this process: its last window is not flushed.")
            streaming.wait_for_callbacks()
        except Exception as late:  # the block ends as it would have; it is raised below
            late.add_note("PeriodicFlush: while the last window was flushed.")
            self._failures.append(late)
        finally:
            self._closed = True
            _OPEN.discard(self)
            self._metrics._watch(None)
            thread.finish()
            if self._derive is not None and not self._alone and everywhere and self._ended is not None:
                with contextlib.suppress(Exception):  # it is in self._stops
                    self._stop_by(self._ended)
            self._outlets.close()
        raised = [] if self._out_of_step is None else [self._out_of_step]
        left = [one for one in itertools.chain(raised, self._stops, self._failures) if one is not error]
        for one in left[0 if error is not None else 1 :]:
            _LOG.error("PeriodicFlush: in the background", exc_info=one)
        if error is None and left:
            raise left[0]

    # --- the end of a window ---

    def _end_window(self) -> None:
        before = self._ended
        self._flush_window(self._require_open())
        if self._derive is not None and not self._alone and before is not None:
            self._stop_by(before)

    def _stop_by(self, window: Window) -> None:
        """In several processes: what ``derive`` raised for a window is raised by all of them at one call."""
        self._numbers_of(window)
        if window.stop is not None:
            self._stops.append(window.stop)
            self._stopped = True
            raise window.stop

    def _flush(self) -> Snapshot:
        return self._metrics._read("flush", fresh=True, timeout=self._timeout, step=self._last_step)

    def _flush_window(self, thread: Background) -> None:
        snapshot = self._flush()
        window, ended = self._window, Moment(snapshot._arrays())
        self._moments.append(ended)
        window.parts.append(snapshot)
        window.begun, window.ended = (None if self._ended is None else self._ended.ended), ended
        self._epoch.add(snapshot)
        self._window, self._ended = Window(), window
        thread.put(window)

    def _poll(self) -> None:
        """Note which results have become ready since the last call: the thread may be busy with a slow writer."""
        while self._moments:
            self._moments[0].poll()
            if self._moments[0].at is None:
                break
            self._moments.popleft()

    def _raise_out_of_step(self) -> None:
        """Every process hears of it, and none may launch another flush."""
        if self._out_of_step is not None:
            raise self._out_of_step

    def _raise_failure(self) -> None:
        """In one process an error surfaces here; in several, one that raised alone would leave the others waiting."""
        if self._alone and self._stops:
            self._stopped = True
            raise self._stops.pop(0)
        if self._alone and self._failures:
            raise self._failures.pop(0)

    # --- in the background ---

    def _deliver(self, what: Delivered) -> None:
        if isinstance(what, Moment):
            what.wait()
            return
        try:
            if isinstance(what, Window):
                self._deliver_window(what)
            elif self._writes:
                self._deliver_written(what)
        except OutOfStepError as error:
            self._out_of_step = error
        except Exception as error:  # the loop hears of it, and the thread goes on
            error.add_note(f"PeriodicFlush: while the numbers of step {what.step} were read.")
            self._failures.append(error)

    def _deliver_window(self, window: Window) -> None:
        # In several processes each must read what it flushed: that checks that all made the same flush.
        if not self._elsewhere and (self._outlets or self._derive is not None or not self._alone):
            numbers = self._numbers_of(window)
            if self._writes:
                self._outlets.write(window.step, numbers, window.snapshot(), self._prefix)
            if window.stop is not None and self._alone:
                self._stops.append(window.stop)
        self._epoch.shorten()

    def _deliver_written(self, written: Written) -> None:
        snapshot = written.numbers if isinstance(written.numbers, Snapshot) else None
        numbers = floats_of(written.numbers) if snapshot is None else snapshot.flatten()
        try:
            numbers |= derived(written.derive, numbers, snapshot)
        except Exception as error:  # what was seen is written all the same
            error.add_note(f"PeriodicFlush: raised by derive, for what was written at step {written.step}.")
            self._failures.append(error)
        self._outlets.write(written.step, numbers, snapshot, written.prefix)

    def _numbers_of(self, window: Window) -> dict[str, float]:
        """The flat floats of a window, derived ones included. Whoever asks first works them out."""
        with window.lock:
            if window.numbers is None:
                if window.ended is not None:
                    window.ended.wait()
                snapshot = window.snapshot()
                numbers = snapshot.flatten()
                if not numbers and not self._warned:
                    self._warned = True
                    _LOG.warning(
                        "PeriodicFlush: the window that ended with step %d saw no values. Where the training step "
                        "returns new metrics, pass them on: flusher(step, metrics)",
                        window.step,
                    )
                numbers |= window.host
                seconds = window.seconds()
                if seconds is not None and seconds > 0:
                    numbers["steps_per_sec"] = window.steps / seconds
                    numbers |= {f"{name}_per_sec": numbers.get(name, 0.0) / seconds for name in self._rates}
                try:
                    numbers |= derived(None if self._stopped else self._derive, numbers, snapshot)
                except Exception as error:  # the loop raises it
                    missing = isinstance(error, KeyError) and str(error).strip("'") in snapshot.flatten(empty="nan")
                    error.add_note(
                        f"PeriodicFlush: raised by derive, for the window that ended with step {window.step}"
                        + (", which saw nothing of that name: numbers.get(name) is None then." if missing else ".")
                    )
                    window.stop = error
                window.numbers = numbers
            return window.numbers

    def _note_flush(self, method: str) -> None:
        if not self._warned_of_flush:
            self._warned_of_flush = True
            _LOG.warning(
                "PeriodicFlush: metrics.%s() was called inside the block. What it took is in no window, and not in "
                "total(). An evaluation has an object of its own; for numbers so far, metrics.compute().",
                method,
            )

    # --- checks ---

    def _require_for_itself(self, metrics: DistributedMetrics) -> None:
        if any(other._metrics is metrics for other in list(_OPEN) if other is not self):
            raise RuntimeError(
                "PeriodicFlush: another one that is open flushes the same object, and each would take windows from the "
                "other.\n  Give one of them all writers; for longer windows add up snapshots: flusher.total(), or a "
                "writer of your own."
            )

    def _require_open(self) -> Background:
        if self._thread is None or self._closed:
            raise RuntimeError(
                "PeriodicFlush: use it inside its with block, which starts and ends the thread that writes:\n"
                "  with PeriodicFlush(metrics, 100, writers) as flusher: ..."
            )
        return self._thread

    def _host_scalar(self, name: str, value: Any) -> float:
        if isinstance(value, jax.Array):
            raise TypeError(
                f"flusher(..., {name}=...): a jax.Array; to read it here would wait for the device.\n"
                f"  Accumulate it: metrics.update({name}=...), with {name!r} in the spec."
            )
        if np.ndim(value) or not isinstance(value, int | float | np.number | np.bool_ | np.ndarray):
            raise TypeError(f"flusher(..., {name}=...): a number, got {type(value).__name__}: {value!r}.")
        if name in self._own_names or self._metrics._plan.shows(name):
            raise ValueError(
                f"flusher(..., {name}=...): the window has a number {name!r} already.\n  Give it another name."
            )
        return float(value)


def _require_metrics(metrics: Any) -> DistributedMetrics:
    if not isinstance(metrics, DistributedMetrics):
        raise TypeError(f"PeriodicFlush flushes DistributedMetrics, got {type(metrics).__name__}: {metrics!r}.")
    metrics._require_accumulators("flush")
    return metrics


def _known_rates(metrics: DistributedMetrics, rates: Iterable[str]) -> tuple[str, ...]:
    rates = (rates,) if isinstance(rates, str) else tuple(rates)
    totals = {metric.name: metric.accumulator for metric in metrics._plan.metrics if metric.accumulator.counts_copies}
    known = [name for name, accumulator in totals.items() if not accumulator.result_shape()]
    for name in rates:
        if name not in known:
            shape = totals[name].result_shape() if name in totals else ()
            raise ValueError(
                f"PeriodicFlush(rates={rates!r}): {name!r} is "
                f"{f'no scalar, but of shape {shape}' if shape else 'no sum or count of these metrics'}; those are: "
                f"{', '.join(map(repr, known)) or 'none'}.{did_you_mean(str(name), known)}"
            )
    return rates


def _host_step(step: Any) -> int:
    if isinstance(step, bool) or not isinstance(step, int | np.integer):
        raise TypeError(
            f"flusher(step): the step is a Python integer, got {type(step).__name__}"
            + (": one on a device has to be waited for" if isinstance(step, jax.Array) else "")
            + (
                ".\n  The step comes first: flusher(step, metrics)"
                if isinstance(step, DistributedMetrics)
                else ".\n  Count on the host: for step, batch in enumerate(batches): ..."
            )
        )
    return int(step)
