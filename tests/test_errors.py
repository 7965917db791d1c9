"""Every mistake has its own text, beside the mistake that brings it up; and nothing accumulated is lost."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from distributed_metrics import Accumulator, DistributedMetrics, Histogram, Max, Mean, Quantile, Std, Var
from distributed_metrics.merging import MERGES
from ways import make_mesh


class NoContribution(Accumulator):
    pass


class OddFields(Accumulator):
    fields = {"total": "sum"}

    def contribution(self, batch):
        return {"totl": batch.sum()}


class OddShape(Accumulator):
    fields = {"total": "sum"}

    def contribution(self, batch):
        return {"total": batch.elements}


class NotReduced(Accumulator):
    fields = {"total": "sum"}

    def contribution(self, batch):
        return {"total": batch.map(jnp.abs)}


class OddMerge(Accumulator):
    fields = {"total": "median"}


class Unhashable(Mean):
    __hash__ = None  # type: ignore[assignment]  # so that it is none


@pytest.mark.parametrize(
    ("spec", "error", "text"),
    [
        ({"": "mean"}, ValueError, "a metric's name is empty ('')"),
        ({" ": "mean"}, ValueError, "a metric's name is empty (' ')"),
        ({"a": {"": "mean"}}, ValueError, "a metric's name is empty ('') in ['a']"),
        ({1: "mean"}, TypeError, "a metric's name must be a string, got 1 (int).\n  For example: '1'"),
        ({"a\nb": "mean"}, ValueError, "holds the control character '\\n', which could forge lines in a log"),
        ({"a\x1b[31m": "mean"}, ValueError, "holds the control character '\\x1b'"),
        ({"a\u2028": "mean"}, ValueError, "holds the control character '\\u2028'"),
        (
            {"a/b": "mean", "a": {"b": "sum"}},
            ValueError,
            "two metrics flatten to one name, 'a/b': ['a/b'] and ['a']['b'].\n  Rename one of them.",
        ),
        (
            {"a": ("mean", "mean")},
            ValueError,
            "one name, 'a/mean': ['a']['mean'] and ['a']['mean'].\n  Once is enough.",
        ),
        ({"a": ("mean", "max"), "a/mean": "sum"}, ValueError, "two metrics flatten to one name, 'a/mean'"),
        ({"a/b": ("mean", "max"), "a": {"b": "sum"}}, ValueError, "two metrics flatten to one name, 'a/b'"),
        (
            {"loss": "maen"},
            ValueError,
            "['loss'] asks for 'maen', which is no known operation.\n  Known: 'mean', 'sum', 'count', 'max', 'min', "
            "'ratio', 'var', 'std', 'last'. Did you mean 'mean'?",
        ),
        ({"loss": 3}, TypeError, "['loss'] is 3 (int), which cannot be accumulated.\n  Give one of 'mean'"),
        ({"loss": None}, TypeError, "['loss'] is None (NoneType), which cannot be accumulated"),
        ({"loss": Mean}, TypeError, "['loss'] is the class Mean, not an accumulator.\n  Make one: Mean()"),
        ({"loss": ()}, ValueError, "['loss'] is an empty tuple: nothing to accumulate"),
        ({"loss": ("mean", "ratio")}, ValueError, "'loss' is accumulated both as mean and as ratio"),
        ({"loss": ("mean", Max(shape=(3,)))}, ValueError, "both as mean and as max[3], which take different values"),
        (
            {"loss": OddMerge()},
            ValueError,
            "OddMerge.fields has unknown merges {'total': 'median'}.\n  Known: 'sum', 'max'",
        ),
        ({"loss": Unhashable()}, TypeError, "the accumulator of ['loss'] cannot be hashed"),
        (
            {"loss": Histogram},
            TypeError,
            "['loss'] is the class Histogram, not an accumulator.\n  Make one: Histogram(edges)",
        ),
        (
            {"loss": "median"},
            ValueError,
            "Did you mean Quantile(0.5)?\n  Others have settings: Quantile(0.5), Histogram(",
        ),
        ({"loss": "average"}, ValueError, "Did you mean 'mean'?"),
        (
            {"x": Mean(shape=2), "x/0": "sum"},
            ValueError,
            "two results flatten to one name, 'x/0': one of those of ['x'], mean[2], and ['x/0'].\n  Rename one",
        ),
        ({"x": Mean(shape=2, labels=("a", "b")), "x/b": "sum"}, ValueError, "two results flatten to one name, 'x/b'"),
        ({"x": Histogram([0, 1]), "x/overflow": "sum"}, ValueError, "two results flatten to one name, 'x/overflow'"),
        ({"x": Histogram([0, 1], shape=2), "x/1/nan": "sum"}, ValueError, "two results flatten to one name, 'x/1/nan'"),
        ({"x": Mean(shape=2, labels=(0, 1))}, TypeError, "a label of ['x'] must be a string, got 0 (int).\n  For exam"),
        (["loss"], TypeError, "takes a dict of names to what is accumulated, not list"),
        ("loss", TypeError, 'For example: DistributedMetrics({"loss": "mean", "tokens": "sum"})'),
    ],
)
def test_a_bad_spec_is_an_error(spec, error, text):
    with pytest.raises(error, match=re.escape(text)):
        DistributedMetrics(spec)


def test_a_bad_mesh_axis_or_policy_is_an_error():
    mesh = make_mesh({"data": 4, "model": 2}, explicit=False)
    with pytest.raises(ValueError, match=r"axis_name='batch'\): the mesh has the axes \('data', 'model'\)"):
        DistributedMetrics({"x": "mean"}, mesh=mesh, axis_name="batch")
    with pytest.raises(ValueError, match="each once"):
        DistributedMetrics({"x": "mean"}, mesh=mesh, axis_name=("data", "data"))
    with pytest.raises(TypeError, match=r"takes a jax.sharding.Mesh, got int: 8.\n  For example: mesh=jax.make_mesh"):
        DistributedMetrics({"x": "mean"}, mesh=8)  # type: ignore[arg-type]  # the mistake
    with pytest.raises(ValueError, match=r"axis_name='data'\): there is no mesh(.|\n)*jax.set_mesh\(mesh\)"):
        DistributedMetrics({"x": "mean"}, axis_name="data")
    with pytest.raises(ValueError, match="nan_policy='drop'"):
        DistributedMetrics({"x": "mean"}, nan_policy="drop")


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: Mean(shape="3"), TypeError, "Mean(shape='3'): the shape of one element, such as 10 or (10, 3)."),
        (lambda: Quantile("p99"), TypeError, "Quantile(q='p99'): a number, or several."),
        (lambda: Quantile(0.5, "1%"), TypeError, "Quantile(relative_error='1%'): a number, or several."),  # type: ignore[arg-type]  # the mistake
        (lambda: Histogram("auto"), TypeError, "Histogram(edges='auto'): a number, or several."),
        (lambda: Mean(shape=(0,)), ValueError, "of sizes of 1 or more"),
        (lambda: Mean(shape=2, labels=("a", "a")), ValueError, "the label 'a' is there twice"),
        (lambda: Var(ddof="1"), ValueError, "Var(ddof='1'): a number, 0 or more"),  # type: ignore[arg-type]  # the mistake
        (lambda: Std(ddof=-1), ValueError, "For example: Std(ddof=1)"),
    ],
)
def test_a_bad_setting_is_an_error_when_the_accumulator_is_made(make, error, text):
    with pytest.raises(error, match=re.escape(text)):
        make()


def test_names_that_may_be_elements_of_others_and_are_not():
    others = ("x/0", "x/012", "x/a", "y", "y/0", "h/mean", "h/underflow/0")
    metrics = DistributedMetrics({"x": Mean(shape=12), "h": Histogram([0, 1]), **dict.fromkeys(others, "mean")})
    metrics.update({"x": np.ones(12), "h": 2.0, **dict.fromkeys(others, 1.0)})
    assert len(metrics.compute().flatten(empty="nan")) == 12 + (1 + 3) + len(others)


def test_flat_names_of_another_separator_may_not_be_one():
    metrics = DistributedMetrics({"a": {"b": "mean"}, "a_b": "mean"})
    with pytest.raises(ValueError, match=r"flatten\(sep='_'\): two results flatten to one name, 'a_b'"):
        metrics.compute().flatten(sep="_")


ONES = np.ones((4, 3), np.float32)


@pytest.mark.parametrize(
    ("values", "kwargs", "error", "text"),
    [
        (
            {"lss": 1.0},
            {},
            ValueError,
            "metrics.update() got 'lss', which this object does not accumulate.\n"
            "  It accumulates: 'loss', 'train/acc', 'ratio', 'vector', 'tuple'. Did you mean 'loss'?\n"
            '  To add it: DistributedMetrics({..., "lss": "mean"})',
        ),
        ({"weights": 1.0}, {}, ValueError, "got 'weights', which this object does not accumulate"),
        (
            {"tuple/max": 1.0},
            {},
            ValueError,
            "got 'tuple/max', which is a result of 'tuple'.\n  Give the value once, for all its statistics: "
            "metrics.update({'tuple': x})",
        ),
        ({"weights": 1.0}, {}, ValueError, "A mask or weights of the values are the argument weight=."),
        ({"loss": 1.0, "mask": 1.0}, {}, ValueError, "A mask or weights of the values are the argument weight=."),
        ({"weigth": 1.0}, {}, ValueError, "Did you mean the argument weight=?"),
        ({"train": {"ac": 1.0}}, {}, ValueError, "got 'train/ac', which this object does not accumulate"),
        ({"train": 1.0}, {}, ValueError, "got 'train', which this object does not accumulate"),
        ({"train/acc": 1.0, "train": {"acc": 1.0}}, {}, ValueError, "metrics.update() got 'train/acc' twice: "),
        (1.0, {}, TypeError, "metrics.update() takes a dict of names to values, got float"),
        ({"loss": "high"}, {}, TypeError, "the value of 'loss' is no number: a str: 'high'."),
        (
            {"loss": None},
            {},
            TypeError,
            "the value of 'loss' is no number: a NoneType: None.\n  Give a scalar or an array",
        ),
        ({"loss": None}, {}, TypeError, "or leave it out: metrics that are not named are left alone"),
        ({"loss": {"a": 1.0}}, {}, TypeError, "the spec is a dict as well: DistributedMetrics({'loss': {...}})"),
        ({"loss": 10**400}, {}, ValueError, "the value of 'loss' is an integer beyond every float: about 2^1329."),
        ({"loss": [1.0, 2.0]}, {}, TypeError, "of a list make one: jnp.asarray(...)"),
        (
            {"loss": (1.0, 2.0)},
            {},
            TypeError,
            "a tuple: (1.0, 2.0).\n  Of a sum and what it is divided by, the accumul",
        ),
        ({"loss": (ONES, ONES[0])}, {}, TypeError, "a tuple of arrays of the shapes (4, 3), (3,).\n  Of a sum"),
        ({"loss": np.array(["a"])}, {}, TypeError, "the value of 'loss' is no number: an array of <U1"),
        ({"loss": jax.random.key(0)}, {}, TypeError, "the value of 'loss' is no number: an array of key"),
        ({"loss": 1j}, {}, TypeError, "the value of 'loss' is complex (complex128)"),
        (
            {"loss": jnp.ones(3, jnp.complex64)},
            {},
            TypeError,
            "Give its magnitude, jnp.abs(x), or its real part, x.real",
        ),
        ({"loss": ONES}, {"weight": "no"}, TypeError, "the weight of 'loss' is no number"),
        ({"loss": ONES}, {"weight": 1j}, TypeError, "the weight of 'loss' is complex"),
        (
            {"loss": ONES},
            {"weight": np.ones(3)},
            ValueError,
            "the weight of 'loss' has shape (3,), and its value has shape (4, 3): they do not align.\n  Weights align "
            "with the leading dims of a value; a dim of size 1 is stretched. Probably: weight[None, ...]",
        ),
        (
            {"loss": ONES},
            {"weight": np.ones((4, 3, 1))},
            ValueError,
            "has shape (4, 3, 1), and its value has shape (4, 3)",
        ),
        (
            {"loss": ONES, "train": {"acc": 1.0}},
            {"weight": np.ones(4)},
            ValueError,
            "the weight of 'train/acc' has shape (4,), and its value has shape (): they do not align.\n  Weights align "
            "with the leading dims of a value; a dim of size 1 is stretched. Give weights by name, and none to "
            "'train/acc' if it needs none: weight={'loss': mask}",
        ),
        (
            {"ratio": (ONES, ONES[0])},
            {"weight": np.ones(4)},
            ValueError,
            "the weight of 'ratio (denominator)' has shape (4,), and its value has shape (3,)",
        ),
        ({"loss": ONES}, {"weight": {"lss": ONES}}, ValueError, "metrics.update(weight=) got 'lss', which this object"),
        ({"loss": ONES}, {"spec": {"lss": P()}}, ValueError, "metrics.update(spec=) got 'lss', which this object"),
        ({"vector": np.ones((4, 3))}, {}, ValueError, "'vector' has shape (4, 3), and Mean(shape=(2,)) takes (..., 2)"),
        (
            {"vector": np.ones((4, 2))},
            {"weight": np.ones((4, 2))},
            ValueError,
            "has shape (4, 2), and its value has shape (4, 2): they do not align.\n  The kept dims (2,) take no "
            "weight: give one of shape (4,). For weights of their own, per class for example: Ratio(shape=(2,))",
        ),
        ({"loss": 1.0}, {"weight": {"train": 1}}, ValueError, "names 'train', and this call updates 'loss' only"),
        (
            {"loss": 1.0},
            {"weight": {"train/acc": 1}},
            ValueError,
            "names 'train/acc', and this call updates 'loss' only",
        ),
        (
            {"ratio": 1.0},
            {},
            ValueError,
            "'ratio' is accumulated as ratio, whose value is (numerator, denominator); got float",
        ),
        ({"ratio": (1.0, 2.0, 3.0)}, {}, ValueError, "got 3 parts.\n  For example: metrics.update({'ratio': (loss_sum"),
        ({"ratio": (1.0, "x")}, {}, TypeError, "the value of 'ratio (denominator)' is no number"),
    ],
)
@pytest.mark.parametrize("where", ["eager", "jit"])
def test_a_bad_update_is_an_error_and_changes_nothing(values, kwargs, error, text, where):
    metrics = DistributedMetrics(
        {
            "loss": "mean",
            "train": {"acc": "mean"},
            "ratio": "ratio",
            "vector": Mean(shape=(2,)),
            "tuple": ("mean", "max"),
        }
    )
    metrics.update(loss=3.0, train={"acc": 5.0})
    update = (
        (lambda m: m.update(values, **kwargs)) if where == "eager" else nnx.jit(lambda m: m.update(values, **kwargs))
    )
    with pytest.raises(error, match=re.escape(text)):
        update(metrics)
    assert metrics.compute().flatten() == {"loss": 3.0, "train/acc": 5.0}


def test_a_value_that_was_donated_is_an_error_that_names_it():
    metrics, loss = DistributedMetrics({"loss": "mean"}), jnp.ones(3)
    metrics.update(loss=loss)
    loss.delete()
    with pytest.raises(ValueError, match=r"the value of 'loss' was deleted: donated to a jitted function"):
        metrics.update(loss=loss)
    assert metrics.compute()["loss"] == 1.0


@pytest.mark.parametrize("method", ["update", "compute", "flush", "reset"])
def test_a_stateless_object_has_no_accumulators(method):
    metrics = DistributedMetrics()
    call = (lambda: metrics.update(loss=1.0)) if method == "update" else getattr(metrics, method)
    with pytest.raises(ValueError, match=rf"metrics.{method}\(\): this object has no accumulators") as error:
        call()
    assert 'Say what to accumulate: DistributedMetrics({"loss": "mean"})' in str(error.value)
    assert metrics.names == ()


def test_a_setting_that_comparisons_do_not_see_is_an_error():
    class Scaled(Mean):
        def __init__(self, scale):
            super().__init__()
            self.scale = scale

    with pytest.raises(TypeError, match=r"\['x'\]: Scaled has the attribute 'scale', which is no field of a dataclass"):
        DistributedMetrics({"x": Scaled(2.0)})

    @dataclasses.dataclass(frozen=True)
    class Derived(Mean):
        scale: float = 1.0

        def __post_init__(self):
            super().__post_init__()
            object.__setattr__(self, "twice", 2 * self.scale)  # follows from a setting

    DistributedMetrics({"x": Derived(scale=2.0)})


def test_an_object_that_came_back_as_the_same_on_all_devices_is_an_error_that_says_so():
    mesh = make_mesh({"data": 8}, explicit=False)
    metrics = DistributedMetrics({"x": "mean"}, mesh=mesh)

    def step(metrics, x):
        metrics.update(x=x)
        return metrics

    specs = {"mesh": mesh, "in_specs": (P("data"), P("data"))}
    whole = jax.jit(jax.shard_map(step, out_specs=P(), check_vma=False, **specs))(metrics, np.arange(8.0))
    with pytest.raises(ValueError, match=r"have 1 of the 8 rows of their mesh(.|\n)*out_specs=P\('data'\)"):
        whole.compute()
    split = jax.jit(jax.shard_map(step, out_specs=P("data"), **specs))(metrics, np.arange(8.0))
    assert split.compute()["x"] == 3.5


@pytest.mark.parametrize(
    ("accumulator", "error", "text"),
    [
        (
            NoContribution(),
            NotImplementedError,
            "NoContribution must say what a batch adds: def contribution(self, batch)",
        ),
        (
            OddFields(),
            ValueError,
            "OddFields.contribution() returned the fields ['totl', 'weight'], and OddFields.fields",
        ),
        (
            OddShape(),
            ValueError,
            "OddShape.contribution() returned 'total' of shape (2,), and the shape of OddShape is ()",
        ),
        (
            NotReduced(),
            TypeError,
            "NotReduced.contribution(): the field 'total' is a Batch, which is no number yet.\n  Reduce it",
        ),
    ],
)
def test_an_accumulator_that_does_not_keep_its_word_is_an_error(accumulator, error, text):
    with pytest.raises(error, match=re.escape(text)):
        DistributedMetrics({"x": accumulator}).update(x=np.ones(2))


class OtherMax(Max):
    fields = {"largest": dataclasses.replace(MERGES["max"])}


class OddMax(Max):
    fields = {"largest": dataclasses.replace(MERGES["max"], combine=lambda a, b: a)}


def test_two_merges_of_one_name_are_an_error_unless_they_are_alike():
    DistributedMetrics({"a": "max", "b": OtherMax()})
    with pytest.raises(
        ValueError, match=r"is named 'max', and another merge has that name.\n  Merges that differ need"
    ):
        DistributedMetrics({"a": "max", "b": OddMax()})


@pytest.mark.parametrize("name", ["weight", "spec"])
def test_a_metric_with_the_name_of_an_argument_is_given_in_a_dict(name):
    metrics = DistributedMetrics({name: "mean", "loss": "mean"})
    with pytest.raises(ValueError, match=f"this object has a metric named '{name}'"):
        metrics.update(loss=1.0, **{name: 2.0})
    with pytest.raises(ValueError, match=f"this object has a metric named '{name}'"):
        metrics.update(**{name: 2.0})
    metrics.update({name: 2.0, "loss": 1.0}, weight=1)
    assert metrics.compute().flatten() == {name: 2.0, "loss": 1.0}


def test_one_of_stacked_windows_is_taken_by_tree_map():
    snapshot = DistributedMetrics({"x": "mean"}).compute()
    with pytest.raises(KeyError, match=r"take one: jax.tree.map\(lambda x: x\[0\], snapshot\)"):
        snapshot[0]  # type: ignore[index]  # the mistake


# --- placement ---


DATA = P("data")


@pytest.fixture
def mesh():
    return make_mesh({"data": 8}, explicit=False)


def sharded(mesh, spec=DATA):
    return jax.device_put(np.ones(16, np.float32), NamedSharding(mesh, spec))


def test_one_row_and_a_value_on_several_devices_is_an_error(mesh):
    metrics = DistributedMetrics({"x": "mean"})
    text = r"'x' lives on 8 devices, and this object has one row.*\n.*mesh=mesh.*jax.set_mesh"
    for value in (sharded(mesh), sharded(mesh, P())):
        with pytest.raises(ValueError, match=text):
            metrics.update(x=value)
    explicit = make_mesh({"data": 8}, explicit=True)
    with pytest.raises(ValueError, match=text):
        nnx.jit(lambda m, x: m.update(x=x))(metrics, sharded(explicit))
    assert metrics.compute().flatten() == {}


def test_a_value_on_other_devices_is_an_error_that_names_both(mesh):
    half = jax.make_mesh((4,), ("data",), devices=jax.devices()[:4], axis_types=(jax.sharding.AxisType.Auto,))
    metrics = DistributedMetrics({"x": "mean"}, mesh=half)
    with pytest.raises(ValueError, match="'x' lies on other devices than the accumulators") as error:
        metrics.update(x=sharded(mesh))
    assert str(mesh) in str(error.value)
    assert str(half) in str(error.value)


def test_a_value_on_explicit_axes_that_the_rows_do_not_have_is_an_error():
    of_rows, of_value = make_mesh({"data": 8}, explicit=True), make_mesh({"batch": 8}, explicit=True)
    metrics = DistributedMetrics({"x": "mean"}, mesh=of_rows)
    x = jax.device_put(np.arange(8.0, dtype=np.float32), NamedSharding(of_value, P("batch")))
    with pytest.raises(ValueError, match="'x' lies on other devices than the accumulators"):
        nnx.jit(lambda metrics, x: metrics.update(x=x))(metrics, x)


@pytest.mark.parametrize(
    ("spec", "error", "text"),
    [
        (P("model"), ValueError, "'model' is no axis of the mesh; its axes are ('data',)"),
        (P(None, None, "data"), ValueError, "'x' has shape (16,): 1 dims for 3 entries"),
        ("data", TypeError, "'x' got 'data'; a spec is a jax.sharding.PartitionSpec"),
    ],
)
@pytest.mark.parametrize("where", ["eager", "jit"])
def test_a_spec_that_does_not_fit_is_an_error(mesh, spec, error, text, where):
    metrics = DistributedMetrics({"x": "mean"}, mesh=mesh)
    update = lambda m, x: m.update(x=x, spec=spec)  # noqa: E731 (the two ways share it)
    with pytest.raises(error, match=re.escape(text)):
        (update if where == "eager" else nnx.jit(update))(
            metrics, np.ones(16, np.float32) if where == "eager" else sharded(mesh)
        )


def test_a_spec_that_does_not_divide_is_an_error(mesh):
    metrics = DistributedMetrics({"x": "mean"}, mesh=mesh)
    with pytest.raises(ValueError, match=r"'x' has shape \(15,\), and 15 is not divisible by 8"):
        nnx.jit(lambda m, x: m.update(x=x[:15], spec=P("data")))(metrics, sharded(mesh))


def test_a_spec_that_contradicts_an_explicit_value_is_an_error():
    mesh = make_mesh({"data": 4, "model": 2}, explicit=True)
    metrics = DistributedMetrics({"x": "mean"}, mesh=mesh)
    with pytest.raises(ValueError, match=r"was said to be partitioned as .*model.*, and its type says .*data.*"):
        nnx.jit(lambda m, x: m.update(x=x, spec=P("model")))(metrics, sharded(mesh))
    nnx.jit(lambda m, x: m.update(x=x, spec=P("data")))(metrics, sharded(mesh))
    assert metrics.compute()["x"] == 1.0


@pytest.mark.parametrize("method", ["update", "compute", "flush", "reset"])
def test_rows_that_enter_mapped_code_unsplit_are_an_error(mesh, method):
    metrics = DistributedMetrics({"x": "mean"}, mesh=mesh)

    def call(metrics, x):
        metrics.update(x=x) if method == "update" else getattr(metrics, method)()
        return x

    with pytest.raises(ValueError, match="8 rows of the accumulators entered code that is mapped over") as error:
        nnx.shard_map(call, mesh=mesh, in_specs=(P(), P("data")), out_specs=P("data"))(metrics, sharded(mesh))
    assert "Split them over all their axes: in_specs=P(('data',))" in str(error.value)
    with pytest.raises(ValueError, match="8 rows of the accumulators entered code that is mapped by pmap"):
        nnx.pmap(call, in_axes=(None, 0))(metrics, np.ones((8, 2)))
    alone = DistributedMetrics({"x": "mean"})
    with pytest.raises(ValueError, match="this object has one row, and here 8 devices are mapped over"):
        nnx.shard_map(call, mesh=mesh, in_specs=(P(), P("data")), out_specs=P("data"))(alone, sharded(mesh))


def test_other_axes_than_those_of_the_rows_are_an_error(mesh):
    metrics = DistributedMetrics({"x": "mean"}, mesh=mesh)
    other = jax.make_mesh((8,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
    call = nnx.shard_map(
        lambda m, x: (m.update(x=x), x)[1], mesh=other, in_specs=(P("batch"), P("batch")), out_specs=P("batch")
    )
    with pytest.raises(ValueError, match=r"spread over the axes .*, and the axes mapped here are") as error:
        call(metrics, sharded(other, P("batch")))
    assert "('batch',)" in str(error.value)
    assert "data" in str(error.value)


# --- already reduced values in mapped code ---


def mapped(metrics, mesh, update):
    def local(metrics, x):
        update(metrics, x)
        return x

    program = nnx.shard_map(
        local, mesh=mesh, in_specs=(P(mesh.axis_names), P(mesh.axis_names)), out_specs=P(mesh.axis_names)
    )
    return program(metrics, sharded(mesh, P(mesh.axis_names)))


@pytest.mark.parametrize("spec", ["sum", "count", ("mean", "sum")], ids=str)
@pytest.mark.parametrize(
    "reduced",
    [
        lambda x: jax.lax.psum(x, ("data", "model")),
        lambda x: jax.lax.pmean(x, "data"),
        lambda x: jnp.ones(3),
    ],
    ids=["psum", "pmean-over-one-axis", "jnp.ones"],
)
def test_a_sum_of_an_already_reduced_value_is_an_error(spec, reduced):
    mesh = make_mesh({"data": 4, "model": 2}, explicit=False)
    metrics = DistributedMetrics({"x": spec}, mesh=mesh)
    with pytest.raises(ValueError, match="'x' is the same on all devices along") as error:
        mapped(metrics, mesh, lambda m, x: m.update(x=reduced(x)))
    assert "would count it once per device" in str(error.value)
    assert "jax.lax.pcast" in str(error.value)
    assert metrics.compute().flatten() == {}


def test_a_ratio_of_which_one_part_is_reduced_is_an_error():
    mesh = make_mesh({"data": 8}, explicit=False)
    metrics = DistributedMetrics({"x": "ratio"}, mesh=mesh)
    with pytest.raises(ValueError, match=r"of 'x', numerator differs over \['data'\] and denominator over \[\]"):
        mapped(metrics, mesh, lambda m, x: m.update(x=(x, jax.lax.psum(x, "data"))))
    mapped(metrics, mesh, lambda m, x: m.update(x=(jax.lax.psum(x, "data"), jax.lax.psum(2 * x, "data"))))
    assert metrics.compute()["x"] == 0.5


def test_what_may_be_the_same_on_all_devices_is_not_refused():
    mesh = make_mesh({"data": 8}, explicit=False)
    metrics = DistributedMetrics({"m": ("mean", "max", "min"), "s": "sum", "c": "count", "p": "sum"}, mesh=mesh)

    def update(metrics, x):
        metrics.update(m=jax.lax.pmean(jnp.sum(x), "data"), s=3, c=1)
        metrics.update(c=jnp.ones(2), weight=x > 0)
        metrics.update(p=jax.lax.pcast(jnp.ones(()), ("data",), to="varying"))

    mapped(metrics, mesh, update)
    assert metrics.compute().flatten() == {
        "m/mean": 2.0, "m/max": 2.0, "m/min": 2.0, "s": 24.0, "c": 8.0 + 16.0, "p": 8.0,
    }  # fmt: skip


def test_values_of_devices_that_share_a_row_are_an_error():
    mesh = make_mesh({"data": 4, "model": 2}, explicit=False)
    metrics = DistributedMetrics({"x": "mean"}, mesh=mesh, axis_name="data")

    def local(metrics, x):
        metrics.update(x=x)
        return x

    both = P(("data", "model"))
    program = nnx.shard_map(local, mesh=mesh, in_specs=(P("data"), both), out_specs=both)
    with pytest.raises(ValueError, match=r"'x' differs over \['model'\], and the rows spread over \('data',\) only"):
        program(metrics, sharded(mesh, both))
