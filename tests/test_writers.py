"""Writers: what each wrote is read back by the reader of its own ecosystem."""

import io
import json
import logging
import math
import signal
import subprocess
import sys
import time
import urllib.request

import jax
import numpy as np
import pytest
from prometheus_client import CollectorRegistry, Gauge
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics_families
from prometheus_client.parser import text_string_to_metric_families

from distributed_metrics import writers
from distributed_metrics.writers import (
    ConsoleWriter,
    JsonLinesWriter,
    MemoryWriter,
    MetricWriter,
    PrometheusWriter,
    TensorBoardWriter,
    as_writer,
)

pytestmark = pytest.mark.slow  # writers never see an array of JAX: one version of it is enough
NAN, INF = float("nan"), float("inf")
HOSTILE = [
    "../../x", "/etc/x", "a\nb", "a\r\u2028b", 'x{y="z"} 1', "[red]x", "[/]", ":smile:", "step", "time", "metrics/step",
    "training_step", "", "\x1b[2J", "$\\bad$", "_hidden", "ü", "\ud800", "1/2", "a b", "a_b", "x" * 5000,
]  # fmt: skip
VALUES = {name: float(i) for i, name in enumerate(HOSTILE)}


@pytest.fixture
def make(tmp_path):
    """Makes a writer of each kind, and closes it."""
    made = []

    def make(kind):
        arguments = {TensorBoardWriter: [tmp_path / "a/b"], JsonLinesWriter: [tmp_path / "a/b/metrics.jsonl"]}
        made.append(kind(*arguments.get(kind, [])))
        return made[-1]

    yield make
    for writer in made:
        writer.close()


ALL = [TensorBoardWriter, JsonLinesWriter, ConsoleWriter, MemoryWriter, PrometheusWriter]


@pytest.mark.parametrize("kind", ALL)
def test_every_writer_keeps_the_protocol(kind, make, tmp_path, caplog):
    writer = make(kind)
    assert isinstance(writer, MetricWriter)
    assert as_writer(writer) is writer
    writer.flush()
    writer.write_scalars(1, {})
    assert not list(tmp_path.rglob("*")), "nothing was written yet"
    with caplog.at_level(logging.INFO):
        writer.write_scalars(2, VALUES | {"nan": NAN, "inf": INF, "-inf": -INF})
    writer.flush()
    writer.close()
    writer.close()
    writer.flush()
    assert not caplog.records
    inside = {path for path in tmp_path.rglob("*") if path.is_file()}
    assert all(path.parent == tmp_path / "a/b" for path in inside), "a name reached a path"
    assert not (tmp_path.parent / "x").exists()


