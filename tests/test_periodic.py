"""The service: what a loop of one call a step leaves with its writers, and when it hears of errors."""

import json
import logging
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from distributed_metrics import DistributedMetrics, Histogram, PeriodicFlush, Snapshot, Sum, delivery
from distributed_metrics.writers import MemoryWriter
from processes import run


class Recorder:
    """A writer that keeps what it got, in order, and how it was told."""

    def __init__(self, gate: threading.Event | None = None):
        self.written: list[tuple[int, dict[str, float]]] = []
        self.calls: list[str] = []
        self.gate = gate

    def write_scalars(self, step, scalars):
        if self.gate is not None:
            assert self.gate.wait(30)
        assert type(step) is int
        assert all(type(name) is str and type(number) is float for name, number in scalars.items())
        self.written.append((step, dict(scalars)))

    def flush(self):
        self.calls.append("flush")

    def close(self):
        self.calls.append("close")

    @property
    def steps(self):
        return [step for step, _ in self.written]

    def __getitem__(self, name):
        return [numbers.get(name) for _, numbers in self.written]


class Broken(Recorder):
    def __init__(self, until: int = 0):
        super().__init__()
        self.left = until

    def write_scalars(self, step, scalars):
        self.left -= 1
        if self.left < 0:
            raise OSError("the disk is full")
        super().write_scalars(step, scalars)


def loop(flusher, metrics, steps, value=float, **host):
    for step in steps:
        metrics.update(loss=value(step))
        flusher(step, **host)


# --- windows ---


def test_windows_end_where_the_step_says_and_the_rest_comes_at_the_end():
    metrics, memory = DistributedMetrics({"loss": "mean"}), Recorder()
    with PeriodicFlush(metrics, 4, memory) as flusher:
        loop(flusher, metrics, range(10))
    assert memory.steps == [3, 7, 9]
    assert memory["loss"] == [1.5, 5.5, 8.5]
    assert memory.calls == ["flush", "close"]


def test_a_resumed_run_has_the_same_windows():
    metrics, memory = DistributedMetrics({"loss": "mean"}), Recorder()
    with PeriodicFlush(metrics, 4, [memory]) as flusher:
        loop(flusher, metrics, range(6, 12))
    assert memory.steps == [7, 11]
    assert memory["loss"] == [6.5, 9.5]


def test_nothing_new_nothing_written():
    metrics, memory = DistributedMetrics({"loss": "mean"}), Recorder()
    with PeriodicFlush(metrics, 4, [memory]) as flusher:
        loop(flusher, metrics, range(4))
    assert memory.steps == [3]
    with PeriodicFlush(metrics, 4, other := Recorder()):
        pass
    assert other.steps == []
    assert other.calls == ["flush", "close"]


def test_steps_that_are_skipped_do_not_swallow_the_end_of_a_window():
    metrics, memory = DistributedMetrics({"loss": "mean"}), Recorder()
    with PeriodicFlush(metrics, 4, memory) as flusher:
        loop(flusher, metrics, [1, 4, 6, 7, 16])
    assert memory.steps == [4, 7, 16]
    assert memory["loss"] == [2.5, 6.5, 16.0]


def test_the_prefix_goes_before_all_numbers_of_a_window():
    metrics, memory = DistributedMetrics({"loss": "mean", "aux": {"z": "max"}}), Recorder()
    seen = []

    def derive(numbers, window):
        seen.append((set(numbers), dict(window)))
        return {"twice": 2 * numbers["loss"]}

    with PeriodicFlush(metrics, 2, memory, prefix="train", derive=derive) as flusher:
        for step in range(2):
            metrics.update({"loss": 1.0, "aux": {"z": step}})
            flusher(step, loading=0.25 * step)
        flusher.write(1, {"x": 3})
    assert memory.written == [
        (1, {"train/loss": 1.0, "train/aux/z": 1.0, "train/loading": 0.25, "train/twice": 2.0}),
        (1, {"eval/x": 3.0}),
    ]
    assert seen == [({"loss", "aux/z", "loading"}, {"loss": 1.0, "aux": {"z": 1.0}})]


def test_of_a_host_scalar_the_last_of_the_window_counts():
    metrics, memory = DistributedMetrics({"loss": "mean"}), Recorder()
    with PeriodicFlush(metrics, 3, memory) as flusher:
        flusher(0, epoch=0, seconds=np.float32(0.5))
        flusher(1, epoch=1)
        flusher(2)
        flusher(5)
    assert memory["epoch"] == [1.0, None]
    assert memory["seconds"] == [0.5, None]


