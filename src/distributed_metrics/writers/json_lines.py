"""A file of JSON lines, for whatever reads text."""

import json
import math
import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

_TAKEN = re.compile(r"(metrics/)*(step|time)")
_BLOCK = 1 << 16


class JsonLinesWriter:
    """Appends a line of JSON per write: ``{"step": 100, "time": 1767225600.0, "train/loss": 0.5}``.

    ``pandas.read_json(path, lines=True)`` reads it. ``time`` is in Unix seconds. NaN and infinities, which JSON does
    not have, are ``null``. A metric that is itself called "step" or "time" is "metrics/step" or "metrics/time"; one
    that is called "metrics/step" is then "metrics/metrics/step", and so on.

    The first write makes the directory and the file, or continues a file that is there: a last line that a killed
    process left unfinished is cut off. Each line is handed to the operating system as it is written, so a killed
    process loses at most the line that it was writing. Two processes must not write one file.

    Args:
        path: the file.

    >>> import pathlib, tempfile
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     path = pathlib.Path(directory, "metrics.jsonl")
    ...     writer = JsonLinesWriter(path)
    ...     writer.write_scalars(100, {"train/loss": 0.5, "accuracy": float("nan")})
    ...     writer.close()
    ...     line = json.loads(path.read_text())
    >>> line["step"], line["train/loss"], line["accuracy"]
    (100, 0.5, None)
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self._file: BinaryIO | None = None

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Write the values of one step, as one line."""
        if not scalars:
            return
        record: dict[str, Any] = {"step": step, "time": time.time()}
        for name, value in scalars.items():
            record[f"metrics/{name}" if _TAKEN.fullmatch(name) else name] = value if math.isfinite(value) else None
        line = json.dumps(record, allow_nan=False, ensure_ascii=True) + "\n"
        if self._file is None:
            self._file = _continued(self.path)
        self._file.write(line.encode("ascii"))
        self._file.flush()

    def flush(self) -> None:
        """Nothing: every line was flushed."""

    def close(self) -> None:
        """Close the file. A later write continues it."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _continued(path: Path) -> BinaryIO:
    """The file, made if it is not there, opened to append to its last complete line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(path, "a+b")  # noqa: SIM115  # closed by the writer
    end = file.seek(0, os.SEEK_END)
    start, tail = end, b""
    while start and b"\n" not in tail:
        start = max(0, start - _BLOCK)
        file.seek(start)
        tail = file.read(end - start)
    tail = tail.rpartition(b"\n")[2]
    if _is_object(tail):
        file.write(b"\n")
    elif tail:
        file.truncate(end - len(tail))
    file.seek(0, os.SEEK_END)
    return file


def _is_object(line: bytes) -> bool:
    """Whether it is a whole line; no part of an object is an object."""
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False
