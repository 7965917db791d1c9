"""Where numbers go, a sink a file. A writer's library is imported when the writer is made, not before."""

from distributed_metrics.writers._protocol import BinnedWriter, MetricWriter, as_writer
from distributed_metrics.writers.console import ConsoleWriter
from distributed_metrics.writers.json_lines import JsonLinesWriter
from distributed_metrics.writers.memory import MemoryWriter
from distributed_metrics.writers.prometheus import PrometheusWriter
from distributed_metrics.writers.tensorboard import TensorBoardWriter

__all__ = [
    "BinnedWriter",
    "ConsoleWriter",
    "JsonLinesWriter",
    "MemoryWriter",
    "MetricWriter",
    "PrometheusWriter",
    "TensorBoardWriter",
    "as_writer",
]