def test_the_object_that_a_jitted_step_returns_is_flushed():
    mesh = jax.make_mesh((8,), ("data",))
    step_fn = jax.jit(lambda metrics, x: (metrics.update(loss=x), metrics)[1], donate_argnums=0)
    metrics, memory = DistributedMetrics({"loss": "mean"}, mesh=mesh), Recorder()
    x = jax.device_put(np.arange(8.0), NamedSharding(mesh, P("data")))
    with PeriodicFlush(metrics, 2, memory) as flusher:
        for step in range(5):
            metrics = step_fn(metrics, x + step)
            flusher(step, metrics)
        assert flusher.total()["loss"] == 5.5
    assert memory["loss"] == [4.0, 6.0, 7.5]


def test_numbers_of_a_population_and_of_histograms_are_written():
    class Binned(Recorder):
        def __init__(self):
            super().__init__()
            self.histograms = []

        def write_binned(self, step, histograms):
            self.histograms.append((step, {name: (c.tolist(), e.tolist()) for name, (c, e) in histograms.items()}))

    metrics = DistributedMetrics({"x": Histogram([0.0, 1.0, 2.0]), "v": Histogram([0.0, 1.0], shape=2), "y": "mean"})
    binned, plain = Binned(), Recorder()
    with PeriodicFlush(metrics, 1, [binned, plain], prefix="t") as flusher:
        metrics.update(x=jnp.array([0.5, 1.5, 1.5, 7.0]), v=jnp.array([[0.5, 3.0]]), y=1.0)
        flusher(0)
        flusher.write(0, metrics.compute())  # has seen nothing
    bins = {"x": ([1.0, 2.0], [0.0, 1.0, 2.0]), "v/0": ([1.0], [0.0, 1.0]), "v/1": ([0.0], [0.0, 1.0])}
    assert binned.histograms == [(0, {f"t/{name}": one for name, one in bins.items()})]
    assert binned.written[0] == (0, {"t/x/overflow": 1.0, "t/y": 1.0, "t/v/1/overflow": 1.0})
    assert plain.written[0][1] == binned.written[0][1] | {
        "t/x/0": 1.0, "t/x/1": 2.0, "t/v/0/0": 1.0, "t/v/1/0": 0.0,
    }  # fmt: skip


# --- rates ---


def test_rates_are_per_second_of_results_without_the_first_window_and_pauses():
    metrics, memory = DistributedMetrics({"loss": "mean", "tokens": ("sum", "max")}), Recorder()
    with PeriodicFlush(metrics, 5, memory, rates=["tokens/sum"]) as flusher:
        for step in range(15):
            metrics.update(loss=1.0, tokens=100)
            time.sleep(0.01)
            if step == 12:
                with flusher.pause():
                    time.sleep(1.0)
            flusher(step)
    assert "steps_per_sec" not in memory.written[0][1]
    assert "tokens/sum_per_sec" not in memory.written[0][1]
    for rate in memory["steps_per_sec"][1:]:
        assert 15 < rate < 120  # with the pause: below 5
    for rate, steps in zip(memory["tokens/sum_per_sec"][1:], memory["steps_per_sec"][1:], strict=True):
        assert rate == pytest.approx(100 * steps)


def test_rates_count_steps_that_are_skipped_and_windows_that_are_joined():
    gate = threading.Event()
    metrics, slow = DistributedMetrics({"calls": "count"}), Recorder(gate)
    with PeriodicFlush(metrics, 10, slow, rates="calls") as flusher:
        for call in range(5 * delivery.MOST_WAITING):
            metrics.update(calls=1.0)
            flusher(10 * call + 9)
        gate.set()
    assert slow["calls"][-1] > 1
    for per_call, per_step in zip(slow["calls_per_sec"][1:], slow["steps_per_sec"][1:], strict=True):
        assert per_step == pytest.approx(10 * per_call)


