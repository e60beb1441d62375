"""Loads that a step waits for, layer by layer: which may be, and what each layer waits for."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from vllm.config import CUDAGraphMode

from triton_offload.transfer.layers import Layers
from triton_offload.vllm.worker import TritonOffloadingWorker

_log = logging.getLogger(__name__)


class LayerLoads:
    """The loads of a step whose layers wait for their own pages.

    `tensors`: of each layer, by vLLM's name, those with its pages. In which order layers are
    computed, and that all of them ask for their pages first (`wait_for`), shows when they do: until
    every one has, loads are waited for whole. So they are for ever where some layers never ask, as
    those of recurrent models.
    """

    def __init__(
        self, transfers: TritonOffloadingWorker, tensors: Mapping[str, Sequence[int]]
    ) -> None:
        self._transfers = transfers
        self._tensors = tensors
        self._order: list[list[int]] = []  # the tensors of layers, as they asked first
        self._silent = set(tensors)  # layers that have not asked
        self._layers: Layers | None = None
        self._number: dict[str, int] = {}  # of each layer, once all have asked
        #: the loads of this step that layers wait for
        self.jobs: set[int] = set()
        self._asking = False

    def begin(self, forward_context: Any) -> None:
        """A step begins: do its layers ask?

        They do where their Python code runs. It does not in a step without a forward pass, and
        where all of it is one recorded graph.
        """
        mode = getattr(forward_context, "cudagraph_runtime_mode", CUDAGraphMode.NONE)
        metadata = getattr(forward_context, "attn_metadata", None)
        self._asking = metadata is not None and mode != CUDAGraphMode.FULL

    @property
    def layers(self) -> Layers | None:
        """What a load of this step is cut by; None: it is waited for whole."""
        return self._layers if self._asking else None

    def add(self, job_id: int) -> None:
        """A load was submitted with `layers`."""
        self.jobs.add(job_id)

    def wait_for(self, name: str) -> None:
        """Before a layer reads its pages: the current stream, or the host where there is none,
        waits for those of this step's loads. A layer that is not known waits for all layers'."""
        if self._silent:
            self._learn(name)
        for job_id in self.jobs:
            number = self._number.get(name)
            try:
                if number is not None:
                    self._transfers.wait_for_layer(job_id, number)
                    continue
            except Exception as error:
                _log.warning("a stream can't wait for layer %s: the host does (%r)", name, error)
            self._transfers.wait([job_id])

    def end(self) -> None:
        """The step ends: block until its loads have, so that failures are told with it."""
        jobs, self.jobs = self.jobs, set()
        self._asking = False
        if jobs:
            self._transfers.wait(jobs)

    def _learn(self, name: str) -> None:
        if name not in self._silent:
            return
        self._silent.discard(name)
        known = {tensor for tensors in self._order for tensor in tensors}
        new = [tensor for tensor in self._tensors[name] if tensor not in known]
        if new:
            self._order.append(new)
        if not self._silent:
            layer_of = {tensor: i for i, tensors in enumerate(self._order) for tensor in tensors}
            self._number = {
                each: max(layer_of[tensor] for tensor in tensors)
                for each, tensors in self._tensors.items()
            }
            self._layers = self._transfers.layers(self._order)


def tensors_by_layer(groups: Sequence[Any], kv_caches: Any) -> dict[str, tuple[int, ...]]:
    """Of each layer the tensors with its pages; empty where vLLM says so of whole blocks alone.

    `groups`: vLLM's KV cache groups; `kv_caches`: its CanonicalKVCaches, in which each layer of a
    group has equally many references, in the group's order.
    """
    found: dict[str, tuple[int, ...]] = {}
    for group, refs in zip(groups, kv_caches.group_data_refs, strict=True):
        each, rest = divmod(len(refs), len(group.layer_names))
        if rest:
            return {}
        for i, name in enumerate(group.layer_names):
            found[name] = tuple(ref.tensor_idx for ref in refs[i * each : (i + 1) * each])
    return found
