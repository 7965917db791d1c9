"""What can be accumulated of a value, a family a file. ``BY_NAME`` is the one list of the names that a spec may use."""

from distributed_metrics.accumulators._base import Accumulator
from distributed_metrics.accumulators._batch import Batch
from distributed_metrics.accumulators.basic import Count, Max, Mean, Min, Ratio, Sum
from distributed_metrics.accumulators.clu_metric import CluMetric
from distributed_metrics.accumulators.histogram import Histogram
from distributed_metrics.accumulators.latest import Last
from distributed_metrics.accumulators.moments import Std, Var
from distributed_metrics.accumulators.quantile import Quantile

BY_NAME: dict[str, type[Accumulator]] = {
    "mean": Mean,
    "sum": Sum,
    "count": Count,
    "max": Max,
    "min": Min,
    "ratio": Ratio,
    "var": Var,
    "std": Std,
    "last": Last,
}

__all__ = [
    "BY_NAME",
    "Accumulator",
    "Batch",
    "CluMetric",
    "Count",
    "Histogram",
    "Last",
    "Max",
    "Mean",
    "Min",
    "Quantile",
    "Ratio",
    "Std",
    "Sum",
    "Var",
]
