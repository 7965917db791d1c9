"""Two-float arithmetic: sums that do not drift, without float64.

A *pair* is a tuple ``(high, low)`` of float32 arrays of one shape; the number it stands for is their exact sum, and
``low`` is at most half a unit in the last place of ``high``, so that a pair carries about 48 bits. Accelerators have no
fast float64 and JAX turns float64 off by default; pairs are exact on every backend.

Two compilers would simplify ``(a + b) - a`` to ``b``: XLA where a is a constant (see ``_no_constant``), and LLVM where
fast math is asked for (``--xla_cpu_enable_fast_math=true``), for which every intermediate whose rounding matters passes
through ``_rounded``.

Sources: T. J. Dekker, "A floating-point technique for extending the available precision" (1971); D. E. Knuth, "The Art
of Computer Programming", vol. 2, 4.2.2 (the branch-free two-sum).
"""

import os
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

Pair = tuple[Array, Array]

MOST_TREE_ELEMENTS = 2**14
"""Above this many elements, runs of neighbours are summed in plain float32 first: reading them then is the whole cost.
"""

_LAST_OF_TREE = 2**6
"""From here on a tree costs more in operations than in additions, and one reduction sums the rest."""


def pair_of(value: Array) -> Pair:
    """The exact pair of a float array; of a float64 array the nearest pair (48 of its 53 bits).

    Args:
        value: a floating-point array of any shape.

    Returns:
        ``(high, low)``, float32 arrays of that shape.
    """
    high = value.astype(jnp.float32)
    if value.dtype != jnp.float64:
        return high, jnp.zeros_like(high)
    low = (value - high.astype(jnp.float64)).astype(jnp.float32)
    return high, jnp.where(jnp.isfinite(high), low, 0)


def host_pair(value: float | np.ndarray) -> np.ndarray:
    """Split float64 or 64-bit integers on the host, where float64 is free.

    Args:
        value: a Python number or a NumPy array of shape S.

    Returns:
        A float32 array of shape ``(*S, 2)``: high and low words.

    >>> high, low = host_pair(0.1)
    >>> float(high) + float(low) - 0.1 < 1e-16
    True
    """
    value = np.asarray(value)
    # A 64-bit integer has more bits than a float64: take off the high word in integers.
    exact = value.astype(np.float64) if value.dtype.kind == "f" else value.astype(object)
    with np.errstate(over="ignore", invalid="ignore"):
        high = np.asarray(value, np.float64).astype(np.float32)
        whole = high.astype(np.float64) if value.dtype.kind == "f" else _integers(high)
        low = np.where(np.isfinite(high), np.asarray(exact - whole, np.float64), 0.0).astype(np.float32)
    return np.stack([high, low], axis=-1)


def _integers(high: np.ndarray) -> np.ndarray:
    """Python integers, of any size; 0 for what a float32 cannot hold."""
    whole = np.frompyfunc(lambda number: int(number) if np.isfinite(number) else 0, 1, 1)
    return np.asarray(whole(high), object)


def _rounded(x: Array) -> Array:
    """``x``, of which what is computed from it uses the rounded value, also where a compiler may reassociate."""
    return opaque(x) if _fast_math() else x


def opaque(x: Array) -> Array:
    """``x`` through a choice that changes the payload of some NaNs only: not free, and no compiler looks through it.

    For products and quotients whose rounded value is used more than once. Also without fast math, LLVM may contract a
    product and a sum to one operation (XLA makes a product of a division by a constant), and the next use of the
    product then sees another number. (The choice looks at the magnitude, because LLVM sees through a plain minimum of
    the bits of a number whose sign it knows.)
    """
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    odd_nan = (bits & jnp.uint32(0x7FFFFFFF)) > jnp.uint32(0x7FFFFFF0)
    return lax.bitcast_convert_type(lax.select(odd_nan, jnp.full_like(bits, 0x7FC00000), bits), jnp.float32)


def _fast_math() -> bool:
    flags = dict(flag.partition("=")[::2] for flag in os.environ.get("XLA_FLAGS", "").split())
    return flags.get("--xla_cpu_enable_fast_math", "false").lower() not in ("false", "0")


def two_sum(a: Array, b: Array) -> Pair:
    """``a + b`` exactly, as the rounded sum and its rounding error (Knuth). An infinite sum has error 0."""
    total = _rounded(a + b)
    finite = jnp.isfinite(total)
    a = _no_constant(a, finite, total)
    b_part = _rounded(total - a)
    a_part = _rounded(total - b_part)
    error = _rounded(_rounded(a - a_part) + _rounded(b - b_part))
    return total, jnp.where(finite, error, 0)


def _no_constant(x: Array, finite: Array, instead: Array) -> Array:
    """``x``, in a way that XLA does not see it where it is a constant.

    It would simplify ``(x + y) - x`` of a constant x to ``y`` (up to jax 0.11). An ``optimization_barrier`` keeps it
    from that as well, but since jax 0.11 each ends a kernel: an update of 20 means had 46 of them instead of 5.
    """
    return jnp.where(finite, x, instead)


