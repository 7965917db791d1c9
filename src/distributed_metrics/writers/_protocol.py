"""What a writer is, and how the writers of other libraries become one."""

import importlib
import inspect
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class MetricWriter(Protocol):
    """What takes scalars. The writers of clu and kauldron are of this shape as they are.

    One that has ``write_binned`` as well gets histograms there (see ``BinnedWriter``).

    >>> from distributed_metrics.writers import MemoryWriter
    >>> isinstance(MemoryWriter(), MetricWriter), isinstance(print, MetricWriter)
    (True, False)
    """

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Write the values of one step."""

    def flush(self) -> None:
        """Hand over everything written so far."""

    def close(self) -> None:
        """Flush, and let go of files and ports. May be called twice."""


@runtime_checkable
class BinnedWriter(MetricWriter, Protocol):
    """A writer that shows histograms as such. To others they go as scalars, one for each bin."""

    def write_binned(self, step: int, histograms: Mapping[str, tuple[Any, Any]]) -> None:
        """Write histograms by name: ``(counts, edges)``, float64 arrays ``(bins,)`` and ``(bins + 1,)``.

        The outermost edges may be infinite.
        """


class _Completed:
    """A writer that lacks ``flush`` or ``close``, with what it lacks doing nothing."""

    def __init__(self, writer: Any):
        self._writer = writer
        if _has(writer, "write_binned"):
            self.write_binned = writer.write_binned

    def __repr__(self) -> str:
        return repr(self._writer)

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        self._writer.write_scalars(step, scalars)

    def flush(self) -> None:
        if _has(self._writer, "flush"):
            self._writer.flush()

    def close(self) -> None:
        if _has(self._writer, "close"):
            self._writer.close()


class _ScalarByScalar(_Completed):
    """A logging backend of metrax. It is closed once: nothing says that it may be closed twice."""

    _closed = False

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        for name, value in scalars.items():
            self._writer.log_scalar(name, value, step=step)

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            super().close()


@dataclass(frozen=True)
class _Logger:
    """A function of the shape of ``jax.monitoring.record_scalar``."""

    log_scalar: Callable[..., Any]

    def __repr__(self) -> str:
        return repr(self.log_scalar)


class _Function:
    """A function of the shape of ``wandb.log``."""

    def __init__(self, log: Callable[..., Any]):
        self._log = log

    def __repr__(self) -> str:
        return repr(self._log)

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        if scalars:
            self._log(dict(scalars), step=step)

    def flush(self) -> None:
        """Nothing is held back."""

    def close(self) -> None:
        """The function is not ours to end."""


def _takes(function: Callable[..., Any], *args: Any, **kwargs: Any) -> bool:
    """Whether a function can be called so, as far as its signature shows."""
    try:
        inspect.signature(function).bind(*args, **kwargs)
    except TypeError:
        return False
    except ValueError:  # it has none to look at
        return True
    return True


def _has(writer: Any, method: str) -> bool:
    return callable(getattr(writer, method, None))


def as_writer(writer: Any) -> MetricWriter:
    """Turn whatever takes numbers into a ``MetricWriter``.

    Args:
        writer: one of

            * an object with ``write_scalars(step, scalars)``: a writer of this package, of clu or of kauldron. It is
              returned as it is; where it has no ``flush`` or ``close``, they do nothing.
            * an object with ``log_scalar(event, value, step=...)``: a logging backend of metrax.
            * a function that is called as ``wandb.log`` is: ``log({"loss": 0.5}, step=3)``; or once for each number, as
              ``jax.monitoring.record_scalar`` is: ``record_scalar("loss", 0.5, step=3)``.

    Returns:
        The writer.

    Raises:
        TypeError: it is none of these, or a class where an instance is meant.

    >>> as_writer(lambda scalars, step: print(step, scalars)).write_scalars(3, {"loss": 0.5})
    3 {'loss': 0.5}
    """
    if not isinstance(writer, type):
        if _has(writer, "write_scalars"):
            return writer if _has(writer, "flush") and _has(writer, "close") else _Completed(writer)
        if _has(writer, "log_scalar"):
            return _ScalarByScalar(writer)
        if callable(writer) and _takes(writer, {}, step=0):
            return _Function(writer)
        if callable(writer) and _takes(writer, "", 0.0, step=0):
            return _ScalarByScalar(_Logger(writer))
        got = (
            f"a function {inspect.signature(writer)}"
            if inspect.isroutine(writer)
            else (f"an instance of {type(writer).__qualname__}")
        )
        fix = ""
    else:
        got, fix = f"the class {writer.__qualname__}", f"\n  Give an instance: {writer.__qualname__}(...)"
    if writer is None:
        got, fix = "None", "\n  For no writer: ()"
    elif isinstance(writer, str | os.PathLike):
        got, fix = repr(writer), f"\n  Give a writer: JsonLinesWriter({os.fspath(writer)!r})"
    raise TypeError(
        f"as_writer() got {got}, which takes no metrics.{fix}\n"
        "  A writer is an object with write_scalars(step, scalars), as those of distributed_metrics.writers, clu and\n"
        "  kauldron; or one with log_scalar(event, value, step=...), as the logging backends of metrax; or a function\n"
        "  that is called as log(scalars, step=step), as wandb.log, or as log(name, value, step=step)."
    )


def as_writers(writers: Any) -> list[MetricWriter]:
    """The writers of one that ``as_writer`` takes, or of several.

    Raises:
        TypeError: one of them takes no metrics.
    """
    is_one = callable(writers) or _has(writers, "write_scalars") or _has(writers, "log_scalar")
    if is_one or isinstance(writers, str | Mapping) or not isinstance(writers, Iterable):
        return [as_writer(writers)]
    return [as_writer(one) for one in writers]


def require(module: str, writer: str, extra: str = "writers") -> Any:
    """The library ``module``, or an error that says how to get it.

    Args:
        module: its name, or that of a module in it: "rich.console".
        writer: the name of the class that needs it.
        extra: the extra of this package that brings it.

    Raises:
        ImportError: it cannot be imported.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        library = module.partition(".")[0]
        raise ImportError(f"{writer} needs {library}: pip install 'distributed-metrics[{extra}]'") from error


def printable(name: str) -> str:
    r"""A name in which no line break, terminal code or change of direction is left.

    >>> print(printable("a\nb \x1b[2J ü"))
    a\nb \x1b[2J ü
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)
