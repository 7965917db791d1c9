"""Metrics that others wrote: the classes of clu and metrax, as rows that only meet when they are read."""

import inspect
import json
from typing import Any

import clu.metrics
import flax
import jax
import jax.numpy as jnp
import metrax
import numpy as np
import pytest
import sklearn.metrics
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from distributed_metrics import DistributedMetrics, Snapshot, count_collectives
from distributed_metrics.accumulators import CluMetric
from ways import AXES_2D, SOME_WAYS, make_mesh

ROWS = 32
PARTS = P("data")
RANDOM = np.random.default_rng(0)
SCORES = RANDOM.random(5 * ROWS).astype(np.float32)
LABELS = (RANDOM.random(5 * ROWS) < SCORES).astype(np.int32)
TARGETS = RANDOM.normal(size=5 * ROWS).astype(np.float32)
GUESSES = (TARGETS + 0.3 * RANDOM.normal(size=5 * ROWS)).astype(np.float32)
LOGITS = RANDOM.normal(size=(5 * ROWS, 7)).astype(np.float32)
CLASSES = RANDOM.integers(0, 7, 5 * ROWS).astype(np.int32)
RELEVANT = (RANDOM.random((5 * ROWS, 7)) < 0.4).astype(np.int32)
SENTENCES = RANDOM.normal(size=(5 * ROWS, 4, 7)).astype(np.float32)
WORDS = RANDOM.integers(0, 7, (5 * ROWS, 4)).astype(np.int32)
IMAGES = RANDOM.random((5 * ROWS, 12, 12, 1)).astype(np.float32)
NOISY = np.clip(IMAGES + 0.1 * RANDOM.normal(size=IMAGES.shape), 0, 1).astype(np.float32)
MASKS = (RANDOM.random((5 * ROWS, 6, 6)) < 0.5).astype(np.int32)

BINARY = {"predictions": SCORES, "labels": LABELS}
REGRESSION = {"predictions": GUESSES, "labels": TARGETS}
RANKING = {"predictions": LOGITS, "labels": RELEVANT, "ks": jnp.array([1, 3])}
TEXT = {"predictions": ["a b c d"], "references": ["a b c e"]}

METRAX = {
    "AUCPR": BINARY,
    "AUCROC": BINARY,
    "Accuracy": {"predictions": LOGITS.argmax(1), "labels": CLASSES},
    "Average": {"values": TARGETS},
    "AveragePrecisionAtK": RANKING,
    "BLEU": (TEXT, "a setting (a number, a string, a tuple)"),
    "DCGAtK": RANKING,
    "Dice": {"predictions": MASKS.astype(np.float32), "labels": MASKS[::-1].copy()},
    "FBetaScore": "has no merge() of its own",
    "IoU": {
        "predictions": MASKS, "targets": MASKS[::-1].copy(), "num_classes": 2, "target_class_ids": jnp.array([0, 1]),
    },
    "MAE": REGRESSION,
    "MRR": RANKING,
    "MSE": REGRESSION,
    "NDCGAtK": RANKING,
    "PSNR": {"predictions": NOISY, "targets": IMAGES, "max_val": 1.0},
    "Perplexity": {"predictions": SENTENCES, "labels": WORDS, "from_logits": True},
    "Precision": BINARY,
    "PrecisionAtK": RANKING,
    "RMSE": REGRESSION,
    "RSQUARED": REGRESSION,
    "Recall": BINARY,
    "RecallAtK": RANKING,
    "RougeL": (TEXT, "a setting (a number, a string, a tuple)"),
    "RougeN": (TEXT, "a setting (a number, a string, a tuple)"),
    "SNR": {"predictions": IMAGES[..., 0, 0], "targets": NOISY[..., 0, 0]},
    "SSIM": {"predictions": NOISY, "targets": IMAGES, "max_val": 1.0},
    "WER": (TEXT, "a setting (a number, a string, a tuple)"),
}  # fmt: skip
CLU = {
    "Accuracy": {"logits": LOGITS, "labels": CLASSES},
    "Average": {"values": TARGETS},
    "CollectingMetric": "collects all outputs on the host",
    "LastValue": 'keeps what the last device saw last.\n  Take "last"',
    "Metric": "has no from_model_output() of its own",
    "Std": ({"values": TARGETS}, '"std" accumulates the standard deviation'),
    "_ReductionCounter": "has no from_model_output() of its own",
}
"""What each class that they export takes; or the error that says why it cannot be accumulated."""

WORKING: list[tuple[Any, str, Any]] = [
    (metrax, name, given) for name, given in METRAX.items() if isinstance(given, dict)
]
WORKING += [(clu.metrics, name, given) for name, given in CLU.items() if isinstance(given, dict)]


def cut(outputs, start: int, stop: int):
    """The part of a batch; settings stay."""
    return {key: x[start:stop] if np.shape(x)[:1] == (5 * ROWS,) else x for key, x in outputs.items()}


