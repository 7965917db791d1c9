"""What ``assert_silent`` says: the value that is moved, where it comes from, and what keeps it still."""

import functools
import json
import re
from typing import Any

import equinox as eqx
import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from distributed_metrics import DistributedMetrics, assert_silent, collective_bytes, count_collectives, hlo
from ways import make_mesh

SEVERAL = {"data": 4, "context": 2}
X = np.arange(128, dtype=np.float32).reshape(16, 8)


def put(mesh, spec, x=X):
    return jax.device_put(x, NamedSharding(mesh, spec))


def objections(fn, *args, **kwargs):
    """The message, without numbers of lines."""
    with pytest.raises(AssertionError) as error:
        assert_silent(fn, *args, **kwargs)
    return re.sub(r"test_audit\.py:\d+", "test_audit.py:0", str(error.value))


def advised(message):
    """The ``spec=`` that a message shows, read as the code that it is."""
    (code,) = re.findall(r"metrics\.update\(\.\.\., spec=(.*)\)$", message, flags=re.MULTILINE)
    return eval(code, {"P": P})


def test_a_value_over_two_dims_of_an_auto_mesh_is_named_with_its_argument_and_the_spec_that_keeps_it_still():
    mesh = make_mesh(SEVERAL, explicit=False)
    metrics = DistributedMetrics({"loss": "mean"}, mesh=mesh)
    batch = {"tokens": {"loss": put(mesh, P("data", "context"))}}

    def update(metrics, batch, spec=None):
        metrics.update(loss=batch["tokens"]["loss"], spec=spec)

    message = objections(update, metrics, batch)
    assert message == (
        "assert_silent(update): the compiled program holds 2 all-reduces.\nEach array that is sent:\n"
        "\n"
        "  all-reduce of f32[] (2 times): metrics.update() of 'loss', shape (16, 8), test_audit.py:0, in "
        "test_a_value_over_two_dims_of_an_auto_mesh_is_named_with_its_argument_and_the_spec_that_keeps_it_still"
        ".<locals>.update\n"
        "    the argument\n"
        "      batch['tokens']['loss']: float32 (16, 8), P(\"data\", \"context\")\n"
        "    On Auto axes JAX does not show how it lies. If it lies as batch['tokens']['loss'], say so, and it is not "
        "moved:\n"
        '      metrics.update(..., spec={"loss": P("data", "context")})'
    )
    assert_silent(lambda metrics, batch: update(metrics, batch, advised(message)), metrics, batch)


@pytest.mark.parametrize("computed", [False, True], ids=["argument", "intermediate"])
def test_a_value_over_the_second_dim_of_an_auto_mesh_of_one_axis_is_named(computed):
    mesh = make_mesh({"data": 8}, explicit=False)
    metrics = DistributedMetrics({"loss": "mean"}, mesh=mesh)

    def update(metrics, x, spec=None):
        metrics.update(loss=2 * x - x if computed else x, spec=spec)

    message = objections(update, metrics, put(mesh, P(None, "data")))
    assert "holds 1 all-to-all.\n" in message
    assert "metrics.update() of 'loss', shape (16, 8)" in message
    assert ("an intermediate, computed from\n" if computed else "the argument\n") in message
    assert 'x: float32 (16, 8), P(None, "data")\n' in message
    assert message.endswith('  metrics.update(..., spec={"loss": P(None, "data")})')
    spec = advised(message)
    assert_silent(lambda metrics, x: update(metrics, x, spec), metrics, put(mesh, P(None, "data")))


