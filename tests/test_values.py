"""Values of any shape, dtype and kind; weights; and what is kept to the last digit."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from distributed_metrics import DistributedMetrics, Mean
from ways import make_mesh

ALL = ("mean", "sum", "count", "max", "min")
DTYPES = ["float32", "float16", "bfloat16", "float64", "int8", "uint8", "int16", "int32", "uint32", "int64", "bool"]


def numbers(dtype: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    if dtype == "bool":
        return rng.random(shape) < 0.5
    if kind.kind in "iu":
        low, high = (-(2**40), 2**40) if kind.itemsize == 8 else (np.iinfo(kind).min, np.iinfo(kind).max)
        return rng.integers(low, high, shape, dtype=np.int64, endpoint=True).astype(kind)
    return rng.normal(size=shape).astype(kind)


def float64(x: np.ndarray) -> np.ndarray:
    return np.asarray(x).astype(np.float64)


@pytest.mark.parametrize("shape", [(), (5, 3), (4, 0)], ids=str)
@pytest.mark.parametrize("where", ["host", "device", "jit"])
def test_values_of_any_shape_and_dtype(shape, where):
    """One program for all dtypes: each of them is a value of its own."""
    values = {dtype: numbers(dtype, shape) for dtype in DTYPES}
    if where != "host" and not jax.config.read("jax_enable_x64"):
        values |= {name: values[name].astype(f"{name[:-2]}32") for name in ("float64", "int64")}
    metrics = DistributedMetrics(dict.fromkeys((*DTYPES, "unseen"), ALL))
    if where == "host":
        metrics.update(values)
    elif where == "device":
        metrics.update(jax.tree.map(jnp.asarray, values))
    else:
        nnx.jit(lambda m, values: m.update(values))(metrics, jax.tree.map(jnp.asarray, values))
    snapshot = metrics.compute()
    for dtype, x in values.items():
        result, exact = snapshot[dtype], float64(x)
        assert result["count"] == exact.size, dtype
        assert result["sum"] == pytest.approx(exact.sum(), rel=2**-44, abs=2**-44), dtype
        if exact.size:
            assert result["mean"] == pytest.approx(exact.mean(), rel=2**-44, abs=2**-44), dtype
            assert (result["max"], result["min"]) == (np.float32(exact.max()), np.float32(exact.min())), dtype
        else:
            assert np.isnan([result["mean"], result["max"], result["min"]]).all(), dtype
        if x.dtype.kind in "iub":
            assert result["sum"] == sum(map(int, x.ravel())), dtype
    assert np.isnan(snapshot["unseen"]["mean"])


@pytest.mark.parametrize("value", [0.1, 7, True, np.float64(0.1), np.int64(2**40 + 1), np.float32(0.1), 2**43 + 1])
@pytest.mark.parametrize("where", ["eager", "jit"])
def test_python_and_numpy_numbers_count_as_what_they_are(value, where):
    metrics = DistributedMetrics({"x": ("mean", "sum")}, mesh=make_mesh({"data": 8}, explicit=False))
    update = (lambda m: m.update(x=value)) if where == "eager" else nnx.jit(lambda m: m.update(x=value))
    for _ in range(3):
        update(metrics)
    assert metrics.compute()["x"]["mean"] == pytest.approx(float(value), rel=2**-47)
    if not isinstance(value, float | np.floating):
        assert metrics.flush()["x"]["sum"] == 3 * int(value)


def test_a_python_integer_beyond_float32_is_infinite():
    metrics = DistributedMetrics({"x": ("sum", "max")})
    metrics.update(x=2**200)
    assert metrics.compute()["x"] == {"sum": np.inf, "max": np.inf}


@settings(max_examples=40, deadline=None)
@given(
    x=hnp.arrays(np.float32, (8, 3), elements=st.floats(-(2**20), 2**20, width=32, allow_subnormal=False)),
    w=hnp.arrays(np.float32, (8, 3), elements=st.floats(2**-40, 2**10, width=32) | st.just(0.0)),
    rows=st.sampled_from([1, 8]),
    kind=st.sampled_from(["float", "mask", "ones"]),
)
def test_weighted_results_equal_float64_numpy(x, w, rows, kind):
    w = {"float": w, "mask": w > 1, "ones": np.ones_like(w)}[kind]
    mesh = make_mesh({"data": 8}, explicit=False) if rows == 8 else None
    metrics = DistributedMetrics({"x": ALL}, mesh=mesh)
    metrics.update(x=jnp.asarray(x), weight=jnp.asarray(w))
    result = metrics.compute()["x"]
    x, w = float64(x), float64(w)
    scale = (np.abs(x) * w).sum()
    assert result["sum"] == pytest.approx((x * w).sum(), rel=2**-44, abs=scale * 2**-44 + 1e-25)
    assert result["count"] == pytest.approx(w.sum(), rel=2**-44, abs=1e-25)
    if result["count"]:
        assert result["mean"] == pytest.approx(
            (x * w).sum() / w.sum(), rel=2**-42, abs=scale / w.sum() * 2**-42 + 1e-25
        )
        assert result["max"] == x[w != 0].max()
        assert result["min"] == x[w != 0].min()


@pytest.mark.parametrize("shape", [(), (4,), (4, 1), (1, 3), (4, 3), (1,), (1, 1), (4, 3, 1)], ids=str)
def test_weights_align_with_leading_dims_and_stretch(shape):
    value, drawn = numbers("float32", (4, 3, 2)), numbers("uint8", shape, seed=1) % 3
    weights = {kind: drawn.astype(kind) for kind in ("bool", "float32", "int32", "float64")}
    metrics = DistributedMetrics(dict.fromkeys(weights, ("sum", "count")))
    metrics.update(dict.fromkeys(weights, value), weight=weights)
    for kind, weight in weights.items():
        full = np.broadcast_to(float64(weight).reshape(shape + (1,) * (3 - len(shape))), value.shape)
        result = metrics.compute()[kind]
        assert result["count"] == full.sum(), kind
        assert result["sum"] == pytest.approx((full * float64(value)).sum(), rel=2**-40, abs=1e-12), kind


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("mask", [np.array([1, 0] * 8, bool), np.array([0.5, 0] * 8, np.float32)])
def test_weight_zero_removes_an_element_nan_included(bad, rows, mask):
    mesh = make_mesh({"data": 8}, explicit=False) if rows == 8 else None
    metrics = DistributedMetrics({"x": ALL}, mesh=mesh)
    values = np.arange(16, dtype=np.float32)
    values[1::2] = bad
    metrics.update(x=values, weight=mask)
    kept = values[::2]
    result = metrics.compute()["x"]
    assert (result["mean"], result["max"], result["min"]) == (kept.mean(), kept.max(), kept.min())
    metrics.update(x=bad, weight=0)
    metrics.update(x=bad, weight=False)
    assert metrics.compute()["x"] == result


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.finfo(np.float32).max, np.finfo(np.float32).min])
def test_a_number_at_the_end_of_the_range_is_the_largest_and_the_smallest(value):
    metrics = DistributedMetrics({"x": ("max", "min")}, mesh=make_mesh({"data": 8}, explicit=False))
    metrics.update(x=value)
    metrics.update(x=np.full(16, value), weight=np.arange(16) > 3)
    assert metrics.compute()["x"] == {"max": value, "min": value}


@pytest.mark.parametrize("bad", [np.inf, -np.inf])
def test_an_infinite_element_of_any_weight_makes_an_infinite_sum(bad):
    metrics = DistributedMetrics({"x": ("sum", "mean")})
    metrics.update(x=np.array([bad, 1.0], np.float32), weight=np.array([0.3, 0.7], np.float32))
    assert metrics.compute()["x"] == {"sum": bad, "mean": bad}


def test_one_weight_for_all_or_a_dict_with_the_structure_of_the_names():
    spec = {"a": "sum", "b": {"c": "sum", "d": ("sum", "max")}, "e": "sum"}
    ones = np.ones(4)
    values = {"a": ones, "b": {"c": ones, "d": ones}, "e": ones}
    half = np.array([1, 1, 0, 0])
    metrics = DistributedMetrics(spec)
    metrics.update(values, weight=half)
    assert metrics.flush().flatten() == {"a": 2, "b/c": 2, "b/d/sum": 2, "b/d/max": 1, "e": 2}
    metrics.update(values, weight={"b": half})
    assert metrics.flush().flatten() == {"a": 4, "b/c": 2, "b/d/sum": 2, "b/d/max": 1, "e": 4}
    metrics.update(values, weight={"b": {"c": half}, "e": 0})
    assert metrics.flush().flatten() == {"a": 4, "b/c": 2, "b/d/sum": 4, "b/d/max": 1}
    metrics.update({"b/c": ones, "b": {"d": ones}}, weight={"b/c": half})
    assert metrics.flush().flatten() == {"b/c": 2, "b/d/sum": 4, "b/d/max": 1}


def test_metrics_that_are_not_named_are_left_alone():
    metrics = DistributedMetrics({"a": "mean", "b": ("mean", "max"), "c": "mean"})
    metrics.update(a=1.0, b=2.0, c=3.0)
    metrics.update(c=5.0)
    metrics.update(b=4.0)
    metrics.update()
    metrics.update({})
    assert metrics.compute().flatten() == {"a": 1.0, "b/mean": 3.0, "b/max": 4.0, "c": 4.0}


def test_a_ratio_sums_its_parts_separately():
    metrics = DistributedMetrics({"loss": "ratio"})
    metrics.update(loss=(jnp.array([6.0, 2.0]), jnp.array([3, 4, 5])))
    metrics.update(loss=(0.0, 4))
    snapshot = metrics.compute()
    assert snapshot["loss"] == 0.5
    assert snapshot.count["loss"] == 16


def test_shape_keeps_trailing_dims():
    metrics = DistributedMetrics({"x": Mean(shape=(3,))}, mesh=make_mesh({"data": 8}, explicit=False))
    x = np.arange(48.0, dtype=np.float32).reshape(16, 3)
    mask = np.arange(16) % 3 == 0
    metrics.update(x=x, weight=mask)
    np.testing.assert_allclose(metrics.compute()["x"], x[mask].mean(0))
    assert metrics.compute().flatten() == {f"x/{i}": x[mask].mean(0)[i] for i in range(3)}
    np.testing.assert_allclose(metrics.compute().count["x"], [6, 6, 6])


def test_integers_beside_floats_of_their_shape_stay_exact():
    metrics = DistributedMetrics({"a": "sum", "b": "sum"})
    metrics.update(a=jnp.full(2, 2**24 + 1, jnp.int32), b=jnp.full(2, 0.5, jnp.float32))
    assert dict(metrics.compute()) == {"a": 2 * (2**24 + 1), "b": 1.0}


def test_ten_million_updates_lose_nothing():
    metrics = DistributedMetrics({"x": "mean", "n": "sum"})

    @nnx.jit
    def many(metrics):
        def one(_, metrics):
            metrics.update(x=np.float64(0.1), n=1)
            return metrics

        return nnx.fori_loop(0, 10**7, one, metrics)

    many(metrics)
    assert metrics.compute()["x"] == pytest.approx(0.1, rel=1e-13)
    assert metrics.compute()["n"] == 10**7


def test_counts_and_integer_sums_are_exact_past_2_to_the_31():
    metrics = DistributedMetrics({"n": ("count", "sum"), "w": "count"}, mesh=make_mesh({"data": 8}, explicit=False))
    big = jnp.full(1024, 2**31 - 1, jnp.int32)
    for _ in range(5):
        metrics.update(n=big, w=1.0, weight={"w": 2.0**31})
    metrics.update(n=1, w=1.0)
    result = metrics.compute()
    assert result["n"]["sum"] == 5 * 1024 * (2**31 - 1) + 1 > 2**43
    assert result["w"] == 5 * 2**31 + 1


@pytest.mark.parametrize("size", [64, 1000, 16384, 100_001, 2**20])
def test_a_large_batch_is_summed_to_the_last_digit_of_float32_and_beyond(size):
    x = np.random.default_rng(0).lognormal(size=size).astype(np.float32)
    metrics = DistributedMetrics({"x": "sum"})
    metrics.update(x=jnp.asarray(x))
    tolerance = 2**-45 if size <= 16384 else 1e-8
    assert metrics.compute()["x"] == pytest.approx(x.sum(dtype=np.float64), rel=tolerance)


@pytest.mark.slow
def test_the_same_data_on_one_to_eight_devices_agree():
    x = np.random.default_rng(0).lognormal(size=(840, 7)).astype(np.float32)
    results = []
    for devices in (1, 3, 8):  # one row, rows that are filled up to an even number, and as many as there are
        mesh = jax.make_mesh((devices,), ("data",), devices=jax.devices()[:devices], axis_types=None)
        metrics = DistributedMetrics({"x": ALL}, mesh=mesh)
        value = jax.device_put(x, NamedSharding(mesh, P("data")))
        nnx.jit(lambda m, x: m.update(x=x))(metrics, value)
        results.append(metrics.compute()["x"])
    for result in results:
        assert result == pytest.approx(results[0], rel=2**-45)
        assert (result["count"], result["max"], result["min"]) == (x.size, x.max(), x.min())


@pytest.mark.parametrize("scale", [1e-25, 1e-10, 1e34])
def test_the_stated_range_of_sums(scale):
    x = (np.random.default_rng(0).lognormal(size=1000) * scale).astype(np.float32)
    metrics = DistributedMetrics({"x": "sum"})
    metrics.update(x=x)
    metrics.update(x=x)
    assert metrics.compute()["x"] == pytest.approx(2 * x.sum(dtype=np.float64), rel=2**-40)
