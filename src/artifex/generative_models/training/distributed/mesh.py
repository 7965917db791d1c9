"""``distributed_metrics.mesh`` under the specification's path."""

from distributed_metrics.mesh import DeviceMeshManager

__all__ = ["DeviceMeshManager"]
