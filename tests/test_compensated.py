"""Two-float arithmetic is exact, whatever a compiler knows of the numbers."""

import itertools
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distributed_metrics import compensated

LARGE, SMALL = np.float32(2**24 + 2), np.float32(0.3)
NUMBERS = (LARGE, SMALL, -LARGE, np.float32(1e-30))
PAIRS = list(itertools.product(NUMBERS, repeat=2))
SUMS = {
    "two_sum": compensated.two_sum,
    "add": lambda a, b: compensated.add((a, 0 * a), (b, 0 * b)),
    "normalized": compensated._normalized,
}


def exact(*numbers):
    return sum((Fraction(float(number)) for number in numbers), Fraction(0))


def traced(function, pairs, constant):
    """``function(a, b)`` of all pairs, compiled where XLA sees one of the numbers, or none, or both."""
    firsts, seconds = ([np.full(3, number) for number in numbers] for numbers in zip(*pairs, strict=True))

    def of_all(firsts, seconds):
        return [function(jnp.asarray(a), jnp.asarray(b)) for a, b in zip(firsts, seconds, strict=True)]

    if constant == "first":
        return jax.jit(lambda seconds: of_all(firsts, seconds))(seconds)
    if constant == "second":
        return jax.jit(lambda firsts: of_all(firsts, seconds))(firsts)
    if constant == "both":
        return jax.jit(lambda: of_all(firsts, seconds))()
    return jax.jit(of_all)(firsts, seconds)


@pytest.mark.parametrize("constant", ["none", "first", "second", "both"])
@pytest.mark.parametrize("function", SUMS)
def test_a_sum_of_two_floats_is_exact_also_where_one_is_a_constant(function, constant):
    pairs = [pair for pair in PAIRS if function != "normalized" or abs(pair[0]) >= abs(pair[1])]
    for (a, b), (high, low) in zip(pairs, traced(SUMS[function], pairs, constant), strict=True):
        assert exact(high[0], low[0]) == exact(a, b), (a, b)


@pytest.mark.parametrize("constant", ["none", "first", "second", "both"])
def test_a_product_of_two_floats_is_exact_also_where_one_is_a_constant(constant):
    pairs = [(SMALL, np.float32(0.7))]
    [(high, low)] = traced(lambda a, b: compensated.multiply((a, 0 * a), (b, 0 * b)), pairs, constant)
    assert exact(high[0], low[0]) == Fraction(float(SMALL)) * Fraction(float(np.float32(0.7)))


@pytest.mark.parametrize("constants_first", [True, False])
def test_a_batch_of_numbers_and_constants_is_summed_to_all_digits(constants_first):
    x = np.random.default_rng(0).random(128).astype(np.float32)
    known = np.full(128, LARGE)

    def total(x):
        both = [jnp.asarray(known), x] if constants_first else [x, jnp.asarray(known)]
        return compensated.tree_sum(compensated.pair_of(jnp.concatenate(both)), 1)

    high, low = jax.jit(total)(x)
    assert abs(exact(high, low) / exact(*x, *known) - 1) < 2**-44


@pytest.mark.parametrize("a", [np.inf, -np.inf, np.nan, np.float32(3e38)])
def test_what_is_not_finite_has_no_error_term(a):
    for b in (1.0, np.inf, 3e38):
        for function in (compensated.two_sum, compensated._normalized):
            total, error = jax.jit(function)(jnp.float32(a), jnp.float32(b))
            with np.errstate(over="ignore", invalid="ignore"):
                np.testing.assert_equal(np.asarray(total), np.float32(a) + np.float32(b))
            assert np.isfinite(total) or error == 0


def test_a_large_batch_on_a_gpu_is_one_reduction_which_keeps_all_digits():
    """GPUs have the one, CPUs the other; both are exact on any."""

    def total(x):
        return compensated.tree_sum(compensated.pair_of(x), 1)

    x = np.random.default_rng(0).lognormal(size=100_001).astype(np.float32)
    for_cuda = jax.export.export(jax.jit(total), platforms=["cuda"])(x).mlir_module()
    assert (for_cuda.count("stablehlo.reduce("), for_cuda.count("stablehlo.slice ")) == (1, 0)
    for numbers in (x, np.full_like(x, 0.7)):
        high, low = jax.jit(compensated._one_reduction)(*compensated.pair_of(jnp.asarray(numbers)))
        assert abs(exact(high, low) / exact(*numbers) - 1) < 2**-44


def test_a_sum_of_many_updates_keeps_its_digits():
    x = np.random.default_rng(0).random(300_000).astype(np.float32)

    def body(total, one):
        return compensated.add(total, (one, jnp.zeros_like(one))), None

    zero = jnp.float32(0)
    for numbers, error in ((x[:10_000], 2**-47), (x, 2**-42)):
        high, low = jax.jit(lambda numbers: jax.lax.scan(body, (zero, zero), numbers)[0])(numbers)
        assert abs(exact(high, low) / exact(*numbers) - 1) < error
