"""Numbers from a compiled loop while it runs."""

import itertools
import os
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from distributed_metrics import (
    DistributedMetrics,
    PeriodicFlush,
    Quantile,
    count_collectives,
    flush_every,
    wait_for_callbacks,
)
from distributed_metrics.writers import MemoryWriter

STEPS, EVERY = 20, 5
LOSSES = np.arange(STEPS * 16, dtype=np.float32).reshape(STEPS, 16)
WINDOWS = [(step, float(LOSSES[step + 1 - EVERY : step + 1].mean())) for step in range(EVERY - 1, STEPS, EVERY)]
SPEC = {"loss": "mean", "top": "max"}


def body_of(told):
    """A step of a loop; what it tells of is appended to ``told``."""

    def body(metrics, step_and_losses):
        step, losses = step_and_losses
        metrics.update(loss=losses, top=losses)
        flush_every(metrics, step, EVERY, lambda step, window: told.append((step, window["loss"])))
        return metrics, None

    return body


def scanned(told):
    return lambda metrics, xs: jax.lax.scan(body_of(told), metrics, xs)[0]


def counted(told):
    def loop(metrics, xs):
        body = body_of(told)
        return jax.lax.fori_loop(0, STEPS, lambda i, metrics: body(metrics, (i, xs[1][i]))[0], metrics)

    return loop


def scanned_by_nnx(told):
    def loop(metrics, xs):
        nnx.scan(lambda metrics, x: body_of(told)(metrics, x)[0], in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(
            metrics, xs
        )
        return metrics

    return loop


def beside_gradients(told):
    def step(metrics, x):
        jax.value_and_grad(lambda w: jnp.mean(w * x[1]))(1.0)
        return body_of(told)(metrics, x)

    return lambda metrics, xs: jax.lax.scan(step, metrics, xs)[0]


LOOPS = {loop.__name__: loop for loop in (scanned, counted, scanned_by_nnx, beside_gradients)}


def checked(told, metrics):
    wait_for_callbacks()
    assert told == WINDOWS
    assert np.isnan(metrics.compute()["loss"])


@pytest.mark.parametrize("loop", LOOPS.values(), ids=LOOPS)
def test_on_one_device(loop):
    told = []
    checked(told, jax.jit(loop(told))(DistributedMetrics(SPEC), (np.arange(STEPS), LOSSES)))


ONE, TWO = {"data": 8}, {"data": 4, "model": 2}
AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit


@pytest.mark.parametrize(
    ("loop", "mapped", "axes", "kind"),
    [
        *itertools.product([scanned], [False, True], [ONE, TWO], [AUTO, EXPLICIT]),
        *((loop, False, ONE, AUTO) for loop in (counted, scanned_by_nnx, beside_gradients)),
        *(
            pytest.param(loop, True, TWO, EXPLICIT, marks=pytest.mark.slow)
            for loop in (counted, scanned_by_nnx, beside_gradients)
        ),
    ],
)  # fmt: skip
def test_on_eight_devices_where_it_is_mapped_with_one_collective(loop, mapped, axes, kind):
    told: list[tuple[int, float]] = []
    mesh = jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(kind,) * len(axes))
    rows, values = P(tuple(axes)), P(None, tuple(axes))
    with jax.set_mesh(mesh):
        metrics = DistributedMetrics(SPEC)
        xs = jnp.arange(STEPS), jax.device_put(LOSSES, NamedSharding(mesh, values))
        program = loop(told)
        if mapped:
            program = jax.shard_map(program, mesh=mesh, in_specs=(rows, (P(), values)), out_specs=rows)
            assert count_collectives(program, metrics, xs) == {"all-gather": 1}
        checked(told, jax.jit(program)(metrics, xs))


def test_under_pmap():
    told = []
    mesh = jax.make_mesh((8,), ("data",))
    metrics = DistributedMetrics(SPEC, mesh=mesh)
    losses = LOSSES.reshape(STEPS, 8, 2)
    metrics = jax.pmap(scanned(told), axis_name="data", in_axes=(0, (None, 1)))(metrics, (np.arange(STEPS), losses))
    checked(told, metrics)


def test_a_large_state_is_told_of_as_well():
    """Reading it in XLA's own thread would deadlock."""
    mesh, told = jax.make_mesh((8,), ("data",)), []

    def body(metrics, x):
        metrics.update(q=x[1])
        flush_every(metrics, x[0], EVERY, lambda step, window: told.append(window["q"]))
        return metrics, None

    xs = jnp.arange(STEPS), LOSSES + 1
    jax.jit(lambda metrics: jax.lax.scan(body, metrics, xs)[0])(DistributedMetrics({"q": Quantile(0.5)}, mesh=mesh))
    wait_for_callbacks()
    assert told == pytest.approx([np.median(LOSSES[at : at + 5]) + 1 for at in range(0, STEPS, EVERY)], rel=0.03)


def test_outside_of_a_trace_it_is_an_ordinary_flush():
    told, metrics = [], DistributedMetrics(SPEC)
    for step in range(STEPS):
        body_of(told)(metrics, (step, LOSSES[step]))
    checked(told, metrics)


def test_a_loop_that_is_unrolled_while_tracing_tells_as_well():
    told = []

    @jax.jit
    def loop(metrics):
        for step in range(STEPS):
            body_of(told)(metrics, (step, LOSSES[step]))
        return metrics

    checked(told, loop(DistributedMetrics(SPEC)))