def add(x: Pair, y: Pair) -> Pair:
    """The sum of two pairs, to about 2^-47 relative (Dekker's add2)."""
    high, error = two_sum(x[0], y[0])
    return _normalized(high, _rounded(error + _rounded(x[1] + y[1])))


def multiply(x: Pair, y: Pair) -> Pair:
    """The product of two pairs, to about 2^-46 relative.

    The factors are cut into 12-bit halves by masking bits, not by Veltkamp's multiplication. The products of halves are
    exact, so that a compiler which contracts a product and a sum changes nothing.
    """
    x_top, y_top = _top_half(x[0]), _top_half(y[0])
    x_rest, y_rest = _rounded(x[0] - x_top), _rounded(y[0] - y_top)
    high, error = two_sum(x_top * y_top, x_top * y_rest)
    high, more = two_sum(high, x_rest * y_top)
    low = _rounded(_rounded(error + more) + x_rest * y_rest)
    low = _rounded(low + _rounded(_rounded(x[0] * y[1]) + _rounded(x[1] * y[0])))
    high, low = _normalized(high, low)
    whole = x[0] * y[0]  # infinite, or NaN, as float arithmetic has it
    return jnp.where(jnp.isfinite(whole), high, whole), jnp.where(jnp.isfinite(whole), low, 0)


def divide(x: Pair, y: Pair) -> Pair:
    """The quotient of two pairs, to about 2^-45 relative: a float quotient, corrected by what it leaves over."""
    quotient = opaque(x[0] / y[0])
    product = multiply((quotient, jnp.zeros_like(quotient)), y)
    rest = add(x, (-product[0], -product[1]))
    return _normalized(quotient, opaque(rest[0] / y[0]))


def _normalized(high: Array, low: Array) -> Pair:
    """A sum of two floats of which the first is the larger, as a pair (Dekker's fast two-sum)."""
    total = _rounded(high + low)
    finite = jnp.isfinite(total)
    rest = _rounded(low - _rounded(total - _no_constant(high, finite, total)))
    return total, jnp.where(finite, rest, 0)


def _top_half(x: Array) -> Array:
    bits = lax.bitcast_convert_type(x, jnp.uint32) & jnp.uint32(0xFFFFF000)
    return lax.bitcast_convert_type(bits, jnp.float32)


def fold(
    combine: Callable[[tuple[Array, ...], tuple[Array, ...]], tuple[Array, ...]],
    parts: Sequence[Array],
    identity: Sequence[float],
) -> tuple[Array, ...]:
    """Combine the entries along the first dim, halving it each time: few operations, and short chains of rounding.

    Args:
        combine: takes and returns tuples of arrays; works element by element.
        parts: arrays of shape ``(n, ...)``, n >= 1.
        identity: for each part, the number that leaves the others as they are.

    Returns:
        Arrays of shape ``(...)``.
    """
    parts = tuple(parts)
    while (n := parts[0].shape[0]) > 1:
        half = (n + 1) // 2
        if n % 2:
            parts = tuple(_append(part, one) for part, one in zip(parts, identity, strict=True))
        parts = combine(tuple(part[:half] for part in parts), tuple(part[half:] for part in parts))
    return tuple(part[0] for part in parts)


def _append(part: Array, number: float) -> Array:
    return jnp.concatenate([part, jnp.full((1, *part.shape[1:]), number, part.dtype)])


def tree_sum(x: Pair, dims: int) -> Pair:
    """The sum over the first ``dims`` dims: to about 2^-47 on CUDA devices; elsewhere so up to 16,384 elements.

    Beyond these to about 1e-8 there (1e-7 where the rounding errors of all runs are alike: equal numbers, or a few that
    take turns).
    """
    if dims == 0:
        return x
    high, low = (part.reshape(-1, *part.shape[dims:]) for part in x)
    total = lax.platform_dependent(high, low, cuda=_one_reduction, default=_tree)
    # XLA may compute a small sum anew, in another order, in each kernel that uses it: these use one and the same.
    return lax.optimization_barrier(total)


def _one_reduction(high: Array, low: Array) -> Pair:
    """On a GPU, which waits for memory, about as fast as ``jnp.sum``; on CPUs XLA would not vectorize it."""
    zero = np.float32(0)
    return lax.reduce((high, low), (zero, zero), lambda a, b: add((a[0], a[1]), (b[0], b[1])), (0,))


def _tree(high: Array, low: Array) -> Pair:
    """Halves are added up, as vectors."""
    if high.shape[0] > MOST_TREE_ELEMENTS:
        high, low = _runs(high), _runs(low)
    while (n := high.shape[0]) > _LAST_OF_TREE:
        half = (n + 1) // 2
        if n % 2:
            high, low = _append(high, 0.0), _append(low, 0.0)
        high, low = add((high[:half], low[:half]), (high[half:], low[half:]))
    return _one_reduction(high, low)