def merged_by_itself(metric, outputs):
    """What the class gives without us: one state over all batches, by its own merge.

    The IoU of metrax is a mean over batches of the IoU of each, so that it depends on what a batch is: here, as in
    clu's own reduction over devices, a device's part of one.
    """
    size = ROWS // 8 if metric is metrax.IoU else ROWS
    states = [metric.from_model_output(**cut(outputs, i, i + size)) for i in range(0, 5 * ROWS, size)]
    state = states[0]
    for other in states[1:]:
        state = state.merge(other)
    return np.asarray(state.compute(), np.float64)


def on_mesh(outputs, mesh, spec=PARTS):
    def put(x):
        whole = not isinstance(x, np.ndarray)
        return x if whole or mesh is None else jax.device_put(x, NamedSharding(mesh, spec))

    return {key: put(x) for key, x in outputs.items()}


def settings_and_arrays(outputs):
    arrays = {key: x for key, x in outputs.items() if isinstance(x, np.ndarray)}
    return {key: x for key, x in outputs.items() if key not in arrays}, arrays


def test_the_table_has_every_class_that_metrax_and_clu_export():
    exported = {name for name in metrax.__all__ if inspect.isclass(getattr(metrax, name))}
    assert exported == set(METRAX)
    classes = inspect.getmembers(clu.metrics, inspect.isclass)
    assert {name for name, one in classes if issubclass(one, clu.metrics.Metric)} == set(CLU)


@pytest.mark.parametrize(
    ("module", "name", "outputs", "explicit"),
    [pytest.param(*case, False, marks=() if i % 4 == 0 else pytest.mark.slow) for i, case in enumerate(WORKING)]
    + [pytest.param(*case, True, marks=pytest.mark.slow) for case in WORKING[::12]],
    ids=lambda x: x if isinstance(x, str | bool) else "",
)
def test_a_class_on_eight_devices_gives_what_it_gives_by_itself(module, name, outputs, explicit):
    metric = getattr(module, name)
    mesh = make_mesh({"data": 8}, explicit=explicit)
    metrics = DistributedMetrics({"x": metric}, mesh=mesh)
    settings, arrays = settings_and_arrays(outputs)
    traces = []

    @nnx.jit
    def step(metrics, arrays):
        traces.append(1)
        metrics.update(x={**settings, **arrays})

    for start in range(0, 5 * ROWS, ROWS):
        step(metrics, on_mesh(cut(arrays, start, start + ROWS), mesh))
    assert len(traces) <= 2, "only the first update, which learns the shapes, is traced apart"
    expected = merged_by_itself(metric, outputs)
    np.testing.assert_allclose(metrics.compute()["x"], expected, rtol=2e-5, atol=1e-6)
    assert metrics.compute().count["x"] == 5 * ROWS
    np.testing.assert_allclose(nnx.jit(lambda m: m.compute()["x"])(metrics), expected, rtol=2e-5, atol=1e-6)
    batch = on_mesh(cut(arrays, 0, ROWS), mesh)
    assert count_collectives(step, metrics, batch) == {}
    assert sum(count_collectives(nnx.jit(lambda m: m.flush()), metrics).values()) == 1
    assert metrics.flush().flatten().keys() == metrics.compute().flatten(empty="nan").keys()
    assert np.isnan(metrics.compute()["x"]).all()


REFUSED: list[tuple[Any, str, Any]] = [
    (metrax, name, given) for name, given in METRAX.items() if not isinstance(given, dict)
]
REFUSED += [(clu.metrics, name, given) for name, given in CLU.items() if not isinstance(given, dict)]


@pytest.mark.parametrize(("module", "name", "why"), REFUSED, ids=[f"{m.__name__}.{n}" for m, n, _ in REFUSED])
def test_a_class_that_cannot_be_accumulated_says_why(module, name, why):
    metric = getattr(module, name)
    if isinstance(why, str):
        with pytest.raises(ValueError, match=r"\['x'\]: .*") as error:
            DistributedMetrics({"x": metric})
    else:
        metrics = DistributedMetrics({"x": metric, "loss": "mean"})
        metrics.update(loss=1.0)
        with pytest.raises((ValueError, TypeError), match="'x'") as error:
            metrics.update(x=why[0], loss=2.0)
        why = why[1]
        assert metrics.compute()["loss"] == 1.0
    assert why in str(error.value)


