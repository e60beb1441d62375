"""triton-offload: moves the KV cache of LLM engines between device pages and host memory.

Names are loaded on first use: the manager side runs where there is no torch.
"""

from __future__ import annotations

import importlib

from triton_offload.version import __version__

TYPE_CHECKING = False  # type checkers take it for true; `typing` is most of what an import took
if TYPE_CHECKING:
    from triton_offload.calibration import Calibration
    from triton_offload.errors import (
        ChecksumError,
        DeviceLostError,
        PendingKeyError,
        PoolFullError,
        TransferFailedError,
        UnknownKeyError,
        UnwrittenBlocksError,
    )
    from triton_offload.job import OffloadJob
    from triton_offload.medium import ChunkSpec
    from triton_offload.offloader import KVOffloader
    from triton_offload.scheduler.base import OffloadingEvent
    from triton_offload.scheduler.policies import EvictionPolicy
    from triton_offload.specs import Direction, LoadStoreSpec, TransferResult, TransferStatus
    from triton_offload.stats import OffloadingStats
    from triton_offload.transfer.options import PipelineOptions

__all__ = [
    "Calibration",
    "ChecksumError",
    "ChunkSpec",
    "DeviceLostError",
    "Direction",
    "EvictionPolicy",
    "KVOffloader",
    "LoadStoreSpec",
    "OffloadJob",
    "OffloadingEvent",
    "OffloadingStats",
    "PendingKeyError",
    "PipelineOptions",
    "PoolFullError",
    "TransferFailedError",
    "TransferResult",
    "TransferStatus",
    "UnknownKeyError",
    "UnwrittenBlocksError",
    "__version__",
]

_MODULE_OF = {
    "Calibration": "calibration",
    "ChecksumError": "errors",
    "ChunkSpec": "medium",
    "DeviceLostError": "errors",
    "Direction": "specs",
    "EvictionPolicy": "scheduler.policies",
    "KVOffloader": "offloader",
    "LoadStoreSpec": "specs",
    "OffloadJob": "job",
    "OffloadingEvent": "scheduler.base",
    "OffloadingStats": "stats",
    "PendingKeyError": "errors",
    "PipelineOptions": "transfer.options",
    "PoolFullError": "errors",
    "TransferFailedError": "errors",
    "TransferResult": "specs",
    "TransferStatus": "specs",
    "UnknownKeyError": "errors",
    "UnwrittenBlocksError": "errors",
}


def __getattr__(name: str) -> object:
    module = _MODULE_OF.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(importlib.import_module(f"{__name__}.{module}"), name)
    globals()[name] = found  # from now on, as any other
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