@pytest.mark.parametrize(
    ("kind", "module"),
    [
        (TensorBoardWriter, "tensorboardX"), (ConsoleWriter, "rich.text"), (PrometheusWriter, "prometheus_client"),
    ],
)  # fmt: skip
def test_a_missing_library_is_an_error_that_names_the_extra(kind, module, make, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    message = rf"{kind.__name__} needs {module.split('.')[0]}: pip install 'distributed-metrics\[writers\]'"
    with pytest.raises(ImportError, match=message):
        make(kind)


def test_a_missing_matplotlib_is_an_error_of_plot_only(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    writer = MemoryWriter()
    writer.write_scalars(1, {"a": 1.0})
    with pytest.raises(ImportError, match=r"MemoryWriter.plot\(\) needs matplotlib: pip install"):
        writer.plot(tmp_path / "a.png")


def test_importing_the_writers_imports_no_library():
    program = (
        "import sys, flax, clu.metrics\n"  # flax imports rich
        "before = set(sys.modules)\n"
        "import distributed_metrics.writers\n"
        "libraries = {'tensorboardX', 'rich', 'prometheus_client', 'matplotlib', 'wandb'}\n"
        "print(sorted(m for m in set(sys.modules) - before if m.partition('.')[0] in libraries))"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert run.stdout.strip() == "[]"


# TensorBoard


def _read_events(logdir):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(logdir), size_guidance={"scalars": 0, "histograms": 0}).Reload()


def test_tensorboard_reads_each_name_as_a_tag_of_its_own(tmp_path):
    writer = TensorBoardWriter(tmp_path)
    for step in (1, 2):
        writer.write_scalars(step, VALUES)
    writer.flush()  # and not close: flush is enough
    events = _read_events(tmp_path)
    tags = {name.encode("utf-8", "backslashreplace").decode(): name for name in HOSTILE}
    assert set(events.Tags()["scalars"]) == set(tags)
    for tag, name in tags.items():
        assert [(event.step, event.value) for event in events.Scalars(tag)] == [(1, VALUES[name]), (2, VALUES[name])]
    writer.close()


def test_tensorboard_keeps_nan_and_infinities_and_what_comes_after_close(tmp_path):
    writer = TensorBoardWriter(tmp_path)
    for step, value in enumerate((NAN, INF, -INF, 1e300)):
        writer.write_scalars(step, {"a": value})
        writer.close()
    assert len(list(tmp_path.iterdir())) == 4, "files of one second overwrite each other"
    events = _read_events(tmp_path).Scalars("a")
    assert [event.step for event in events] == [0, 1, 2, 3]
    np.testing.assert_array_equal([event.value for event in events], [NAN, INF, -INF, INF])


def test_tensorboard_shows_what_was_written_at_the_first_write_after_five_seconds(tmp_path, monkeypatch):
    now = time.monotonic()
    writer = TensorBoardWriter(tmp_path)
    for step, seconds in enumerate((0, 4, 6)):
        monkeypatch.setattr(time, "monotonic", lambda seconds=seconds: now + seconds)
        writer.write_scalars(step, {"a": 1.0})
        assert ("a" in _read_events(tmp_path).Tags()["scalars"]) == (seconds > 5)
    writer.close()


def test_tensorboard_has_everything_without_close_at_the_end_of_the_interpreter(tmp_path):
    program = (
        "import threading, time\n"
        "from distributed_metrics.writers import TensorBoardWriter\n"
        "def write():\n"
        f"    writer = TensorBoardWriter({str(tmp_path)!r})\n"
        "    for step in range(100):\n"
        "        writer.write_scalars(step, {'a': 1.0})\n"
        "    done.set()\n"
        "    time.sleep(1000)\n"
        "done = threading.Event()\n"
        "threading.Thread(target=write, daemon=True).start()\n"
        "done.wait(60)\n"
    )
    subprocess.run([sys.executable, "-c", program], timeout=120, check=True)
    assert len(_read_events(tmp_path).Scalars("a")) == 100


@pytest.mark.parametrize(
    ("edges", "counts", "expected"),
    [
        # (min, max, num, sum, sum of squares), limits
        ([0, 1, 2, 4], [1, 0, 2], ((0, 4, 3, 6.5, 18.25), [1, 2, 4])),
        ([0, 1, 2, 4], [0, 3, 0], ((1, 2, 3, 4.5, 6.75), [1, 2, 4])),
        ([-INF, 0, 2, INF], [1, 1, 1], ((-2, 4, 3, 3, 11), [0, 2, 4])),
        ([-INF, 5], [2], ((4, 5, 2, 9, 40.5), [5])),
        ([-INF, INF], [2], ((-1, 1, 2, 0, 0), [1])),
    ],
)
def test_tensorboard_reads_histograms(tmp_path, edges, counts, expected):
    writer = TensorBoardWriter(tmp_path)
    binned = (np.array(counts, float), np.array(edges, float))
    writer.write_binned(7, {"../h": binned, "empty": (np.zeros(2), np.arange(3.0))})
    writer.write_binned(8, {"empty": (np.zeros(2), np.arange(3.0))})
    writer.close()
    events = _read_events(tmp_path)
    assert events.Tags()["histograms"] == ["../h"]
    (event,) = events.Histograms("../h")
    read = event.histogram_value
    assert event.step == 7
    assert ((read.min, read.max, read.num, read.sum, read.sum_squares), list(read.bucket_limit)) == expected
    assert list(read.bucket) == counts


# JSON lines


def _read_lines(path):
    def bare(constant):
        raise AssertionError(f"{constant} is not JSON")

    data = path.read_bytes()
    assert data.endswith(b"\n")
    return [json.loads(line, parse_constant=bare) for line in data.decode("ascii").splitlines()]


def test_json_lines_lose_nothing(tmp_path):
    path = tmp_path / "runs/1/metrics.jsonl"
    writer = JsonLinesWriter(path)
    writer.write_scalars(3, VALUES)
    writer.close()
    writer.write_scalars(4, {"a": NAN, "b": INF, "c": -INF, "d": 0.1})
    writer.write_scalars(5, {"metrics/step": 1.0, "metrics/metrics/step": 2.0})
    first, second, third = _read_lines(path)
    writer.close()
    moved = {"step": "metrics/step", "time": "metrics/time", "metrics/step": "metrics/metrics/step"}
    assert first.pop("step") == 3
    assert 1e9 < first.pop("time") < 1e11
    assert first == {moved.get(name, name): value for name, value in VALUES.items()}
    assert second == {"step": 4, "time": second["time"], "a": None, "b": None, "c": None, "d": 0.1}
    assert (third["metrics/metrics/step"], third["metrics/metrics/metrics/step"]) == (1.0, 2.0)


@pytest.mark.parametrize("before", [b"", b'{"step": 1}\n', b'{"step": 1, "long": "' + b"x" * 200_000 + b'"}\n'])
def test_json_lines_continue_a_file_that_ends_anywhere(tmp_path, before):
    path = tmp_path / "metrics.jsonl"
    last = b'{"step": 2, "time": 0.0, "a/}": 1.5, "b": null}\n'
    for end in range(len(last) + 1):
        path.write_bytes(before + last[:end])
        writer = JsonLinesWriter(path)
        writer.write_scalars(9, {"a": 1.0})
        writer.close()
        whole = end >= len(last) - 1  # all of it, or all but the line break
        assert path.read_bytes().startswith(before + last * whole)
        steps = [line["step"] for line in _read_lines(path)]
        assert steps == [1] * bool(before) + [2] * whole + [9], f"cut after {end} bytes"


def test_json_lines_survive_a_killed_process(tmp_path):
    path = tmp_path / "metrics.jsonl"
    program = (
        "import itertools, sys\n"
        "from distributed_metrics.writers import JsonLinesWriter\n"
        f"writer = JsonLinesWriter({str(path)!r})\n"
        "for step in itertools.count():\n"
        "    writer.write_scalars(step, {f'metric {i}': i + 0.5 for i in range(500)})\n"
        "    print(step, flush=True)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if int(line) >= 50:
                process.send_signal(signal.SIGKILL)
                break
        process.stdout.read()
        process.wait(timeout=60)
    writer = JsonLinesWriter(path)
    writer.write_scalars(-1, {"a": 1.0})
    writer.close()
    steps = [line["step"] for line in _read_lines(path)]
    assert len(steps) > 51, "a line that was written is there"
    assert steps == [*range(len(steps) - 1), -1]


# Console


def _printed(scalars, step=100):
    from rich.console import Console

    file = io.StringIO()
    ConsoleWriter(Console(file=file, width=40)).write_scalars(step, scalars)
    return file.getvalue()


def test_console_prints_a_line_per_write(capsys):
    scalars = {"loss": 0.123412, "accuracy": 97.1, "n": 1e9, "nan": NAN, "-inf": -INF}
    line = "step 100  loss 0.1234  accuracy 97.1  n 1e+09  nan nan  -inf -inf\n"
    assert _printed(scalars) == line
    ConsoleWriter().write_scalars(100, scalars)
    assert capsys.readouterr().out == line


def test_console_prints_names_literally_and_on_one_line():
    line = _printed(VALUES)
    assert line.count("\n") == 1
    assert "  [red]x 5  [/] 6  :smile: 7  " in line
    assert r"  a\nb 2  a\r\u2028b 3  " in line
    assert r"\x1b[2J 13" in line
    assert line.rstrip("\n").isprintable()


def test_console_prints_above_the_bars_of_a_progress():
    from rich.console import Console
    from rich.progress import Progress

    file = io.StringIO()
    with Progress(console=Console(file=file, force_terminal=True, width=80)) as progress:
        progress.add_task("training")
        ConsoleWriter(progress.console).write_scalars(1, {"loss": 0.5})
    assert "loss" in file.getvalue()


# Memory


def test_memory_keeps_everything():
    writer = MemoryWriter()
    writer.write_scalars(np.int64(1), {"a": np.float32(0.5), "b": NAN})  # type: ignore[arg-type]
    writer.close()
    writer.write_scalars(2, {"a": INF})
    kept = writer.to_dict()
    assert kept["a"] == {"step": [1, 2], "value": [0.5, INF]}
    assert kept["b"]["step"] == [1]
    assert math.isnan(kept["b"]["value"][0])
    assert {type(kept["a"]["step"][0]), type(kept["a"]["value"][0])} == {int, float}
    kept["a"]["step"].clear()
    assert writer.to_dict()["a"]["step"] == [1, 2]


def test_memory_keeps_histograms_of_the_same_edges():
    writer = MemoryWriter()
    counts, edges = np.ones(2), np.array([-INF, 0, INF])
    writer.write_binned(1, {"h": (counts, edges)})
    counts += 1
    writer.write_binned(2, {"h": (counts, edges)})
    kept = writer.histograms["h"]
    assert kept["step"] == [1, 2]
    np.testing.assert_array_equal(kept["counts"], [[1, 1], [2, 2]])
    np.testing.assert_array_equal(kept["edges"], edges)
    with pytest.raises(ValueError, match="the histogram 'h' had the edges"):
        writer.write_binned(3, {"h": (counts, edges + 1)})


def test_memory_plots_without_a_display(tmp_path):
    from matplotlib.image import imread

    writer = MemoryWriter()
    for step in range(5):
        writer.write_scalars(step, {"train/loss": 1.0 / (step + 1), "eval/loss": NAN if step == 2 else 0.5})
        writer.write_scalars(step, VALUES | {"$\\bad$/loss": 0.1, "_/loss": 0.2})
    writer.plot(tmp_path / "new/all.png")
    writer.plot(tmp_path / "loss.png", ["train/loss", "eval/loss"])
    writer.plot(tmp_path / "loss.svg", ["train/loss", "eval/loss"])
    image = imread(tmp_path / "loss.png")
    assert image.shape == (300, 400, 4), "one panel"
    assert len(np.unique(image.reshape(-1, 4), axis=0)) > 10
    assert imread(tmp_path / "new/all.png").shape[0] > 300
    assert (tmp_path / "loss.svg").read_text().startswith("<?xml")


def test_memory_plots_nothing_that_was_not_written(tmp_path):
    writer = MemoryWriter()
    with pytest.raises(ValueError, match=r"nothing was written to plot\.\n  There is: nothing"):
        writer.plot(tmp_path / "a.png")
    writer.write_scalars(1, {"loss": 1.0})
    with pytest.raises(ValueError, match=r"nothing was written under 'lss'\.\n  There is: 'loss'"):
        writer.plot(tmp_path / "a.png", ["lss"])


# Prometheus


@pytest.fixture
def prometheus():
    writer = PrometheusWriter()
    yield writer
    writer.close()


def _scrape(writer, accept=""):
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(urllib.request.Request(writer.url, headers={"Accept": accept}), timeout=10) as response:
        text = response.read().decode()
    families = openmetrics_families if "openmetrics" in accept else text_string_to_metric_families
    samples = [sample for family in families(text) for sample in family.samples]
    assert all(not sample.labels for sample in samples)
    values = {sample.name: sample.value for sample in samples}
    assert len(values) == len(samples), "one sample per name"
    return values


def test_prometheus_serves_the_latest_values(prometheus):
    assert prometheus.url == f"http://127.0.0.1:{prometheus.port}/metrics"
    prometheus.write_scalars(1, {"train/loss": 0.5, "a": NAN})
    prometheus.write_scalars(2, {"train/loss": 0.25, "b": INF, "c": -INF})
    values = _scrape(prometheus)
    assert math.isnan(values.pop("a"))
    assert values == {"training_step": 2, "train_loss": 0.25, "b": INF, "c": -INF}


@pytest.mark.parametrize("accept", ["", "application/openmetrics-text; version=1.0.0"])
def test_prometheus_serves_each_name_once_and_no_forged_line(prometheus, accept):
    prometheus.write_scalars(3, VALUES)
    prometheus.write_scalars(4, dict(reversed(VALUES.items())))
    values = _scrape(prometheus, accept)
    assert len(values) == len(VALUES) + 1
    assert values["training_step"] == 4
    assert values["training_step_2"] == VALUES["training_step"]
    assert values["a_b"] == VALUES["a\nb"]
    assert values["a_b_2"] == VALUES["a b"]
    assert values["a_b_3"] == VALUES["a_b"]
    assert values["_1_2"] == VALUES["1/2"]
    assert values["x_y__z___1"] == VALUES['x{y="z"} 1']


def test_prometheus_shares_a_registry_and_leaves_it_as_it_was():
    registry = CollectorRegistry()
    Gauge("loss", "of the host", registry=registry).set(9)
    writer = PrometheusWriter(registry=registry)
    try:
        writer.write_scalars(1, {"loss": 0.5})
        assert _scrape(writer) == {"loss": 9, "loss_2": 0.5, "training_step": 1}
    finally:
        writer.close()
    assert [family.name for family in registry.collect()] == ["loss"]


def test_prometheus_is_closed_for_good(prometheus):
    prometheus.close()
    assert not prometheus._thread.is_alive()
    with pytest.raises(OSError, match="refused"):
        _scrape(prometheus)
    with pytest.raises(RuntimeError, match=r"PrometheusWriter is closed. To serve on: writer = PrometheusWriter\("):
        prometheus.write_scalars(1, {"a": 1.0})
    again = PrometheusWriter(port=prometheus.port)
    again.close()


# as_writer


class _CluShaped:
    """As clu.metric_writers.MetricWriter, which needs TensorFlow."""

    def __init__(self):
        self.calls = []

    def write_scalars(self, step, scalars):
        self.calls.append((step, dict(scalars)))


def test_a_writer_without_flush_and_close_is_completed():
    theirs = _CluShaped()
    writer = as_writer(theirs)
    assert isinstance(writer, MetricWriter)
    writer.write_scalars(1, {"a": 1.0})
    writer.flush()
    writer.close()
    assert theirs.calls == [(1, {"a": 1.0})]
    assert not hasattr(writer, "write_binned")
    theirs.write_binned = theirs.flush = theirs.close = lambda *arguments: theirs.calls.append(arguments)
    assert as_writer(theirs) is theirs
    del theirs.close
    binned = as_writer(theirs)
    binned.write_binned(2, {})  # type: ignore[attr-defined]
    binned.flush()
    assert theirs.calls[1:] == [(2, {}), ()]


def test_a_logging_backend_of_metrax_is_adapted(tmp_path):
    from metrax.logging import TensorboardBackend

    writer = as_writer(TensorboardBackend(str(tmp_path)))
    assert isinstance(writer, MetricWriter)
    writer.write_scalars(5, {"train/loss": 0.5, "b": 2.0})
    writer.write_scalars(6, {"train/loss": 0.25})
    writer.flush()
    writer.close()
    writer.close()
    events = _read_events(tmp_path)
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(5, 0.5), (6, 0.25)]
    assert [(event.step, event.value) for event in events.Scalars("b")] == [(5, 2.0)]


def test_a_logging_backend_is_closed_once():
    closed = []

    class Backend:
        def log_scalar(self, event, value, **kwargs):
            pass

        def close(self):
            closed.append(self)

    writer = as_writer(Backend())
    writer.close()
    writer.close()
    assert len(closed) == 1


def test_a_function_of_the_shape_of_wandb_log_is_adapted():
    calls = []
    writer = as_writer(lambda data, step=None: calls.append((type(data), data, step)))
    assert isinstance(writer, MetricWriter)
    writer.write_scalars(1, {})
    writer.write_scalars(2, {"a": 1.0})
    writer.flush()
    writer.close()
    assert calls == [(dict, {"a": 1.0}, 2)]


def test_a_function_without_a_signature_is_taken_for_one_of_a_mapping():
    kept = {}
    as_writer(kept.update).write_scalars(3, {"loss": 0.5})  # of C: it does not say what it takes
    assert kept == {"loss": 0.5, "step": 3}


def test_a_function_of_the_shape_of_jax_monitoring_is_adapted():
    heard = []
    listener = lambda event, value, **given: heard.append((event, value, given))  # noqa: E731 (to unregister it)
    jax.monitoring.register_scalar_listener(listener)
    as_writer(jax.monitoring.record_scalar).write_scalars(3, {"a": 1.0, "b": 2.0})
    jax.monitoring.unregister_scalar_listener(listener)
    assert heard == [("a", 1.0, {"step": 3}), ("b", 2.0, {"step": 3})]


def test_a_function_that_cannot_be_called_with_numbers_is_an_error_at_once():
    with pytest.raises(TypeError, match=r"got a function \(numbers\), which takes no metrics"):
        as_writer(lambda numbers: None)


@pytest.mark.parametrize("wrong", [3, {"write_scalars": print}, json])
def test_anything_else_is_an_error_that_names_what_is_accepted(wrong):
    with pytest.raises(TypeError, match=rf"got an instance of {type(wrong).__qualname__}, which") as error:
        as_writer(wrong)
    for shape in (r"write_scalars(step, scalars)", "log_scalar(event, value, step=...)", "log(scalars, step=step)"):
        assert shape in str(error.value)


def test_a_class_is_an_error_that_asks_for_an_instance():
    with pytest.raises(TypeError, match=r"got the class MemoryWriter, which .*\n  Give an instance: MemoryWriter\("):
        as_writer(MemoryWriter)


def test_public_names():
    assert sorted(writers.__all__) == sorted(
        {kind.__name__ for kind in ALL} | {"BinnedWriter", "MetricWriter", "as_writer"}
    )