def test_results_agree_with_scikit_learn_on_eight_devices():
    mesh = make_mesh({"data": 8}, explicit=False)
    spec = {
        "binary": (metrax.AUCROC, metrax.Precision, metrax.Recall),
        "regression": (metrax.RMSE, metrax.MAE, metrax.RSQUARED),
        "ranking": metrax.NDCGAtK,
        "perplexity": metrax.Perplexity,
        "accuracy": clu.metrics.Accuracy,
    }
    metrics = DistributedMetrics(spec, mesh=mesh)
    for start in range(0, 5 * ROWS, ROWS):
        part = slice(start, start + ROWS)
        metrics.update({
            "binary": on_mesh(cut(BINARY, start, start + ROWS), mesh),
            "regression": on_mesh(cut(REGRESSION, start, start + ROWS), mesh),
            "ranking": {**on_mesh({"predictions": LOGITS[part], "labels": RELEVANT[part]}, mesh), "ks": jnp.array([3])},
            "perplexity": on_mesh({"predictions": SENTENCES[part], "labels": WORDS[part], "from_logits": True}, mesh),
            "accuracy": on_mesh({"logits": LOGITS[part], "labels": CLASSES[part]}, mesh),
        })  # fmt: skip
    result = metrics.flush().flatten()
    assert result["binary/aucroc"] == pytest.approx(sklearn.metrics.roc_auc_score(LABELS, SCORES), abs=1e-3)
    assert result["binary/precision"] == pytest.approx(sklearn.metrics.precision_score(LABELS, SCORES >= 0.5))
    assert result["binary/recall"] == pytest.approx(sklearn.metrics.recall_score(LABELS, SCORES >= 0.5))
    assert result["regression/rmse"] == pytest.approx(
        sklearn.metrics.root_mean_squared_error(TARGETS, GUESSES), rel=1e-5
    )
    assert result["regression/mae"] == pytest.approx(sklearn.metrics.mean_absolute_error(TARGETS, GUESSES), rel=1e-5)
    assert result["regression/rsquared"] == pytest.approx(sklearn.metrics.r2_score(TARGETS, GUESSES), rel=1e-5)
    assert result["ranking/0"] == pytest.approx(sklearn.metrics.ndcg_score(RELEVANT, LOGITS, k=3), rel=1e-5)
    probabilities = np.asarray(jax.nn.softmax(SENTENCES.astype(np.float64), axis=-1)).reshape(-1, 7)
    loss = sklearn.metrics.log_loss(WORDS.ravel(), probabilities, labels=range(7))
    assert result["perplexity"] == pytest.approx(np.exp(loss), rel=1e-4)
    assert result["accuracy"] == pytest.approx(sklearn.metrics.accuracy_score(CLASSES, LOGITS.argmax(1)))


@pytest.mark.parametrize("way", SOME_WAYS, ids=lambda way: way.name)
def test_every_way_of_running_agrees_without_a_collective_in_an_update(way):
    """An object learns the shapes of a clu metric from its first update; programs of fixed structure come after it."""

    def update(metrics, values):
        metrics.update({"auc": {"predictions": values["p"], "labels": values["y"]}}, loss=values["p"])

    def values(start):
        return {"p": SCORES[start : start + ROWS], "y": LABELS[start : start + ROWS]}

    with way.scope():
        metrics = way.make({"auc": metrax.AUCROC, "loss": "mean"})
        # graph=False, scan, cond and pmap keep the structure of what they carry, so these learn before.
        metrics.update({"auc": {"predictions": np.ones(ROWS, np.float32), "labels": np.ones(ROWS, np.int32)}})
        metrics.reset()
        run = way.step(way, update)
        for start in range(0, 5 * ROWS, ROWS):
            metrics, _ = run(metrics, way.place(values(start)))
        assert metrics.compute()["auc"] == pytest.approx(merged_by_itself(metrax.AUCROC, BINARY), abs=1e-6)
        assert metrics.compute().count["auc"] == 5 * ROWS
        if way.program:
            assert count_collectives(run, metrics, way.place(values(0))) == {}


@pytest.mark.parametrize("run", ["eager", "nnx.jit", "jax.jit", "nnx.shard_map", "jax.shard_map"])
def test_the_first_update_learns_the_shapes_in_any_program_that_gives_the_object_back(run):
    mesh = make_mesh({"data": 8}, explicit=False)
    metrics = DistributedMetrics({"auc": metrax.AUCROC, "last": "last", "loss": "mean"}, mesh=mesh)
    metrics.update(loss=1.0, last=5.0)

    def step(metrics, p, y):
        metrics.update({"auc": {"predictions": p, "labels": y}})
        return metrics

    rows = P("data")
    program = {
        "eager": step,
        "nnx.jit": nnx.jit(lambda m, p, y: (step(m, p, y), None)[1]),
        "jax.jit": jax.jit(step),
        "nnx.shard_map": nnx.jit(
            nnx.shard_map(
                lambda m, p, y: (step(m, p, y), None)[1], mesh=mesh, in_specs=(rows, rows, rows), out_specs=P()
            )
        ),
        "jax.shard_map": jax.jit(jax.shard_map(step, mesh=mesh, in_specs=(rows, rows, rows), out_specs=rows)),
    }[run]
    for start in range(0, 5 * ROWS, ROWS):
        given = on_mesh(cut(BINARY, start, start + ROWS), mesh)
        metrics = program(metrics, given["predictions"], given["labels"]) or metrics
    assert metrics.compute()["auc"] == pytest.approx(merged_by_itself(metrax.AUCROC, BINARY), abs=1e-6)
    assert (metrics.compute()["loss"], metrics.compute()["last"]) == (1.0, 5.0)
    assert metrics.sum_rows.get_value().sharding.spec[0] in ("data", ("data",))


