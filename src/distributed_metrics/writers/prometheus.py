"""The latest numbers over HTTP, for Prometheus and with it Grafana."""

import re
from collections.abc import Mapping
from typing import Any

from distributed_metrics.writers._protocol import printable, require

_ILLEGAL = re.compile(r"[^a-zA-Z0-9_:]")
_MOST_ALIKE = 1000


class PrometheusWriter:
    """Serves the latest value of each metric, as a gauge, and the step as the gauge ``training_step``.

    Characters that Prometheus does not allow in a name become "_": "train/loss" is ``train_loss``. Where that, or what
    the registry holds already, makes a name that is taken, the later one gets a number: ``train_loss_2``. The help text
    of a gauge is the name as it was.

    Whoever reaches the port reads the metrics: there is no password and no encryption. So it is open to this machine
    only, unless ``addr`` says otherwise: "0.0.0.0" lets in all who can reach the machine.

    Args:
        port: the port; 0 takes a free one.
        addr: the address to listen on.
        registry: a ``prometheus_client.CollectorRegistry``; by default one that holds these metrics only.

    Attributes:
        port: the port, also where 0 was given.
        url: where to read.

    Raises:
        ImportError: prometheus_client is missing.
        OSError: the port is taken.

    >>> writer = PrometheusWriter(port=9400)  # doctest: +SKIP
    >>> writer.write_scalars(100, {"train/loss": 0.5})  # doctest: +SKIP
    >>> urllib.request.urlopen("http://127.0.0.1:9400/metrics").read()  # doctest: +SKIP
    b'... train_loss 0.5 ... training_step 100.0 ...'
    """

    def __init__(self, port: int = 0, addr: str = "127.0.0.1", registry: Any = None):
        self._library = require("prometheus_client", type(self).__name__)
        self._registry = self._library.CollectorRegistry() if registry is None else registry
        self._gauges: dict[str, Any] = {}
        self._server, self._thread = self._library.start_http_server(port, addr=addr, registry=self._registry)
        self._step = self._gauge("training_step", "the step of the latest write")
        self._closed = False
        self.port: int = self._server.server_port
        self.url = f"http://{f'[{addr}]' if ':' in addr else addr}:{self.port}/metrics"

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Serve the values of one step from now on.

        Raises:
            RuntimeError: the writer is closed.
        """
        if self._closed:
            raise RuntimeError("PrometheusWriter is closed. To serve on: writer = PrometheusWriter(port)")
        if not scalars:
            return
        for name, value in scalars.items():
            if name not in self._gauges:
                self._gauges[name] = self._gauge(name, printable(name))
            self._gauges[name].set(value)
        self._step.set(step)

    def _gauge(self, name: str, description: str) -> Any:
        legal = _ILLEGAL.sub("_", name) or "_"
        legal = f"_{legal}" if legal[0].isdigit() else legal
        for number in range(1, _MOST_ALIKE):
            try:
                return self._library.Gauge(
                    legal if number == 1 else f"{legal}_{number}", description, registry=self._registry
                )
            except ValueError as error:  # the registry has one of this name
                taken = error
        raise taken

    def flush(self) -> None:
        """Nothing: every value is served from when it is written."""

    def close(self) -> None:
        """Stop the server, for good, and take the gauges out of the registry."""
        if self._closed:
            return
        self._closed = True
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        for gauge in (self._step, *self._gauges.values()):
            self._registry.unregister(gauge)
