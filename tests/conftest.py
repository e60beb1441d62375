"""What holds for every test."""

from __future__ import annotations

import gc

import pytest


@pytest.fixture(autouse=True, scope="session")
def empty_cache(tmp_path_factory):
    """No test reads or writes what the user's own measurements left."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def quick_collections():
    """What other tests left is not looked through at every `gc.collect`."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
