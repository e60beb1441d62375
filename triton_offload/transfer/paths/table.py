"""The paths by their names."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from triton_offload.calibration import Path
from triton_offload.transfer.paths.base import Crossing
from triton_offload.transfer.paths.copy_engine import CopyEngine
from triton_offload.transfer.paths.staged import Staged
from triton_offload.transfer.paths.zero_copy import ZeroCopy

#: A path is a member of `Path`, a file here, and its line in this table.
CROSSINGS: Mapping[Path, Crossing] = MappingProxyType(
    {
        Path.STAGED: Staged(),
        Path.ZERO_COPY: ZeroCopy(),
        Path.COPY_ENGINE: CopyEngine(),
    }
)