@pytest.mark.parametrize("size", [1, 5, 31])
def test_a_batch_that_the_rows_do_not_divide(size):
    mesh = make_mesh({"data": 8}, explicit=False)
    metrics = DistributedMetrics({"mae": metrax.MAE}, mesh=mesh)
    step = nnx.jit(lambda m, p, y: m.update(mae={"predictions": p, "labels": y}))
    step(metrics, GUESSES[:ROWS], TARGETS[:ROWS])
    step(metrics, GUESSES[:size], TARGETS[:size])
    metrics.update(mae={"predictions": GUESSES[:size], "labels": TARGETS[:size]})
    seen = np.concatenate([np.abs(GUESSES - TARGETS)[:n] for n in (ROWS, size, size)])
    assert metrics.compute()["mae"] == pytest.approx(seen.mean(), rel=1e-6)
    assert metrics.compute().count["mae"] == ROWS + 2 * size


@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("spec", [None, P(("data", "model")), P("data")], ids=str)
def test_a_mesh_of_two_axes_with_and_without_a_spec(explicit, spec):
    mesh = make_mesh(AXES_2D, explicit=explicit)
    axes = tuple(AXES_2D)
    lies = P(axes) if spec is None or len(spec[0]) == 2 else P(axes[0])
    spec = None if spec is None or explicit else lies
    metrics = DistributedMetrics({"auc": metrax.AUCROC}, mesh=mesh)

    @nnx.jit
    def step(metrics, p, y):
        metrics.update({"auc": {"predictions": p, "labels": y}}, spec=spec)

    for start in range(0, 5 * ROWS, ROWS):
        given = on_mesh(cut(BINARY, start, start + ROWS), mesh, lies)
        step(metrics, given["predictions"], given["labels"])
    assert metrics.compute()["auc"] == pytest.approx(merged_by_itself(metrax.AUCROC, BINARY), abs=1e-6)
    if spec is not None or explicit:
        assert count_collectives(step, metrics, given["predictions"], given["labels"]) == {}


def test_replicated_labels_beside_partitioned_predictions():
    for explicit in (False, True):
        mesh = make_mesh({"data": 8}, explicit=explicit)
        metrics = DistributedMetrics({"auc": metrax.AUCROC}, mesh=mesh)
        p = jax.device_put(SCORES, NamedSharding(mesh, P("data")))
        y = jax.device_put(LABELS, NamedSharding(mesh, P()))
        metrics.update({"auc": {"predictions": p, "labels": y}})
        nnx.jit(lambda m, p, y: m.update({"auc": {"predictions": p, "labels": y}}))(metrics, p, y)
        assert metrics.compute()["auc"] == pytest.approx(
            float(metrax.AUCROC.from_model_output(SCORES, LABELS).compute()), abs=1e-6
        )


@flax.struct.dataclass
class Largest(clu.metrics.Metric):
    """A metric whose merge is no sum."""

    largest: jax.Array
    count: jax.Array

    @classmethod
    def empty(cls):
        return cls(jnp.array(-jnp.inf), jnp.array(0))

    @classmethod
    def from_model_output(cls, values, **_):
        return cls(jnp.max(values), jnp.asarray(values.size))

    def merge(self, other):
        return type(self)(jnp.maximum(self.largest, other.largest), self.count + other.count)

    def compute(self):
        return jnp.stack([self.largest, self.count.astype(jnp.float32)])


@pytest.mark.parametrize("devices", [1, 8])
def test_a_merge_that_is_no_sum_runs_as_it_is(devices):
    mesh = make_mesh({"data": 8}, explicit=False) if devices == 8 else None
    metrics = DistributedMetrics({"x": Largest, "y": ("mean", "max")}, mesh=mesh)
    step = nnx.jit(lambda m, x: m.update(x={"values": x}, y=x))
    values = -1 - RANDOM.random((3, ROWS)).astype(np.float32)  # zeros of a fresh row would be larger
    windows = []
    for one in values:
        step(metrics, on_mesh({"x": one}, mesh)["x"])
        windows.append(metrics.flush())
        assert windows[-1]["x"].tolist() == [one.max(), ROWS]
    together = sum(windows)
    assert together["x"].tolist() == [values.max(), values.size]
    metrics.merge(Snapshot.from_dict(together.to_dict()))
    step(metrics, on_mesh({"x": values[0]}, mesh)["x"])
    assert metrics.compute()["x"].tolist() == [values.max(), values.size + ROWS]
    np.testing.assert_array_equal(nnx.jit(lambda m: m.compute()["x"])(metrics), [values.max(), values.size + ROWS])
    assert count_collectives(step, metrics, on_mesh({"x": values[0]}, mesh)["x"]) == {}