def busy_step(seconds: float):
    """A step that keeps the device busy for about so long."""

    def step(metrics, x, n):
        x = jax.lax.fori_loop(0, n, lambda i, x: jnp.tanh(x @ x), x)
        metrics.update(loss=x.mean())
        return metrics, x

    step, x, n = jax.jit(step), jnp.eye(256), 16
    metrics = DistributedMetrics({"loss": "mean"})
    while True:
        jax.block_until_ready(step(metrics, x, n))
        started = time.perf_counter()
        jax.block_until_ready(step(metrics, x, n))
        if (took := time.perf_counter() - started) > seconds:
            return step, x, n, took
        n = max(n + 1, int(n * min(8, 1.2 * seconds / took)))


def test_a_call_does_not_wait_for_the_device():
    step_fn, x, n, took = busy_step(0.1)
    metrics, memory = DistributedMetrics({"loss": "mean"}), Recorder()
    calls = []
    with PeriodicFlush(metrics, 2, memory) as flusher:
        for step in range(8):
            metrics, x = step_fn(metrics, x, n)
            started = time.perf_counter()
            flusher(step, metrics)
            calls.append(time.perf_counter() - started)
        assert len(memory.written) < 4, "the device was done before the loop: this shows nothing"
    assert len(memory.written) == 4
    assert np.median(calls) < took / 10
    assert sorted(calls)[-2] < took  # the first flush compiles; a busy machine may stop one more


def test_a_pause_counts_from_when_the_devices_are_done():
    """A pause begins with waiting for the steps before: that is no pause."""
    step_fn, x, n, took = busy_step(0.1)
    metrics, memory = DistributedMetrics({"loss": "mean"}), Recorder()
    with PeriodicFlush(metrics, 4, memory) as flusher:
        for step in range(8):
            metrics, x = step_fn(metrics, x, n)
            flusher(step, metrics)
            if step == 6:
                with flusher.pause():
                    jax.block_until_ready(x)
                    time.sleep(12 * took)
    rate = memory["steps_per_sec"][1] * took
    assert 0.5 < rate < 1.8, rate  # all of the pause left out: 4 steps in the time of one, 4; none of it: 0.25


# --- slow and broken writers ---


def test_windows_are_added_together_where_writers_cannot_keep_up():
    gate = threading.Event()
    slow, metrics = Recorder(gate), DistributedMetrics({"loss": ("mean", "count", "last"), "x": Histogram([0, 1])})
    windows = 20 * delivery.MOST_WAITING
    with PeriodicFlush(metrics, 2, slow, derive=lambda numbers, window: {"n": window.count["loss/mean"]}) as flusher:
        for step in range(2 * windows):
            metrics.update(loss=float(step), x=0.5)
            flusher(step, load=step)
            with flusher.pause():
                pass
        gate.set()
    assert len(slow.written) <= delivery.MOST_WAITING + 2
    assert slow.steps == sorted(slow.steps)
    assert slow.steps[-1] == 2 * windows - 1 == slow["loss/last"][-1] == slow["load"][-1]
    assert sum(slow["loss/count"]) == 2 * windows == sum(slow["n"]) == sum(slow["x/0"])
    total = sum(mean * count for mean, count in zip(slow["loss/mean"], slow["loss/count"], strict=True))
    assert total == sum(range(2 * windows))


def test_what_is_written_keeps_its_place_also_where_writers_cannot_keep_up():
    gate = threading.Event()
    slow, metrics = Recorder(gate), DistributedMetrics({"loss": "count"})
    with PeriodicFlush(metrics, 1, slow) as flusher:
        for step in range(100):
            metrics.update(loss=1.0)
            flusher(step)
            if step % 40 == 39:
                flusher.write(step, {"loss": 0.0})
        gate.set()
    seen = 0.0
    for step, numbers in slow.written:
        if "eval/loss" in numbers:
            assert seen == step + 1
        seen += numbers.get("loss", 0.0)
    assert seen == 100


def test_a_jitted_function_cannot_flush_a_window_and_nothing_is_lost():
    metrics, memory = DistributedMetrics({"loss": "mean"}), MemoryWriter()
    with PeriodicFlush(metrics, 1, memory) as flusher:
        metrics.update(loss=3.0)

        @nnx.jit
        def step(metrics):
            flusher(0, metrics)

        with pytest.raises(TypeError, match=r"called inside a jitted function(.|\n)*Call it after the step"):
            step(metrics)
        flusher(0)
    assert memory.to_dict()["loss"]["value"] == [3.0]


