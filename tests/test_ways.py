"""The laws, over every way of running."""

import jax
import numpy as np
import pytest
from flax import nnx

from distributed_metrics import count_collectives
from ways import SOME_WAYS, WAYS, Way

SPEC = {
    "loss": ("mean", "sum", "count", "max", "min"),
    "train": {"accuracy": "mean", "ratio": "ratio"},
    "integers": "sum",
    "never": "mean",
}
BATCH = 32
TRACED = [way for way in WAYS if not way.name.startswith("eager")]
"""An eager ``compute()`` is not traced: ``test_eager_flush_costs_no_collective``."""


def batch(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "loss": rng.lognormal(size=BATCH).astype(np.float32),
        "hits": rng.random(BATCH) < 0.7,
        "tokens": rng.integers(1, 100, (BATCH, 3)).astype(np.int32),
        "integers": rng.integers(-(2**31), 2**31, BATCH).astype(np.int32),
        "mask": rng.random(BATCH) < 0.5,
    }


def update(metrics, values):
    metrics.update(
        {
            "loss": values["loss"],
            "train": {"accuracy": values["hits"], "ratio": (values["loss"], values["tokens"])},
            "integers": values["integers"],
        },
        weight={"loss": values["mask"]},
    )


def expected(batches: list[dict[str, np.ndarray]]) -> dict[str, float]:
    """The same in float64 NumPy over everything seen."""
    seen = {key: np.concatenate([b[key] for b in batches]) for key in batches[0]}
    loss = seen["loss"].astype(np.float64)
    kept = loss[seen["mask"]]
    return {
        "loss/mean": kept.mean(),
        "loss/sum": kept.sum(),
        "loss/count": len(kept),
        "loss/max": kept.max(),
        "loss/min": kept.min(),
        "train/accuracy": seen["hits"].mean(),
        "train/ratio": loss.sum() / seen["tokens"].sum(),
        "integers": seen["integers"].sum(dtype=np.int64),
    }


def assert_results(flat: dict[str, float], batches) -> None:
    wanted = expected(batches)
    assert flat.keys() == wanted.keys()
    for name, number in wanted.items():
        assert flat[name] == pytest.approx(number, rel=2**-45, abs=0), name
    assert flat["integers"] == wanted["integers"]
    assert all(type(number) is float for number in flat.values())


def shapes_of(metrics):
    return [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for x in jax.tree.leaves(nnx.state(metrics))]


def assert_shapes_kept(metrics, before, way):
    """Shape, dtype and sharding; pmap lays the same rows on the same devices by a mesh of its own."""
    for now, then in zip(shapes_of(metrics), before, strict=True):
        assert (now.shape, now.dtype) == (then.shape, then.dtype)
        assert "pmap" in way.name or now.sharding.is_equivalent_to(then.sharding, len(now.shape))
        assert now.sharding.device_set == then.sharding.device_set


@pytest.fixture(params=WAYS, ids=lambda way: way.name)
def way(request) -> Way:
    return request.param


@pytest.fixture
def in_scope(way):
    with way.scope():
        yield


@pytest.mark.usefixtures("in_scope")
class TestEveryWay:
    def test_results_equal_float64_numpy_over_many_windows_and_updates_send_nothing(self, way):
        metrics = way.make(SPEC)
        traces = []

        def body(m, v):
            traces.append(1)
            update(m, v)

        run = way.step(way, body)
        before = shapes_of(metrics)
        warm = 0
        for window in range(3):
            batches = [batch(10 * window + i) for i in range(4)]
            for values in batches:
                metrics, _ = run(metrics, way.place(values))
            warm = warm or len(traces)
            snapshot = metrics.flush()
            assert_results(snapshot.flatten(), batches)
            assert np.isnan(snapshot["never"])
            assert snapshot.per_device("loss/count").sum() == snapshot.count["loss"]
        assert_shapes_kept(metrics, before, way)
        if way.program:
            assert len(traces) == warm, "the body was traced again after a flush"
            assert count_collectives(run, metrics, way.place(batches[0])) == {}

    @pytest.mark.parametrize(
        "way",
        [pytest.param(way, id=way.name, marks=() if way in SOME_WAYS else pytest.mark.slow) for way in TRACED],
        indirect=True,
    )
    def test_traced_compute_and_flush_cost_at_most_one_collective_and_agree_with_eager_ones(self, way):
        batches = [batch(i) for i in range(2)]
        add = way.step(way, update)
        for method in ("compute", "flush"):
            metrics = way.make(SPEC)
            read = way.step(way, lambda m, v, method=method: getattr(m, method)())
            metrics, _ = add(metrics, way.place(batches[0]))
            metrics, _ = add(metrics, way.place(batches[1]))
            eager = metrics.compute().flatten()
            values = way.place(batches[0])
            if way.program:
                few = count_collectives(read, metrics, values)
                assert sum(few.values()) == (0 if way.axes is None else way.copies)
            metrics, snapshot = read(metrics, values)
            if way.stacked and method == "flush":
                continue  # the second step of the scan flushes what the first one left: nothing
            assert snapshot.flatten() == eager
            assert_results(snapshot.flatten(), batches)
            seen = metrics.compute().count["loss"]
            assert seen == (0 if method == "flush" else eager["loss/count"])

    def test_update_compute_and_flush_in_one_program_carry_their_types(self, way):
        """A flush inside the step: the state keeps its shape, dtype and sharding, so nothing is traced again."""
        metrics = way.make(SPEC)
        traces = []

        def body(m, v):
            traces.append(1)
            update(m, v)
            m.reset()
            update(m, v)
            return m.flush()

        run = way.step(way, body)
        before, warm = shapes_of(metrics), 0
        for seed in range(4):
            metrics, snapshot = run(metrics, way.place(batch(seed)))
            half = {key: x[len(x) // 2 :] for key, x in batch(seed).items()} if way.stacked else batch(seed)
            assert_results(snapshot.flatten(), [half])
            warm = len(traces) if seed < 2 else warm  # pmap moves the state to a mesh of its own at first
        assert_shapes_kept(metrics, before, way)
        if way.program:
            assert len(traces) == warm
