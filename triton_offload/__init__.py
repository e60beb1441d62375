"""triton-offload: moves the KV cache of LLM engines between device pages and host memory.

Names are loaded on first use: the manager side runs where there is no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from triton_offload.version import __version__ as __version__

if TYPE_CHECKING:
    from triton_offload.offloader import KVOffloader as KVOffloader

_EXPORTS = {"KVOffloader": "triton_offload.offloader"}

__all__ = ["KVOffloader", "__version__"]


def __getattr__(name: str) -> object:
    module = _EXPORTS.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(module), name)
