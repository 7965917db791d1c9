"""Each row of the table in docs/sharding.md is built, run, compared with float64 NumPy, and its collectives counted."""

import collections
import pathlib
import re
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import distributed_metrics.eager
import distributed_metrics.metrics
from distributed_metrics import DistributedMetrics, count_collectives

PAGE = pathlib.Path(__file__).parent.parent / "docs" / "sharding.md"
SPEC = {"x": ("sum", "count", "max")}


@dataclass(frozen=True)
class Row:
    """One row of the table, read.

    Attributes:
        axes: the sizes of the mesh's axes by name.
        kinds: whether each is Auto or Explicit.
        axis_name: of the object; None for all.
        value: a Python number, or the shape and the partition of an array.
        way: ``"jit"``, ``"eager"``, ``"shard_map"``, or ``"shard_map over"`` some of the axes.
        spec: given to ``update``.
        sends: the collectives of the compiled update by kind.
        digits: the relative error that the sum may have.
        times: how often the value counts; None where the update is refused.
    """

    axes: dict[str, int]
    kinds: tuple[AxisType, ...]
    axis_name: Any
    value: float | tuple[tuple[int, ...], P]
    way: str
    spec: P | None
    sends: dict[str, int]
    digits: float
    times: int | None

    @property
    def mesh(self) -> Mesh:
        return jax.make_mesh(tuple(self.axes.values()), tuple(self.axes), axis_types=self.kinds)

    @property
    def rows(self) -> P:
        """How the accumulators are split."""
        return P(tuple(self.axes) if self.axis_name is None else self.axis_name)

    def make(self) -> tuple[np.ndarray, jax.Array | float]:
        """The numbers of the value, and the value."""
        if isinstance(self.value, float):
            return np.asarray(self.value), self.value
        shape, partition = self.value
        numbers = np.random.default_rng(0).lognormal(size=shape).astype(np.float32)
        return numbers, jax.device_put(numbers, NamedSharding(self.mesh, partition))


def read_row(line: str) -> Row:
    cells = (cell.strip().strip("`") for cell in line.strip("|").split("|"))
    mesh, axis_name, value, way, spec, sends, digits, times = cells
    axes, kinds = {}, []
    for part in mesh.split(", "):
        *sizes, kind = part.split()
        axes.update({name: int(size) for name, size in (one.split(":") for one in sizes)})
        kinds += [AxisType[kind]] * len(sizes)
    array = re.fullmatch(r"(\(.*?\)) (P\(.*\))", value)
    return Row(
        axes=axes,
        kinds=tuple(kinds),
        axis_name=None if axis_name == "all" else eval(axis_name),
        value=(eval(array[1]), eval(array[2])) if array else float(value),
        way=way,
        spec=None if spec == "none" else eval(spec),
        sends=read_sends(sends),
        digits={"47 bits": 2**-45, "float32": 3e-7, "": 0.0}[digits],
        times=None if times == "refused" else 1 if times == "once" else int(times.removesuffix(" times")),
    )


def read_sends(cell: str) -> dict[str, int]:
    """``2 all-reduces``; or ``nothing (jax 0.10: 4 all-gathers)``, where versions differ."""
    usual, _, older = cell.partition(" (jax 0.10: ")
    chosen = older.removesuffix(")") if older and jax.__version__.startswith("0.10.") else usual
    assert re.fullmatch(r"nothing||\d+ [a-z-]+", chosen), cell
    return {kind.removesuffix("s"): int(number) for number, kind in re.findall(r"(\d+) ([\w-]+)", chosen)}


def table() -> list[str]:
    lines = PAGE.read_text().splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("| mesh |"))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append(line)
    return rows


def run(row: Row, metrics: DistributedMetrics, x: Any, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Updates the metrics in the row's way, and counts what the program sends."""

    def update(metrics, given):
        metrics.update(x=x if isinstance(x, float) else given, spec=row.spec)

    if row.way == "eager":
        return run_eagerly(lambda: update(metrics, x), monkeypatch)
    if row.way == "jit":
        program: Any = nnx.jit(update)
    else:
        manual = set(row.way.split()[2:]) or set(row.axes)
        program = nnx.jit(functional(row, update, manual))
    counted = count_collectives(program, metrics, x)
    program(metrics, x)
    return counted


def functional(row: Row, update: Any, manual: set[str]) -> Any:
    """``update`` in a ``jax.shard_map`` that maps over some axes."""
    rows = only(row.rows, manual)
    partition = P() if isinstance(row.value, float) else only(row.value[1], manual)

    def program(metrics, x):
        graphdef, state = nnx.split(metrics)

        def local(state, x):
            inner = nnx.merge(graphdef, state)
            update(inner, x)
            return nnx.state(inner)

        mapped = jax.shard_map(
            local, mesh=row.mesh, in_specs=(rows, partition), out_specs=rows, axis_names=frozenset(manual)
        )
        nnx.update(metrics, mapped(state, x))

    return program


def only(spec: P, manual: set[str]) -> P:
    """The part of a partition that names the axes which are mapped."""
    entries = ((one,) if isinstance(one, str) else one or () for one in spec)
    return P(*(tuple(axis for axis in entry if axis in manual) for entry in entries))


def run_eagerly(call: Any, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """An eager update is one compiled program as well: it is counted when it is called."""
    counted: collections.Counter[str] = collections.Counter()
    quick, careful = distributed_metrics.eager.program, distributed_metrics.programs.update

    def counting(program):
        def counted_program(*args):
            counted.update(count_collectives(program, *args))
            return program(*args)

        return counted_program

    def quick_counting(*static):
        program = quick(*static)
        return program and replace(program, run=counting(program.run))

    monkeypatch.setattr(distributed_metrics.eager, "program", quick_counting)
    monkeypatch.setattr(distributed_metrics.programs, "update", lambda *static: counting(careful(*static)))
    call()
    return dict(counted)


@pytest.mark.parametrize("line", table(), ids=lambda line: f"row-{table().index(line) + 1}")
def test_every_row_of_the_table_is_true(line, monkeypatch):
    row = read_row(line)
    metrics = DistributedMetrics(SPEC, mesh=row.mesh, axis_name=row.axis_name)
    numbers, x = row.make()
    if row.times is None:
        with pytest.raises(ValueError, match=r"once per device|devices that share a row"):
            run(row, metrics, x, monkeypatch)
        return
    sent = run(row, metrics, x, monkeypatch)
    result = metrics.flush()["x"]
    assert result["count"] == row.times * numbers.size
    assert result["sum"] == pytest.approx(row.times * numbers.sum(dtype=np.float64), rel=row.digits)
    assert result["max"] == np.float32(numbers.max())
    assert sent == row.sends


def test_the_table_has_every_kind_of_row():
    rows = [read_row(line) for line in table()]
    assert {row.way.split()[0] for row in rows} == {"jit", "eager", "shard_map"}
    assert {frozenset(row.kinds) for row in rows} == {
        frozenset({AxisType.Auto}),
        frozenset({AxisType.Explicit}),
        frozenset({AxisType.Auto, AxisType.Explicit}),
    }
    assert len(set(table())) == len(rows)
