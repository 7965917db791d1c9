"""Metrics for JAX and Flax training loops that cost almost nothing until you look at them."""

from distributed_metrics.accumulators import (
    Accumulator,
    Batch,
    Count,
    Histogram,
    Last,
    Max,
    Mean,
    Min,
    Quantile,
    Ratio,
    Std,
    Sum,
    Var,
)
from distributed_metrics.audit import assert_silent, collective_bytes, count_collectives
from distributed_metrics.data_parallel import DataParallel
from distributed_metrics.mesh import DeviceMeshManager
from distributed_metrics.metrics import DistributedMetrics
from distributed_metrics.periodic import PeriodicFlush
from distributed_metrics.reducers import (
    all_gather,
    collect_from_devices,
    reduce_custom,
    reduce_max,
    reduce_mean,
    reduce_min,
    reduce_sum,
)
from distributed_metrics.snapshot import Snapshot
from distributed_metrics.streaming import flush_every, wait_for_callbacks

__all__ = [
    "Accumulator",
    "Batch",
    "Count",
    "DataParallel",
    "DeviceMeshManager",
    "DistributedMetrics",
    "Histogram",
    "Last",
    "Max",
    "Mean",
    "Min",
    "PeriodicFlush",
    "Quantile",
    "Ratio",
    "Snapshot",
    "Std",
    "Sum",
    "Var",
    "all_gather",
    "assert_silent",
    "collect_from_devices",
    "collective_bytes",
    "count_collectives",
    "flush_every",
    "reduce_custom",
    "reduce_max",
    "reduce_mean",
    "reduce_min",
    "reduce_sum",
    "wait_for_callbacks",
]
__version__ = "0.1.0"
