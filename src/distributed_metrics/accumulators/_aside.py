"""Small programs of metrics that others wrote, which have nothing to do with the devices and settings around them."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np


def nowhere() -> Any:
    """A context without a mesh."""
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ()))


@contextlib.contextmanager
def aside() -> Iterator[None]:
    """What runs in here runs at once, also while something is traced, on a local CPU device, whatever mesh or guard is
    set. NaNs are no error: metrax divides by 0, and then selects."""
    try:
        device = jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # this process was started without the CPU backend
        device = jax.local_devices()[0]
    with (
        nowhere(),
        jax.ensure_compile_time_eval(),
        jax.default_device(device),
        jax.transfer_guard("allow"),
        jax.debug_nans(False),
        jax.debug_infs(False),
        np.errstate(all="ignore"),
    ):
        yield
