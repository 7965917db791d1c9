"""Eight virtual devices for every test, and the meshes on them."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import hypothesis
import jax
import pytest

DEVICES = 8
collect_ignore = ["programs"]  # started by tests, as processes of their own
hypothesis.settings.register_profile("same", derandomize=True, deadline=None)
hypothesis.settings.load_profile("same")  # the same data in every run: a failure is one of the code


def pytest_sessionstart():
    assert jax.device_count() == DEVICES, f"the tests need {DEVICES} devices, and there are {jax.device_count()}"


@pytest.fixture(autouse=True, scope="module")
def _fresh_caches():
    """Hundreds of compiled programs for eight devices take memory that the next file does not need."""
    yield
    jax.clear_caches()
