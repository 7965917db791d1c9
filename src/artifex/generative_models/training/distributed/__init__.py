"""The specification's import path of ``distributed_metrics``: the same objects."""

from artifex.generative_models.training.distributed.data_parallel import DataParallel
from artifex.generative_models.training.distributed.mesh import DeviceMeshManager
from artifex.generative_models.training.distributed.metrics import DistributedMetrics

__all__ = ["DataParallel", "DeviceMeshManager", "DistributedMetrics"]
