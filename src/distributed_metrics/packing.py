"""Many small arrays <-> one flat buffer for each dtype, so that one collective or one copy serves them all."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array


def pack(arrays: Sequence[Array]) -> dict[np.dtype, Array]:
    """Concatenate the raveled arrays of each dtype, in order."""
    by_dtype: dict[np.dtype, list[Array]] = {}
    for array in arrays:
        by_dtype.setdefault(np.dtype(array.dtype), []).append(array.reshape(-1))
    return {dtype: jnp.concatenate(parts) for dtype, parts in by_dtype.items()}


def unpack(buffers: dict[np.dtype, Any], like: Sequence[Any]) -> list[Any]:
    """Undo ``pack``.

    Args:
        buffers: for each dtype the packed buffer, of shape ``(..., words)``; what precedes the last dim stays in front.
        like: arrays (or anything with ``shape`` and ``dtype``) as they were given to ``pack``.

    Returns:
        Arrays of shape ``(..., *shape)``.
    """
    used = dict.fromkeys(buffers, 0)
    arrays = []
    for one in like:
        dtype, size = np.dtype(one.dtype), int(np.prod(one.shape, dtype=np.int64))
        buffer = buffers[dtype]
        part = buffer[..., used[dtype] : used[dtype] + size]
        used[dtype] += size
        arrays.append(part.reshape(*buffer.shape[:-1], *one.shape))
    return arrays


def unpack_one(buffer: Any, like: Sequence[Any]) -> list[Any]:
    """``unpack`` for arrays of one dtype; the buffer's own dtype is kept (a mean of integers is a float)."""
    return unpack({np.dtype(like[0].dtype): buffer}, like)
