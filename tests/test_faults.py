"""One of three processes fails: the others hear of it within their limits, and none of them gives a wrong number.

What is held here is what docs/reliability.md tells.
"""

import concurrent.futures
import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from processes import Ended, Processes, started

LIMIT = 3  # seconds of flush(timeout=...)


@dataclass(frozen=True)
class Fault:
    """What happens to one of the processes, and whether a flush has a limit."""

    what: str
    victim: int
    limit: int = LIMIT


FAULTS = {
    "a peer sleeps": Fault("sleeps", 1, 2),
    "a peer is killed": Fault("killed", 1),
    "a peer raises": Fault("raised", 1),
    "the coordinator is killed": Fault("killed", 0),
    "a peer is killed, no limit": Fault("killed", 1, 0),
    "a peer raises, no limit": Fault("raised", 1, 0),
}


@pytest.fixture(scope="module")
def programs() -> Iterator[dict[str, Processes]]:
    """All of them at once: they wait, most of the time."""
    with contextlib.ExitStack() as stack, concurrent.futures.ThreadPoolExecutor() as killers:
        running = {
            name: stack.enter_context(
                started("faults.py", 3, fault.what, str(fault.victim), str(fault.limit), devices=1)
            )
            for name, fault in FAULTS.items()
        }
        killed = [killers.submit(kill, running[name], f.victim) for name, f in FAULTS.items() if f.what == "killed"]
        for one in killed:
            one.result()
        yield running


def kill(running: Processes, victim: int) -> None:
    """Once all of them are at the same flush."""
    for rank in range(3):
        running.wait_for_line(rank, "in step")
    running.kill(victim)


def ended(programs: dict[str, Processes], name: str) -> dict[str, list[Ended]]:
    victim, processes = FAULTS[name].victim, programs[name].wait(seconds=90)
    assert all("in step" in process.lines for process in processes), "it failed before the fault"
    survivors = [process for rank, process in enumerate(processes) if rank != victim]
    return {"victim": [processes[victim]], "survivors": survivors}


def numbers(process: Ended) -> list[str]:
    return [line for line in process.lines if line.startswith("flushed")]


def limits_heard(process: Ended) -> list[float]:
    return [float(s) for line in process.lines for s in re.findall(r"^TimeoutError after ([\d.]+) s", line)]


def test_a_peer_that_sleeps_is_named_and_the_numbers_are_right_once_it_comes(programs):
    of = ended(programs, "a peer sleeps")
    for process in of["survivors"]:
        assert any("process 1 of 3 did not come within 2 s" in line for line in process.lines), process.lines
        assert 2 <= limits_heard(process)[0] < 10
    assert any("the others have waited for it and given up" in line for line in of["victim"][0].lines)
    for process in of["victim"] + of["survivors"]:
        assert numbers(process) == ["flushed {'loss': 2.0, 'steps': 1.0}"], process.lines
        assert (process.code, process.lines[-1]) == (0, "ended"), process.errors[-2000:]


@pytest.mark.parametrize("name", ["a peer is killed", "a peer raises"])
def test_a_peer_that_is_gone_is_named_and_the_others_save_what_they_hold(name, programs):
    of = ended(programs, name)
    assert of["victim"][0].code != 0
    for process in of["survivors"]:
        assert numbers(process) == []
        assert any("process 1 of 3 did not come within 3 s" in line for line in process.lines), process.lines
        assert limits_heard(process)[0] < 15
        assert process.lines[-1].startswith("saved [["), process.lines
        assert process.code == 3


def test_without_the_coordinator_jax_ends_all_processes(programs):
    of = ended(programs, "the coordinator is killed")
    for process in of["survivors"]:
        assert numbers(process) == []
        assert process.code != 0


@pytest.mark.parametrize("name", ["a peer is killed, no limit", "a peer raises, no limit"])
def test_without_a_limit_the_transport_says_so_or_jax_ends_the_process(name, programs):
    of = ended(programs, name)
    assert of["victim"][0].code != 0
    for process in of["survivors"]:
        assert numbers(process) == []
        assert process.code != 0