def _runs(part: Array) -> Array:
    """Sum about 256 runs of neighbours in plain float32, each as fast, and rounded as little, as XLA does it.

    A number of runs that divides the number of elements spares the copy that padding would cost, half of the time.
    """
    n = part.shape[0]
    divisors = [runs for runs in range(128, 513) if n % runs == 0]
    runs = min(divisors, key=lambda runs: max(runs / 256, 256 / runs), default=256)
    if n % runs:
        part = jnp.concatenate([part, jnp.zeros((-n % runs, *part.shape[1:]), part.dtype)])
    return jnp.sum(part.reshape(runs, -1, *part.shape[1:]), axis=1)


def plain_sum(x: Pair, dims: int) -> Pair:
    """The sum over the first ``dims`` dims in float32, in whatever order XLA likes.

    For values whose sharding is not known here: a tree of slices would move their elements between devices.
    """
    axes = tuple(range(dims))
    return _normalized(jnp.sum(x[0], axes), jnp.sum(x[1], axes))


def integer_sum(x: Array, dims: int) -> Pair:
    """The exact sum of integers or booleans over the first ``dims`` dims (exact while below 2^47).

    The bits are cut into pieces so narrow that no int32 sum of them can overflow; such sums are exact in any order.
    """
    axes = tuple(range(dims))
    elements = int(np.prod(x.shape[:dims], dtype=np.int64))
    if x.dtype == jnp.bool_:
        x, bits = x.astype(jnp.int32), 1
    else:
        bits = jnp.iinfo(x.dtype).bits
        if bits < 32:
            x = x.astype(jnp.int32)
        elif x.dtype == jnp.int64:  # the middle bits of small negative numbers are large: keep them from cancelling
            high, low = integer_sum(jnp.maximum(-x, 0).astype(jnp.uint64), dims)
            return add(integer_sum(jnp.maximum(x, 0).astype(jnp.uint64), dims), (-high, -low))
    width = max(1, 31 - max(elements - 1, 0).bit_length())
    total: Pair | None = None
    for start in range(0, bits, width):
        piece = x >> start
        if start + width < bits:
            piece = piece & ((1 << width) - 1)
        part = _scaled(jnp.sum(piece.astype(jnp.int32), axes, dtype=jnp.int32), 2.0**start)
        total = part if total is None else add(total, part)
    assert total is not None  # every integer dtype has bits
    return total


def _scaled(x: Array, power_of_two: float) -> Pair:
    """An int32 array times a power of two, exactly."""
    top = x & ~jnp.int32(0xFFF)
    high, low = top.astype(jnp.float32), (x - top).astype(jnp.float32)
    return _normalized(high * jnp.float32(power_of_two), low * jnp.float32(power_of_two))


def binned_sum(weight: Array | Pair | None, bins: Array, number: int) -> Pair:
    """The sum of the weights in each bin, exactly: every weight is cut into pieces whose int32 sums cannot overflow.

    Args:
        weight: of the shape of ``bins``: booleans, a pair, or None, where each counts once.
        bins: int32, from 0 to ``number`` - 1.
        number: of bins.

    Returns:
        A pair of shape ``(number,)``. Weights that are no integers keep what is above 2^-48 of the largest of them.
    """

    def scattered(pieces: Array) -> Array:
        return jnp.zeros(number, jnp.int32).at[bins].add(pieces, mode="promise_in_bounds")

    if not isinstance(weight, tuple):
        pieces = jnp.ones(bins.shape, jnp.int32) if weight is None else weight.astype(jnp.int32)
        return integer_pair(scattered(pieces))
    finite = jnp.isfinite(weight[0])
    high, low = (jnp.where(finite, part, 0) for part in weight)
    largest = jnp.max(jnp.abs(high), initial=jnp.finfo(jnp.float32).tiny)
    unit = lax.bitcast_convert_type(
        lax.bitcast_convert_type(largest, jnp.uint32) & jnp.uint32(0x7F800000), jnp.float32
    )  # the power of two below the largest
    high, low = high / unit, low / unit
    width = max(1, 29 - bins.size.bit_length())
    total = jnp.zeros(number, jnp.float32), jnp.zeros(number, jnp.float32)
    for piece in range(-(-48 // width)):
        scale = 2.0 ** (width * (piece + 1))
        whole = jnp.trunc(high * scale)
        high, low = _normalized(high - whole / scale, low)
        total = add(total, _scaled(scattered(whole.astype(jnp.int32)), 1 / scale))
    return total[0] * jnp.where(jnp.all(finite), unit, jnp.nan), total[1] * unit


def integer_pair(x: Array) -> Pair:
    """Each integer or boolean as a pair: exact below 2^47."""
    return integer_sum(x, 0)


def constant(number: float) -> Pair:
    """A number that is known while tracing, as a pair of scalars."""
    high, low = host_pair(number)
    return jnp.float32(high), jnp.float32(low)


def is_integer(x: Array | jax.ShapeDtypeStruct) -> bool:
    """Whether a sum of such values is exact: integers and booleans."""
    return x.dtype == jnp.bool_ or jnp.issubdtype(x.dtype, jnp.integer)
