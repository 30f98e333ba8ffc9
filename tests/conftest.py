"""Settings that every test runs under: hypothesis profiles, one thread, fixed seeds."""

import os
from collections.abc import Iterator

import hypothesis
import pytest
import torch

torch.set_num_threads(1)
if not torch.cuda.is_available():  # Triton reads it when it is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

_COMMON = {
    "deadline": None,  # the first capture in a process imports half of torch
    "suppress_health_check": [hypothesis.HealthCheck.too_slow],
    "print_blob": True,
}
hypothesis.settings.register_profile("dev", max_examples=25, **_COMMON)
hypothesis.settings.register_profile("ci", max_examples=60, derandomize=True, **_COMMON)
hypothesis.settings.register_profile("nightly", max_examples=2000, **_COMMON)
hypothesis.settings.load_profile(
    os.environ.get("HYPOTHESIS_PROFILE") or ("ci" if os.environ.get("CI") == "true" else "dev")
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Proofs first: some take minutes, for which one worker would wait for the other at the end."""
    items.sort(key=lambda one: "test_prove.py" not in one.nodeid)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Proofs and choices of backends are made once in a session and never taken from an earlier one."""
    names = ("XDG_CACHE_HOME", "GRAPHOPT_CACHE_DIR")
    before = {name: os.environ[name] for name in names if name in os.environ}
    for name in names:
        os.environ[name] = str(tmp_path_factory.mktemp("cache"))
    yield
    for name in names:
        del os.environ[name]
    os.environ.update(before)
