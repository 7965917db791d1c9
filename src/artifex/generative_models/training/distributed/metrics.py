"""``distributed_metrics.metrics`` under the specification's path."""

from distributed_metrics.metrics import DistributedMetrics

__all__ = ["DistributedMetrics"]
