"""Several processes give the numbers of one."""

import json
import pathlib
import socket
import subprocess
import sys

import numpy as np

PROGRAM = pathlib.Path(__file__).parent / "programs" / "two_processes.py"


def run(program: pathlib.Path, processes: int, seconds: float = 90) -> list[str]:
    """What each process printed last; no child outlives the call."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = [
        subprocess.Popen(
            [sys.executable, str(program), str(rank), str(processes), str(port)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(processes)
    ]
    try:
        outputs = [child.communicate(timeout=seconds) for child in children]
    finally:
        for child in children:
            child.kill()
            child.wait()
    for child, (_, errors) in zip(children, outputs, strict=True):
        assert child.returncode == 0, errors[-3000:]
    return [printed.strip().splitlines()[-1] for printed, _ in outputs]


def test_two_processes_give_the_numbers_of_one():
    examples = np.arange(16.0)
    weight = np.concatenate([np.ones(16), examples % 2 == 0])
    flat = {
        "x/mean": np.average(np.tile(examples, 2), weights=weight), "x/max": 15.0, "x/count": 24.0, "steps": 2.0,
    }  # fmt: skip
    for printed in run(PROGRAM, processes=2):
        for result in json.loads(printed):
            assert result == {
                "update sends": {},
                "traced": flat,
                "eager": flat,
                "per device": [6.0, 6.0, 6.0, 6.0],
                "after": {},
                "collected": examples.tolist(),
            }
