"""Flat names: how nested keys are joined, how elements are numbered, and which name was probably meant."""

import difflib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

SEPARATOR = "/"


def flattened(tree: Mapping[str, Any], leaves: Collection[str] = (), outer: str = "") -> Iterator[tuple[str, Any]]:
    """The flat names and leaves of a nested mapping; a mapping under a name of ``leaves`` is a leaf itself."""
    for key, value in tree.items():
        name = f"{outer}{SEPARATOR}{key}" if outer else str(key)
        if isinstance(value, Mapping) and name not in leaves:
            yield from flattened(value, leaves, name)
        else:
            yield name, value


def element(index: Sequence[int], shape: Sequence[int], labels: Sequence[str] | None = None) -> list[str]:
    """The keys of an element of an array: numbers with zeros in front, so that they sort, or labels of the last dim.

    >>> element((3, 0), (120, 2)), element((3, 0), (120, 2), labels=("precision", "recall"))
    (['003', '0'], ['003', 'precision'])
    """
    keys = [str(i).zfill(len(str(n - 1))) for i, n in zip(index, shape, strict=True)]
    return keys if labels is None else [*keys[:-1], labels[index[-1]]]


def is_element(keys: Sequence[str], shape: Sequence[int], labels: Sequence[str] | None = None) -> bool:
    """Whether an element of an array has these keys."""
    if len(keys) != len(shape) or (labels is not None and keys[-1] not in labels):
        return False
    numbered = len(keys) if labels is None else len(keys) - 1
    return all(
        key.isdecimal() and int(key) < n and len(key) == len(str(n - 1))
        for key, n in zip(keys[:numbered], shape[:numbered], strict=True)
    )


def show_path(path: Iterable[str]) -> str:
    """A path as it is written in code: ``['train']['loss']``."""
    return "".join(f"[{key!r}]" for key in path)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`` Did you mean ...?``, or nothing."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean {near[0]!r}?" if near else ""
