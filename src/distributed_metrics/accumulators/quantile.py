"""Streaming quantiles with a bounded relative error, in fixed memory.

Every float is counted in a bucket, and the buckets are so narrow that the middle of one is near enough to all that it
holds. As in DDSketch, the sketch of two sets of data is the sum of theirs, exactly. Its buckets are not powers of a
base, though, but equal parts of each octave, so that a float's bucket follows from its bits, without a logarithm.

Sources: C. Masson, J. E. Rim, H. K. Lee, "DDSketch: a fast and fully-mergeable quantile sketch with relative-error
guarantees" (2019); G. Tene, "HdrHistogram", for the linear buckets.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from distributed_metrics.accumulators._base import Accumulator, as_numbers
from distributed_metrics.accumulators._batch import Batch
from distributed_metrics.merging import BINS

_OCTAVES = 255  # exponents of finite floats, the subnormal ones included


@dataclass(frozen=True)
class Quantile(Accumulator):
    """Quantiles to a relative error, of any number of values of any size and sign. Empty: NaN, as with a NaN seen.

    The result is within ``relative_error`` of ``numpy.quantile(x, q, method="lower")``. Zeros are exact, infinite
    values are infinite; values nearer to 0 than 1.2e-38 count as 0. Whole weights count as repetitions;
    with others the result is the first value at which the share q of the weight is reached, NumPy's "inverted_cdf".
    One row takes 8 bytes for each of ``510 * ceil((1 / relative_error - 1) / 2) + 2`` buckets: 204 kB at 0.01.

    Args:
        q: what part of the values lies below: a number from 0 to 1, or several.
        relative_error: of the results, from 0.001 to 0.5.
        shape, name, labels: see ``Accumulator``; results have the shape S for one q, ``(*S, len(q))`` for several.

    Raises:
        TypeError, ValueError: a q or a relative error that is no number, or out of its range.

    >>> from distributed_metrics import DistributedMetrics
    >>> metrics = DistributedMetrics({"ms": Quantile((0.5, 0.99), labels=("p50", "p99"))})
    >>> metrics.update(ms=jnp.arange(1.0, 1001.0))
    >>> {name: round(ms) for name, ms in metrics.compute().flatten().items()}
    {'ms/p50': 499, 'ms/p99': 988}
    """

    fields = {"buckets": BINS}

    q: Any
    relative_error: float = 0.01
    shape: Any = field(default=(), kw_only=True)

    def __post_init__(self) -> None:
        q = as_numbers("Quantile(q", self.q)
        if q.ndim > 1 or not q.size or not ((q >= 0) & (q <= 1)).all():
            raise ValueError(f"Quantile(q={self.q!r}): q is a number from 0 to 1, or several: (0.5, 0.99).")
        if not 0.001 <= as_numbers("Quantile(relative_error", self.relative_error) <= 0.5:
            raise ValueError(f"Quantile(relative_error={self.relative_error!r}): it may be from 0.001 to 0.5.")
        object.__setattr__(self, "q", tuple(q.tolist()) if q.ndim else q.item())
        object.__setattr__(self, "relative_error", float(self.relative_error))
        super().__post_init__()

    @property
    def _parts(self) -> int:
        """Into how many buckets an octave is cut: the middle of one of n is within 1 / (2n + 1) of what it holds."""
        return math.ceil((1 / self.relative_error - 1) / 2)

    @property
    def _zero(self) -> int:
        """The bucket of 0. That of infinity is as far from it as there are buckets of positive numbers."""
        return _OCTAVES * self._parts

    def field_shape(self, field: str) -> tuple[int, ...]:
        return (*self.shape, 2 * self._zero + 2) if field == "buckets" else self.shape

    def result_shape(self) -> tuple[int, ...]:
        return (*self.shape, len(self.q)) if isinstance(self.q, tuple) else self.shape

    def contribution(self, batch: Batch) -> dict[str, Any]:
        return {"buckets": batch.tally(self._bucket(batch.elements), 2 * self._zero + 2)}

    def _bucket(self, x: Array) -> Array:
        bits = lax.bitcast_convert_type(x, jnp.uint32)
        exponent, mantissa = (bits >> 23) & 0xFF, bits & 0x7FFFFF
        distance = exponent * jnp.uint32(self._parts) + ((mantissa * jnp.uint32(self._parts)) >> 23)
        signed = jnp.where(bits >> 31, -distance.astype(jnp.int32), distance.astype(jnp.int32))
        return jnp.where(jnp.isnan(x), 2 * self._zero + 1, self._zero + signed)

    def _middles(self) -> np.ndarray:
        """The value of each bucket: of [low, high) the one that is as far from both, relatively."""
        edges = np.arange(self._zero + 1)
        exponent, part = np.divmod(edges, self._parts)
        # The first octave is that of the subnormal numbers, as wide as the next.
        share = np.where(exponent == 0, part / self._parts, 1 + part / self._parts)
        edges = np.ldexp(share, np.maximum(exponent, 1) - 127)
        low, high = edges[:-1], edges[1:]
        above = np.append(2 * low * high / (low + high), np.inf)
        return np.concatenate([-above[:0:-1], above])

    def result(self, xp: Any, weight: Any, buckets: Any) -> Any:
        shares = xp.asarray(self.q, weight.dtype)
        finite = buckets[..., :-1]
        whole = xp.all(finite == xp.floor(finite), axis=-1)[..., None]
        reached = xp.cumsum(finite, axis=-1)[..., None, :]
        total = reached[..., -1]  # as rounded here, so that the largest value reaches it
        rank = xp.floor(shares.reshape(-1) * (total - 1))[..., None]
        share = (shares.reshape(-1) * total)[..., None]
        passed = xp.where(whole[..., None], reached > xp.maximum(rank, 0), reached >= share)
        # A float32 sum up to here may round to more than that up to the bucket before, also where nothing was counted.
        passed = passed & (finite > 0)[..., None, :]
        last = finite.shape[-1] - 1 - xp.argmax(finite[..., ::-1] > 0, axis=-1)[..., None]
        bucket = xp.where(xp.any(passed, axis=-1), xp.argmax(passed, axis=-1), last)
        results = xp.asarray(self._middles(), weight.dtype)[bucket]
        results = xp.where(buckets[..., -1:] != 0, float("nan"), results)
        return results if isinstance(self.q, tuple) else results[..., 0]

    def __str__(self) -> str:
        return f"{super().__str__()} {self.q} to {self.relative_error:.2g}"