def test_what_derive_gives_is_numbers():
    for given, text in (({"a": np.ones(3)}, r"'a', which is no number: an array of shape \(3,\)"), ({"a": "x"}, "str")):
        metrics = DistributedMetrics({"loss": "mean"})
        with pytest.raises(TypeError, match=text):
            with PeriodicFlush(
                metrics, 1, MemoryWriter(), derive=lambda numbers, window, given=given: given
            ) as flusher:
                metrics.update(loss=1.0)
                flusher(0)


def test_a_run_that_derive_has_stopped_does_not_ask_it_again():
    metrics, asked = DistributedMetrics({"loss": "mean"}), []

    def derive(numbers, window):
        asked.append(numbers["loss"])
        raise FloatingPointError("stop")

    with pytest.raises(FloatingPointError):
        with PeriodicFlush(metrics, 2, MemoryWriter(), derive=derive) as flusher:
            for step in range(3):
                metrics.update(loss=1.0)
                if step == 2:
                    wait_until(lambda: asked)
                flusher(step)
    assert len(asked) == 1


def wait_until(condition):
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_an_error_of_a_writer_surfaces_at_the_next_call_and_the_others_go_on():
    metrics, good, broken = DistributedMetrics({"loss": "mean"}), Recorder(), Broken(until=1)
    with pytest.raises(OSError, match="the disk is full") as raised:
        with PeriodicFlush(metrics, 1, [broken, good]) as flusher:
            loop(flusher, metrics, range(2))
            wait_until(lambda: len(good.written) == 2)
            metrics.update(loss=2.0)
            flusher(2)
    assert "Broken" in raised.value.__notes__[0]
    assert good["loss"] == [0.0, 1.0, 2.0]
    assert broken["loss"] == [0.0]
    assert good.calls == ["flush", "close"]


def test_a_loop_that_catches_the_error_of_a_writer_goes_on_without_it():
    metrics, good, broken = DistributedMetrics({"loss": "mean"}), Recorder(), Broken()
    errors = 0
    with PeriodicFlush(metrics, 1, [broken, good]) as flusher:
        for step in range(5):
            metrics.update(loss=float(step))
            wait_until(lambda step=step: len(good.written) == step)
            try:
                flusher(step)
            except OSError:
                errors += 1
    assert errors == 1
    assert good["loss"] == [0.0, 1.0, 2.0, 3.0, 4.0]


def test_an_error_of_the_last_write_is_raised_when_the_block_ends():
    metrics, good = DistributedMetrics({"loss": "mean"}), Recorder()
    with pytest.raises(OSError, match="full"), PeriodicFlush(metrics, 10, [Broken(), good]) as flusher:
        loop(flusher, metrics, range(3))
    assert good["loss"] == [1.0]


def test_an_exception_in_the_loop_flushes_what_is_left_and_goes_on_its_way(caplog):
    metrics, good = DistributedMetrics({"loss": "mean"}), Recorder()
    with pytest.raises(ZeroDivisionError), PeriodicFlush(metrics, 10, [Broken(), good]) as flusher:
        loop(flusher, metrics, range(3))
        raise ZeroDivisionError
    assert good["loss"] == [1.0]
    assert good.calls == ["flush", "close"]
    assert "the disk is full" in caplog.text


def test_an_exception_in_the_loop_is_not_hidden_by_accumulators_that_are_gone(caplog):
    step_fn = jax.jit(lambda metrics: metrics, donate_argnums=0)
    metrics, good = DistributedMetrics({"loss": "mean"}), Recorder()
    with pytest.raises(ZeroDivisionError), PeriodicFlush(metrics, 10, good) as flusher:
        loop(flusher, metrics, range(3))
        step_fn(metrics)
        raise ZeroDivisionError
    assert "donated" in caplog.text
    assert good.calls == ["flush", "close"]


def test_derive_stops_a_run_and_the_numbers_that_it_saw_are_written():
    metrics, memory = DistributedMetrics({"loss": "mean"}), Recorder()

    def derive(numbers, window):
        if np.isnan(numbers["loss"]):
            raise FloatingPointError("the loss is NaN")

    with pytest.raises(FloatingPointError, match="NaN") as raised:
        with PeriodicFlush(metrics, 2, memory, derive=derive) as flusher:
            loop(flusher, metrics, range(4), lambda step: float("nan") if step == 3 else 1.0)
            wait_until(lambda: len(memory.written) == 2)
            loop(flusher, metrics, range(4, 100))
    assert "step 3" in raised.value.__notes__[0]
    assert memory.steps == [1, 3, 4]
    assert np.isnan(memory["loss"][1])