def test_from_output_and_from_fun_and_masks():
    def doubled(values, mask, **_):
        return {"values": 2 * values, "mask": mask}

    average = clu.metrics.Average
    mesh = make_mesh({"data": 8}, explicit=False)
    metrics = DistributedMetrics({"a": average.from_output("loss"), "b": average.from_fun(doubled)}, mesh=mesh)
    mask = SCORES[:ROWS] < 0.5
    metrics.update(a={"loss": TARGETS[:ROWS], "mask": mask}, b={"values": TARGETS[:ROWS], "mask": mask})
    assert metrics.compute()["a"] == pytest.approx(TARGETS[:ROWS][mask].mean(), rel=1e-6)
    assert metrics.compute()["b"] == pytest.approx(2 * TARGETS[:ROWS][mask].mean(), rel=1e-6)


def test_counts_go_past_what_their_own_dtype_holds():
    @flax.struct.dataclass
    class Tokens(clu.metrics.Metric):
        total: jax.Array

        @classmethod
        def from_model_output(cls, tokens):
            return cls(tokens.sum(dtype=jnp.int32))

        def merge(self, other):
            return type(self)(self.total + other.total)

        def compute(self):
            return self.total

    metrics = DistributedMetrics({"tokens": Tokens})
    for _ in range(5):
        metrics.update(tokens={"tokens": jnp.array([2**31 - 1], jnp.int32)})
    assert metrics.compute()["tokens"] == 5 * (2**31 - 1)


def test_windows_before_and_after_the_first_update_add_up():
    metrics = DistributedMetrics({"auc": metrax.AUCROC, "loss": "mean"})
    metrics.update(loss=1.0)
    early = metrics.flush()
    metrics.update({"auc": {"predictions": SCORES, "labels": LABELS}}, loss=3.0)
    late = metrics.flush()
    own = float(metrax.AUCROC.from_model_output(SCORES, LABELS).compute())
    for both in (early + late, late + early, sum([early, early, late])):
        assert both["auc"] == pytest.approx(own, abs=1e-6)
    assert (early + late)["loss"] == 2.0
    fresh = DistributedMetrics({"auc": metrax.AUCROC, "loss": "mean"})
    fresh.merge(late)
    fresh.merge(early)
    assert fresh.compute()["auc"] == late["auc"]
    assert fresh.compute()["loss"] == 2.0
    assert np.isnan(early["auc"])


def test_a_state_of_short_floats_is_added_up_in_float32_also_in_a_trace():
    @flax.struct.dataclass
    class Short(clu.metrics.Metric):
        total: jax.Array

        @classmethod
        def from_model_output(cls, values):
            return cls(values.sum(dtype=jnp.bfloat16))

        def merge(self, other):
            return type(self)(self.total + other.total)

        def compute(self):
            return self.total.astype(jnp.float32)

    metrics = DistributedMetrics({"x": Short})
    for number in (200.0, 57.0):
        metrics.update(x={"values": jnp.array([number])})
    assert metrics.compute()["x"] == jax.jit(lambda metrics: metrics.compute()["x"])(metrics) == 257.0


def test_a_setting_may_be_an_array_without_dims_also_in_front_of_the_batch():
    @flax.struct.dataclass
    class Scaled(clu.metrics.Metric):
        total: jax.Array

        @classmethod
        def from_model_output(cls, scale, values):
            return cls(scale * values.sum())

        def merge(self, other):
            return type(self)(self.total + other.total)

        def compute(self):
            return self.total

    metrics = DistributedMetrics({"x": Scaled}, mesh=make_mesh({"data": 8}, explicit=False))
    metrics.update(x={"scale": jnp.float32(2.0), "values": jnp.arange(8.0)})
    assert (metrics.compute()["x"], metrics.compute().count["x"]) == (56.0, 8.0)


def test_what_was_seen_before_the_first_value_of_a_class_stays_with_its_metric():
    metrics = DistributedMetrics({"a": "sum", "auc": metrax.AUCROC, "b": "sum", "c": "min"})
    metrics.update(a=1.0, b=2.0)
    metrics.update({"auc": {"predictions": SCORES, "labels": LABELS}})
    metrics.update(c=3.0)
    assert [metrics.compute()[name] for name in "abc"] == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("learnt_before", [False, True])
