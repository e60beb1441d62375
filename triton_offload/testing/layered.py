"""A serving engine whose loads come by layers, and which computes each layer behind its own."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from triton_offload.specs import Ids
from triton_offload.testing.engine import EngineMemory
from triton_offload.testing.serving import Flags, Request, ServingEngine, Transfer
from triton_offload.transfer.layers import Layers
from triton_offload.transfer.queue_manager import OffloadingQueueManager


class LayeredEngine(ServingEngine):
    """As `ServingEngine`; most of its loads are by layers, of a tensor each, in any order.

    A request that is loaded so is read a layer at a time: the stream (now and then the host) waits
    for the layer, and a kernel reads its pages alone. Sometimes that breaks off in the middle, and
    begins anew later.
    """

    def __init__(
        self,
        memory: EngineMemory,
        queue: OffloadingQueueManager,
        rng: random.Random,
        lanes: Sequence[str] = ("store", "load", "expedited"),
    ) -> None:
        super().__init__(memory, queue, rng, lanes)
        number = len(memory.tensors)
        self._tensors = [[i] for i in rng.sample(range(number), number)]
        self._layers = Layers(memory.layout, self._tensors)
        self._by_layers: set[int] = set()  # jobs

    def decode(self) -> None:
        request = self._rng.choice(self._requests) if self._requests else None
        if request is not None and request.loading is not None and self._rng.random() < 0.3:
            self._compute(request, self._rng.randrange(len(self._tensors)))
        super().decode()

    def _load_options(self) -> dict[str, Any]:
        return {"layers": self._layers} if self._rng.random() < 0.8 else {}

    def _submit(
        self, lane: str, group: int, blocks: Ids, slots: Ids, first: int, fresh: Flags | None
    ) -> Transfer:
        transfer = super()._submit(lane, group, blocks, slots, first, fresh)
        if "layers" in self.last_options:
            self._by_layers.add(transfer.job_id)
        return transfer

    def _await_load(self, request: Request) -> None:
        if self._compute(request, len(self._tensors)):
            assert request.loading is not None
            request.loading.blocks = frozenset()
            request.loading = None
        else:
            super()._await_load(request)

    def _compute(self, request: Request, count: int) -> bool:
        """Read the first so many layers behind their waits; False where the load is not by layers,
        and nothing was done."""
        if request.loading is None or request.loading.job_id not in self._by_layers:
            return False
        job_id = request.loading.job_id
        for layer, tensors in enumerate(self._tensors[:count]):
            if self._rng.random() < 0.1:
                self.queue.wait_for_layer(job_id, layer)
            else:
                self.queue.wait_on(job_id, self.memory.device.compute_stream, layer)
            self.memory.read(request.group, request.blocks, tensors)
        return True
