"""The policy that a user chose: by name, or made by what the user gave, and watched then."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

from triton_offload.kernels.arguments import shown
from triton_offload.scheduler.policies import (
    ARCPolicy,
    EvictionPolicy,
    Key,
    LRUPolicy,
    PolicyChoice,
    PolicyMaker,
)

_BY_NAME: dict[str, type[LRUPolicy | ARCPolicy]] = {"lru": LRUPolicy, "arc": ARCPolicy}
_METHODS = [name for name in vars(EvictionPolicy) if not name.startswith("_")]


def make_policy(
    policy: PolicyChoice, capacity: int, held: Mapping[Key, object]
) -> LRUPolicy | ARCPolicy | GuardedPolicy:
    """The policy for a pool of `capacity` chunks; `held` answers for ever which keys it holds.

    Raises ValueError or TypeError that names the argument.
    """
    if isinstance(policy, str):
        if policy not in _BY_NAME:
            raise ValueError(f"policy: expected 'lru' or 'arc', got {shown(policy)}")
        return _BY_NAME[policy](capacity)
    if not callable(policy):
        raise TypeError(
            f"policy: expected 'lru', 'arc', or a class or function that makes an EvictionPolicy "
            f"of the number of chunks, got an instance of {type(policy).__name__}"
        )
    return GuardedPolicy(policy, capacity, held)


class GuardedPolicy:
    """A user's policy, of which nothing can harm the manager.

    Its answers are checked before the manager acts on them. What it raises is kept: it is asked no
    more from its first wrong on, for its order and the pool's chunks belong together no longer, and
    every eviction raises RuntimeError that names the policy and the wrong, until `clear`.
    """

    def __init__(self, make: PolicyMaker, capacity: int, held: Mapping[Key, object]) -> None:
        self._make, self._capacity, self._held = make, capacity, held
        self._name = getattr(make, "__qualname__", None) or shown(make)
        self._wrong: str | None = None
        self._cause: Exception | None = None
        self._policy = self._made()

    def admit(self, keys: Sequence[Key]) -> None:
        self._call("admit", tuple(keys))

    def land(self, keys: Sequence[Key]) -> None:
        self._call("land", tuple(keys))

    def remove(self, keys: Sequence[Key]) -> None:
        self._call("remove", tuple(keys))

    def refresh(self, keys: Sequence[Key]) -> None:
        self._call("refresh", tuple(keys))

    def touch(self, keys: Sequence[Key], pending: Collection[Key] = ()) -> None:
        self._call("touch", tuple(keys), frozenset(pending))

    def evict(
        self, count: int, protected: AbstractSet[Key], busy: Sequence[AbstractSet[Key]] = ()
    ) -> list[Key]:
        answer = self._call("evict", count, frozenset(protected), tuple(busy))
        if self._wrong is None:
            try:
                keys = list(answer)
                if len(keys) == count == len(set(keys)) and all(
                    key in self._held
                    and key not in protected
                    and not any(key in each for each in busy)
                    for key in keys
                ):
                    return keys
            except Exception as error:  # what it returned is no list, or has what is no key
                self._cause = error
            self._wrong = (
                f"evict: expected {count} different keys that are in the pool, neither protected "
                f"nor busy, got {shown(answer)}"
            )
        raise RuntimeError(
            f"policy {self._name}: {self._wrong}; nothing is evicted until a reset"
        ) from self._cause

    def release(self, keys: Sequence[Key]) -> None:
        self._call("release", tuple(keys))

    def drop(self, keys: Sequence[Key]) -> None:
        """Evicts these keys; by `evict` where the policy has no such method."""
        if hasattr(self._policy, "drop"):
            self._call("drop", tuple(keys))
        elif keys:
            self.evict(len(keys), self._held.keys() - keys)

    def clear(self) -> None:
        """Forgets every key; after a wrong with a policy that is made anew."""
        self._call("clear")
        if self._wrong is None:
            return
        self._wrong = self._cause = None
        try:
            self._policy = self._made()
        except Exception as error:
            self._note("made", error)

    def _made(self) -> EvictionPolicy:
        try:
            made = self._make(self._capacity)
        except TypeError as error:
            raise TypeError(
                f"policy: expected what makes an EvictionPolicy of the number of chunks, "
                f"got {self._name}, which raised {error!r}"
            ) from error
        missing = [name for name in _METHODS if not callable(getattr(made, name, None))]
        if missing:
            raise TypeError(
                f"policy: expected what makes an EvictionPolicy, got {self._name}, which made "
                f"{shown(made)} without {', '.join(missing)}"
            )
        return made

    def _call(self, name: str, *arguments: Any) -> Any:
        if self._wrong is not None:
            return None
        try:
            return getattr(self._policy, name)(*arguments)
        except Exception as error:
            self._note(name, error)
            return None

    def _note(self, name: str, error: Exception) -> None:
        self._wrong, self._cause = f"{name} raised {error!r}", error

    def _check(self, keys: Collection[Key], busy: AbstractSet[Key]) -> None:
        """Asserts what the user's own `_check` does, where there is one."""
        check: Callable[..., None] | None = getattr(self._policy, "_check", None)
        if check is not None and self._wrong is None:
            check(keys, busy)