def test_a_saved_metric_is_read_after_merge_into_an_object_that_has_its_class(learnt_before):
    metrics = DistributedMetrics({"auc": metrax.AUCROC, "loss": "mean"}, mesh=make_mesh({"data": 8}, explicit=False))
    metrics.update({"auc": {"predictions": SCORES, "labels": LABELS}}, loss=3.0)
    text = json.dumps(jax.tree.map(np.ndarray.tolist, metrics.compute().to_dict()))
    snapshot = Snapshot.from_dict(json.loads(text))
    assert snapshot.flatten() == {"loss": 3.0}
    assert snapshot.count["auc"] == 5 * ROWS
    with pytest.raises(TypeError, match=r"the code of metrax\S*AUCROC.\n  Merge it into an object that has it"):
        snapshot["auc"]
    after = DistributedMetrics({"auc": metrax.AUCROC, "loss": "mean"})
    if learnt_before:
        after.update({"auc": {"predictions": SCORES, "labels": LABELS}})
        after.reset()
    after.merge(snapshot)
    assert after.compute()["auc"] == metrics.compute()["auc"]
    assert (snapshot + after.compute())["auc"] == metrics.compute()["auc"]
    with pytest.raises(ValueError, match=r"'auc': .*AUCROC\(.*\) and .*Precision\(\)"):
        snapshot + DistributedMetrics({"auc": metrax.Precision, "loss": "mean"}).compute()


@pytest.mark.parametrize("first", [False, True])
def test_saved_snapshots_of_which_one_is_from_before_the_first_value_add(first):
    def saved(seen):
        metrics = DistributedMetrics({"auc": metrax.AUCROC, "loss": "mean"})
        metrics.update(loss=float(seen))
        if seen:
            metrics.update(auc={"predictions": SCORES, "labels": LABELS})
        return Snapshot.from_dict(metrics.compute().to_dict())

    both = saved(first) + saved(not first)
    after = DistributedMetrics({"auc": metrax.AUCROC, "loss": "mean"})
    after.merge(both)
    assert after.compute().count["auc"] == 5 * ROWS
    assert after.compute()["loss"] == 0.5
    assert after.compute()["auc"] > 0


def test_a_population_keeps_its_dims():
    metrics = jax.vmap(lambda seed: DistributedMetrics({"mae": metrax.MAE, "x": Largest}))(jnp.arange(3))
    values = jnp.asarray(GUESSES[: 3 * ROWS].reshape(3, ROWS))

    def update(metrics, x):
        metrics.update(mae={"predictions": x, "labels": jnp.zeros_like(x)}, x={"values": x})
        return metrics

    metrics = jax.vmap(update)(metrics, values)
    np.testing.assert_allclose(metrics.compute()["mae"], np.abs(values).mean(1), rtol=1e-6)
    np.testing.assert_allclose(metrics.compute()["x"][:, 0], values.max(1))
    np.testing.assert_allclose(nnx.jit(lambda m: m.flush()["mae"])(metrics), np.abs(values).mean(1), rtol=1e-6)


def test_settings_are_static_and_a_change_of_them_is_an_error():
    metrics = DistributedMetrics({"auc": metrax.AUCROC, "ndcg": metrax.NDCGAtK})
    metrics.update({"auc": {**BINARY, "num_thresholds": 50}, "ndcg": RANKING})
    with pytest.raises(ValueError, match=r"it was \(50,\), and is \(100,\).\n  Give it the same settings"):
        metrics.update({"auc": {**BINARY, "num_thresholds": 100}})
    with pytest.raises(ValueError, match=r"it was \(2,\), and is \(3,\)"):
        metrics.update({"ndcg": {**RANKING, "ks": jnp.array([1, 2, 3])}})
    assert metrics.compute().count["auc"] == 5 * ROWS


WEIGHTED = [name for name, value in METRAX.items() if isinstance(value, dict) and name != "IoU"]


@pytest.mark.parametrize(
    ("name", "how"),
    [
        *((name, how) for name in ("clu", "MSE", "Precision") for how in ("eager", "jit")),
        *(pytest.param(name, "host", marks=pytest.mark.slow) for name in [*WEIGHTED, "clu"]),
    ],
)
def test_a_mask_leaves_out_examples_also_of_metrics_that_have_none(name, how):
    kind = clu.metrics.Accuracy if name == "clu" else getattr(metrax, name)
    given: Any = {"logits": LOGITS, "labels": CLASSES} if name == "clu" else METRAX[name]
    arrays = {key: x for key, x in given.items() if np.shape(x)[:1] == (5 * ROWS,)}
    settings = {key: x for key, x in given.items() if key not in arrays}
    mask = np.arange(5 * ROWS) % 3 != 1
    expected = kind.from_model_output(**{key: jnp.asarray(x[mask]) for key, x in arrays.items()}, **settings).compute()

    mesh = make_mesh({"data": 8}, explicit=False)
    metrics = DistributedMetrics({"x": kind, "n": "count"}, mesh=mesh)
    if how != "host":
        arrays, on_device = jax.device_put((arrays, mask), NamedSharding(mesh, PARTS))
    if how == "jit":

        def step(metrics, arrays, mask):
            metrics.update({"x": {**arrays, **settings}, "n": mask}, weight=mask)

        nnx.jit(step)(metrics, arrays, on_device)
        assert count_collectives(step, metrics, arrays, on_device) == {}
    else:
        weight = on_device if how == "eager" else mask
        metrics.update({"x": {**arrays, **settings}, "n": weight}, weight=weight)
    window = metrics.flush()
    np.testing.assert_allclose(window["x"], expected, rtol=1e-4)
    assert window.count["x"] == window["n"] == mask.sum()
    metrics.update({"x": {**arrays, **settings}}, weight=0 * mask)
    assert metrics.flush().flatten() == {}, "nothing was seen"


