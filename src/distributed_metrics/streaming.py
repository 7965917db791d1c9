"""Numbers out of a compiled loop while it runs: ``flush_every`` inside ``lax.scan`` or ``fori_loop``.

The program hands merged words to a callback of XLA, which may do nothing but pass them on: the devices wait for it, and
reading an array in it can deadlock. A thread of its own reads them and calls the user's function.
"""

import atexit
import functools
import logging
import queue
import threading
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distributed_metrics.metrics import DistributedMetrics
from distributed_metrics.snapshot import Snapshot
from distributed_metrics.tables import Tables
from distributed_metrics.view import is_traced, mapped_axes

_LOG = logging.getLogger(__name__)

Receive = Callable[[int, Snapshot], Any]


class _Inbox:
    """What compiled loops have sent, and the thread that hands it on."""

    def __init__(self) -> None:
        self._sent: queue.SimpleQueue[tuple[Receive, Any, Snapshot]] = queue.SimpleQueue()
        self._changed = threading.Condition()
        self._open = 0
        self._thread: threading.Thread | None = None
        self._failures: list[Exception] = []
        self.used = False  # whether any program may send

    def put(self, receive: Receive, step: Any, snapshot: Snapshot) -> None:
        """Called by XLA: it must not read an array, and not raise."""
        with self._changed:
            self._open += 1
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="flush_every", daemon=True)
                self._thread.start()
        self._sent.put((receive, step, snapshot))

    def _run(self) -> None:
        while True:
            receive, step, snapshot = self._sent.get()
            try:
                receive(int(np.asarray(jax.device_get(step))), snapshot)
            except Exception as error:  # the thread goes on; wait() raises it
                error.add_note("flush_every: raised by the callback.")
                self._failures.append(error)
            finally:
                with self._changed:
                    self._open -= 1
                    self._changed.notify_all()

    def wait(self) -> None:
        """Until all was handed on."""
        if not self.used:
            return
        jax.effects_barrier()  # what programs have not sent yet is not open yet
        with self._changed:
            self._changed.wait_for(lambda: not self._open)
        if self._failures:
            failures, self._failures = self._failures, []
            for other in failures[1:]:
                _LOG.error("flush_every: also", exc_info=other)
            raise failures[0]


_INBOX = _Inbox()


@jax.custom_batching.custom_vmap
def _one_run(tables: Tables) -> Tables:
    """The same rows, in a program that is no ``vmap`` of several runs."""
    return tables


@_one_run.def_vmap
def _refuse_vmap(*_: Any) -> Any:
    raise ValueError(
        "flush_every(): under vmap there is no order in which the members could tell of their windows.\n"
        "  Let the loop return its windows: def body(metrics, x): ...; return metrics, metrics.flush()\n"
        "  metrics, windows = jax.lax.scan(body, metrics, xs)  # a Snapshot of stacked windows"
    )


def flush_every(metrics: DistributedMetrics, step: Any, n: int, callback: Receive) -> None:
    """Inside a compiled loop: flush where ``(step + 1) % n == 0``, and tell the host while the program runs on.

    For ``lax.scan`` and ``fori_loop`` (and those of nnx), on one device and on many, under ``jit`` and in
    ``shard_map``: there the flush is one collective (two where the state is large), which only steps that flush run.
    Where the numbers may come at the end of the program, let the loop return ``metrics.flush()`` as an output instead:
    that costs no callback.

    Args:
        metrics: what the loop updates; it starts afresh where it was flushed.
        step: the number of the step, an integer scalar, the same on all devices.
        n: how many steps make a window.
        callback: called as ``callback(step, snapshot)``, in order, on a thread of its own, in the first process only.
            It may pass them to ``flusher.write(step, snapshot, prefix="train")``. ``wait_for_callbacks()`` waits for
            the last of them, and raises what one of them raised; so does the end of a ``PeriodicFlush`` block.

    Raises:
        ValueError: under ``vmap``, where there is no single step; ``n`` is no whole number of steps.

    >>> import jax.numpy as jnp
    >>> windows = []
    >>> @jax.jit
    ... def loop(metrics, losses):
    ...     def body(metrics, step_and_loss):
    ...         step, loss = step_and_loss
    ...         metrics.update(loss=loss)
    ...         flush_every(metrics, step, 2, lambda step, window: windows.append((step, window["loss"])))
    ...         return metrics, None
    ...     return jax.lax.scan(body, metrics, (jnp.arange(4), losses))[0]
    >>> metrics = loop(DistributedMetrics({"loss": "mean"}), jnp.array([1.0, 2.0, 3.0, 4.0]))
    >>> wait_for_callbacks()
    >>> windows
    [(1, 1.5), (3, 3.5)]
    """
    if isinstance(n, bool) or not isinstance(n, int | np.integer) or n < 1:
        raise ValueError(f"flush_every(n={n!r}): it is a whole number of steps, 1 or more.")
    if not callable(callback):
        raise TypeError(f"flush_every(callback={callback!r}): a function of the step and a Snapshot.")
    if np.shape(step):
        raise ValueError(f"flush_every(step=...): one number, got an array of shape {np.shape(step)}.")
    ends = (step + 1) % n == 0
    if is_traced(ends) or metrics._in_trace():
        _INBOX.used = True

        def tell(window: Snapshot) -> None:
            send = functools.partial(jax.debug.callback, functools.partial(_INBOX.put, callback), step, window)
            if mapped := mapped_axes():  # all devices know: one speaks
                jax.lax.cond(jax.lax.axis_index(mapped) == 0, send, lambda: None)
            else:
                send()

        metrics._flush_where(jnp.asarray(ends), _one_run, tell)
    elif ends:
        window = metrics.flush()
        if jax.process_index() == metrics._processes()[0]:
            _INBOX.used = True
            _INBOX.put(callback, step, window)


def wait_for_callbacks() -> None:
    """Wait until compiled loops have ended, and all that ``flush_every`` sent has gone through its callback.

    Raises:
        Exception: the first that a callback raised.
    """
    _INBOX.wait()


@atexit.register
def _at_exit() -> None:
    try:
        wait_for_callbacks()
    except Exception:  # nobody is left to hear of it
        _LOG.exception("flush_every: a callback raised")
