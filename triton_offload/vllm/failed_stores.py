"""Stores that failed, in what vLLM's manager is told of stores."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any


class FailedStores:
    """Has `manager` complete these stores as failures, where vLLM says that all succeeded.

    A manager is told once of each store. A TieringOffloadingManager hands what succeeded to its
    tiers, and counts: told again of the same store it would end the engine.
    """

    def __init__(self, manager: Any) -> None:
        self._complete = manager.complete_store
        self._failed: list[Any] = []
        manager.complete_store = self._tell

    def add(self, keys: Collection[Any]) -> None:
        """The store of these keys, the very object that vLLM will name, has failed."""
        self._failed.append(keys)

    def _tell(self, keys: Collection[Any], context: Any, success: bool = True) -> None:
        kept = [each for each in self._failed if each is not keys]
        success = success and len(kept) == len(self._failed)
        self._failed = kept
        self._complete(keys, context, success)
