"""``distributed_metrics.data_parallel`` under the specification's path."""

from distributed_metrics.data_parallel import DataParallel

__all__ = ["DataParallel"]
