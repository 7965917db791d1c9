"""A flush costs a device the same, however many there are; large states take another path to the same numbers."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from distributed_metrics import DistributedMetrics, Histogram, Mean, Var, count_collectives, gathering
from processes import PROGRAMS
from ways import make_mesh


def compiled_for(devices: int) -> dict[str, dict[str, object]]:
    """What ``programs/scale.py`` prints of a mesh of so many virtual devices."""
    command = [sys.executable, str(PROGRAMS / "scale.py"), str(devices)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_bytes_and_memory_of_a_device_do_not_grow_with_the_number_of_devices():
    few, many = compiled_for(8), compiled_for(512)
    for of in (few, many):
        assert of["scalars"]["update sends"] == of["all"]["update sends"] == {}
        assert of["scalars"]["compute sends"] == {"all-gather": 1}
        assert of["all"]["compute sends"] == {"all-to-all": 1, "all-gather": 1}
    assert many["scalars"]["bytes sent by a device"] == few["scalars"]["bytes sent by a device"]
    assert many["scalars"]["temporary bytes on a device"] < 2 * gathering.MOST_GATHERED_BYTES
    state = many["all"]["bytes of state on a device"]
    assert few["all"]["bytes of state on a device"] == state > 300_000
    for of in (few, many):
        assert of["all"]["bytes sent by a device"] < 1.2 * state
        assert of["all"]["temporary bytes on a device"] < 3 * state, "all rows together are 512 times the state"


SLOTS = 37  # not divisible by the devices
AXES = {"data": 4, "model": 2}


def updated(explicit: bool, name: str) -> DistributedMetrics:
    """Metrics of several merges, whose rows all differ; the name makes a spec of its own."""
    spec = {
        "x": (Mean(shape=(SLOTS,)), Var(shape=(SLOTS,))),
        "bins": Histogram(tuple(range(SLOTS + 1))),
        "y": ("last", "max", "min"),
        name: "sum",
    }
    mesh = make_mesh(AXES, explicit)
    metrics = DistributedMetrics(spec, mesh=mesh)
    rng = np.random.default_rng(0)
    for _ in range(3):
        x = rng.lognormal(3.0, 1.0, (16, SLOTS)).astype(np.float32)
        values = {"x": x, "bins": x, name: x, "y": x}
        metrics.update(jax.device_put(values, NamedSharding(mesh, P(("data", "model")))))
    return metrics


@pytest.mark.parametrize(
    "explicit", [pytest.param(False, id="auto"), pytest.param(True, id="explicit", marks=pytest.mark.slow)]
)
def test_both_paths_give_the_same_numbers_to_the_bit(explicit, monkeypatch):
    def compute(metrics):
        return nnx.jit(lambda metrics: metrics.compute())(metrics)

    small, large = updated(explicit, "small"), updated(explicit, "large")
    by_gathering = compute(small)
    monkeypatch.setattr(gathering, "MOST_GATHERED_BYTES", 0)
    gathered, reduced = by_gathering.to_dict()["metrics"], compute(large).to_dict()["metrics"]
    reduced["small"] = reduced.pop("large")
    assert set(gathered) == set(reduced)
    jax.tree.map(np.testing.assert_array_equal, gathered, dict(reduced))
    seen = large.flush().flatten()
    for name, number in by_gathering.flatten().items():
        assert number == pytest.approx(seen[name.replace("small", "large")], rel=1e-12), name


def test_a_table_is_merged_on_the_way_from_one_mebibyte_of_rows_on():
    """Eight rows of a mean of n elements take 128 n bytes."""
    mesh = make_mesh({"data": 8}, explicit=False)
    at_most = gathering.MOST_GATHERED_BYTES // 128
    assert at_most == 8192
    for size, sent in ((at_most, {"all-gather": 1}), (at_most + 1, {"all-to-all": 1, "all-gather": 1})):
        metrics = DistributedMetrics({"x": Mean(shape=(size,))}, mesh=mesh)
        assert count_collectives(lambda metrics: metrics.compute(), metrics) == sent


def test_large_states_in_mapped_code_and_of_populations(monkeypatch):
    monkeypatch.setattr(gathering, "MOST_GATHERED_BYTES", 0)
    mesh = make_mesh({"data": 8}, explicit=False)
    x = np.arange(8 * SLOTS, dtype=np.float32).reshape(8, SLOTS)
    metrics = DistributedMetrics({"mapped": Mean(shape=(SLOTS,)), "total": "sum"}, mesh=mesh)

    def local(metrics, x):
        metrics.update(mapped=x, total=x)
        return metrics.flush()

    sharded = jax.device_put(x, NamedSharding(mesh, P("data")))
    step = nnx.jit(nnx.shard_map(local, mesh=mesh, in_specs=(P("data"), P("data")), out_specs=P()))
    window = step(metrics, sharded)
    assert np.array_equal(window["mapped"], x.mean(axis=0))
    assert window["total"] == x.sum()

    make = jax.vmap(lambda seed: DistributedMetrics({"population": Mean(shape=(SLOTS,))}, mesh=mesh))
    population = jax.jit(make)(jnp.arange(3))
    add = jax.vmap(lambda metrics, x: (metrics.update(population=x), metrics)[1])
    population = jax.jit(add)(population, np.stack([x, 2 * x, 3 * x]))
    seen = jax.jit(jax.vmap(lambda metrics: metrics.compute()))(population)
    assert np.allclose(seen["population"], x.mean(axis=0) * np.array([[1], [2], [3]]), rtol=1e-6)


@pytest.mark.parametrize("most", [gathering.MOST_GATHERED_BYTES, 0], ids=["gathered", "merged"])
def test_an_odd_number_of_rows_is_filled_up_with_what_changes_nothing(most, monkeypatch):
    monkeypatch.setattr(gathering, "MOST_GATHERED_BYTES", most)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:3]), (f"of_{most}",))
    metrics = DistributedMetrics({"x": ("max", "min", "sum", "var", "last")}, mesh=mesh)
    x = np.array([-5.0, -3.0, -4.0], np.float32)
    metrics.update(x=x)
    seen = nnx.jit(lambda metrics: metrics.compute())(metrics)["x"]
    assert seen == {"max": -3.0, "min": -5.0, "sum": -12.0, "var": pytest.approx(2 / 3), "last": -4.0}