def test_derive_at_the_end_of_a_run_is_heard_as_well():
    metrics = DistributedMetrics({"loss": "mean"})
    with (
        pytest.raises(KeyError) as error,
        PeriodicFlush(metrics, 2, derive=lambda numbers, _: numbers["los"]) as flusher,
    ):
        loop(flusher, metrics, range(2))
    assert "step 1." in error.value.__notes__[0]
    with (
        pytest.raises(KeyError) as error,
        PeriodicFlush(metrics, 2, derive=lambda numbers, _: numbers["loss"]) as flusher,
    ):
        flusher(1)
    assert "step 1, which saw nothing of that name: numbers.get(name) is None then." in error.value.__notes__[0]
    with pytest.raises(TypeError, match="gives a mapping"), PeriodicFlush(metrics, 2, derive=lambda *_: 3.0) as flusher:
        loop(flusher, metrics, range(2))


def test_derive_does_not_replace_a_number():
    metrics = DistributedMetrics({"loss": "mean"})
    with pytest.raises(ValueError, match="that number is there already"):
        with PeriodicFlush(metrics, 2, derive=lambda numbers, window: {"loss": 0.0}) as flusher:
            loop(flusher, metrics, range(2))


def test_windows_that_saw_nothing_are_a_warning_once(caplog):
    metrics = DistributedMetrics({"loss": "mean"})
    with PeriodicFlush(metrics, 2) as flusher:
        for step in range(6):
            flusher(step)
    assert caplog.text == ""  # nobody would read it
    with PeriodicFlush(metrics, 2, Recorder()) as flusher:
        for step in range(6):
            flusher(step)
    assert caplog.text.count("flusher(step, metrics)") == 1


# --- epochs ---


@pytest.mark.parametrize("method", ["flush", "reset"])
def test_a_flush_by_hand_is_a_warning_once_since_its_values_are_in_no_window(method, caplog):
    metrics, memory = DistributedMetrics({"loss": "count"}), MemoryWriter()
    with PeriodicFlush(metrics, 2, memory) as flusher:
        for step in range(4):
            metrics.update(loss=1.0)
            if step % 2 == 0:
                getattr(metrics, method)()
            flusher(step)
    metrics.flush()
    assert memory.to_dict()["loss"]["value"] == [1.0, 1.0]
    assert [one.message for one in caplog.records] == [
        f"PeriodicFlush: metrics.{method}() was called inside the block. What it took is in no window, and not in "
        "total(). An evaluation has an object of its own; for numbers so far, metrics.compute()."
    ]


def test_windows_add_up_to_epochs_also_where_an_epoch_ends_within_a_window():
    metrics, memory = DistributedMetrics({"loss": ("sum", "max", "last")}), Recorder()
    step = 0
    with PeriodicFlush(metrics, 4, memory) as flusher:
        for epoch in range(3):
            flusher.start_epoch()
            for _ in range(6):
                metrics.update(loss=float(step))
                flusher(step)
                step += 1
            total = flusher.total()
            assert isinstance(total, Snapshot)
            seen = range(6 * epoch, 6 * epoch + 6)
            assert dict(total["loss"]) == {"sum": sum(seen), "max": max(seen), "last": max(seen)}
    assert memory.steps == [3, 7, 11, 15, 17]
    assert memory["loss/sum"] == [6.0, 22.0, 38.0, 54.0, 33.0]


def test_the_total_without_epochs_is_of_all():
    metrics = DistributedMetrics({"loss": "count"})
    with PeriodicFlush(metrics, 3) as flusher:
        loop(flusher, metrics, range(200))
        assert flusher.total()["loss"] == 200
    assert flusher.total()["loss"] == 200


# --- other numbers ---