def test_of_several_values_those_that_are_moved_are_named_each_with_its_own_sources():
    mesh = make_mesh(SEVERAL, explicit=False)
    metrics = DistributedMetrics({"train": {"loss": "mean", "reward": "mean"}, "still": "mean"}, mesh=mesh)
    batch = {"x": put(mesh, P("data", "context")), "y": put(mesh, P("data"))}
    still = {"still": P("data", "context")}

    def update(metrics, batch, scale, spec):
        loss = batch["x"] * scale["of"][0]
        values = {"train": {"loss": loss, "reward": batch["y"][:, 0]}, "still": batch["x"]}
        metrics.update(values, spec=spec)

    arguments = (metrics, batch, {"of": [jnp.ones(())]})
    message = objections(lambda *args: update(*args, still), *arguments)
    assert "'still'" not in message
    first, second = message.split("\n\n")[1:]
    assert "metrics.update() of 'train/loss', shape (16, 8)" in first
    assert (
        "    an intermediate, computed from\n"
        '      args[1][\'x\']: float32 (16, 8), P("data", "context")\n'
        "      args[2]['of'][0]: float32 (), P()\n"
    ) in first
    assert "metrics.update() of 'train/reward', shape (16,)" in second
    assert "args[1]['y']: float32 (16, 8), P(\"data\")" in second
    specs = [advised(paragraph)["train"] for paragraph in (first, second)]
    assert specs == [{"loss": P("data", "context")}, {"reward": P("data")}]
    both = {**still, "train": {**specs[0], **specs[1]}}
    assert_silent(lambda *args: update(*args, both), *arguments)


