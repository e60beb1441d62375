"""The handle of a store or a load."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, SupportsIndex, TypeAlias

from triton_offload.errors import TransferFailedError
from triton_offload.kernels.arguments import as_integer, as_seconds, shown
from triton_offload.specs import Direction, TransferResult

#: the number of each layer of a load by layers, by what the layer may be called
LayerNumbers: TypeAlias = Mapping[int | str, int]
_NO_LAYERS: LayerNumbers = {}


class JobOwner(Protocol):
    """What a job under way asks of the offloader that moves it."""

    def _collect(self) -> None:
        """Take in what has ended."""

    def _released(self, job: OffloadJob) -> bool:
        """Whether the job's pages are the engine's again."""

    def _wait_on(self, job: OffloadJob, stream: Any, layer: int | None) -> None:
        """Let a stream follow that, or the release of a layer's pages."""

    def _block(self, job: OffloadJob, timeout: float | None) -> None:
        """Block until the job has ended; raises TimeoutError."""

    def _block_for_layer(self, job: OffloadJob, layer: int, timeout: float | None) -> None:
        """Block until a layer's pages are the engine's again; raises TimeoutError."""


class OffloadJob:
    """A store or a load. Any thread may use it.

    Once the job has ended, the handle keeps its result and nothing else: neither the offloader nor
    its memory lives on for it.
    """

    def __init__(self, owner: JobOwner, job_id: int, direction: Direction) -> None:
        self.job_id = job_id
        self.direction = direction
        self._owner: JobOwner | None = owner  # until it has ended
        self._layers = _NO_LAYERS
        self._result: TransferResult | None = None

    def __repr__(self) -> str:
        state = "under way" if self._result is None else self._result.status.value
        return f"<OffloadJob {self.job_id}: {self.direction.value}, {state}>"

    @property
    def result(self) -> TransferResult | None:
        """How the job ended, or None while it is under way."""
        owner = self._owner
        if owner is not None:
            owner._collect()
        return self._result

    @property
    def done(self) -> bool:
        return self.result is not None

    @property
    def source_released(self) -> bool:
        """Whether the engine may use the job's pages again: overwrite what was stored (its bytes
        may still be on their way to the pool), read what was loaded."""
        owner = self._owner
        return owner is None or owner._released(self)

    def wait(self, timeout: float | None = None) -> TransferResult:
        """Block until the bytes have landed. Raises TimeoutError, and TransferFailedError where
        they did not land or the job was cancelled. `get_finished` still reports the job."""
        self.block(timeout)
        result = self._result
        assert result is not None
        if not result.success:
            raise TransferFailedError(result) from result.error
        return result

    def wait_on(self, stream: Any, *, layer: SupportsIndex | str | None = None) -> None:
        """Let a stream wait for the release of the job's pages, without the host.

        `layer`: of a load by layers, only for the pages of that layer: its place among the load's
        `layers`, or the name of a tensor in it. Whether what landed is right the job's result
        tells. Raises ValueError where the load has no such layer.
        """
        number = self._number(layer)
        owner = self._owner
        if owner is not None:
            owner._wait_on(self, stream, number)

    def block(
        self, timeout: float | None = None, *, layer: SupportsIndex | str | None = None
    ) -> None:
        """Block until the job has ended, well or not. Raises TimeoutError.

        `layer`: as for `wait_on`; until that layer's pages are released, or the job has ended.
        """
        timeout = as_seconds("timeout", timeout)
        number = self._number(layer)
        owner = self._owner
        if owner is None:
            return
        if number is None:
            owner._block(self, timeout)
        else:
            owner._block_for_layer(self, number, timeout)

    def _number(self, layer: SupportsIndex | str | None) -> int | None:
        if layer is None:
            return None
        name = layer if isinstance(layer, str) else as_integer("layer", layer)
        if name not in self._layers:
            known = f"one of {list(self._layers)}" if self._layers else "none, for a job without"
            raise ValueError(f"layer: expected {known}, got {shown(layer)}")
        return self._layers[name]

    def _end(self, result: TransferResult) -> None:
        self._result = result
        self._owner = None
