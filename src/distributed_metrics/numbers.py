"""One value, or weight, as an array. What is no number is refused."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from distributed_metrics.compensated import host_pair
from distributed_metrics.placement import Value
from distributed_metrics.view import is_traced


@dataclass(frozen=True)
class HostNumber:
    """A number that was split on the host: its high and low words, float32 of shape (2,)."""

    words: jax.Array


def numbers_of(name: str, value: Any, what: str) -> tuple[Value, bool]:
    """The value as an array, and whether it was split into high and low words on the host.

    Raises:
        TypeError: it is no number, or a complex one.
    """
    if isinstance(value, HostNumber):
        return value.words, True
    if isinstance(value, nnx.Variable):
        value = value.get_value()
    if isinstance(value, jax.Array):
        if not (jnp.issubdtype(value.dtype, jnp.number) or value.dtype == jnp.bool_):
            raise _no_number(name, value, what)
        if not is_traced(value) and value.is_deleted():
            raise ValueError(
                f"metrics.update(): the {what} of {name!r} was deleted: donated to a jitted function, as a rule.\n"
                "  Update with it before, or return it from that function."
            )
        if jnp.issubdtype(value.dtype, jnp.complexfloating):
            raise _is_complex(name, value.dtype, what)
        return value, False
    if isinstance(value, bool | int | float | complex | np.ndarray | np.generic):
        array = np.asarray(value)
        if np.iscomplexobj(array):
            raise _is_complex(name, array.dtype, what)
        if array.dtype == np.bool_:
            return array, False
        if (array.dtype.kind in "iuf" and array.dtype.itemsize > 4) or (
            array.dtype == object and isinstance(value, int)
        ):
            try:
                return host_pair(array), True
            except OverflowError as error:
                raise ValueError(
                    f"metrics.update(): the {what} of {name!r} is an integer beyond every float: about "
                    f"2^{max(int(one).bit_length() for one in array.flat)}.\n  Sums hold up to 2^127."
                ) from error
        if jnp.issubdtype(array.dtype, jnp.number):
            return array, False
        raise _no_number(name, array, what)
    raise _no_number(name, value, what)


def _no_number(name: str, got: Any, what: str) -> TypeError:
    shown = f"an array of {got.dtype}" if isinstance(got, jax.Array | np.ndarray) else f"{_of(got)}{_shown(got)}"
    fix = "Give a scalar or an array of floats, integers or booleans"
    if isinstance(got, tuple) and len(got) == 2:
        fix = (
            'Of a sum and what it is divided by, the accumulator is "ratio"; a mean of values under a mask is '
            f"metrics.update({{{name!r}: values}}, weight=mask)."
        )
    elif isinstance(got, list | tuple):
        fix += "; of a list make one: jnp.asarray(...)."
    elif got is None:
        fix += ", or leave it out: metrics that are not named are left alone."
    elif isinstance(got, Mapping):
        fix += f"; for names below {name!r} the spec is a dict as well: DistributedMetrics({{{name!r}: {{...}}}})."
    else:
        fix += "."
    return TypeError(f"metrics.update(): the {what} of {name!r} is no number: {shown}.\n  {fix}")


def _shown(value: Any) -> str:
    if isinstance(value, tuple | list) and any(isinstance(one, jax.Array | np.ndarray) for one in value):
        return f" of arrays of the shapes {', '.join(str(np.shape(one)) for one in value)}"
    return f": {value!r:.80}"


def _of(value: Any) -> str:
    kind = type(value).__name__
    return f"{'an' if kind[0].lower() in 'aeiou' else 'a'} {kind}"


def _is_complex(name: str, dtype: Any, what: str) -> TypeError:
    return TypeError(
        f"metrics.update(): the {what} of {name!r} is complex ({dtype}), and complex numbers have no order to "
        "log them by.\n  Give its magnitude, jnp.abs(x), or its real part, x.real."
    )
