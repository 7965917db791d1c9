"""Numbers kept in memory: to look at, to test with, to plot."""

import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from distributed_metrics.writers._protocol import printable, require

_LONGEST = 40  # characters of a name in a plot


class MemoryWriter:
    """Keeps everything that is written, also after ``close()``.

    Attributes:
        histograms: by name ``{"step": [...], "counts": [...], "edges": array}``: what ``write_binned`` got.

    >>> writer = MemoryWriter()
    >>> writer.write_scalars(100, {"train/loss": 0.5})
    >>> writer.write_scalars(200, {"train/loss": 0.25})
    >>> writer.to_dict()
    {'train/loss': {'step': [100, 200], 'value': [0.5, 0.25]}}
    """

    def __init__(self) -> None:
        self._scalars: dict[str, list[tuple[int, float]]] = {}
        self.histograms: dict[str, dict[str, Any]] = {}

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Keep the values of one step."""
        for name, value in scalars.items():
            self._scalars.setdefault(name, []).append((int(step), float(value)))

    def write_binned(self, step: int, histograms: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> None:
        """Keep the histograms of one step.

        Args:
            step: the step.
            histograms: by name ``(counts, edges)``, of shapes ``(bins,)`` and ``(bins + 1,)``.

        Raises:
            ValueError: the edges are not those that came before under this name.
        """
        for name, (counts, edges) in histograms.items():
            kept = self.histograms.setdefault(name, {"step": [], "counts": [], "edges": np.array(edges)})
            if not np.array_equal(kept["edges"], edges):
                raise ValueError(f"MemoryWriter: the histogram {name!r} had the edges {kept['edges']}, and has {edges}")
            kept["step"].append(int(step))
            kept["counts"].append(np.array(counts))

    def to_dict(self) -> dict[str, dict[str, list[Any]]]:
        """A copy of the scalars: by name ``{"step": [...], "value": [...]}``, of builtin ints and floats."""
        # The lists are copied first: another thread may be writing.
        kept = {name: list(points) for name, points in list(self._scalars.items())}
        return {
            name: {"step": [step for step, _ in points], "value": [value for _, value in points]}
            for name, points in kept.items()
        }

    def plot(self, path: str | os.PathLike[str], names: Iterable[str] | None = None) -> None:
        """Draw the scalars over the steps, in small panels.

        A panel holds the names that differ in their first part: "train/loss" and "eval/loss" share one. NaN leaves a
        gap. No display is needed, and any thread may call it.

        Args:
            path: the file; its suffix says of which type: ``.png``, ``.svg``, ``.pdf``. The directory is made.
            names: those to draw; by default all.

        Raises:
            ImportError: matplotlib is missing.
            ValueError: nothing was written, or nothing under one of the names.
        """
        figure_module = require("matplotlib.figure", "MemoryWriter.plot()")
        scalars = self.to_dict()
        names = list(scalars if names is None else names)
        unknown = [name for name in names if name not in scalars]
        if unknown or not names:
            wanted = f"under {', '.join(map(repr, unknown))}" if unknown else "to plot"
            raise ValueError(
                f"MemoryWriter.plot({os.fspath(path)!r}): nothing was written {wanted}.\n"
                f"  There is: {', '.join(map(repr, scalars)) or 'nothing'}."
            )
        panels: dict[str, list[str]] = {}
        for name in names:
            panels.setdefault(name.partition("/")[2] or name, []).append(name)
        columns = math.ceil(math.sqrt(len(panels)))
        rows = math.ceil(len(panels) / columns)
        figure = figure_module.Figure(figsize=(4 * columns, 3 * rows), layout="constrained")
        for place, (title, members) in enumerate(panels.items(), start=1):
            axes = figure.add_subplot(rows, columns, place)
            axes.set_title(_short(title), parse_math=False)  # or a "$" would begin a formula
            lines = [axes.plot(scalars[name]["step"], scalars[name]["value"], marker=".")[0] for name in members]
            if members != [title]:
                # Set afterwards, as a label that begins with "_" would be left out.
                legend = axes.legend(lines, [""] * len(lines), fontsize="small")
                for text, name in zip(legend.get_texts(), members, strict=True):
                    text.set_parse_math(False)
                    text.set_text(_short(name.partition("/")[0]))
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)

    def flush(self) -> None:
        """Nothing: everything is kept."""

    def close(self) -> None:
        """Nothing: everything stays."""


def _short(name: str) -> str:
    name = printable(name)
    return name if len(name) <= _LONGEST else f"{name[: _LONGEST - 1]}…"
