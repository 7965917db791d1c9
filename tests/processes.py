"""Programs of several processes, started by tests: each joins the others on 127.0.0.1 and ends within a time limit."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

PROGRAMS = Path(__file__).parent / "programs"


@dataclass
class Ended:
    """How a process ended: its exit code (negative: by a signal), what it printed, and after how many seconds."""

    code: int
    lines: list[str]
    errors: str
    seconds: float


class Processes:
    """Several processes of one program, with their outputs in files, so that none of them waits for a reader."""

    def __init__(self, program: str, processes: int, *options: str, devices: int = 2) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self._started = time.monotonic()
        self._ended: dict[int, float] = {}
        self._outputs: list[tuple[IO[str], IO[str]]] = []
        self._children: list[subprocess.Popen[bytes]] = []
        for rank in range(processes):
            outputs = tempfile.TemporaryFile("w+"), tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed by close())
            command = [sys.executable, str(PROGRAMS / program), str(rank), str(processes), str(port), *options]
            environment = {**os.environ, "DEVICES": str(devices), "PYTHONUNBUFFERED": "1"}
            environment.pop("XLA_FLAGS", None)
            self._outputs.append(outputs)
            self._children.append(subprocess.Popen(command, stdout=outputs[0], stderr=outputs[1], env=environment))

    def printed(self, rank: int) -> list[str]:
        """The lines that a process has printed so far."""
        stream = self._outputs[rank][0]
        return os.pread(stream.fileno(), 1 << 24, 0).decode().splitlines()

    def wait_for_line(self, rank: int, line: str, seconds: float = 90) -> None:
        """Until a process has printed a line."""
        limit = time.monotonic() + seconds
        while line not in self.printed(rank):
            assert time.monotonic() < limit, f"process {rank} did not print {line!r} within {seconds} s"
            assert self._children[rank].poll() is None, f"process {rank} ended before it printed {line!r}"
            time.sleep(0.02)

    def kill(self, rank: int) -> None:
        """End a process without a word."""
        self._children[rank].send_signal(signal.SIGKILL)

    def wait(self, seconds: float = 120) -> list[Ended]:
        """How each of them ended.

        Raises:
            AssertionError: one has not, within so many seconds.
        """
        limit = time.monotonic() + seconds
        while any(child.poll() is None for child in self._children):
            for rank, child in enumerate(self._children):
                if child.poll() is not None:
                    self._ended.setdefault(rank, time.monotonic())
            hanging = [rank for rank, child in enumerate(self._children) if child.poll() is None]
            assert time.monotonic() < limit, f"processes {hanging} have not ended within {seconds} s"
            time.sleep(0.02)
        ended = []
        for rank, (child, (_, errors)) in enumerate(zip(self._children, self._outputs, strict=True)):
            errors.seek(0)
            at = self._ended.setdefault(rank, time.monotonic())
            ended.append(Ended(child.returncode, self.printed(rank), errors.read(), at - self._started))
        return ended

    def close(self) -> None:
        """No child outlives this."""
        for child, outputs in zip(self._children, self._outputs, strict=True):
            child.kill()
            child.wait()
            for output in outputs:
                output.close()


@contextlib.contextmanager
def started(program: str, processes: int, *options: str, devices: int = 2) -> Iterator[Processes]:
    """Processes of a program in ``tests/programs``, given RANK PROCESSES PORT and the options; ended with the block."""
    running = Processes(program, processes, *options, devices=devices)
    try:
        yield running
    finally:
        running.close()


def run(program: str, processes: int, *options: str, devices: int = 2, seconds: float = 120) -> list[str]:
    """What each process of a program printed last, all of which must end well."""
    with started(program, processes, *options, devices=devices) as running:
        ended = running.wait(seconds)
    for rank, one in enumerate(ended):
        assert one.code == 0, f"process {rank}: exit code {one.code}\n{one.errors[-3000:]}"
    return [one.lines[-1] for one in ended]
