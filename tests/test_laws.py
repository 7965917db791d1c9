"""Every accumulator keeps the laws, and each law can be broken: ``check_accumulator`` on both."""

import re
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distributed_metrics import Accumulator, Histogram, Last, Mean, Quantile, Ratio, Sum, Var
from distributed_metrics.accumulators import BY_NAME
from distributed_metrics.merging import MERGES, Merge, Number
from distributed_metrics.testing import check_accumulator

OURS = [
    *(kind() for name, kind in BY_NAME.items() if name not in ("var", "std")),
    pytest.param(Var(), marks=pytest.mark.slow, id="var"),
    pytest.param(Mean(shape=(3, 2)), marks=pytest.mark.slow, id="mean[3, 2]"),
    Histogram((0.0, 0.5, 1.0, 2.0, 8.0)),
    pytest.param(Quantile((0.1, 0.9), relative_error=0.3), marks=pytest.mark.slow, id="quantile (0.1, 0.9) to 0.3"),
]


@pytest.mark.parametrize("accumulator", OURS, ids=str)
def test_our_accumulators_keep_the_laws(accumulator):
    check_accumulator(accumulator)


# --- accumulators as users write them ---


@dataclass(frozen=True)
class Above(Accumulator):
    """With a setting, two results and labels."""

    threshold: float = 1.0
    fields = {"above": "sum", "largest": "max"}

    def contribution(self, batch):
        return {"above": batch.map(lambda x: x > self.threshold).sum(), "largest": batch.max()}

    def result_shape(self):
        return (*self.shape, 2)

    def result(self, xp, weight, above, largest):
        return xp.stack([above / weight, largest], axis=-1)


def test_an_accumulator_of_a_user_keeps_the_laws():
    check_accumulator(Above(threshold=0.5, labels=("share", "largest")))


SIZES = (5, 3, 5, 3, 5, 3)


@settings(max_examples=12)
@given(
    values=st.lists(st.floats(2**-10, 2**10, width=32), min_size=24, max_size=24),
    weights=st.lists(st.floats(2**-5, 2**5, width=32) | st.just(0.0), min_size=24, max_size=24),
    sizes=st.permutations(SIZES),
)
@pytest.mark.parametrize("accumulator", [Mean(), pytest.param(Last(), marks=pytest.mark.slow, id="last")], ids=str)
def test_any_values_weights_and_splits_keep_the_laws(accumulator, values, weights, sizes):
    ends = np.cumsum(sizes)[:-1]
    check_accumulator(
        accumulator,
        np.split(np.array(values, np.float32), ends),
        weights=np.split(np.array(weights, np.float32), ends),
    )


# --- each law, broken ---


class Pair(Mean):
    """Results in two numbers, which it does not say."""

    def result(self, xp, weight, total):
        return xp.stack([total / weight, weight], axis=-1)


class NothingDividedByNothing(Mean):
    empty = None


class BestSoFar(Sum):
    """Remembers, beside its state."""

    best = 0.0

    def result(self, xp, weight, total):
        if xp is np:
            type(self).best = np.maximum(self.best, total)
        return self.best


def least(join):
    return lambda a, b: (join.minimum(a[0], b[0]),)


class Smallest(Accumulator):
    """The smallest of the elements, and of 0."""

    fields = {"least": Merge("least", (Number("least", pair=False),), least(jnp), least(np))}

    def contribution(self, batch):
        return {"least": -batch.map(jnp.negative).max()}

    def result(self, xp, weight, least):
        return least


def greatest(join):
    return lambda a, b: (join.maximum(a[0], b[0]),)


class Largest(Smallest):
    """The largest of the elements, and of 0: for positive elements right."""

    fields = {"least": Merge("greatest", (Number("greatest", pair=False),), greatest(jnp), greatest(np))}

    def contribution(self, batch):
        return {"least": batch.max()}


class Unweighted(Mean):
    def contribution(self, batch):
        return {"total": jnp.sum(batch.elements)}


def first(join):
    return lambda a, b: tuple(join.where(a[0] > 0, x, y) for x, y in zip(a, b, strict=True))


NUMBERS = (Number("seen", pair=False), Number("value", pair=False))


class First(Accumulator):
    fields = {"first": Merge("first", NUMBERS, first(jnp), first(np))}

    def contribution(self, batch):
        counted = jnp.broadcast_to(batch.counted(), batch.elements.shape)
        at = jnp.argmax(counted)
        return {"first": (jnp.any(counted).astype(jnp.float32), jnp.where(counted[at], batch.elements[at], 0))}

    def result(self, xp, weight, first):
        return first[1]


class SquareOfSum(Mean):
    def contribution(self, batch):
        total = batch.sum()[0]
        return {"total": total * total}


class MeanOfMeans(Accumulator):
    fields = {"means": "sum", "batches": "sum"}

    def contribution(self, batch):
        weight, total = batch.total_weight()[0], batch.sum()[0]
        return {"means": jnp.where(weight > 0, total / weight, 0), "batches": jnp.where(weight > 0, 1.0, 0.0)}

    def result(self, xp, weight, means, batches):
        return means / batches


class TwoMinds(Mean):
    """A sum on the devices, and something else on the host."""

    fields = {"total": Merge("odd", (Number("total"),), MERGES["sum"].combine, lambda a, b: (np.hypot(a[0], b[0]),))}

    def contribution(self, batch):
        return {"total": batch.map(jnp.abs).sum()}