def test_write_takes_snapshots_and_nested_mappings_with_arrays():
    metrics, memory = DistributedMetrics({"loss": "mean"}), Recorder()
    scores = np.array([1.0, 2.0])
    with PeriodicFlush(metrics, 10, memory, prefix="train") as flusher:
        metrics.update(loss=0.5)
        flusher.write(7, metrics.flush())
        flusher.write(8, {"a": {"b": jnp.float32(1.5)}, "c": scores, "d": True}, prefix="")
        scores[:] = 0
        flusher.write(9, {})
        metrics.update(loss=2.0)
        flusher.write(
            9,
            metrics.flush(),
            "eval/a/",
            derive=lambda numbers, seen: {"n": seen.count["loss"]} | {"double": 2 * numbers["loss"]},
        )
        flusher.write(9, {"b": 1}, derive=lambda numbers, seen: {"c": numbers["b"], "seen": seen is not None})
    assert memory.written == [
        (7, {"eval/loss": 0.5}),
        (8, {"a/b": 1.5, "c/0": 1.0, "c/1": 2.0, "d": 1.0}),
        (9, {"eval/a/loss": 2.0, "eval/a/n": 1.0, "eval/a/double": 4.0}),
        (9, {"eval/b": 1.0, "eval/c": 1.0, "eval/seen": 0.0}),
    ]


# --- misuse ---


def test_misuse_is_an_error_that_shows_the_way():
    metrics = DistributedMetrics({"loss": "mean", "tokens": "sum", "v": "count"})
    for wrong in (0, -1, 2.0, True, None):
        with pytest.raises(ValueError, match="every_steps"):
            PeriodicFlush(metrics, wrong)
    with pytest.raises(TypeError, match="got dict"):
        PeriodicFlush({}, 1)
    with pytest.raises(ValueError, match="no accumulators"):
        PeriodicFlush(DistributedMetrics(), 1)
    with pytest.raises(ValueError, match=r"'loss' is no sum or count.*'tokens', 'v'"):
        PeriodicFlush(metrics, 1, rates=["loss"])
    vector = DistributedMetrics({"v": Sum(shape=3)})
    with pytest.raises(ValueError, match=r"'v' is no scalar, but of shape \(3,\)"):
        PeriodicFlush(vector, 1, rates=["v"])
    with pytest.raises(TypeError, match="int"):
        PeriodicFlush(metrics, 1, [3])
    for writer, text in (("run.jsonl", r"JsonLinesWriter\('run.jsonl'\)"), (None, r"For no writer: \(\)")):
        with pytest.raises(TypeError, match=text):
            PeriodicFlush(metrics, 1, writer)
    with pytest.raises(TypeError, match=r"derive=\{\}\): a function"):
        PeriodicFlush(metrics, 1, derive={})
    with pytest.raises(TypeError, match="prefix=3"):
        PeriodicFlush(metrics, 1, prefix=3)
    with pytest.raises(ValueError, match=r"PeriodicFlush\(timeout=-1\): a positive number"):
        PeriodicFlush(metrics, 1, timeout=-1)
    for taken, rates in (("steps_per_sec", ()), ("n_per_sec", ["n"])):
        with pytest.raises(ValueError, match=f"the metric '{taken}' has the name of a number that it adds"):
            PeriodicFlush(DistributedMetrics({taken: "mean", "n": "count"}), 1, rates=rates)
    with PeriodicFlush(vector, 1) as flusher, pytest.raises(ValueError, match="has a number 'v/1' already"):
        flusher(0, **{"v/1": 3.0})
    flusher = PeriodicFlush(metrics, 1)
    with pytest.raises(RuntimeError, match="with PeriodicFlush"):
        flusher(0)
    with flusher:
        with pytest.raises(TypeError, match="Count on the host"):
            flusher(jnp.int32(3))
        with pytest.raises(TypeError, match="would wait for the device"):
            flusher(0, loss_now=jnp.float32(1))
        with pytest.raises(TypeError, match="a number"):
            flusher(0, name="x")
        with pytest.raises(ValueError, match="already"):
            flusher(0, tokens=3)
        with pytest.raises(TypeError, match="got list"):
            flusher.write(0, [1.0])
        for wrong in (None, "hi", 1j):
            with pytest.raises(TypeError, match=r"flusher.write\(\): 'note' is no number"):
                flusher.write(0, {"loss": 1.0, "note": wrong})
        with pytest.raises(TypeError, match=r"start_epoch\(\) takes a Snapshot, got dict(.|\n)*Snapshot.from_dict"):
            flusher.start_epoch({})
        with pytest.raises(TypeError, match=r"The step comes first: flusher\(step, metrics\)"):
            flusher(metrics, 0)
        with pytest.raises(TypeError, match=r"got DistributedMetrics.\n  Of metrics: metrics.flush\(\)"):
            flusher.write(0, metrics)
        with pytest.raises(RuntimeError, match="another one that is open flushes the same object"):
            PeriodicFlush(metrics, 3).__enter__()
        with PeriodicFlush(DistributedMetrics({"loss": "mean"}), 3) as other:
            with pytest.raises(RuntimeError, match="another one that is open flushes the same object"):
                other(0, metrics)
        flusher(0)
        with pytest.raises(ValueError, match="the last step was 0"):
            flusher(0)
        flusher(np.int64(1))
    with pytest.raises(RuntimeError, match="with PeriodicFlush"):
        flusher(2)
    with pytest.raises(RuntimeError, match="entered before"), flusher:
        pass