def test_inside_a_loop_the_spec_is_that_of_one_round():
    mesh = make_mesh(SEVERAL, explicit=False)
    metrics = DistributedMetrics({"loss": "mean"}, mesh=mesh)

    def update(metrics, xs, spec=None):
        def body(metrics, x):
            metrics.update(loss=x, spec=spec)
            return metrics

        nnx.scan(body, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(metrics, xs)

    xs = put(mesh, P(None, "data", "context"), np.ones((3, 16, 8), np.float32))
    message = objections(update, metrics, xs)
    assert 'the argument\n      xs: float32 (3, 16, 8), P(None, "data", "context")\n' in message
    assert advised(message) == {"loss": P("data", "context")}
    assert_silent(lambda metrics, xs: update(metrics, xs, advised(message)), metrics, xs)


def test_in_both_branches_of_a_condition_values_are_named():
    mesh = make_mesh(SEVERAL, explicit=False)
    metrics = DistributedMetrics({"a": "mean", "b": "mean"}, mesh=mesh)

    def update(metrics, flag, x):
        nnx.cond(flag, lambda m, x: m.update(a=x), lambda m, x: m.update(b=x * x), metrics, x)

    message = objections(update, metrics, np.asarray(True), put(mesh, P("data", "context")))
    for name in "ab":
        assert f"update() of '{name}', shape (16, 8)" in message
    assert message.count('      x: float32 (16, 8), P("data", "context")\n') == 2


def test_collectives_of_the_train_step_itself_are_not_blamed_on_the_metrics():
    """Also where XLA packs them into one collective with those of the metrics."""
    mesh = make_mesh(SEVERAL, explicit=False)
    metrics = DistributedMetrics({"loss": "mean"}, mesh=mesh)

    def step(metrics, w, batch, spec=None):
        def loss_of(w):
            each = ((batch["x"] @ w) ** 2).sum(-1)
            return each.mean(), each

        gradient, each = jax.grad(loss_of, has_aux=True)(w)
        metrics.update(loss=each, spec=spec)
        return w - gradient

    arguments = metrics, jnp.ones((8, 4)), {"x": put(mesh, P("data"))}
    message = objections(step, *arguments)
    of_metrics, of_gradient = message.split("\n\n")[1:]
    assert "update() of 'loss', shape (16,)" in of_metrics
    assert advised(of_metrics) == {"loss": P("data")}
    assert re.search(r"all-reduce of f32\[(4,8|8,4)\]: test_audit.py:0, in .*loss_of\n", of_gradient)
    assert "      w: float32 (8, 4), P()\n" in of_gradient
    assert of_gradient.endswith("    It is not sent by the metrics: spec= would not change it.")
    assert "spec={" not in of_gradient

    message = objections(lambda metrics, w, batch: step(metrics, w, batch, P("data")), *arguments)
    assert "metrics.update()" not in message
    without = count_collectives(jax.jit(lambda w, batch: step(_NoMetrics(), w, batch)), *arguments[1:])
    assert count_collectives(lambda *args: step(*args, P("data")), *arguments) == without


class _NoMetrics:
    def update(self, **_: Any) -> None:
        pass


def test_what_is_packed_into_a_collective_of_the_train_step_shows_in_its_bytes():
    mesh = make_mesh({"data": 8}, explicit=False)
    metrics = DistributedMetrics({"loss": "ratio"}, mesh=mesh)

    def step(weights, x, metrics=None, reduced=False):
        def loss_fn(weights):
            losses = jnp.square(x @ weights)
            return losses.mean(), losses

        (_, losses), gradient = jax.value_and_grad(loss_fn, has_aux=True)(weights)
        if metrics is not None:
            metrics.update(loss=(losses.sum() if reduced else losses, 128))
        return weights - gradient, metrics

    weights, x = put(mesh, P(), X[:8]), put(mesh, P("data"))
    assert collective_bytes(step, weights, x) == {"all-reduce": 256}
    assert collective_bytes(step, weights, x, metrics) == {"all-reduce": 256}
    sends = functools.partial(step, reduced=True)
    assert count_collectives(sends, weights, x, metrics) == count_collectives(step, weights, x)
    assert collective_bytes(sends, weights, x, metrics) == {"all-reduce": 260}


def test_arguments_may_hold_none():
    mesh = make_mesh(SEVERAL, explicit=False)
    state = {"ema": None, "metrics": DistributedMetrics({"loss": "mean"}, mesh=mesh)}
    message = objections(lambda state, x: state["metrics"].update(loss=x), state, put(mesh, P("data", "context")))
    assert advised(message) == {"loss": P("data", "context")}


def test_a_shape_whose_sharding_is_not_said_is_an_error():
    """XLA would choose one for which nothing is sent."""
    mesh = make_mesh(SEVERAL, explicit=False)
    lies = NamedSharding(mesh, P("data", "context"))

    def make():
        return DistributedMetrics({"loss": "mean"}, mesh=mesh)

    def step(metrics, x):
        metrics.update(loss=x)
        return metrics

    shape, known = jax.ShapeDtypeStruct(X.shape, X.dtype), jax.ShapeDtypeStruct(X.shape, X.dtype, sharding=lies)
    sent = {"all-reduce": 2}
    assert count_collectives(step, make(), put(mesh, lies.spec)) == sent
    assert count_collectives(step, nnx.eval_shape(make), known) == sent
    said = jax.jit(step, in_shardings=(make().sharding, lies))
    assert count_collectives(said, jax.eval_shape(make), shape) == sent
    assert count_collectives(said.lower(jax.eval_shape(make), shape).compile()) == sent
    for ask in (count_collectives, collective_bytes, assert_silent):
        with pytest.raises(ValueError, match=r"The argument \[1\] is a shape without a sharding: XLA would choose one"):
            ask(step, make(), shape)
    with pytest.raises(
        ValueError, match=r"The argument \[0\].sum_rows.*\n.*an object\n  nnx.eval_shape\(lambda: Distri"
    ):
        count_collectives(step, jax.eval_shape(make), known)


def test_a_step_of_equinox_is_counted():
    mesh = make_mesh({"data": 8}, explicit=False)
    metrics, x = DistributedMetrics({"loss": "mean"}, mesh=mesh), put(mesh, P("data"))
    assert count_collectives(eqx.filter_jit(lambda metrics, x: (metrics.update(loss=x), metrics)[1]), metrics, x) == {}
    assert count_collectives(eqx.filter_jit(lambda x: x.sum()), x) == {"all-reduce": 1}


def test_a_step_that_holds_its_object_is_told_to_take_it_as_an_argument():
    metrics = DistributedMetrics({"loss": "mean"})
    step = nnx.cached_partial(nnx.jit(lambda metrics, x: metrics.update(loss=x)), metrics)
    for ask in (count_collectives, assert_silent):
        with pytest.raises(flax.errors.TraceContextError) as error:
            ask(step, jnp.ones(3))
        assert "give them as arguments" in error.value.__notes__[-1]


def test_a_reduction_of_the_users_before_the_update_is_shown_with_its_line():
    mesh = make_mesh(SEVERAL, explicit=False)
    metrics = DistributedMetrics({"loss": "mean"}, mesh=mesh)
    message = objections(lambda metrics, x: metrics.update(loss=x.mean()), metrics, put(mesh, P("data", "context")))
    assert "all-reduce of f32[] (2 times): test_audit.py:0, in test_a_reduction_of_the_users" in message
    assert message.endswith("It is not sent by the metrics: spec= would not change it.")


@pytest.mark.parametrize("way", ["shard_map", "pmap"])
def test_collectives_of_mapped_code_are_shown(way):
    mesh = make_mesh({"i": 8}, explicit=False)

    def body(x):
        return jax.lax.psum(x.sum(), "i")

    if way == "shard_map":
        mapped: Any = jax.jit(jax.shard_map(body, mesh=mesh, in_specs=P("i"), out_specs=P()))
    else:
        mapped = jax.pmap(body, axis_name="i")
    x = np.ones((8, 3), np.float32)
    message = objections(mapped, put(mesh, P("i"), x) if way == "shard_map" else x)
    assert (
        "all-reduce of f32[]: test_audit.py:0, in test_collectives_of_mapped_code_are_shown.<locals>.body\n" in message
    )
    assert 'an intermediate, computed from\n      x: float32 (8, 3), P("i")\n' in message
    assert message.endswith("It is not sent by the metrics: spec= would not change it.")


def test_an_update_in_mapped_code_and_on_explicit_axes_is_silent():
    mesh = make_mesh(SEVERAL, explicit=True)
    metrics = DistributedMetrics({"loss": ("mean", "max")}, mesh=mesh)

    def update(metrics, x):
        metrics.update(loss=2 * x - x)

    both = P(tuple(SEVERAL))
    mapped = nnx.jit(nnx.shard_map(update, mesh=mesh, in_specs=(both, both), out_specs=P()))
    assert_silent(mapped, metrics, put(mesh, both, X.reshape(-1)))
    assert_silent(update, metrics, put(mesh, P("data", "context")))
    assert_silent(jax.jit(lambda metrics, x: (metrics.update(loss=x), metrics)[1]), metrics, put(mesh, P("data")))


def test_a_flush_says_that_it_is_one():
    mesh = make_mesh({"data": 8}, explicit=False)
    metrics = DistributedMetrics({"loss": "mean"}, mesh=mesh)
    message = objections(lambda metrics: metrics.flush(), metrics)
    assert 'the argument\n      metrics.sum_rows: float32 (8, 2, 2), P("data")\n' in message.replace(
        "('data',)", '"data"'
    )
    assert message.endswith("It is what flush() sends; spec= would not change it.")


def test_a_reducer_says_that_it_is_one():
    message = objections(jax.pmap(lambda x: DistributedMetrics().reduce_mean({"a": x})["a"]), np.ones(8, np.float32))
    assert message.endswith("It is what reduce_mean() sends; spec= would not change it.")


def test_an_object_of_one_row_is_told_to_have_more():
    mesh = make_mesh({"data": 8}, explicit=False)
    x = put(mesh, P("data"))
    message = objections(lambda metrics, x: metrics.update(loss=x), DistributedMetrics({"loss": "mean"}), x)
    assert message.endswith(
        "    The object has one row, and the value lies on several devices. Give each device a row:\n"
        "      DistributedMetrics({...}, mesh=mesh)"
    )
    assert_silent(lambda metrics, x: metrics.update(loss=x), DistributedMetrics({"loss": "mean"}, mesh=mesh), x)


@pytest.mark.parametrize("explicit", [False, True], ids=["auto", "explicit"])
def test_an_object_whose_rows_are_shared_is_told_to_have_more(explicit):
    mesh = make_mesh(SEVERAL, explicit)
    x = put(mesh, P("data", "context"))

    def update(metrics, x):
        metrics.update(loss=x, spec=P("data", "context"))

    message = objections(update, DistributedMetrics({"loss": "mean"}, mesh=mesh, axis_name="data"), x)
    assert message.endswith(
        "    Devices that share a row hold different parts of the value. Give each device a row, by leaving out\n"
        "    axis_name=: DistributedMetrics({...}, mesh=mesh)"
    )
    assert_silent(update, DistributedMetrics({"loss": "mean"}, mesh=mesh), x)


def test_a_spec_that_is_not_how_the_value_lies_is_corrected():
    mesh = make_mesh(SEVERAL, explicit=False)
    metrics = DistributedMetrics({"loss": "mean"}, mesh=mesh)
    x = put(mesh, P("data", "context"))
    message = objections(lambda metrics, x: metrics.update(loss=x, spec=P("data")), metrics, x)
    assert "all-gather of f32[4,4]: metrics.update() of 'loss', shape (16, 8)" in message
    assert advised(message) == {"loss": P("data", "context")}


def test_where_arguments_lie_differently_the_spec_is_left_to_the_reader():
    mesh = make_mesh({"a": 4, "b": 2}, explicit=False)
    metrics = DistributedMetrics({"loss": "mean"}, mesh=mesh)
    message = objections(lambda m, x, y: m.update(loss=x * y), metrics, put(mesh, P("a")), put(mesh, P(None, "b")))
    assert '      x: float32 (16, 8), P("a")\n      y: float32 (16, 8), P(None, "b")\n' in message
    assert message.endswith('Say how it lies, and it is not moved:\n      metrics.update(..., spec={"loss": P(...)})')


def test_a_move_between_the_users_own_operations_is_not_blamed_on_the_metrics():
    mesh = make_mesh({"a": 4, "b": 2}, explicit=False)
    metrics = DistributedMetrics({"loss": "mean"}, mesh=mesh)
    message = objections(lambda m, x, y: m.update(loss=x * y), metrics, put(mesh, P("a")), put(mesh, P("b")))
    [paragraph] = [one for one in message.split("\n\n") if 'y: float32 (16, 8), P("b")' in one]
    assert "metrics.update() of" not in paragraph
    assert paragraph.endswith(("It is not sent by the metrics: spec= would not change it.", '{"name": P(...)})'))


def test_arrays_of_modules_are_named_by_their_attributes():
    mesh = make_mesh(SEVERAL, explicit=False)
    metrics = DistributedMetrics({"loss": "mean"}, mesh=mesh)
    model = nnx.Linear(8, 4, rngs=nnx.Rngs(0))
    message = objections(lambda model, m, x: m.update(loss=model(x) ** 2), model, metrics, put(mesh, P("data")))
    assert 'x: float32 (16, 8), P("data")\n' in message
    assert "      model.bias: float32 (4,), P()\n      model.kernel: float32 (8, 4), P()\n" in message


ACCELERATOR_TEXT = """\
HloModule jit_step, is_scheduled=true

FileNames
1 "/home/me/train.py"

FunctionNames
1 "step"

FileLocations
1 {file_name_id=1 function_name_id=1 line=7 end_line=7 column=0 end_column=9}

StackFrames
1 {file_location_id=1 parent_frame_id=1}

%body (p: (s32[], f32[4]{0:T(256)})) -> (s32[], f32[4]) {
  %p = (s32[], f32[4]{0:T(256)}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %v = f32[4]{0:T(256)} get-tuple-element(%p), index=1
  %start = (f32[4]{0:T(256)}, f32[32]{0:T(256)}) all-gather-start(%v), channel_id=1, dimensions={0}
  %done = f32[32]{0:T(256)} all-gather-done(%start)
  ROOT %out = (s32[], f32[4]{0:T(256)}) tuple(%i, %v)
}

%inner (q: f32[4]) -> (f32[1], f32[1], f32[1], f32[1], f32[1], /*index=5*/f32[1]) {
  %q = f32[4]{0} parameter(0)
  ROOT %mixed = (f32[1], f32[1], f32[1], f32[1], f32[1], /*index=5*/f32[1]) all-to-all(%q, %q, %q, %q, %q, %q)
}

%left (l: f32[4]) -> f32[4] {
  ROOT %l = f32[4]{0} parameter(0)
}

%right (r: f32[4]) -> f32[4] {
  ROOT %r = f32[4]{0} parameter(0)
}

ENTRY %main (a: f32[4], b: f32[4], c: s32[]) -> f32[4] {
  %a = f32[4]{0} parameter(0), metadata={op_name="batch[\\'a\\']"}
  %b = f32[4]{0} parameter(1), metadata={op_name="b"}
  %c = s32[] parameter(2), metadata={op_name="c"}
  %chosen = pred[] constant(true)
  %sum = f32[4]{0} add(%a, %a), metadata={op_name="jit(step)/add" stack_frame_id=1}
  %first = (s32[], f32[4]{0}) tuple(%c, %sum)
  %loop = (s32[], f32[4]{0}) while(%first), condition=%cond, body=%body
  %either = f32[4]{0} conditional(%chosen, %a, %b), true_computation=%left, false_computation=%right
  %moved = f32[4]{0} collective-permute(%either), channel_id=3
  %begun = ((f32[4]), (f32[1]), u32[]) async-start(%b), calls=%inner
  ROOT %result = f32[4]{0} get-tuple-element(%loop), index=1
}
"""


def test_programs_of_accelerators_are_read():
    """Asynchronous collectives, tiled layouts, long tuples, loops, branches: sources are found through all of them."""
    program = hlo.parsed(ACCELERATOR_TEXT)
    sources = {}
    for node in program.collectives():
        start = node._replace(instruction=program[node].operands[0])
        reached = [program[one] for one in program.reached([start], program.before)]
        sources[program[node].collective] = {one.op_name for one in reached if one.op_name and "jit" not in one.op_name}
    assert sources == {"all-gather": {"batch['a']"}, "all-to-all": {"b"}, "collective-permute": {"batch['a']", "b"}}
    (frame,) = program.frames(program.computations["main"]["sum"])
    assert frame == ("/home/me/train.py", "step", 7)


def test_a_name_with_braces_and_quotes_is_told_and_its_advice_is_code():
    mesh = make_mesh({"a": 4, "b": 2}, explicit=False)
    name = 'a{b}\'s "c"'
    metrics, x = DistributedMetrics({name: "mean"}, mesh=mesh), put(mesh, P("a", "b"))
    message = objections(lambda metrics, x: metrics.update({name: x}), metrics, x)
    advice = f'metrics.update(..., spec={{{json.dumps(name)}: P("a", "b")}})'
    assert message.endswith(advice)
    assert_silent(lambda metrics, x: metrics.update({name: x}, spec={name: P("a", "b")}), metrics, x)


def test_a_weight_that_is_moved_is_never_said_to_be_none_of_the_metrics():
    """jax 0.12 leaves out of the compiled program who asked for it."""
    mesh = make_mesh({"a": 4, "b": 2}, explicit=False)
    metrics, x, weight = DistributedMetrics({"loss": "mean"}, mesh=mesh), put(mesh, P("a")), put(mesh, P("a", "b"))
    message = objections(lambda m, x, w: m.update(loss=x, weight=w, spec=P("a")), metrics, x, weight)
    assert "spec= would not change it" not in message
    assert message.endswith(('spec={"loss": P("a", "b")})', 'spec={"name": P(...)})'))
    assert_silent(lambda m, x, w: m.update(loss=x, weight=w, spec=P("a", "b")), metrics, x, weight)