def test_float_weights_and_nan_behind_the_mask_of_a_metric_that_has_none():
    metrics = DistributedMetrics({"precision": metrax.Precision})
    weight = RANDOM.uniform(0, 2, 5 * ROWS).astype(np.float32)
    weight[:9] = 0
    scores = np.where(weight == 0, np.nan, SCORES)
    called = SCORES >= 0.5
    for name in ("MSE", "MAE", "RSQUARED", "AUCROC"):
        hidden, clean = (
            DistributedMetrics({"x": getattr(metrax, name)}),
            DistributedMetrics({"x": getattr(metrax, name)}),
        )
        hidden.update({"x": {"predictions": scores, "labels": LABELS * 1.0}}, weight=weight != 0)
        clean.update({"x": {"predictions": SCORES[9:], "labels": LABELS[9:] * 1.0}})
        assert hidden.flush()["x"] == pytest.approx(clean.flush()["x"], rel=1e-5), name
    metrics.update({"precision": {"predictions": scores, "labels": LABELS}}, weight=weight)
    expected = np.sum(weight * called * LABELS, dtype=np.float64) / np.sum(weight * called, dtype=np.float64)
    assert metrics.compute()["precision"] == pytest.approx(expected, rel=1e-6)
    assert float(nnx.jit(lambda metrics: metrics.compute()["precision"])(metrics)) == pytest.approx(expected, rel=1e-6)
    assert metrics.compute().count["precision"] == pytest.approx(weight.sum(dtype=np.float64), rel=1e-7)


@pytest.mark.parametrize("name", ["Precision", "MSE", "AUCROC"])
def test_a_weight_moves_no_values_where_xla_has_to_reduce_them(name):
    """On Auto axes without ``spec=`` all-reduces are of the size of a state."""
    mesh = make_mesh({"data": 4, "model": 2}, explicit=False)
    metrics = DistributedMetrics({"x": getattr(metrax, name)}, mesh=mesh)
    scores, labels, mask = jax.device_put((SCORES, LABELS, SCORES > 0.3), NamedSharding(mesh, PARTS))

    def step(metrics, scores, labels, mask):
        metrics.update({"x": {"predictions": scores, "labels": labels}}, weight=mask)
        return metrics

    metrics.update({"x": {"predictions": scores, "labels": labels}})
    assert set(count_collectives(step, metrics, scores, labels, mask)) == {"all-reduce"}


def test_results_are_read_also_where_jax_looks_for_nan():
    metrics = DistributedMetrics({"precision": metrax.Precision})
    with jax.debug_nans(True):
        metrics.update({"precision": {"predictions": 0 * SCORES, "labels": LABELS}})
        assert metrics.flush()["precision"] == 0.0


def test_a_spec_by_keyword_says_which_array_is_no_batch():
    mesh = make_mesh({"data": 8}, explicit=False)
    metrics = DistributedMetrics({"ndcg": metrax.NDCGAtK}, mesh=mesh)
    given = {"predictions": LOGITS[:8], "labels": RELEVANT[:8], "ks": jnp.array([1, 2, 3, 4, 5, 6, 7, 7])}
    step = nnx.jit(lambda m, given: m.update({"ndcg": given}, spec={"ndcg": {"ks": P()}}))
    step(metrics, given)
    own = metrax.NDCGAtK.from_model_output(**{key: jnp.asarray(x) for key, x in given.items()}).compute()
    np.testing.assert_allclose(metrics.compute()["ndcg"], own, rtol=1e-5)


