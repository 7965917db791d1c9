"""What each version has to read: one saved snapshot of each case, and the numbers that it held when it was written.

A case is written once, by the version that brought it, and never again:

    PYTHONPATH=src:tests JAX_PLATFORMS=cpu python -c "import saved_format; saved_format.write()"

This adds the cases that the file does not have. A new accumulator is a new case; a new format, a new file.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import clu.metrics
import flax
import jax
import jax.numpy as jnp
import numpy as np

from distributed_metrics import Accumulator, DistributedMetrics, Histogram, Mean, Quantile, Snapshot, Var
from distributed_metrics.portable import FORMAT_VERSION

PATH = Path(__file__).parent / "data" / f"format_{FORMAT_VERSION}.json"

X = np.array([0.5, 1.0, 4.0, -2.5, 8.0, 0.0, -0.125, 3.0], np.float32)  # sums of these are exact
LOGITS = np.array([[1, 0, 0], [0, 2, 0], [0, 0, 3], [4, 0, 0]], np.float32)


class LogTotal(Accumulator):
    """One of a user's own."""

    fields = {"log_total": "sum", "largest": "max"}

    def contribution(self, batch):
        return {"log_total": batch.map(jnp.abs).sum(), "largest": batch.max()}

    def result(self, xp, weight, log_total, largest):
        return log_total / weight + largest


@flax.struct.dataclass
class Largest(clu.metrics.Metric):
    """A clu metric that merges by no sum, and has a constant."""

    largest: jax.Array
    threshold: Any

    @classmethod
    def empty(cls):
        return cls(jnp.float32(-jnp.inf), np.float32(0.5))

    @classmethod
    def from_model_output(cls, values, **_):
        return cls(jnp.max(values), np.float32(0.5))

    def merge(self, other):
        return type(self)(jnp.maximum(self.largest, other.largest), self.threshold)

    def compute(self):
        return self.largest + self.threshold


def _of(spec: dict[str, Any], *updates: dict[str, Any], weight: Any = None, **kwargs: Any) -> DistributedMetrics:
    metrics = DistributedMetrics(spec, **kwargs)
    for update in updates:
        metrics.update(update, weight=weight)
    return metrics


EVERY = ("mean", "sum", "count", "max", "min", "var", "std", "last", Var(ddof=1, name="of sample"))


def every(*updates: np.ndarray, **kwargs: Any) -> DistributedMetrics:
    """All that has a name, with settings and without, nested."""
    spec = {
        "x": EVERY,
        "nested": {"a/b": {"ü": "mean", "ratio": "ratio"}, "0": Mean(2, labels=("cat", "a.b/c"), name="ignored")},
        "histogram": Histogram((-np.inf, 0.0, 0.7, 4.0)),
        "histograms": Histogram([0, 1], shape=(2, 1), labels=["low"]),
        "quantile": Quantile(0.5, 0.5),
        "quantiles": Quantile((0.25, 1.0), 0.4, labels=("p25", "p100")),
        "unseen": ("mean", "sum", "max", "last", "var"),
    }
    return _of(spec, *map(_seen, updates), **kwargs)


def _seen(x: np.ndarray) -> dict[str, Any]:
    pairs = x.reshape(4, 2)
    nested = {"a/b": {"ü": x, "ratio": (x, np.ones_like(x))}, "0": pairs}
    return {"x": x, "nested": nested, "histogram": x, "histograms": pairs[..., None], "quantile": x, "quantiles": x}


def own(*updates: np.ndarray) -> DistributedMetrics:
    spec = {"own": LogTotal(), "owns": (LogTotal(2, labels="ab"), Mean(2))}
    return _of(spec, *({"own": x, "owns": x.reshape(4, 2)} for x in updates))


def of_clu(*updates: np.ndarray) -> DistributedMetrics:
    spec = {"accuracy": clu.metrics.Accuracy, "largest": Largest, "loss": "mean"}
    labels = np.array([0, 1, 1, 0])
    return _of(spec, *({"accuracy": {"logits": LOGITS, "labels": labels}, "largest": {"values": x}, "loss": x}
                       for x in updates))  # fmt: skip


def before_clu(*updates: np.ndarray) -> DistributedMetrics:
    spec = {"accuracy": clu.metrics.Accuracy, "loss": "mean"}
    return _of(spec, *({"loss": x} for x in updates))


def small(*updates: np.ndarray) -> DistributedMetrics:
    spec = {"x": ("mean", "max", "last", "var"), "pair": {"mean": Mean(2)}, "histogram": Histogram([0, 1, 4])}
    return _of(spec, *({"x": x, "pair": {"mean": x.reshape(4, 2)}, "histogram": x} for x in updates))


def ignoring(*updates: np.ndarray) -> DistributedMetrics:
    return every(*(np.where(x == 4, np.nan, x) for x in updates), nan_policy="ignore")


MADE: dict[str, Callable[..., DistributedMetrics]] = {
    "every accumulator": every,
    "nan_policy ignore": ignoring,
    "one's own": own,
    "clu": of_clu,
    "clu before its first value": before_clu,
    "stacked windows": small,
}


def snapshot_of(case: str) -> Snapshot:
    """What today's code has for a case."""
    if case != "stacked windows":
        return MADE[case](X, 2 * X).compute()
    windows = [Snapshot.from_dict(MADE[case](x).compute().to_dict()) for x in (X, 2 * X, -X)]
    return jax.tree.map(lambda *words: np.stack(words), *windows)


def numbers_of(snapshot: Snapshot) -> dict[str, Any]:
    """All that one reads of a snapshot, as lists."""
    numbers: dict[str, Any] = {"flat": snapshot.flatten(empty="nan"), "count": dict(snapshot.count)}
    numbers["outside"] = {name: dict(kinds) for name, kinds in snapshot.outside.items() if kinds}
    if snapshot._plan.ignores:
        numbers["nonfinite"] = dict(snapshot.nonfinite)
    return jax.tree.map(lambda number: np.asarray(number, np.float64).tolist(), numbers)


def write() -> None:
    """Write the cases that the file does not have yet; the others stay as they were written."""
    kept = json.loads(PATH.read_text()) if PATH.exists() else {}
    for case in MADE:
        if case not in kept:
            snapshot = snapshot_of(case)
            saved = jax.tree.map(np.ndarray.tolist, snapshot.to_dict())
            kept[case] = {"saved": saved, "numbers": numbers_of(snapshot)}
    PATH.parent.mkdir(exist_ok=True)
    lines = (f"{json.dumps(case)}: {json.dumps(one, separators=(',', ':'))}" for case, one in kept.items())
    PATH.write_text("{\n" + ",\n".join(lines) + "\n}\n")
