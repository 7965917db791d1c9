"""Meshes by name and size: a data-parallel one, a model-parallel one, both."""

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh


class DeviceMeshManager:
    """Makes meshes from a list of devices.

    The meshes have Auto axes. A mesh takes the first devices of the list, in its order, as many as it needs.

    Args:
        devices: the devices to make meshes from. Default: ``jax.devices()``.

    Raises:
        TypeError: ``devices`` is a number or a name.
        ValueError: it is empty.

    >>> manager = DeviceMeshManager()
    >>> mesh = manager.create_device_mesh({"data": 1, "model": 1})
    >>> manager.get_mesh_info(mesh)
    {'total_devices': 1, 'axes': {'data': 1, 'model': 1}}
    """

    def __init__(self, devices: Sequence[jax.Device] | None = None) -> None:
        if isinstance(devices, int | str):
            raise TypeError(
                f"DeviceMeshManager(devices={devices!r}): a list of devices.\n"
                "  For the first 8: DeviceMeshManager(jax.devices()[:8])"
            )
        self._devices = list(jax.devices() if devices is None else devices)
        if not self._devices:
            raise ValueError(
                "DeviceMeshManager(devices=[]): there are no devices to make a mesh from.\n"
                "  Leave devices out to use all of jax.devices()."
            )

    @property
    def num_devices(self) -> int:
        """How many devices there are to make meshes from."""
        return len(self._devices)

    @property
    def devices(self) -> list[jax.Device]:
        """The devices to make meshes from."""
        return list(self._devices)

    def create_device_mesh(
        self, shape: Mapping[str, int] | Sequence[tuple[str, int]], devices: Sequence[jax.Device] | None = None
    ) -> Mesh:
        """A mesh of any axes.

        Args:
            shape: names to sizes, as a dict or as a list of pairs; the last axis varies fastest over the devices.
            devices: the devices for this mesh. Default: those of the manager.

        Returns:
            The mesh, on the first devices if there are more than it needs.

        Raises:
            TypeError: a name that is no string, or a size that is no integer.
            ValueError: a name that is empty or there twice, a size below 1, or more devices needed than there are.

        >>> DeviceMeshManager().create_device_mesh([("data", 1), ("model", 1)]).axis_names
        ('data', 'model')
        """
        axes = _checked_axes(shape)
        available = self._devices if devices is None else list(devices)
        needed = int(np.prod(list(axes.values()), dtype=np.int64))
        if needed > len(available):
            shown = " x ".join(f"{name}: {size}" for name, size in axes.items())
            raise ValueError(
                f"Not enough devices: the mesh ({shown}) needs {needed} devices, and there are {len(available)}.\n"
                f"  Make it smaller, or give more devices. To try {needed} devices on a CPU, before JAX is imported:\n"
                f'  os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count={needed}"'
            )
        grid = np.array(available[:needed], dtype=object).reshape(tuple(axes.values()))
        return Mesh(grid, tuple(axes), axis_types=(AxisType.Auto,) * len(axes))

    def create_data_parallel_mesh(self, num_devices: int | None = None, axis_name: str = "data") -> Mesh:
        """A mesh of one axis over ``num_devices`` devices (default: all); errors as in ``create_device_mesh``."""
        return self.create_device_mesh([(axis_name, self.num_devices if num_devices is None else num_devices)])

    def create_model_parallel_mesh(self, num_devices: int | None = None, axis_name: str = "model") -> Mesh:
        """A mesh of one axis over ``num_devices`` devices (default: all); errors as in ``create_device_mesh``."""
        return self.create_device_mesh([(axis_name, self.num_devices if num_devices is None else num_devices)])

    def create_hybrid_mesh(
        self,
        data_parallel_size: int = 1,
        model_parallel_size: int = 1,
        data_axis: str = "data",
        model_axis: str = "model",
    ) -> Mesh:
        """A mesh of a data axis and a model axis; neighbouring devices share a model. Errors: ``create_device_mesh``.

        >>> DeviceMeshManager().create_hybrid_mesh(data_parallel_size=1, model_parallel_size=1).axis_names
        ('data', 'model')
        """
        return self.create_device_mesh([(data_axis, data_parallel_size), (model_axis, model_parallel_size)])

    def get_mesh_info(self, mesh: Mesh) -> dict[str, Any]:
        """``{"total_devices": how many devices, "axes": names to sizes}`` of a mesh."""
        return {"total_devices": mesh.size, "axes": dict(mesh.shape)}

    def __repr__(self) -> str:
        return f"DeviceMeshManager({self.num_devices} devices)"


def _checked_axes(shape: Any) -> dict[str, int]:
    """The axes that ``shape`` asks for.

    Raises:
        TypeError, ValueError: as in ``create_device_mesh``.
    """
    pairs = list(shape.items()) if isinstance(shape, Mapping) else shape
    is_pairs = isinstance(pairs, Sequence) and not isinstance(pairs, str)
    if not is_pairs or any(not isinstance(pair, tuple | list) or len(pair) != 2 for pair in pairs):
        raise TypeError(
            f"create_device_mesh() takes names to sizes, got {shape!r}.\n"
            '  For example: {"data": 4, "model": 2} or [("data", 4), ("model", 2)]'
        )
    if not pairs:
        raise ValueError(f'create_device_mesh({shape!r}): no axes.\n  For example: {{"data": 1}}')
    axes: dict[str, int] = {}
    for name, size in pairs:
        if not isinstance(name, str):
            raise TypeError(
                f"create_device_mesh(): the name of an axis must be a string, got {name!r} ({type(name).__name__}).\n"
                f"  For example: {{{str(name)!r}: {size!r}}}"
            )
        if not name:
            raise ValueError(
                f"create_device_mesh({shape!r}): the axis of size {size} has an empty name.\n"
                f'  For example: {{"data": {size}}}'
            )
        if name in axes:
            raise ValueError(
                f"create_device_mesh(): the axis {name!r} is there twice, with the sizes {axes[name]} and {size}.\n"
                "  Each axis needs a name of its own."
            )
        axes[name] = _checked_size(name, size)
    return axes


def _checked_size(name: str, size: Any) -> int:
    if isinstance(size, bool | np.bool_) or not hasattr(size, "__index__"):
        raise TypeError(
            f"create_device_mesh(): the size of the axis {name!r} must be an integer, got {size!r} "
            f"({type(size).__name__}).\n  For example: {{{name!r}: 4}}"
        )
    number = operator.index(size)
    if number < 1:
        raise ValueError(
            f"create_device_mesh(): the axis {name!r} has the size {number}; sizes are 1 or more.\n"
            "  For as many as there are: manager.num_devices"
        )
    return number
