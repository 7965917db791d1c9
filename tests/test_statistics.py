"""Variances, last values, histograms and quantiles, against float64 NumPy; and what holds for every accumulator.

The laws of ``test_ways.py`` are held here by the accumulators whose merge is more than a sum, and so are the promises
on elements that are not finite, on populations, and on ``shape=``.
"""

import json
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from distributed_metrics import (
    Count,
    DistributedMetrics,
    Histogram,
    Last,
    Max,
    Mean,
    Min,
    Quantile,
    Ratio,
    Snapshot,
    Std,
    Sum,
    Var,
    count_collectives,
)
from ways import AXES_2D, SOME_WAYS, WAYS, Way, make_mesh

DEVICES = (1, 2, 3, 8)
WEIGHTS = ["none", "mask", "floats"]
EDGES = (-1.0, 0.0, 0.1, 0.7, 1.5, 20.0)


def mesh_of(devices: int, explicit: bool = False) -> Mesh:
    kind = AxisType.Explicit if explicit else AxisType.Auto
    return jax.make_mesh((devices,), ("data",), devices=jax.devices()[:devices], axis_types=(kind,))


def eight():
    return make_mesh({"data": 8}, explicit=False)


def split(x, mesh, spec=None):
    """An array on the mesh, its leading dim over the devices."""
    return jax.device_put(x, NamedSharding(mesh, P("data") if spec is None else spec))


def weights_of(kind: str, size: int, seed: int = 1) -> np.ndarray | None:
    rng = np.random.default_rng(seed)
    return {
        "none": None,
        "mask": rng.random(size) < 0.6,
        "floats": (rng.random(size) + 0.01).astype(np.float32),
    }[kind]


def variance(x, weight=None, ddof: float = 0) -> float:
    """The weighted variance in float64 NumPy, in two passes."""
    x = np.asarray(x).astype(np.float64)
    w = np.ones_like(x) if weight is None else np.asarray(weight).astype(np.float64)
    x, w = x[w != 0], w[w != 0]
    x = x - x[0]  # or float64 itself would lose the digits that are asked of the pairs
    return float((w * (x - np.average(x, weights=w)) ** 2).sum() / (w.sum() - ddof))


def in_two_words(x) -> np.ndarray:
    """The float64 numbers that pairs of float32 hold: 48 bits."""
    x = np.asarray(x, np.float64)
    high = x.astype(np.float32).astype(np.float64)
    return high + (x - high).astype(np.float32).astype(np.float64)


@nnx.jit
def one_by_one(metrics, x, weight):
    """An update for each element, in one loop on the device."""

    def one(i, metrics):
        metrics.update(x=x[i], weight=weight[i])
        return metrics

    nnx.fori_loop(0, x.shape[0], one, metrics)


# --- variances ---


DATA = {
    "mean 1e6, deviation 1": lambda rng, n: rng.normal(1e6, 1, n),
    "mean -3e7, deviation 30": lambda rng, n: rng.normal(-3e7, 30, n),
    "100 outliers first": lambda rng, n: np.concatenate([np.zeros(100), rng.normal(1e6, 1, n - 100)]),
    "lognormal": lambda rng, n: rng.lognormal(0, 3, n),
    "mean 1e-4, deviation 1e-10": lambda rng, n: rng.normal(1e-4, 1e-10, n),
    "deviation 1e-10": lambda rng, n: rng.normal(0, 1e-10, n),
}


@pytest.mark.slow
def test_any_data_on_one_to_eight_devices_equal_float64_numpy_and_agree():
    edges, size = (-1e3, 0.0, 1.0, 1e6, 1e6 + 1, 1e7), 840
    masks = [np.ones(size, bool), np.random.default_rng(1).random(size) < 0.6]
    weight = (np.random.default_rng(2).random(size) + 0.01).astype(np.float32)
    variances: dict[Any, list[float]] = {}
    for devices in DEVICES:
        mesh = mesh_of(devices)
        metrics = DistributedMetrics({"x": ("var", "last", Histogram(edges)), "w": "var"}, mesh=mesh)
        for name, draw in DATA.items():
            x = draw(np.random.default_rng(0), size).astype(np.float32)
            for k, mask in enumerate(masks):
                metrics.update(x=split(x, mesh), w=split(x, mesh), weight={"x": split(mask, mesh), "w": weight})
                snapshot, kept = metrics.flush(), x[mask]
                result = snapshot["x"]
                assert snapshot.count["x"] == len(kept)
                assert result["last"] == kept[-1]
                np.testing.assert_array_equal(result["histogram"], counts(kept, edges))
                assert result["var"] == pytest.approx(variance(kept), rel=2e-10), (name, devices)
                assert snapshot["w"] == pytest.approx(variance(x, weight), rel=2e-10), (name, devices)
                variances.setdefault((name, k), []).append(result["var"])
    for same in variances.values():
        assert same == pytest.approx([same[0]] * len(DEVICES), rel=4e-10)


@settings(max_examples=20, deadline=None)
@given(
    noise=hnp.arrays(np.float32, 64, elements=st.floats(-4, 4, width=32)),
    mean=st.sampled_from([0.0, 1.0, -1e3, 1e6, -4e6, 3e-7]),
    scale=st.sampled_from([1.0, 16.0, 2.0**-10]),
    update_of=hnp.arrays(np.int8, 64, elements=st.integers(0, 4)),
    weight=hnp.arrays(np.float32, 64, elements=st.floats(2**-6, 2**6, width=32)),
    kind=st.sampled_from(WEIGHTS),
    devices=st.sampled_from([1, 8]),
)
def test_any_split_into_updates_gives_the_variance_of_all(noise, mean, scale, update_of, weight, kind, devices):
    x = (np.float32(mean) + np.float32(scale) * noise).astype(np.float32)
    whole = {"none": np.ones(64, np.float32), "mask": (weight > 1).astype(np.float32), "floats": weight}[kind]
    metrics = DistributedMetrics({"x": "var"}, mesh=eight() if devices == 8 else None)
    for number in range(5):
        metrics.update(x=x, weight=np.where(update_of == number, whole, np.float32(0)))
    if not whole.any():
        assert np.isnan(metrics.compute()["x"])
        return
    spread = np.ptp(x[whole != 0].astype(np.float64))  # what cancels is as small as the mean times a pair's last bit
    assert metrics.compute()["x"] == pytest.approx(
        variance(x, whole), rel=1e-9, abs=spread * np.abs(x).max() * 2**-44 + 1e-30
    )


@pytest.mark.parametrize("weights", ["mask", "floats"])
def test_the_variance_of_many_updates_of_one_element(weights):
    metrics = DistributedMetrics({"x": ("var", "std")})
    for name in ("mean 1e6, deviation 1", "100 outliers first", "lognormal"):
        x = DATA[name](np.random.default_rng(0), 20_000).astype(np.float32)
        for weight in (weights_of(weights, len(x)), np.ones(len(x), bool if weights == "mask" else np.float32)):
            one_by_one(metrics, x, weight)
            result = metrics.flush()["x"]
            assert result["var"] == pytest.approx(variance(x, weight), rel=2e-9), name
            assert result["std"] == pytest.approx(variance(x, weight) ** 0.5, rel=1e-9), name


