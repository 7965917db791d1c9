"""A line per window in the terminal."""

from collections.abc import Mapping
from typing import Any

from distributed_metrics.writers._protocol import printable, require


class ConsoleWriter:
    """Prints a line per write: ``step 100  loss 0.1234  accuracy 97.1``.

    Numbers have four significant digits. Names are printed literally: rich's markup in them does nothing, and
    characters that cannot be printed are shown by their escapes.

    Args:
        console: a ``rich.console.Console``; that of a ``rich.progress.Progress`` prints above its bars. By default one
            on standard output.

    Raises:
        ImportError: rich is missing.

    >>> import sys
    >>> from rich.console import Console
    >>> ConsoleWriter(Console(file=sys.stdout)).write_scalars(100, {"loss": 0.12341, "accuracy": 97.1})
    step 100  loss 0.1234  accuracy 97.1
    """

    def __init__(self, console: Any = None):
        self._text = require("rich.text", type(self).__name__).Text
        self._console = require("rich.console", type(self).__name__).Console() if console is None else console

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Print the values of one step, on one line."""
        if not scalars:
            return
        line = self._text.assemble(("step ", "dim"), (str(step), "bold"))  # a Text has no markup
        for name, value in scalars.items():
            line.append("  ").append(printable(name), style="dim").append(f" {value:.4g}")
        self._console.print(line, soft_wrap=True, highlight=False)

    def flush(self) -> None:
        """Nothing: every line was printed."""

    def close(self) -> None:
        """Nothing: the console is not ours to close."""