def test_what_cannot_be_right_is_an_error_that_shows_the_fix():
    metrics = DistributedMetrics({"auc": metrax.AUCROC, "loss": "mean"})
    metrics.update({"auc": BINARY})
    before = metrics.compute().flatten()
    with pytest.raises(
        TypeError, match=r"whose value is a dict of the keywords of its from_model_output\(\); got ndarr"
    ):
        metrics.update(auc=SCORES)
    with pytest.raises(ValueError, match=r"'auc' has 160 examples, and its weight has the shape \(3,\).\n  Give one n"):
        metrics.update({"auc": BINARY}, weight={"auc": np.ones(3)})
    with pytest.raises(ValueError, match="'auc' has got sample_weights= among its keywords already"):
        metrics.update({"auc": {**BINARY, "sample_weights": SCORES}}, weight={"auc": SCORES})
    iou = DistributedMetrics({"iou": metrax.IoU})
    with pytest.raises(ValueError, match="no weights of examples, and whose state of a batch is no sum over its"):
        iou.update({"iou": METRAX["IoU"]}, weight=SCORES)
    with pytest.raises(TypeError, match="unexpected keyword"):
        metrics.update({"auc": {**BINARY, "lables": LABELS}})
    with pytest.raises(ValueError, match="integers beyond int32"):
        metrics.update({"auc": {"predictions": SCORES, "labels": LABELS.astype(np.int64) + 2**40}})
    assert metrics.compute().flatten() == before
    with pytest.raises(TypeError, match="labels= of 'auc' is \\['a'\\], neither an array nor a setting"):
        metrics.update({"auc": {"predictions": SCORES, "labels": ["a"]}})
    fresh = DistributedMetrics({"auc": metrax.AUCROC})
    with pytest.raises(ValueError, match=r"'auc': metrax\S*AUCROC: its from_model_output\(\) does not take these"):
        fresh.update({"auc": {"lables": LABELS}})
    with pytest.raises(TypeError, match="Give the class: Accuracy"):
        DistributedMetrics({"x": clu.metrics.Accuracy.empty()})
    with pytest.raises(TypeError, match="Give its metrics one by one"):
        DistributedMetrics({"x": clu.metrics.Collection.create(a=clu.metrics.Accuracy)})
    with pytest.raises(ValueError, match=r"elements cannot be left out for it"):
        DistributedMetrics({"x": metrax.MAE}, nan_policy="ignore")
    with pytest.raises(ValueError, match="take different values"):
        DistributedMetrics({"x": (metrax.MAE, "mean")})


def test_an_array_cut_within_its_examples_is_an_error():
    mesh = make_mesh({"data": 4, "model": 2}, explicit=True)
    metrics = DistributedMetrics({"accuracy": clu.metrics.Accuracy}, mesh=mesh)
    logits = jax.device_put(LOGITS[:, :6], NamedSharding(mesh, P("data", "model")))
    labels = jax.device_put(CLASSES % 6, NamedSharding(mesh, P("data")))
    with pytest.raises(ValueError, match="logits= of 'accuracy' is partitioned over 'model' within an example"):
        metrics.update(accuracy={"logits": logits, "labels": labels})


@flax.struct.dataclass
class Growing(clu.metrics.Metric):
    values: jax.Array

    @classmethod
    def from_model_output(cls, values):
        return cls(values)

    def merge(self, other):
        return type(self)(jnp.concatenate([self.values, other.values]))

    def compute(self):
        return self.values.mean()


@flax.struct.dataclass
class Newest(clu.metrics.Metric):
    value: jax.Array

    @classmethod
    def from_model_output(cls, values):
        return cls(values[-1])

    def merge(self, other):
        return other

    def compute(self):
        return self.value


@pytest.mark.parametrize(
    ("metric", "why"),
    [(Growing, "merge() changes the shape of its state"), (Newest, "does not join two states but takes one of them")],
)
def test_a_state_that_grows_or_is_replaced_is_refused_at_the_first_update(metric, why):
    metrics = DistributedMetrics({"x": metric})
    with pytest.raises(ValueError, match="'x'") as error:
        metrics.update(x={"values": jnp.ones(3)})
    assert why in str(error.value)


def test_names_in_a_tuple_and_in_the_repr():
    metrics = DistributedMetrics({"x": (metrax.MAE, CluMetric(metrax.MSE, name="squared"))})
    metrics.update(x=REGRESSION)
    assert list(metrics.compute()["x"]) == ["mae", "squared"]
    assert "metrax.regression_metrics.MAE" in repr(metrics)


def test_arrays_of_the_host_are_partitioned_as_those_on_the_devices():
    mesh = make_mesh({"data": 4, "model": 2}, explicit=False)
    metrics = DistributedMetrics({"x": metrax.Precision}, mesh=mesh)
    scores = jax.device_put(SCORES, NamedSharding(mesh, P("data")))
    metrics.update({"x": {"predictions": scores, "labels": np.asarray(LABELS)}})
    alone = metrax.Precision.from_model_output(predictions=SCORES, labels=LABELS).compute()
    np.testing.assert_allclose(metrics.compute()["x"], alone, rtol=1e-6)


def test_what_is_learnt_takes_the_place_of_what_was_there_before():
    metrics = DistributedMetrics({"x": Largest})
    metrics.update({"x": {"values": jnp.arange(3.0)}})
    assert set(nnx.state(metrics).keys()) == set(metrics._plan.variables)
    assert jax.tree.leaves(nnx.state(metrics))[0].size > 0


def test_the_keywords_of_a_metric_given_as_names_are_an_error_that_shows_where_they_go():
    metrics = DistributedMetrics({"acc": clu.metrics.Accuracy})
    with pytest.raises(
        ValueError, match=r"'logits'(.|\n)*metrics.update\(\{'acc': dict\(logits=logits, labels=labels\)\}\)"
    ):
        metrics.update(logits=np.ones((2, 2)), labels=np.ones(2, int))