def test_a_variance_of_many_updates_in_a_scan_over_batches_of_any_size():
    x = np.random.default_rng(0).normal(1e6, 1, (500, 16)).astype(np.float32)
    sizes = np.random.default_rng(1).integers(0, 17, 500)
    mask = np.arange(16) < sizes[:, None]
    metrics = DistributedMetrics({"x": "var"}, mesh=eight())

    def step(metrics, given):
        metrics.update(x=given[0], weight=given[1])
        return metrics

    nnx.jit(lambda m, given: nnx.scan(step, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(m, given))(metrics, (x, mask))
    assert metrics.compute()["x"] == pytest.approx(variance(x[mask]), rel=1e-9)


def test_rows_that_saw_70_and_29_and_1_percent_have_the_variance_of_all():
    mesh = mesh_of(3)
    x = np.random.default_rng(0).normal(1e6, 1, (3, 700)).astype(np.float32)
    x[1] += 5
    mask = np.arange(700) < np.array([[700], [290], [10]])
    metrics = DistributedMetrics({"x": "var"}, mesh=mesh)
    metrics.update(x=split(x, mesh), weight=mask)
    assert metrics.compute().per_device("x").tolist() == pytest.approx(
        [variance(row[kept]) for row, kept in zip(x, mask, strict=True)], rel=1e-9
    )
    assert metrics.compute()["x"] == pytest.approx(variance(x[mask]), rel=1e-9)
    traced = nnx.jit(lambda m: m.compute())(metrics)
    assert traced["x"] == pytest.approx(variance(x[mask]), rel=1e-9)


@pytest.mark.parametrize(("rows", "size"), [(1, 20_011), (8, 1000)])
def test_a_constant_has_the_variance_0(size, rows):
    metrics = DistributedMetrics({"x": "var"}, mesh=eight() if rows == 8 else None)
    for constant in (0.0, 0.1, 0.7, 1 / 3, -7.3, 1e6 + 0.3, 3e-10, 1e10, 1e20, -1e30):
        x = np.full(size, constant, np.float32)
        metrics.update(x=x)
        metrics.update(x=np.float32(constant))
        metrics.update(x=x, weight=np.arange(size) % 2 == 0)
        # A sum of so many differences errs in the last bit of a pair, relative to the last bit of the constant.
        bound = 0 if size <= 16384 else (abs(constant) * 2**-60) ** 2
        assert metrics.flush()["x"] <= bound, constant


def test_a_constant_of_two_words_and_one_with_weights_vary_by_less_than_their_last_bits():
    weight = weights_of("floats", 1000)
    metrics = DistributedMetrics({"x": "std"}, mesh=eight())
    for constant in (0.1, 1e6 + 0.3, 1e20 / 3, -7.3e-5):
        metrics.update(x=np.full(1000, constant))
        metrics.update(x=np.full(1000, constant), weight=weight)
        for _ in range(10):
            metrics.update(x=constant)
        assert metrics.flush()["x"] <= abs(constant) * 2**-44


@pytest.mark.slow
def test_what_saw_nothing_has_no_variance_and_one_element_has_the_variance_0():
    metrics = DistributedMetrics({"x": ("var", Var(ddof=1, name="of sample"))}, mesh=eight())

    def results():
        return list(metrics.compute()["x"].values())

    def see_nothing():
        metrics.update(x=np.zeros((8, 0), np.float32))
        metrics.update(x=np.full(16, np.nan, np.float32), weight=np.zeros(16, bool))
        metrics.update(x=np.full(16, np.inf, np.float32), weight=np.zeros(16, np.float32))
        metrics.update(x=np.nan, weight=0)

    assert np.isnan(results()).all()
    see_nothing()
    assert np.isnan(results()).all()
    assert metrics.compute().flatten() == {}
    metrics.update(x=5.0)
    see_nothing()
    assert results()[0] == 0
    assert np.isnan(results()[1])  # 0 / 0, as of numpy.var(ddof=1)
    metrics.update(x=7.0)
    assert results() == [1, 2]


@pytest.mark.parametrize("offset", [1e30, -1e30, 1e20])
def test_a_variance_far_off_0_is_that_of_the_two_words(offset):
    x = in_two_words(offset + np.random.default_rng(0).normal(0, 2e-13, 800) * offset)
    metrics = DistributedMetrics({"x": "var"}, mesh=eight())
    metrics.update(x=x)
    metrics.update(x=x[:8])
    assert metrics.compute()["x"] == pytest.approx(variance(np.append(x, x[:8])), rel=2e-2)  # of ten bits
    x = in_two_words(offset + np.random.default_rng(0).normal(0, 1e-12, 800) * (offset * 1e6))
    if abs(x).max() ** 2 * 1e-12 < 1e37:
        metrics.flush()
        metrics.update(x=x)
        assert metrics.compute()["x"] == pytest.approx(variance(x), rel=1e-7)


def alternating(first: float, low: float, high: float) -> np.ndarray:
    return np.array([first] + [low, high] * 500)


# Statistical Reference Datasets of the National Institute of Standards and Technology, Univariate Summary Statistics:
# https://www.itl.nist.gov/div898/strd/univ/homepage.html. Data, certified mean, certified deviation (of n - 1), and by
# what share the deviation may be wrong: two float32 words hold the 0.1 of 10000000.1 to a ten-millionth.
NIST = {
    "NumAcc1": (np.array([10000001, 10000003, 10000002]), 10000002.0, 1.0, 0.0),
    "NumAcc1 in float32": (np.array([10000001, 10000003, 10000002], np.float32), 10000002.0, 1.0, 0.0),
    "NumAcc2": (alternating(1.2, 1.1, 1.3), 1.2, 0.1, 1e-13),
    "NumAcc3": (alternating(1000000.2, 1000000.1, 1000000.3), 1000000.2, 0.1, 5e-8),
    "NumAcc4": (alternating(10000000.2, 10000000.1, 10000000.3), 10000000.2, 0.1, 5e-7),
}


@pytest.mark.parametrize("name", NIST)
@pytest.mark.parametrize("how", ["at once", "one by one", "8 devices"])
def test_the_certified_statistics_of_the_nist_data_sets(name, how):
    x, mean, deviation, tolerance = NIST[name]
    metrics = DistributedMetrics({"x": ("mean", Std(ddof=1))}, mesh=eight() if how == "8 devices" else None)
    if how == "at once":
        metrics.update(x=x)
    elif how == "one by one":
        for one in x:
            metrics.update(x=one)
    else:
        padded = (
            np.concatenate([x, np.full(-len(x) % 8, np.nan, x.dtype)]) if x.dtype.kind == "f" else np.append(x, [0] * 5)
        )
        metrics.update(x=padded, weight=np.arange(len(padded)) < len(x))
    assert metrics.compute()["x"]["mean"] == pytest.approx(mean, rel=1e-12)
    assert metrics.compute()["x"]["std"] == pytest.approx(deviation, rel=max(tolerance, 2**-44))


@pytest.mark.parametrize(("weights", "rows"), [("none", 1), ("floats", 8), ("mask", 8)])
def test_the_variance_of_a_million_elements_in_one_update(weights, rows):
    metrics = DistributedMetrics({"x": "var"}, mesh=eight() if rows == 8 else None)
    weight = weights_of(weights, 10**6)
    for mean, deviation in ((1e6, 1.0), (0.0, 1.0), (1e5, 1.0), (-3e7, 100.0)):
        x = np.random.default_rng(0).normal(mean, deviation, 10**6).astype(np.float32)
        metrics.update(x=x, weight=weight)
        assert metrics.flush()["x"] == pytest.approx(variance(x, weight), rel=2e-8), (mean, deviation)


def test_the_mean_of_a_million_elements_with_an_outlier_is_good_enough_for_the_variance_of_two_updates():
    x, y = np.random.default_rng(0).normal((0, 1e3), 1.0, (10**6, 2)).astype(np.float32).T
    x[0] = 1e6
    metrics = DistributedMetrics({"x": "var"})
    metrics.update(x=x)
    metrics.update(x=y)
    assert metrics.flush()["x"] == pytest.approx(variance(np.concatenate([x, y])), rel=2e-8)


@pytest.mark.slow
def test_variances_and_last_values_of_any_dtype():
    rng = np.random.default_rng(0)
    values: dict[str, np.ndarray] = {"float64": rng.normal(1e6, 1, 96), "bool": rng.random(96) < 0.3}
    for dtype in ("bfloat16", "float16"):
        values[dtype] = rng.normal(3, 1, 96).astype(getattr(ml_dtypes, dtype, dtype))
    for dtype in ("int8", "int32", "uint32"):
        values[dtype] = rng.integers(np.iinfo(dtype).min, np.iinfo(dtype).max, 96).astype(dtype)
    metrics = DistributedMetrics(dict.fromkeys(values, ("var", "last")), mesh=eight())
    metrics.update(values)
    for dtype, x in values.items():
        result, exact = metrics.compute()[dtype], x.astype(np.float64)
        assert result["var"] == pytest.approx(variance(exact), rel=2e-10)
        assert result["last"] == (pytest.approx(exact[-1], rel=2**-47) if dtype == "float64" else exact[-1])


# --- the last value ---


@pytest.mark.slow
def test_the_last_element_of_nonzero_weight_in_row_major_order():
    x = np.arange(24, dtype=np.int32).reshape(4, 3, 2)
    metrics = DistributedMetrics({"x": "last"}, mesh=mesh_of(4))
    for mask in (
        np.ones((4, 3, 2), bool),
        np.arange(24).reshape(4, 3, 2) < 17,
        np.arange(24).reshape(4, 3, 2) == 2,
        np.array([[1], [0], [1], [0]]),
        np.array([[[0.0, 0.5]]]),
        np.array([[0, 1, 0]]),
        np.array(1.0),
    ):
        aligned = mask.reshape(mask.shape + (1,) * (3 - mask.ndim))
        metrics.update(x=x, weight=mask)
        assert metrics.compute()["x"] == x[np.broadcast_to(aligned, x.shape) != 0][-1]


read = nnx.jit(lambda metrics: metrics.compute())
read_results = nnx.jit(lambda metrics: dict(metrics.compute()))


@pytest.mark.slow
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_any_sequence_of_masked_updates_leaves_the_last_element_that_counted(data):
    metrics = DistributedMetrics({"x": "last", "y": "last"}, mesh=eight())
    expected = {"x": np.nan, "y": np.nan}
    for step in range(data.draw(st.integers(1, 6))):
        values, masks = {}, {}
        for name in data.draw(st.sampled_from([("x",), ("x", "y")])):
            if name == "x" and data.draw(st.booleans()):
                values[name], masks[name] = np.float32(100 * step), np.array(data.draw(st.booleans()))
            else:
                values[name] = 100 * step + np.arange(16, dtype=np.float32)
                masks[name] = data.draw(hnp.arrays(bool, 16) | st.just(np.zeros(16, bool)))
            kept = np.atleast_1d(values[name])[np.atleast_1d(masks[name])]
            expected[name] = float(kept[-1]) if kept.size else expected[name]
        metrics.update(values, weight=masks)
        if data.draw(st.integers(0, 4)) == 0:
            metrics.merge(metrics.flush())
        for result in (metrics.compute(), read(metrics)):
            np.testing.assert_equal({name: result[name] for name in expected}, expected)


@pytest.mark.slow
def test_a_sum_whose_weights_cancel_is_shown():
    metrics = DistributedMetrics({"x": ("sum", "mean")})
    metrics.update(x=jnp.array([3.0, 4.0]), weight=jnp.array([1, -1]))
    assert metrics.flush().flatten() == {"x/sum": -1.0}


def test_an_update_that_is_all_masked_does_not_change_the_last_value():
    for mesh in (None, eight()):
        metrics = DistributedMetrics({"x": "last"}, mesh=mesh)
        metrics.update(x=np.full(16, 7), weight=np.zeros(16, bool))
        assert np.isnan(metrics.compute()["x"])
        metrics.update(x=np.arange(16) + 2**30 + 1)
        for nothing in (np.zeros(16, bool), np.zeros((16,), np.float32), 0):
            metrics.update(x=np.full(16, np.nan, np.float32), weight=nothing)
        metrics.update(x=np.nan, weight=False)
        metrics.update(x=np.zeros((8, 0)))
        assert metrics.compute()["x"] == 2**30 + 16


def test_a_sharded_value_after_scalars_is_the_later():
    mesh = eight()
    metrics = DistributedMetrics({"x": "last"}, mesh=mesh)
    for number in (30.0, 20.0, 10.0):
        metrics.update(x=number)
    metrics.update(x=split(np.arange(8.0, dtype=np.float32), mesh))
    assert metrics.compute()["x"] == 7.0


def test_a_scalar_after_a_sharded_value_after_a_masked_one_with_elements_on_one_device():
    mesh = eight()
    metrics = DistributedMetrics({"x": "last"}, mesh=mesh)
    only_third = (np.arange(16) // 2) == 3
    metrics.update(x=split(np.arange(16, dtype=np.float32), mesh), weight=only_third)
    assert metrics.compute()["x"] == 7
    metrics.update(x=split(np.arange(100, 116, dtype=np.float32), mesh))
    assert metrics.compute()["x"] == 115
    metrics.update(x=3.0)
    assert metrics.compute()["x"] == 3
    metrics.update(x=split(np.arange(16, dtype=np.float32), mesh), weight=only_third)
    assert metrics.compute()["x"] == 7
    metrics.update(x=jnp.float32(4))
    assert metrics.compute()["x"] == 4
    assert nnx.jit(lambda m: m.compute())(metrics)["x"] == 4


TWO_DIMS = [P("model", "data"), P(None, "model"), P(("model", "data")), P(None, ("data", "model")), P()]


@pytest.mark.parametrize("spec", TWO_DIMS, ids=str)
def test_the_last_value_of_an_array_over_two_mesh_dims(spec):
    mesh = make_mesh(AXES_2D, explicit=False)
    x = (np.arange(128, dtype=np.int32) + 2**24).reshape(8, 16)
    metrics = DistributedMetrics({"x": "last"}, mesh=mesh)
    for last in (127, 126, 65, 15, 14, 0):
        mask = np.arange(128).reshape(8, 16) <= last
        values = jax.device_put((x, mask), NamedSharding(mesh, spec))
        metrics.update(x=values[0], weight=values[1])
        assert metrics.compute()["x"] == 2**24 + last
    metrics.update(x=values[0])
    assert metrics.compute()["x"] == 2**24 + 127


@pytest.mark.parametrize("spec", [P("model", "data"), P(("model", "data")), P(None, ("data", "model"))], ids=str)
@pytest.mark.parametrize("how", ["explicit", "auto, with spec=", "auto"])
def test_the_last_value_of_an_array_over_two_mesh_dims_in_a_program(spec, how):
    mesh = make_mesh(AXES_2D, explicit=how == "explicit")
    x = (np.arange(128, dtype=np.int32) + 2**24).reshape(8, 16)
    metrics = DistributedMetrics({"x": "last"}, mesh=mesh)
    update = nnx.jit(lambda m, x, w: m.update(x=x, weight=w, spec=spec if how == "auto, with spec=" else None))
    for last in (127, 65, 15, 0):
        update(metrics, *jax.device_put((x, np.arange(128).reshape(8, 16) <= last), NamedSharding(mesh, spec)))
        assert metrics.compute()["x"] == 2**24 + last


@pytest.mark.parametrize(
    ("axis_name", "spec"),
    [("data", P("model", "data")), pytest.param("model", P("data", "model"), marks=pytest.mark.slow)],
    ids=str,
)
def test_devices_that_share_a_row_agree_on_the_last_value_and_the_variance(axis_name, spec):
    mesh = make_mesh(AXES_2D, explicit=False)
    metrics = DistributedMetrics({"x": ("last", "var"), "y": "last"}, mesh=mesh, axis_name=axis_name)
    x = np.arange(128, dtype=np.int32).reshape(8, 16) + 2**24
    value = jax.device_put(x, NamedSharding(mesh, spec))
    for last in (127, 66, 5):
        metrics.update(x=value, y=5.0, weight={"x": x <= 2**24 + last})
        snapshot = metrics.compute()
        assert (snapshot["x"]["last"], snapshot["y"]) == (2**24 + last, 5)
    seen = np.concatenate([np.arange(last + 1) for last in (127, 66, 5)])
    assert snapshot["x"]["var"] == pytest.approx(variance(seen), rel=2e-9)  # of means half a million deviations off 0


@pytest.mark.parametrize("spec", [P("data", "model"), P(("data", "model")), P("model", "data")], ids=str)
def test_in_mapped_code_later_devices_are_later(spec):
    """The devices of a mesh are in row-major order, however they split the value."""
    mesh = make_mesh(AXES_2D, explicit=False)
    metrics = DistributedMetrics({"x": "last"}, mesh=mesh)
    x = np.arange(128, dtype=np.float32).reshape(8, 16)
    place = np.empty_like(x)
    for position, device in enumerate(mesh.devices.ravel()):
        place[NamedSharding(mesh, spec).devices_indices_map(x.shape)[device]] = position
    step = nnx.jit(
        nnx.shard_map(
            lambda m, x, w: m.update(x=x, weight=w),
            mesh=mesh,
            in_specs=(P(("data", "model")), spec, spec),
            out_specs=P(),
        )
    )
    for devices in (8, 6, 1):
        mask = place < devices
        step(metrics, *jax.device_put((x, mask), NamedSharding(mesh, spec)))
        latest = np.where(place == devices - 1, x, -1).max()
        assert metrics.compute()["x"] == latest


def test_the_last_value_is_exact_for_integers_and_to_48_bits_for_floats():
    metrics = DistributedMetrics({"x": "last"}, mesh=eight())
    for integer in (2**24 + 1, 2**31 - 1, -(2**31), 2**40 + 1, -(2**46) - 1, 2**47 - 1):
        metrics.update(x=np.full(8, integer))
        assert metrics.compute()["x"] == integer
        metrics.update(x=integer)
        assert metrics.compute()["x"] == integer
    for number in (0.1, 1e-30 / 3, -1e30 / 3, np.pi):
        metrics.update(x=number)
        assert metrics.compute()["x"] == pytest.approx(number, rel=2**-47)
    for number in (np.inf, -np.inf, np.nan, 0.0):
        metrics.update(x=np.array([1.0, number]))
        np.testing.assert_equal(metrics.compute()["x"], number)
        metrics.update(x=np.array([np.nan, np.inf, 5.0]))
        assert metrics.compute()["x"] == 5


@pytest.mark.slow
def test_what_is_added_or_merged_is_later_than_what_is_there():
    spec = {"x": "last", "y": "last", "z": Last(shape=2)}
    metrics = DistributedMetrics(spec, mesh=eight())
    metrics.update(x=1.0, y=1.0, z=np.array([1.0, 2.0]))
    metrics.update(x=2.0)
    metrics.update(x=3.0)
    a = metrics.flush()
    metrics.update(x=np.arange(16.0), weight=np.arange(16) < 5)
    metrics.update(x=-1.0, y=2.0, weight=0)
    b = metrics.flush()
    metrics.update(y=9.0)
    c = metrics.flush()
    for both, other_way in ((a + b, b + a), jax.jit(lambda a, b: (a + b, b + a))(a, b)):
        assert (both["x"], both["y"], other_way["x"]) == (4, 1, 3)
    assert (a + b + c)["y"] == 9
    assert (a + (b + c)).flatten() == {"x": 4, "y": 9, "z/0": 1, "z/1": 2}
    assert ((c + a) + b).flatten() == {"x": 4, "y": 1, "z/0": 1, "z/1": 2}
    merged = DistributedMetrics(spec, mesh=mesh_of(4))
    for _ in range(5):
        merged.update(x=50.0, y=50.0)
    merged.merge(a)
    assert merged.compute().flatten() == {"x": 3, "y": 1, "z/0": 1, "z/1": 2}
    merged.merge(b)
    assert (merged.compute()["x"], merged.compute()["y"]) == (4, 1)
    merged.update(x=8.0)
    assert (merged.compute()["x"], merged.compute()["y"]) == (8, 1)
    nnx.jit(lambda m, b: m.merge(b))(merged, b)
    assert (merged.compute()["x"], merged.compute()["y"]) == (4, 1)
    merged.update(y=np.arange(8.0), weight=np.arange(8) == 3)
    assert (merged.compute()["x"], merged.compute()["y"]) == (4, 3)


@pytest.mark.parametrize("rows", [1, 8])
def test_the_last_value_of_loops_on_the_device(rows):
    metrics = DistributedMetrics({"x": "last"}, mesh=eight() if rows == 8 else None)

    @nnx.jit
    def loop(metrics, steps):
        def one(i, metrics):
            metrics.update(x=2**24 + i, weight=i % 10 != 9)
            return metrics

        nnx.fori_loop(0, steps, one, metrics)

    loop(metrics, 1000)
    assert metrics.compute()["x"] == 2**24 + 998
    loop(metrics, 3)
    assert metrics.compute()["x"] == 2**24 + 2

    @nnx.jit
    def scanned(metrics, x, mask):
        def one(metrics, given):
            metrics.update(x=given[0], weight=given[1])
            return metrics

        nnx.scan(one, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(metrics, (x, mask))

    x = np.arange(80, dtype=np.float32).reshape(5, 16)
    scanned(metrics, x, (x < 50) & (x != 49))
    assert metrics.compute()["x"] == 48


# --- histograms ---


FINITE = st.floats(-1e9, 1e9, width=32).filter(lambda x: x == 0 or abs(x) > 1e-30)
DECIMALS = st.integers(-40, 40).map(lambda n: n / 10)
BIG = st.integers(-(2**31), 2**31 - 1)


def counts(x, edges, weight=None) -> np.ndarray:
    """``numpy.histogram`` in float64, which has no place for NaN."""
    x = np.asarray(x).astype(np.float64)
    number = ~np.isnan(x)
    weight = None if weight is None else np.broadcast_to(weight, x.shape)[number].astype(np.float64)
    return np.histogram(x[number], np.asarray(edges, np.float64), weights=weight)[0]


def beyond(x, edges) -> dict[str, int]:
    x = np.asarray(x).astype(np.float64)
    return {
        "underflow": int((x < edges[0]).sum()),
        "overflow": int((x > edges[-1]).sum()),
        "nan": int(np.isnan(x).sum()),
    }


KINDS = ("float64", "float32", "bfloat16", "int32")


def in_kinds(floats: np.ndarray) -> dict[str, np.ndarray]:
    """The same numbers in every dtype, as near as it has them."""
    whole = np.clip(np.where(np.isfinite(floats), floats, 7), -(2**31), 2**31 - 1)
    kinds = {"float64": floats, "float32": floats.astype(np.float32), "bfloat16": floats.astype(ml_dtypes.bfloat16)}
    return {**kinds, "int32": whole.astype(np.int64).astype(np.int32)}


@pytest.mark.slow
@settings(max_examples=7, deadline=None)
@given(data=st.data(), rows=st.sampled_from([1, 8]))
def test_histograms_count_exactly_as_numpy(data, rows):
    some = st.one_of(FINITE, DECIMALS, BIG.map(float))
    edges = data.draw(st.lists(some | st.sampled_from([-np.inf, np.inf]), min_size=2, max_size=9).map(sorted))
    if data.draw(st.booleans()):
        edges = sorted([*edges, edges[data.draw(st.integers(0, len(edges) - 1))]])
    assume(edges[0] < edges[-1] or np.isfinite(edges[0]))  # NumPy does not count infinities between infinities
    element = st.sampled_from(edges) | some | st.sampled_from([np.nan, np.inf, -np.inf])
    metrics = DistributedMetrics(dict.fromkeys(KINDS, Histogram(edges)), mesh=eight() if rows == 8 else None)
    for _ in range(5):
        floats, mask = data.draw(hnp.arrays(float, 16, elements=element)), data.draw(hnp.arrays(bool, 16))
        values = in_kinds(floats)
        metrics.update(values, weight=mask)
        snapshot = metrics.flush()
        for kind, x in values.items():
            np.testing.assert_array_equal(snapshot[kind], counts(x[mask], edges), err_msg=kind)
            assert snapshot.outside[kind] == beyond(x[mask], edges), kind
            assert snapshot.count[kind] == mask.sum()


OFTEN = [
    [0.1, 0.2, 0.3, 0.7], [0.0, 0.0, 1.0, 1.0], [-np.inf, -np.inf, 0.1, 0.1, 0.1, np.inf, np.inf],
    [2**24, 2**24 + 1, 2**24 + 2],
]  # fmt: skip
RARELY = [[0.0, 1.0], [-np.inf, 0.0, np.inf], [1.0, 1.0], list(range(-50, 50)), [-(2.0**31), 2.0**31 - 1]]


@pytest.mark.parametrize("edges", [*OFTEN, *(pytest.param(one, marks=pytest.mark.slow) for one in RARELY)], ids=str)
def test_elements_on_the_edges_fall_where_numpy_counts_them(edges):
    x = [*edges[:12], 0.1, 0.2, 0.3, 0.7, 2**24, 2**24 + 1, 2**24 + 2, 2**31 - 1, -(2**31), 3, -7, 49, 50]
    values = in_kinds(np.append(x, [np.nan, np.inf, -np.inf]))
    metrics = DistributedMetrics(dict.fromkeys(values, Histogram(edges)))
    metrics.update(values)
    for kind, of_kind in values.items():
        np.testing.assert_array_equal(metrics.compute()[kind], counts(of_kind, edges), err_msg=kind)
        assert metrics.compute().outside[kind] == beyond(of_kind, edges), kind


@pytest.mark.slow
def test_the_weight_in_each_bin_is_that_of_numpy():
    rng = np.random.default_rng(0)
    edges = np.linspace(-2, 2, 12)
    x, shape = rng.normal(size=(48, 32)).astype(np.float32), (48, 32)
    metrics = DistributedMetrics({"x": Histogram(edges)}, mesh=eight())
    for weight in (
        rng.random(shape).astype(np.float32),
        (rng.random(shape) * 10.0 ** rng.integers(-4, 4, shape)).astype(np.float32),
        (rng.random(shape) * 1e-20).astype(np.float32),
        (rng.random(shape) * 1e25).astype(np.float32),
        rng.random(shape),
        rng.random((48, 1)).astype(np.float32),
        rng.integers(0, 100, 48),
        rng.random(shape) < 0.5,
        np.float64(0.3),
    ):
        metrics.update(x=x, weight=weight)
        metrics.update(x=x, weight=weight)
        full = 2 * np.broadcast_to(weight.reshape(weight.shape + (1,) * (2 - weight.ndim)), shape).astype(np.float64)
        snapshot = metrics.flush()
        np.testing.assert_allclose(snapshot["x"], counts(x, edges, full), rtol=1e-12)
        assert snapshot.outside["x"]["underflow"] == pytest.approx(full[x < edges[0]].sum(), rel=1e-12)
        assert snapshot.outside["x"]["overflow"] == pytest.approx(full[x > edges[-1]].sum(), rel=1e-12)
        assert snapshot.outside["x"]["nan"] == 0
        assert snapshot.count["x"] == pytest.approx(full.sum(), rel=1e-12)


@pytest.mark.parametrize("size", [100_003, 2**20])
def test_the_weights_of_a_large_batch_are_binned_as_exactly(size):
    rng = np.random.default_rng(0)
    x, weight = rng.normal(size=size).astype(np.float32), rng.random(size).astype(np.float32)
    edges = (-1.0, 0.0, 0.25, 4.0)
    metrics = DistributedMetrics({"x": Histogram(edges)})
    metrics.update(x=x, weight=weight)
    np.testing.assert_allclose(metrics.flush()["x"], counts(x, edges, weight), rtol=1e-12)
    metrics.update(x=x)
    np.testing.assert_array_equal(metrics.compute()["x"], counts(x, edges))


def test_bins_that_see_whole_numbers_are_exact_past_2_to_the_31():
    metrics = DistributedMetrics({"x": ("count", Histogram([0, 1, 2]), Quantile((0.0, 0.5, 1.0)))}, mesh=eight())
    for _ in range(5):
        metrics.update(x=np.array([0.5, 1.5, 1.5, 7.0] * 2), weight=2.0**31)
    metrics.update(x=np.array([0.5, 1.5]))
    metrics.update(x=1.5, weight=2**40 + 1)
    snapshot = metrics.compute()
    assert snapshot["x"]["histogram"].tolist() == [10 * 2**31 + 1, 20 * 2**31 + 1 + 2**40 + 1]
    assert snapshot.outside["x/histogram"] == {"underflow": 0, "overflow": 10 * 2**31, "nan": 0}
    assert snapshot["x"]["count"] == 40 * 2**31 + 2 + 2**40 + 1
    np.testing.assert_allclose(snapshot["x"]["quantile"], [0.5, 1.5, 7.0], rtol=0.01)


def test_histograms_of_columns_and_what_lies_outside_of_them():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(16, 4, 3)).astype(np.float32)
    x[3, 1] = [np.nan, 9.0, -9.0]
    mask = rng.random((16, 4)) < 0.7
    mask[3, 1] = True
    metrics = DistributedMetrics({"x": Histogram(EDGES, shape=(3,))}, mesh=eight())
    metrics.update(x=x, weight=mask)
    snapshot = metrics.compute()
    assert snapshot["x"].shape == (3, 5)
    for column in range(3):
        kept = x[..., column][mask]
        np.testing.assert_array_equal(snapshot["x"][column], counts(kept, EDGES))
        assert {kind: number[column] for kind, number in snapshot.outside["x"].items()} == beyond(kept, EDGES)
    flat = snapshot.flatten()
    assert flat["x/0/nan"] == 1
    assert "x/1/nan" not in flat
    assert flat["x/2/0"] == snapshot["x"][2, 0]
    assert snapshot.flatten(empty="nan")["x/1/nan"] == 0


@pytest.mark.parametrize(
    ("edges", "wrong"),
    [
        (10, r"Histogram\(edges=10\): a number of bins needs edges: numpy.linspace"),
        ([], "0 edges, and the least is two"),
        ([1.0], "1 edges, and the least is two"),
        ([[0.0, 1.0]], "2 dims, where a list of edges has one"),
        ([0.0, np.nan, 1.0], "NaN is no edge"),
        ([0.0, 2.0, 1.0], "the edges descend; sort them"),
        ([0.0, 1e39], "an edge lies beyond float32's range; give an infinite one"),
    ],
)
def test_edges_that_make_no_bins_are_refused(edges, wrong):
    with pytest.raises(ValueError, match=wrong):
        Histogram(edges)


# --- quantiles ---


QS = (0.0, 0.001, 0.01, 0.1, 0.25, 0.5, 0.7, 0.9, 0.99, 0.999, 1.0)
ERRORS = (0.3, 0.05, 0.01, 0.001)
QUANTILES = tuple(Quantile(QS, error, name=str(error)) for error in ERRORS)
DISTRIBUTIONS = {
    "lognormal": lambda rng: rng.lognormal(0, 3, 1000),
    "normal": lambda rng: rng.normal(size=1000),
    "uniform": lambda rng: rng.random(1000),
    "negative": lambda rng: -rng.lognormal(0, 3, 1000),
    "tiny": lambda rng: rng.lognormal(0, 0.3, 1000) * 1e-37,
    "huge": lambda rng: rng.normal(size=1000) * 5e37,
    "constant": lambda rng: np.full(1000, -0.7),
    "zeros": lambda rng: np.zeros(1000),
    "many zeros": lambda rng: np.where(rng.random(1000) < 0.5, 0, rng.normal(size=1000)),
    "infinities": lambda rng: np.where(
        rng.random(1000) < 0.2, np.inf * rng.choice([-1, 1], 1000), rng.normal(size=1000)
    ),
    "powers of two": lambda rng: 2.0 ** rng.integers(-125, 127, 1000) * rng.choice([-1, 1], 1000),
    "just below powers": lambda rng: np.nextafter(np.float32(2.0) ** rng.integers(-125, 127, 1000), np.float32(0)),
    "whole numbers": lambda rng: rng.integers(-50, 50, 1000),
}


def assert_near(results, exact, error: float) -> None:
    """Within a relative error; zeros and infinities exactly."""
    exact = np.asarray(exact, np.float64)
    finite = np.isfinite(exact)
    np.testing.assert_array_equal(results[~finite], exact[~finite])
    assert (np.abs(results[finite] - exact[finite]) <= error * np.abs(exact[finite]) * (1 + 1e-6)).all(), (
        results,
        exact,
    )


@pytest.mark.parametrize("rows", [1, 8])
def test_quantiles_are_within_their_relative_error_of_numpy(rows):
    metrics = DistributedMetrics({"x": QUANTILES}, mesh=eight() if rows == 8 else None)
    for draw in DISTRIBUTIONS.values():
        x = draw(np.random.default_rng(0)).astype(np.float32)
        metrics.update(x=x[:500])
        metrics.update(x=x[500:])
        result = metrics.flush()["x"]
        for error in ERRORS:
            assert_near(result[str(error)], np.quantile(x, QS, method="lower"), error)
    x = np.random.default_rng(0).normal(size=500).astype(np.float32)
    metrics.update(x=np.where(np.arange(500) == 77, np.float32(np.nan), x))
    metrics.update(x=x)
    assert all(np.isnan(result).all() for result in metrics.compute()["x"].values())


@pytest.mark.parametrize("size", [1, 2, 3, 7, 101])
def test_quantiles_of_a_few_elements(size):
    metrics = DistributedMetrics({"x": Quantile((0, 1 / 3, 0.5, 2 / 3, 1), 0.001)})
    for seed in range(5):
        x = np.random.default_rng(seed).normal(size=size)
        metrics.update(x=x)
        assert_near(metrics.flush()["x"], np.quantile(x, (0, 1 / 3, 0.5, 2 / 3, 1), method="lower"), 0.001)
    assert np.isnan(metrics.compute()["x"]).all()
    assert metrics.compute().flatten() == {}


@settings(max_examples=20, deadline=None)
@given(
    x=hnp.arrays(np.float32, 48, elements=st.floats(width=32, allow_nan=False, allow_subnormal=False)),
    weight=hnp.arrays(np.int32, 48, elements=st.integers(0, 5)),
    kind=st.sampled_from(["none", "mask", "repetitions"]),
)
def test_whole_weights_count_as_repetitions(x, weight, kind):
    metrics = DistributedMetrics({"x": (Quantile(QS, 0.05), Quantile(0.5, 0.05, name="median"))}, mesh=eight())
    weight = {"none": np.ones(48, np.int32), "mask": (weight > 2).astype(np.int32), "repetitions": weight}[kind]
    given = {"none": None, "mask": weight > 0, "repetitions": weight}[kind]
    metrics.update(x=x, weight=given)
    result = metrics.compute()["x"]
    repeated = np.repeat(x.astype(np.float64), weight)
    if not repeated.size:
        assert np.isnan(result["median"])
        return
    assert_near(result["quantile"], np.quantile(repeated, QS, method="lower"), 0.05)
    np.testing.assert_equal(result["median"], result["quantile"][QS.index(0.5)])


@pytest.mark.parametrize(("size", "rows"), [(10, 8), (1000, 1), (100_000, 1), (100_000, 8)])
def test_fractional_weights_give_the_inverted_cdf_of_numpy_also_at_the_ends(size, rows):
    metrics = DistributedMetrics({"x": Quantile(QS, 0.01)}, mesh=eight() if rows == 8 else None)
    for seed in range(6):
        rng = np.random.default_rng(seed)
        x, weight = rng.normal(size=size).astype(np.float32), rng.random(size).astype(np.float32)
        metrics.update(x=x, weight=weight)
        result = metrics.flush()["x"]
        exact = np.quantile(x.astype(float), QS, method="inverted_cdf", weights=weight.astype(float))
        assert_near(result, exact, 0.01)


def test_a_share_that_is_just_reached_is_reached():
    metrics = DistributedMetrics({"x": Quantile((0.25, 0.5, 1.0), 0.01)})
    metrics.update(x=np.array([1.0, 2.0, 3.0, 4.0]), weight=np.full(4, 0.5))
    assert_near(metrics.compute()["x"], np.array([1.0, 2.0, 4.0]), 0.01)


@pytest.mark.parametrize("weights", ["fractional", "many", "large"])
def test_the_highest_quantile_is_that_of_the_largest_element_also_in_a_trace(weights):
    metrics = DistributedMetrics({"x": Quantile((0.0, 1.0))})
    for seed in range(6):
        rng = np.random.default_rng(seed)
        x = rng.normal(size=1000).astype(np.float32)
        weight = {
            "fractional": rng.random(1000),
            "many": np.full(1000, 2.0**15),
            "large": rng.integers(1, 2**30, 1000).astype(np.float64),
        }[weights]
        metrics.update(x=x, weight=weight)
        for result in (read_results(metrics)["x"], metrics.flush()["x"]):
            assert_near(np.asarray(result, np.float64), [x.min(), x.max()], 0.01)


def test_quantiles_in_a_trace_are_values_that_were_seen():
    """Also where the share falls between two that are far apart, and float32 sums round to either side of it."""
    metrics = DistributedMetrics({"x": Quantile((0.25, 0.5, 0.75), 0.01)})
    for seed in range(20):
        rng = np.random.default_rng(seed)
        x = (10.0 ** np.array([[-20], [-3], [4], [25]]) * np.exp(rng.normal(0, 0.5, (1, 64)))).astype(np.float32)
        metrics.update(x=x, weight=np.tile(rng.random(64), (4, 1)))
        for result in (read_results(metrics)["x"], metrics.flush()["x"]):
            nearest = np.abs(np.asarray(result, np.float64)[:, None] / x.astype(np.float64).ravel() - 1).min(axis=1)
            assert (nearest <= 0.01).all(), (seed, result)


def test_quantiles_merged_over_eight_devices_equal_those_of_one_exactly():
    rng = np.random.default_rng(0)
    x = (rng.lognormal(0, 3, (840, 3)) * rng.choice([-1, 1], (840, 3))).astype(np.float32)
    quantile = Quantile(QS, 0.01, shape=(3,))
    results = []
    for devices in (1, 8):
        mesh = mesh_of(devices)
        metrics = DistributedMetrics({"x": quantile}, mesh=mesh)
        metrics.update(x=split(x, mesh))
        results.append(metrics.compute())
    assert results[0]["x"].shape == (3, len(QS))
    for result in results:
        np.testing.assert_array_equal(result["x"], results[0]["x"])
    assert_near(results[0]["x"], np.quantile(x.astype(float), QS, axis=0, method="lower").T, 0.01)


@pytest.mark.parametrize("q", [-0.1, 1.1, np.nan, (), (0.5, 2.0), [[0.5]], np.inf])
def test_a_q_that_is_no_share_is_refused(q):
    with pytest.raises(ValueError, match="q is a number from 0 to 1, or several"):
        Quantile(q)


@pytest.mark.parametrize("error", [0, 0.0009, 0.6, -0.01, np.nan, 1])
def test_a_relative_error_out_of_range_is_refused(error):
    with pytest.raises(ValueError, match=r"Quantile\(relative_error=.*\): it may be from 0.001 to 0.5"):
        Quantile(0.5, error)


# --- the laws, over every way of running ---


QUARTILES = Quantile((0.0, 0.25, 0.5, 1.0), 0.2)
SPEC: dict[str, Any] = {"x": ("var", "std", "last", Histogram(EDGES), QUARTILES), "never": ("last", "var")}


def batch(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {"x": rng.lognormal(size=32).astype(np.float32), "mask": rng.random(32) < 0.5}


def update(metrics, values):
    metrics.update(x=values["x"], weight=values["mask"])


def assert_results(snapshot, batches) -> None:
    x = np.concatenate([b["x"][b["mask"]] for b in batches])
    result = snapshot["x"]
    assert result["var"] == pytest.approx(variance(x), rel=1e-12)
    assert result["std"] == pytest.approx(variance(x) ** 0.5, rel=1e-12)
    assert result["last"] == x[-1]
    np.testing.assert_array_equal(result["histogram"], counts(x, EDGES))
    assert_near(result["quantile"], np.quantile(x, QUARTILES.q, method="lower"), QUARTILES.relative_error)
    assert snapshot.outside["x/histogram"] == beyond(x, EDGES)
    assert snapshot.count["x"] == len(x)
    assert np.isnan(list(snapshot["never"].values())).all()


def shapes_of(metrics):
    return [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for x in jax.tree.leaves(nnx.state(metrics))]


@pytest.fixture(params=SOME_WAYS, ids=lambda way: way.name)
def way(request) -> Way:
    return request.param


@pytest.fixture
def in_scope(way):
    with way.scope():
        yield


ELSEWHERE = ("nnx.scan", "jax.jit", "jax.pmap")
"""Ways that compile the longest here, and that ``test_ways.py`` tries on every Python."""


@pytest.mark.usefixtures("in_scope")
class TestEveryWay:
    @pytest.mark.parametrize(
        "way",
        [pytest.param(way, id=way.name, marks=pytest.mark.slow if way.name in ELSEWHERE else ()) for way in SOME_WAYS],
        indirect=True,
    )
    def test_results_equal_float64_numpy_and_updates_send_nothing(self, way):
        metrics = way.make(SPEC)
        run = way.step(way, update)
        before = shapes_of(metrics)
        for window in range(2):
            batches = [batch(10 * window + i) for i in range(3)]
            for values in batches:
                metrics, _ = run(metrics, way.place(values))
            assert_results(metrics.flush(), batches)
        for now, then in zip(shapes_of(metrics), before, strict=True):
            assert (now.shape, now.dtype) == (then.shape, then.dtype)
            assert now.sharding.device_set == then.sharding.device_set
            assert "pmap" in way.name or now.sharding.is_equivalent_to(then.sharding, len(now.shape))
        if way.program:
            assert count_collectives(run, metrics, way.place(batches[0])) == {}

    @pytest.mark.slow
    @pytest.mark.parametrize("way", SOME_WAYS[1:], ids=lambda way: way.name, indirect=True)  # not the eager one
    def test_a_traced_compute_costs_at_most_one_collective_and_agrees_with_an_eager_one(self, way):
        metrics = way.make(SPEC)
        run = way.step(way, lambda m, v: m.compute())
        batches = [batch(i) for i in range(3)]
        for values in batches:
            update(metrics, values)
        values = way.place(batches[0])
        eager = metrics.compute()
        metrics, snapshot = run(metrics, values)
        assert_results(snapshot, batches)
        assert snapshot.flatten() == pytest.approx(eager.flatten(), rel=2**-40)
        assert metrics.compute().flatten() == eager.flatten()
        if way.program:
            assert sum(count_collectives(run, metrics, values).values()) == (0 if way.axes is None else way.copies)


@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("how", ["eager", "jit"])
def test_a_program_that_updates_some_of_the_tables_leaves_the_others_readable(how, devices, explicit):
    mesh = mesh_of(devices, explicit)
    metrics = DistributedMetrics({"x": "max", "y": ("mean", "last")}, mesh=mesh)
    step = (lambda m, x: m.update(x=x)) if how == "eager" else nnx.jit(lambda m, x: m.update(x=x))
    step(metrics, split(np.arange(16.0, dtype=np.float32), mesh))
    assert metrics.compute()["x"] == 15
    metrics.update(y=2.0)
    assert metrics.flush().flatten() == {"x": 15, "y/mean": 2, "y/last": 2}


# --- elements that are not finite ---


EVERY = {
    "mean": Mean(),
    "sum": Sum(),
    "count": Count(),
    "max": Max(),
    "min": Min(),
    "var": Var(),
    "last": Last(),
    "histogram": Histogram(EDGES),
    "quantile": Quantile((0.0, 0.5), 0.1),
}
EVERY_SPEC: dict[str, Any] = {"x": tuple(EVERY.values()), "ratio": "ratio"}


def every_result(x) -> dict[str, Any]:
    """What every accumulator makes of finite elements, in float64 NumPy; extrema are float32."""
    x = np.asarray(x).astype(np.float64).ravel()
    return {
        "mean": x.mean(), "sum": x.sum(), "count": x.size, "max": np.float32(x.max()), "min": np.float32(x.min()),
        "var": x.var(), "last": x[-1], "histogram": counts(x, EDGES),
        "quantile": np.quantile(x, (0.0, 0.5), method="lower"),
    }  # fmt: skip


def assert_every(result, expected) -> None:
    assert list(result) == list(expected)
    for name, number in expected.items():
        if name == "quantile":
            assert_near(result[name], number, 0.1)
        else:
            np.testing.assert_allclose(result[name], number, rtol=1e-12, atol=1e-14, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "rows"), [("float32", 8), ("float32", 1), ("bfloat16", 8), ("float16", 8), ("float64", 8)]
)
def test_ignore_leaves_out_and_counts_what_is_not_finite(dtype, rows):
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    rng = np.random.default_rng(0)
    x, bad = rng.normal(size=32).astype(kind), np.zeros(32, bool)
    bad[[0, 7, 8, 30, 31]] = True
    x[bad] = np.array([np.nan, np.inf, -np.inf, np.nan, np.inf]).astype(kind)
    some = rng.random(32) < 0.7
    some[[0, 7, 8, 31]] = [True, True, False, False]
    mesh = eight() if rows == 8 else None
    metrics = DistributedMetrics({**EVERY_SPEC, "other": ("mean", "var")}, mesh=mesh, nan_policy="ignore")
    for mask in (np.ones(32, bool), some, bad):
        metrics.update(x=x, ratio=(x, x), other=np.ones(32, np.float32), weight={"x": mask, "ratio": mask})
        snapshot = metrics.flush()
        if (mask & ~bad).any():
            assert_every(snapshot["x"], every_result(x[~bad & mask]))
            assert snapshot["ratio"] == 1
        else:
            assert np.isnan([snapshot["x"][name] for name in ("mean", "max", "min", "var", "last")]).all()
            assert (snapshot["x"]["count"], snapshot["x"]["sum"]) == (0, 0)
        left_out = (bad & mask).sum()
        assert {name: snapshot.nonfinite[f"x/{name}"] for name in EVERY} == dict.fromkeys(EVERY, left_out)
        assert (snapshot.nonfinite["ratio"], snapshot.nonfinite["x"]) == (left_out, left_out)
        assert (snapshot.nonfinite["other"], snapshot["other"]) == (0, {"mean": 1, "var": 0})
        assert snapshot.outside["x/histogram"]["nan"] == 0


@pytest.mark.parametrize("weight", [None, np.arange(8) % 3, np.arange(8) % 3 / 7, np.arange(8) % 3 > 0, np.True_, 0])
def test_ignore_does_not_count_what_has_weight_0(weight):
    metrics = DistributedMetrics({"x": ("mean", "count", "last"), "n": "mean"}, nan_policy="ignore")
    x = np.arange(8.0)
    x[[0, 1, 2, 3]] = np.nan
    metrics.update(x=x, n=np.arange(8), weight=weight)
    metrics.update(x=np.nan, n=3, weight=0)
    metrics.update(x=np.nan)
    full = np.ones(8) if weight is None else np.broadcast_to(np.asarray(weight, float), 8)
    snapshot = metrics.compute()
    assert snapshot.nonfinite["x"] == (full[:4] != 0).sum() + 1
    assert snapshot.nonfinite["n"] == 0
    assert snapshot["x"]["count"] == pytest.approx(full[4:].sum(), rel=1e-12)
    if full.any():
        assert snapshot["x"]["mean"] == pytest.approx(np.average(x[4:], weights=full[4:]), rel=1e-12)
        assert snapshot["x"]["last"] == x[full != 0][-1]
        assert snapshot["n"] == pytest.approx(np.average(np.arange(8), weights=full), rel=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["nnx.jit-explicit-2d", "nnx.shard_map", "jax.shard_map-2d", "jax.pmap", "nnx.scan"])
def test_ignore_in_every_kind_of_program(name):
    [way] = [way for way in WAYS if way.name == name]
    x, y = np.random.default_rng(0).normal(size=(2, 32)).astype(np.float32)
    x[[0, 17, 31]], y[[1, 17]] = [np.nan, np.inf, -np.inf], np.nan
    spec = {"x": ("mean", "count", "var", "last"), "r": "ratio", "n": ("mean", "last"), "other": "mean"}
    with way.scope():
        metrics = way.make(spec, nan_policy="ignore")
        run = way.step(way, lambda m, v: m.update(x=v["x"], r=(v["x"], v["y"]), n=v["n"]))
        values = {"x": x, "y": y, "n": np.arange(32, dtype=np.int32)}
        for _ in range(2):
            metrics, _ = run(metrics, way.place(values))
        assert not way.program or count_collectives(run, metrics, way.place(values)) == {}
        snapshot = metrics.compute()
    kept, both = x[np.isfinite(x)].astype(float), np.isfinite(x) & np.isfinite(y)
    assert snapshot["x"] == pytest.approx(
        {"mean": kept.mean(), "count": 58, "var": kept.var(), "last": kept[-1]}, 1e-12
    )
    assert snapshot["r"] == pytest.approx(x[both].sum(dtype=float) / y[both].sum(dtype=float), rel=1e-12)
    assert snapshot["n"] == {"mean": 15.5, "last": 31}
    assert [snapshot.nonfinite[value] for value in ("x", "r", "n", "other")] == [6, 8, 0, 0]


def test_ignore_counts_for_each_column_and_windows_add_the_counts():
    spec = {"v": (Mean(3), Var(3), Last(3), Histogram(EDGES, shape=3), Quantile(0.5, 0.1, shape=3)), "r": Ratio(3)}
    metrics = DistributedMetrics(spec, mesh=eight(), nan_policy="ignore")
    x = np.random.default_rng(0).normal(size=(16, 3)).astype(np.float32)
    x[4, 0], x[15, 0], x[15, 2] = np.nan, np.inf, -np.inf
    other = np.ones_like(x)
    other[0, 1] = np.nan
    metrics.update(v=x, r=(x, other), weight=np.ones(16, bool))
    first = metrics.flush()
    assert first.nonfinite["v/var"].tolist() == [2, 0, 1]
    assert first.nonfinite["r"].tolist() == [2, 1, 1]
    for column in range(3):
        kept = x[np.isfinite(x[:, column]), column].astype(float)
        assert first["v"]["mean"][column] == pytest.approx(kept.mean(), rel=1e-12)
        assert first["v"]["var"][column] == pytest.approx(kept.var(), rel=1e-12)
        assert first["v"]["last"][column] == kept[-1]
        np.testing.assert_array_equal(first["v"]["histogram"][column], counts(kept, EDGES))
        both = np.isfinite(x[:, column]) & np.isfinite(other[:, column])
        assert first["r"][column] == pytest.approx(x[both, column].mean(dtype=float), rel=1e-12)
    metrics.update(v=x, r=(x, other), weight=np.arange(16) != 4)
    second = metrics.flush()
    assert second.nonfinite["v"].tolist() == [1, 0, 1]
    for total in (first + second, sum([first, second])):
        assert total.nonfinite["v/quantile"].tolist() == [3, 0, 2]
        assert total.nonfinite["r"].tolist() == [3, 2, 2]
    saved = json.dumps(jax.tree.map(np.ndarray.tolist, first.to_dict()))
    restored = Snapshot.from_dict(json.loads(saved))
    np.testing.assert_equal(dict(restored.nonfinite), dict(first.nonfinite))
    metrics.merge(restored)
    assert metrics.compute().nonfinite["r"].tolist() == [2, 1, 1]
    assert metrics.compute().flatten() == pytest.approx(first.flatten(), rel=1e-13)


def test_ignore_leaves_out_a_pair_of_which_either_part_is_not_finite():
    metrics = DistributedMetrics({"r": "ratio"}, mesh=eight(), nan_policy="ignore")
    a, b = np.arange(16.0), np.arange(16.0) + 1
    a[2], b[3], a[5], b[5] = np.nan, np.inf, np.nan, np.nan
    metrics.update(r=(a, b))
    kept = np.isfinite(a) & np.isfinite(b)
    assert metrics.compute()["r"] == pytest.approx(a[kept].sum() / b[kept].sum(), rel=1e-12)
    assert (metrics.compute().nonfinite["r"], metrics.compute().count["r"]) == (3, b[kept].sum())
    metrics.update(r=(a, b), weight=np.arange(16) != 2)
    assert metrics.compute().nonfinite["r"] == 5
    metrics.flush()
    metrics.update(r=(np.arange(16), b))
    kept = np.isfinite(b)
    assert metrics.compute()["r"] == pytest.approx(np.arange(16)[kept].sum() / b[kept].sum(), rel=1e-12)
    metrics.update(r=(np.nan, 1.0))
    metrics.update(r=(1, 1))
    assert metrics.compute().nonfinite["r"] == 3


@pytest.mark.parametrize("size", [8, 16])
@pytest.mark.parametrize("how", ["eager", "explicit jit"])
@pytest.mark.parametrize("specs", [(P("data"), P()), (P(), P("data")), (P(), P())], ids=str)
def test_ignore_takes_pairs_whose_parts_are_partitioned_differently(size, how, specs):
    mesh = make_mesh({"data": 8}, explicit=how == "explicit jit")
    metrics = DistributedMetrics({"r": "ratio"}, mesh=mesh, nan_policy="ignore")
    a, b = np.arange(1.0, size + 1).astype(np.float32), 2 * np.arange(1.0, size + 1).astype(np.float32) + 1
    a[3], b[5] = np.nan, np.inf
    values = tuple(split(part, mesh, spec) for part, spec in zip((a, b), specs, strict=True))
    put = (lambda m, r: m.update(r=r)) if how == "eager" else nnx.jit(lambda m, r: m.update(r=r))
    put(metrics, values)
    kept = np.isfinite(a) & np.isfinite(b)
    snapshot = metrics.compute()
    assert snapshot["r"] == pytest.approx(a[kept].sum() / b[kept].sum(), rel=1e-12)
    assert (snapshot.nonfinite["r"], snapshot.count["r"]) == (2, b[kept].sum())


def test_ignore_refuses_a_ratio_of_different_shapes_and_propagate_has_no_counts():
    metrics = DistributedMetrics({"r": "ratio"}, nan_policy="ignore")
    with pytest.raises(ValueError, match=r"'r' has parts of the shapes numerator \(4,\), denominator \(\), and nan_po"):
        metrics.update(r=(np.ones(4), 4))
    DistributedMetrics({"r": "ratio"}).update(r=(np.ones(4), 4))
    with pytest.raises(ValueError, match=r'To leave it out and count it: .*nan_policy="ignore"'):
        _ = DistributedMetrics({"r": "ratio"}).compute().nonfinite
    ignoring, propagating = metrics.compute(), DistributedMetrics({"r": "ratio"}).compute()
    with pytest.raises(ValueError, match="nan_policy: 'ignore' and 'propagate'"):
        ignoring + propagating


def bad_results(bad: float) -> dict[str, Any]:
    """What every accumulator makes of 31 ones, this number among them, and a 2 in the end."""
    nan = bad if np.isnan(bad) else None
    return {
        "mean": bad,
        "sum": bad,
        "count": 33,
        "max": nan or (np.inf if bad > 0 else 2),
        "min": nan or (-np.inf if bad < 0 else 1),
        "var": np.nan,
        "last": 2,
        "histogram": [0, 0, 0, 31, 1],
        "quantile": [nan or (-np.inf if bad < 0 else 1), nan or 1],
    }


def test_nan_and_inf_reach_the_metrics_that_saw_them_and_no_other():
    """Of every accumulator."""
    metrics = DistributedMetrics({"bad": EVERY_SPEC, "good": EVERY_SPEC}, mesh=eight())
    ones, all_of_them = np.ones(16, np.float32), np.ones(16, bool)
    for bad in (np.nan, np.inf, -np.inf):
        seen = ones.copy()
        seen[5] = bad
        for x, mask in ((seen, all_of_them), (ones, all_of_them), (np.full(16, 2, np.float32), np.arange(16) == 15)):
            pairs = {"bad": {"x": x, "ratio": (x, ones)}, "good": {"x": x, "ratio": (x, ones)}}
            metrics.update(pairs, weight={"bad": mask, "good": mask & np.isfinite(x)})
        snapshot = metrics.flush()
        assert_every(snapshot["good"]["x"], every_result(np.append(np.ones(31), 2)))
        assert snapshot["good"]["ratio"] == 33 / 32
        outside = {"underflow": bad == -np.inf, "overflow": bad == np.inf, "nan": np.isnan(bad)}
        assert snapshot.outside["bad/x/histogram"] == outside
        np.testing.assert_equal(snapshot["bad"]["ratio"], bad)
        for name, expected in bad_results(bad).items():
            result = snapshot["bad"]["x"][name]
            np.testing.assert_allclose(result, expected, rtol=0.1 if name == "quantile" else 1e-12, err_msg=name)


# --- populations, and vectors ---


POPULATION_SPEC: dict[str, Any] = {**EVERY_SPEC, "v": (Var(shape=2), Quantile((0.5,), 0.3, shape=2))}


def feed(metrics, x):
    metrics.update(x=x, ratio=(x, 2), v=x.reshape(-1, 2), weight={"x": x < 2})
    return metrics


def assert_members(snapshot, singles) -> None:
    """Every result of a population (or of stacked windows) is that of the member alone; nothing is summed over them."""
    for i, single in enumerate(singles):
        for result, own in zip(jax.tree.leaves(dict(snapshot)), jax.tree.leaves(dict(single)), strict=True):
            assert np.shape(result) == (len(singles), *np.shape(own))
            np.testing.assert_allclose(result[i], own, rtol=1e-12)
        for name, own in single.count.items():
            assert np.shape(snapshot.count[name]) == (len(singles), *np.shape(own))
            np.testing.assert_allclose(snapshot.count[name][i], own, rtol=1e-12)
        for name, outside in single.outside.items():
            for kind, own in outside.items():
                np.testing.assert_array_equal(snapshot.outside[name][kind][i], own)
        flat = snapshot.flatten()
        assert flat[f"x/var/{i}"] == snapshot["x"]["var"][i]
        assert flat[f"x/last/{i}"] == snapshot["x"]["last"][i]
        assert flat[f"x/histogram/{i}/2"] == snapshot["x"]["histogram"][i, 2]
        assert flat[f"x/histogram/{i}/underflow"] == snapshot.outside["x/histogram"]["underflow"][i] != 0
        assert flat[f"x/quantile/{i}/1"] == snapshot["x"]["quantile"][i, 1]
        assert flat[f"v/var/{i}/1"] == snapshot["v"]["var"][i, 1]
        assert flat[f"v/quantile/{i}/1/0"] == snapshot["v"]["quantile"][i, 1, 0]
    assert len(snapshot.flatten(empty="nan")) == len(singles) * len(singles[0].flatten(empty="nan"))


@pytest.mark.slow
def test_a_population_keeps_its_dims_in_every_result_of_every_accumulator():
    mesh = eight()
    x = np.random.default_rng(0).normal(size=(2, 3, 16)).astype(np.float32)
    x[:, :, 0] = -5
    population = jax.vmap(lambda _: DistributedMetrics(POPULATION_SPEC, mesh=mesh))(jnp.arange(3))
    singles = [DistributedMetrics(POPULATION_SPEC, mesh=mesh) for _ in range(3)]
    step = jax.jit(jax.vmap(feed))
    for of_all in x:
        population = step(population, of_all)
        for single, of_one in zip(singles, of_all, strict=True):
            feed(single, of_one)
    alone = [single.compute() for single in singles]
    for snapshot in (
        population.compute(),
        read(population),
        Snapshot.from_dict(population.compute().to_dict()),
    ):
        assert_members(snapshot, alone)
    assert_members(population.compute() + population.compute(), [one + one for one in alone])
    assert population.compute().per_device("x/histogram").shape == (3, 8, 5)
    population.flush()
    assert population.compute().flatten() == {}


def test_a_population_that_ignores_counts_for_each_member():
    spec = {"x": ("count", "var", "last"), "ratio": "ratio"}
    population = jax.vmap(lambda _: DistributedMetrics(spec, nan_policy="ignore"))(jnp.arange(3))
    x = np.ones((3, 4), np.float32)
    x[1, :2] = np.nan
    x[2, 0] = np.inf
    population = jax.vmap(lambda m, x: (m.update(x=x, ratio=(x, x)), m)[1])(population, x)
    snapshot = population.compute()
    for name in snapshot.nonfinite:
        assert snapshot.nonfinite[name].tolist() == [0, 2, 1]
    assert snapshot["x"]["count"].tolist() == [4, 2, 3]


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["mask", "floats"])
def test_shape_keeps_trailing_dims_of_every_accumulator(weights):
    rng = np.random.default_rng(0)
    x = rng.normal(1e3, 1, (16, 5, 2, 3)).astype(np.float32)
    weight: Any = weights_of(weights, 80)
    weight = weight.reshape(16, 5)
    shape = (2, 3)
    spec = {
        "x": (Var(shape), Std(shape), Last(shape), Count(shape), Histogram([0, 1e3, 1e3 + 1], shape=shape),
              Quantile((0.1, 0.5), 0.01, shape=shape), Quantile(0.5, 0.01, shape=shape, name="median")),
    }  # fmt: skip
    metrics = DistributedMetrics(spec, mesh=eight())
    for half in (slice(8), slice(8, 16)):
        metrics.update(x=x[half], weight=weight[half])
    result = metrics.compute()["x"]
    assert result["histogram"].shape == (2, 3, 2)
    assert result["quantile"].shape == (2, 3, 2)
    assert result["median"].shape == (2, 3)
    for i, j in np.ndindex(shape):
        column = x[..., i, j].ravel().astype(np.float64)
        w = weight.ravel().astype(np.float64)
        assert result["var"][i, j] == pytest.approx(variance(column, w), rel=1e-12)
        assert result["std"][i, j] == pytest.approx(variance(column, w) ** 0.5, rel=1e-12)
        assert result["last"][i, j] == column[w != 0][-1]
        assert result["count"][i, j] == pytest.approx(w.sum(), rel=1e-12)
        np.testing.assert_allclose(result["histogram"][i, j], counts(column, [0, 1e3, 1e3 + 1], w), rtol=1e-12)
        method: Any = {"method": "inverted_cdf", "weights": w} if weights == "floats" else {"method": "lower"}
        kept = column if weights == "floats" else column[w != 0]
        assert_near(result["quantile"][i, j], np.quantile(kept, (0.1, 0.5), **method), 0.01)
        assert result["median"][i, j] == result["quantile"][i, j, 1]


def test_labels_name_the_bins_and_the_quantiles():
    metrics = DistributedMetrics(
        {"x": (Histogram([0, 1, 2], labels=("low", "high")), Quantile((0.5, 1.0), labels=("p50", "p100")))}
    )
    metrics.update(x=np.array([0.0, 0.0, 1.5, 9.0]))
    assert list(metrics.compute().flatten()) == [
        "x/histogram/low", "x/histogram/high", "x/histogram/overflow", "x/quantile/p50", "x/quantile/p100",
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"1 labels for results of shape \(2,\)"):
        Histogram([0, 1, 2], labels=("low",))
    with pytest.raises(ValueError, match=r"2 labels for results of shape \(\)"):
        Quantile(0.5, labels=("p50", "p99"))


def test_flatten_of_a_population_leaves_out_the_members_that_saw_nothing_and_labels_the_last_dim():
    spec = {"x": Quantile((0.0, 1.0), labels=("least", "most"))}
    population = jax.vmap(lambda _: DistributedMetrics(spec))(jnp.arange(2))
    update = jax.vmap(lambda metrics, x, weight: (metrics.update(x=x, weight=weight), metrics)[1])
    population = update(population, jnp.array([[1.0, 2.0], [0.0, 0.0]]), jnp.array([0.0, 1.0]))
    assert population.compute().flatten() == {"x/1/least": 0.0, "x/1/most": 0.0}


# --- as float64 would have it ---


def test_a_million_updates_lose_nothing():
    metrics = DistributedMetrics({"x": ("mean", "var", "std", "last", "count")})

    @nnx.jit
    def many(metrics):
        def one(_, metrics):
            metrics.update(x=np.float64(0.1))
            return metrics

        nnx.fori_loop(0, 10**6, one, metrics)

    many(metrics)
    result = metrics.compute()["x"]
    assert result["mean"] == pytest.approx(0.1, rel=1e-13)
    assert result["last"] == pytest.approx(0.1, rel=2**-47)
    assert (result["var"], result["std"], result["count"]) == (0, 0, 10**6)


def error_of_sums(metrics, x) -> float:
    metrics.update(x=x, v=x[:, None])
    result, exact = metrics.flush(), x.sum(dtype=np.float64)
    return np.abs(np.array([result["x"]["sum"], result["x"]["mean"] * len(x), result["v"][0]]) / exact - 1).max()


@pytest.mark.parametrize(("size", "rows"), [(10**6, 1), (999_983, 1), (16_385, 1), (2**20 + 1, 1), (10**6, 8)])
def test_the_sum_of_many_elements_in_one_update_errs_by_less_than_1e_8(size, rows):
    rng = np.random.default_rng(0)
    metrics = DistributedMetrics({"x": ("sum", "mean"), "v": Sum(shape=1)}, mesh=eight() if rows == 8 else None)
    assert error_of_sums(metrics, rng.lognormal(size=size).astype(np.float32)) < 1e-8
    assert error_of_sums(metrics, rng.lognormal(0, 3, size).astype(np.float32)) < 1e-8
    assert error_of_sums(metrics, rng.random(size).astype(np.float32)) < 1e-8


@pytest.mark.parametrize(("size", "rows"), [(10**6, 1), (999_983, 1), (10**6, 8)])
def test_the_sum_of_many_equal_elements_errs_by_about_1e_7(size, rows):
    """Their rounding errors do not average out, nor those of a pattern; the ones of jnp.sum reach 2.2e-7."""
    metrics = DistributedMetrics({"x": ("sum", "mean"), "v": Sum(shape=1)}, mesh=eight() if rows == 8 else None)
    i = np.arange(size)
    for constant in (0.1, 0.7, 1 / 3, np.pi, 1e30, 16777215):
        for x in (np.ones(size), i % 2, np.where(i % 3, 1, 1 / 7), np.where(i % 7, 1, 1 / 7)):
            assert error_of_sums(metrics, (x * constant).astype(np.float32)) < 2e-7, constant
