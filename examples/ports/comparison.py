"""What every port shows at its end: what its step sends, and its numbers beside those of the way that it replaces."""

import sys
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np


class Numbers(NamedTuple):
    """One metric, three ways: what the hand-written loop logs, what ours does, and float64 NumPy over all values."""

    by_hand: float
    ours: float
    numpy: float


def compare(
    without: Mapping[str, int], with_metrics: Mapping[str, int], numbers: Mapping[str, Numbers], rtol: float = 1e-6
) -> None:
    """Print both tables.

    Args:
        without: what a step sends that logs nothing, by kind of collective, as ``collective_bytes`` gives it.
        with_metrics: what the step sends with our metrics.
        numbers: by name.
        rtol: how far ours may be from NumPy's, relatively.

    Raises:
        SystemExit: the metrics send something, or a number of ours is not NumPy's.
    """
    for title, sent in (("without metrics", without), ("with metrics", with_metrics)):
        kinds = ", ".join(f"{kind} {size:,} bytes" for kind, size in sorted(sent.items()))
        print(f"a step sends {title + ':':17} {kinds or 'nothing'}")
    print(f"{'':32}{'by hand':>14}{'ours':>14}{'NumPy':>14}")
    for name, (by_hand, ours, by_numpy) in numbers.items():
        print(f"{name:32}{by_hand:14.7g}{ours:14.7g}{by_numpy:14.7g}")
    if with_metrics != without:
        sys.exit(f"The metrics send something: {dict(with_metrics)} with them, {dict(without)} without.")
    for name, (_, ours, by_numpy) in numbers.items():
        if not np.isclose(ours, by_numpy, rtol=rtol, atol=0, equal_nan=True):
            sys.exit(f"{name} is {ours!r}, and {by_numpy!r} by NumPy.")
