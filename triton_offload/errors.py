"""What may go wrong, beside a ValueError or TypeError for a wrong argument. Needs no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from triton_offload.specs import TransferResult


class PoolFullError(RuntimeError):
    """No room in the host pool that is not pinned by transfers under way."""


class UnknownKeyError(KeyError):
    """A key that the pool doesn't hold (never stored, evicted, dropped by a reset)."""


class PendingKeyError(KeyError):
    """A key whose first store hasn't been completed."""


class UnwrittenBlocksError(ValueError):
    """A load wants blocks of a chunk that none of its stores has written."""


class TransferFailedError(RuntimeError):
    """A job did not move all of its bytes; the cause is in `result.error`."""

    def __init__(self, result: TransferResult) -> None:
        super().__init__(f"job {result.job_id} {result.status.value}: {result.error}")
        self.result = result

    def __reduce__(self) -> tuple[type, tuple[TransferResult]]:
        # By default it would be made anew from its message.
        return type(self), (self.result,)


class DeviceLostError(RuntimeError):
    """The device reports an error that nothing queued on it will survive."""


class ChecksumError(RuntimeError):
    """What a load brought is not what was stored; its pages hold wrong bytes.

    `slot_ids`: the slots of the pool whose bytes are wrong, or were on their way.
    """

    def __init__(self, slot_ids: tuple[int, ...]) -> None:
        shown = ", ".join(map(str, slot_ids[:8])) + (", ..." if len(slot_ids) > 8 else "")
        super().__init__(
            f"{len(slot_ids)} chunks do not add up to what was stored, in the slots {shown}"
        )
        self.slot_ids = slot_ids

    def __reduce__(self) -> tuple[type, tuple[tuple[int, ...]]]:
        return type(self), (self.slot_ids,)