def test_the_thread_ends_with_the_block():
    metrics = DistributedMetrics({"loss": "mean"})
    with PeriodicFlush(metrics, 1) as flusher:
        assert any(thread.name == "PeriodicFlush" for thread in threading.enumerate())
        loop(flusher, metrics, range(3))
    assert not any(thread.name == "PeriodicFlush" for thread in threading.enumerate())


def test_memory_and_a_training_step_of_nnx():
    model = nnx.Linear(4, 1, rngs=nnx.Rngs(0))
    metrics, memory = DistributedMetrics({"loss": "mean"}), MemoryWriter()

    @nnx.jit
    def step_fn(model, metrics, x):
        loss, gradients = nnx.value_and_grad(lambda model: (model(x) ** 2).mean())(model)
        nnx.update(model, jax.tree.map(lambda p, g: p - 0.1 * g, nnx.state(model), gradients))
        metrics.update(loss=loss)

    with PeriodicFlush(metrics, 10, memory) as flusher:
        for step in range(30):
            step_fn(model, metrics, jnp.ones((2, 4)))
            flusher(step)
    assert memory.to_dict()["loss"]["step"] == [9, 19, 29]


# --- threads, processes ---


def test_threads_that_share_an_object_lose_nothing_and_count_nothing_twice():
    mesh = jax.make_mesh((8,), ("data",))
    metrics = DistributedMetrics({"n": ("sum", "count", "max", "var"), "h": Histogram([0, 1])}, mesh=mesh)
    x = jax.device_put(np.arange(8.0), NamedSharding(mesh, P("data")))
    metrics.update(n=x, h=0.5)
    one, taken, errors = metrics.flush(), [], []
    each, updaters = 60, 3

    def attempt(work):
        try:
            for _ in range(each):
                work()
        except Exception as error:
            errors.append(error)

    def merge():
        metrics.merge(one)

    works = [lambda: metrics.update(n=x, h=0.5)] * updaters + [merge]
    works += [lambda: taken.append(metrics.flush()), lambda: metrics.compute()["n"]["sum"]]
    threads = [threading.Thread(target=attempt, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive()
    assert not errors
    total = sum(taken, metrics.flush())
    times = each * (updaters + 1)
    assert total["n"]["sum"] == 28 * times
    assert total["n"]["count"] == 8 * times
    assert total["n"]["max"] == 7
    assert total["n"]["var"] == pytest.approx(5.25, rel=1e-12)
    assert total["h"].tolist() == [times]


def test_two_processes_write_once_and_stop_together(caplog):
    caplog.set_level(logging.ERROR)
    first, second = (json.loads(line) for line in run("service.py", processes=2))
    assert first["steps"] == [1, 3, 5, 6]
    assert first["loss"] == [0.5, 2.5, 4.5, 6.0]
    assert second["steps"] == []
    assert first["derived"] == second["derived"] == [0.5, 2.5, 4.5, 6.0]
    assert first["total"] == second["total"] == 3.0
    assert first["stopped at"] == second["stopped at"] == 5  # the window of step 3 has the NaN; the next ends here
    assert first["at the end"] == "the disk is full"
    assert second["at the end"] is None
    assert first["steps of the other writer"] == [1, 3, 5]
    assert first["missed"] == ["metrics.flush(timeout=5): process 1 of 2 did not come within 5 s."]
    assert ["came late" in one for one in second["missed"]] == [True]
    assert first["total after that"] == second["total after that"] == 2.5  # nothing was lost
    assert first["left alone"] == second["left alone"] == "KeyError"