def test_a_flusher_writes_what_a_loop_tells():
    memory, metrics = MemoryWriter(), DistributedMetrics(SPEC)
    with PeriodicFlush(metrics, 1, memory) as flusher:

        def body(metrics, x):
            metrics.update(loss=x[1], top=x[1])
            flush_every(metrics, x[0], EVERY, lambda step, window: flusher.write(step, window, prefix="train"))
            return metrics, None

        jax.jit(lambda metrics: jax.lax.scan(body, metrics, (jnp.arange(STEPS), LOSSES))[0])(metrics)
    written = memory.to_dict()["train/loss"]
    assert list(zip(written["step"], written["value"], strict=True)) == WINDOWS


def test_the_callback_runs_while_the_program_does_and_may_be_slow():
    reached, released, told = threading.Event(), threading.Event(), []

    def slow(step, window):
        reached.set()
        assert released.wait(30)
        told.append((step, window["loss"]))

    def body(metrics, x):
        metrics.update(loss=x[1])
        flush_every(metrics, x[0], EVERY, slow)
        return metrics, None

    @jax.jit
    def loop(metrics):
        return jax.lax.scan(body, metrics, (jnp.arange(STEPS), LOSSES))[0]

    jax.block_until_ready(loop(DistributedMetrics({"loss": "mean"})))  # the program does not wait for the callback
    assert reached.wait(30)
    released.set()
    wait_for_callbacks()
    assert told == WINDOWS


def test_the_wait_is_for_programs_that_have_sent_nothing_yet():
    code = """
import jax, jax.numpy as jnp
from distributed_metrics import DistributedMetrics, flush_every, wait_for_callbacks
told = []
def body(metrics, step):
    x = jax.lax.fori_loop(0, 200, lambda i, x: jnp.tanh(x @ x), jnp.eye(200) * step)
    metrics.update(loss=x.mean())
    flush_every(metrics, step, 1, lambda step, window: told.append(step))
    return metrics, None
metrics = DistributedMetrics({"loss": "mean"}, mesh=jax.make_mesh((8,), ("data",)))
jax.jit(lambda metrics: jax.lax.scan(body, metrics, jnp.arange(3))[0])(metrics)
before = len(told)
wait_for_callbacks()
print(before, told)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == "0 [0, 1, 2]\n"


def test_an_exception_of_the_callback_is_raised_by_the_wait():
    def fail(step, window):
        raise KeyError(step)

    def body(metrics, x):
        metrics.update(loss=x[1])
        flush_every(metrics, x[0], EVERY, fail)
        return metrics, None

    mesh = jax.make_mesh((8,), ("data",))
    jax.jit(lambda metrics: jax.lax.scan(body, metrics, (jnp.arange(STEPS), LOSSES))[0])(
        DistributedMetrics({"loss": "mean"}, mesh=mesh)
    )
    with pytest.raises(KeyError, match="4") as raised:
        wait_for_callbacks()
    assert "callback" in raised.value.__notes__[0]
    wait_for_callbacks()


def stacked(x):
    return jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), x)


@pytest.mark.parametrize("axes", [(0, 0), (None, (None, 0))], ids=["members", "values"])
def test_vmap_is_an_error_that_shows_the_way(axes):
    metrics, xs = DistributedMetrics(SPEC), (jnp.arange(STEPS), jnp.asarray(LOSSES))
    metrics = stacked(metrics) if axes[0] == 0 else metrics
    xs = stacked(xs) if axes[1] == 0 else (xs[0], stacked(xs[1]))
    with pytest.raises(ValueError, match=r"return metrics, metrics\.flush"):
        jax.jit(jax.vmap(scanned([]), in_axes=axes))(metrics, xs)


def test_the_way_for_vmap_works():
    def loop(metrics, xs):
        def body(metrics, x):
            metrics.update(loss=x, top=x)
            return metrics, metrics.flush()

        return jax.lax.scan(body, metrics, xs)[1]

    windows = jax.jit(jax.vmap(loop, in_axes=(None, 0)))(DistributedMetrics(SPEC), stacked(jnp.asarray(LOSSES)))
    np.testing.assert_allclose(windows["loss"], np.tile(LOSSES.mean(axis=1), (3, 1)))


def test_misuse():
    metrics = DistributedMetrics(SPEC)
    for wrong in (0, 2.0, True):
        with pytest.raises(ValueError, match="whole number"):
            flush_every(metrics, 0, wrong, print)
    with pytest.raises(TypeError, match="callback"):
        flush_every(metrics, 0, 1, None)
    with pytest.raises(ValueError, match="one number"):
        flush_every(metrics, np.arange(3), 1, print)


def test_a_program_that_ends_at_once_has_told_all():
    code = f"""
import jax, jax.numpy as jnp, sys, time
from distributed_metrics import DistributedMetrics, flush_every
def slow(step, window):
    time.sleep(0.05)
    print(step, window["loss"], flush=True)
def body(metrics, step):
    metrics.update(loss=step)
    flush_every(metrics, step, {EVERY}, slow)
    return metrics, None
jax.jit(lambda metrics: jax.lax.scan(body, metrics, jnp.arange({STEPS}))[0])(DistributedMetrics({{"loss": "mean"}}))
sys.exit(0)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ, capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.split() == ["4", "2.0", "9", "7.0", "14", "12.0", "19", "17.0"]


def test_an_eager_flush_is_told_on_the_same_thread_as_others():
    metrics, told = DistributedMetrics({"loss": "mean"}), []
    for step in range(4):
        metrics.update(loss=float(step))
        flush_every(
            metrics, step, 2, lambda step, window: told.append((step, window["loss"], threading.current_thread()))
        )
    wait_for_callbacks()
    assert [one[:2] for one in told] == [(1, 0.5), (3, 2.5)]
    assert {thread.name for *_, thread in told} == {"flush_every"}