class OnTheHostOnly(Mean):
    def result(self, xp, weight, total):
        return np.sqrt(total / weight)


class OtherType(Accumulator):
    """Counts in integers: right, but a loop cannot carry it."""

    fields = {
        "number": Merge(
            "whole number",
            (Number("number", pair=False),),
            lambda a, b: ((a[0] + b[0]).astype(jnp.int32),),
            lambda a, b: (a[0] + b[0],),
        )
    }

    def contribution(self, batch):
        return {"number": jnp.sum(jnp.broadcast_to(batch.counted(), batch.elements.shape))}

    def result(self, xp, weight, number):
        return number


class FloatsOnly(Mean):
    def contribution(self, batch):
        return {"total": jnp.sum(jnp.where(batch.counted(), batch.value[0], 0))}


class Shares(Mean):
    """Normalized over everything that is computed together."""

    def result(self, xp, weight, total):
        return total / total.sum()


BROKEN = [
    (Pair(), "empty", r"shape, what result_shape\(\) says: \(\)\n  shape, of the result: +\(2,\)\n.*overridden"),
    (NothingDividedByNothing(), "empty", r"where empty is None: +a number\n.*of what has seen nothing: nan\n"),
    (BestSoFar(), "reset", r"of one batch in a new object: +[\d.]+\n.*after reset: [\d.]+\n.*Python object"),
    (
        Smallest(),
        "neutral element",
        r"least \(least\), of one batch: +0\.\d+\n.*after the identity: 0\.0\n.*inf of a minimum",
    ),
    (Largest(), "neutral element", r"least \(greatest\), of one batch: +-0\.\d+\n.*after the identity: +0\.0\n"),
    (Unweighted(), "weight 0", r"without some elements: +[\d.]+\n.*NaN of weight 0: nan\n.*batch.counted\(\)"),
    (First(), "order", r"of 24 elements: +[\d.]+\n.*in another order: [\d.]+\n  They differ by .*a follow"),
    (SquareOfSum(), "split equals whole", r"of 24 elements in one batch: +[\d.]+\n.*in 6 updates: .*square of a sum"),
    (MeanOfMeans(), "split equals whole", r"of 24 elements in one batch: +[\d.]+\n.*in 6 updates: .*mean of means"),
    (TwoMinds(), "split equals whole", r"in one batch: +[\d.]+\n.*as a sum of 6 snapshots: +[\d.]+\n.*combine_numbers"),
    (OnTheHostOnly(), "state", r"by an error:\n  TracerArrayConversionError: .*instead of the xp"),
    (OtherType(), "state", r"in a new object: float32\[1, 1\]\n.*an update: int32\[1, 1\]\n.*a combine changes dtypes"),
    (FloatsOnly(), "state", r"of eager updates of float32: .*of bfloat16 or int32, in a cond in a scan: .*batch.value"),
    (Shares(shape=3), "populations", r"of 3 objects apart: .* at \[0, 0\]\n.*vmap, with two metrics: .*over all dims"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("accumulator", "law", "shown"), BROKEN, ids=[f"{kind}-{law}" for kind, law, _ in BROKEN])
def test_a_broken_law_is_named_with_both_numbers_and_a_cause(accumulator, law, shown):
    BestSoFar.best = 0.0
    with pytest.raises(AssertionError) as error:
        check_accumulator(accumulator, tolerance=1e-6)  # some of them multiply in float32, which is another matter
    text = str(error.value)
    assert text.startswith(f'{accumulator} breaks the law "{law}"'), text
    assert re.search(shown, text, flags=re.DOTALL), text


# --- the values that are given ---


@pytest.mark.slow
def test_values_may_have_any_leading_dims_weights_and_several_parts():
    x = np.random.default_rng(0).lognormal(size=(4, 3, 2)).astype(np.float32)
    tokens = np.arange(1, 25).reshape(4, 3, 2)
    check_accumulator(Ratio(shape=2), [(x, tokens)], weights=[np.array([[1], [0], [1], [1]], bool)])
    with pytest.raises(ValueError, match="there is no element in them"):
        check_accumulator(Mean(), [x[:0]])
    with pytest.raises(ValueError, match="has parts of 24 and 12 elements"):
        check_accumulator(Ratio(), [(x, x[:2])])
    with pytest.raises(ValueError, match="2 batches, and weights for 1"):
        check_accumulator(Mean(), [x, x], weights=[None])
    with pytest.raises(ValueError, match="the weight of 'x' has shape"):
        check_accumulator(Mean(), [x], weights=[x[0]])
    with pytest.raises(TypeError, match=r"takes an accumulator, got 'mean' \(str\)"):
        check_accumulator("mean")


class PlainFloats(Mean):
    def contribution(self, batch):
        return {"total": jnp.sum(jnp.where(batch.counted(), batch.elements, 0) * 1e3)}


@pytest.mark.slow
def test_tolerances_are_what_may_differ():
    with pytest.raises(
        AssertionError, match=r"e-0[78], relative; 1e-09 is allowed.\n.*plain float32.*: tolerance=1e-6"
    ):
        check_accumulator(PlainFloats())
    check_accumulator(PlainFloats(), tolerance=1e-6)
    with pytest.raises(AssertionError, match=r"in a trace: .*\n.*; 0e\+00 is allowed"):
        check_accumulator(Mean(), traced_tolerance=0)
