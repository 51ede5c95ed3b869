"""Fixtures of tests that make worlds: one thread, and a cache of base models of their own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tokengrain.worlds.base_models import single_thread


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """The tensors are small: more threads only get in each other's way."""
    with single_thread():
        yield


@pytest.fixture(autouse=True, scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing is read from or written to the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TOKENGRAIN_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield
