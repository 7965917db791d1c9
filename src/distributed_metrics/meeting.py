"""A flush that waits for the other processes only so long: they meet before it is launched.

A collective waits for all processes without end. With a limit, every process announces its flush to the coordination
service of ``jax.distributed`` first, and launches only when all have come and say the same.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from distributed_metrics.heads import Head, require_agreement

_MET: dict[tuple[int, ...], int] = {}  # by the processes: how often this one has come to meet them


def meet(head: Head, processes: tuple[int, ...], timeout: float) -> None:
    """Wait for the other processes to come to the same flush.

    The meetings of the same processes are counted, whatever they flush: so processes that are out of step meet as well,
    and can tell.

    Args:
        head: what this process is about to flush.
        processes: those that take part, this one among them.
        timeout: seconds.

    Raises:
        TimeoutError: some did not come; or the others have given up waiting for this one.
        OutOfStepError: they have come to another flush.
    """
    client = _client()
    group = hashlib.blake2b(repr(processes).encode(), digest_size=8).hexdigest()
    while True:
        number = _MET.get(processes, 0)
        _MET[processes] = number + 1
        place = f"distributed_metrics/{group}/{number}"
        try:
            client.key_value_set_bytes(f"{place}/{head.process}", head.to_bytes())
            client.wait_at_barrier(place, max(1, round(timeout * 1000)), list(processes))
            heads = _heads_at(client, place)
            break
        except jax.errors.JaxRuntimeError as error:
            if not _was_of_another_flush(client, place, head, processes):
                raise TimeoutError(_who_is_missing(client, place, processes, timeout)) from error
    require_agreement(heads)
    if number:  # all have left the meeting before
        client.key_value_delete(f"distributed_metrics/{group}/{number - 1}/{head.process}")


def checked_timeout(call: str, timeout: Any) -> float | None:
    """Seconds, or None for no limit.

    Raises:
        ValueError: it is neither.
    """
    if timeout is None:
        return None
    if isinstance(timeout, bool) or not isinstance(timeout, int | float | np.number) or not timeout > 0:
        raise ValueError(f"{call}(timeout={timeout!r}): a positive number of seconds, or None: no limit.")
    return float(timeout)


def _client() -> Any:
    # Private: no public function of JAX waits for a process with a limit, or can tell which one did not come. Orbax
    # uses the same client. tests/test_faults.py fails if it changes.
    from jax._src import distributed

    return distributed.global_state.client


def _heads_at(client: Any, place: str) -> list[Head]:
    return [Head.from_bytes(head) for _, head in client.key_value_dir_get_bytes(place)]


def _was_of_another_flush(client: Any, place: str, head: Head, processes: Sequence[int]) -> bool:
    """Whether the others have waited and given up here, and for another flush than this one: they flushed alone."""
    try:
        others = [one for one in _heads_at(client, place) if one.process != head.process]
    except jax.errors.JaxRuntimeError:
        return False
    return len(others) == len(processes) - 1 and any(replace(one, process=head.process) != head for one in others)


def _who_is_missing(client: Any, place: str, processes: Sequence[int], timeout: float) -> str:
    try:
        came = {head.process for head in _heads_at(client, place)}
    except jax.errors.JaxRuntimeError:
        return (
            "metrics.flush(timeout=...): the coordination service does not answer: the process that runs it, as a rule "
            "process 0, has ended.\n"
            "  Nothing was flushed. Save what this process holds, leave by os._exit(1), and start the job again."
        )
    missing = [process for process in processes if process not in came]
    if not missing:
        return (
            "metrics.flush(timeout=...): this process came late: the others have waited for it and given up.\n"
            "  Nothing was flushed, here or there. Flush again, as they do, and the numbers are those of both windows."
        )
    who = "process" if len(missing) == 1 else "processes"
    return (
        f"metrics.flush(timeout={timeout:g}): {who} {', '.join(map(str, missing))} of {len(processes)} did not come "
        f"within {timeout:g} s.\n"
        "  Nothing was flushed: the accumulators go on, and the next flush has all of it, if the process comes then.\n"
        "  If it has died: save what this process holds, leave by os._exit(1), and start the job again."
    )
