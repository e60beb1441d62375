"""KVOffloader: manager and workers behind one object, for a program that is its own engine."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, SupportsIndex

import torch

from triton_offload.calibration import Calibration, PathChoice
from triton_offload.device import Device, device_for
from triton_offload.job import OffloadJob
from triton_offload.kernels.arguments import shown
from triton_offload.medium_jobs import MediumJobs
from triton_offload.pool.host_pool import HostPool
from triton_offload.pool.memory_limits import check_memory
from triton_offload.request import BlockIds
from triton_offload.scheduler.chunks import ChunkSpan, StoreRun, runs_to_store
from triton_offload.scheduler.manager import (
    CPUOffloadingManager,
    OffloadingEvent,
    PrepareStoreOutput,
)
from triton_offload.scheduler.policies import Key, PolicyChoice
from triton_offload.sizes import parse_bytes
from triton_offload.slabs import Slabs
from triton_offload.specs import CPULoadStoreSpec, Direction, Ids
from triton_offload.stats import OffloadingStats, SizeStats
from triton_offload.transfer.layers import NamedLayers
from triton_offload.transfer.layout import CacheLayout
from triton_offload.transfer.options import Verify, check_verify
from triton_offload.transfer.pipeline import PipelineOptions
from triton_offload.transfer.queue_manager import transfer_queue
from triton_offload.tuning.calibrate import calibration_for


class KVOffloader(MediumJobs):
    """Offloads chunks of a KV cache to host memory under keys, and loads them back.

    Args:
        kv_caches: `[num_blocks, ...]` tensors, all on one device: a list, or a dict by name. They
            stay the caller's. A block is one page in every tensor of its group. Of a layer whose K
            and V are one tensor `[2, num_blocks, ...]`, give the two:
            `[half for tensor in tensors for half in tensor]`. Its first dimension would be taken
            for two blocks otherwise.
        host_bytes: size of the host pool, an int or a string ("8GiB").
        blocks_per_chunk: consecutive blocks that are offloaded, looked up and evicted together.
        groups: for hybrid models, the tensors of each KV cache group, by name (dict) or index
            (list); None: one group of all.
        path: "staged", "zero_copy", "copy_engine", or "auto".
        policy: which chunks are evicted: "lru", "arc", or a class or function of your own that
            makes an `EvictionPolicy` of the number of chunks. Where that one raises, or names what
            may not be evicted, a store that needs room raises RuntimeError, with nothing changed,
            until a `reset`; everything else works on.
        enable_events: record what is stored and removed for `take_events`.
        calibration: what was measured of this machine. "auto": what is kept in the user's cache;
            where that is nothing, a GPU is measured here and now, once, for some seconds, and CPU
            memory keeps its defaults. "off": published figures. Else a file that
            `triton-offload calibrate --output` wrote, or a `Calibration`.
        options: sizes of the worker side; what they give, the calibration does not decide.
        device: the seam to transfer by, uncalibrated; None: by where the tensors lie. Tests give a
            `triton_offload.testing.SimulatedDevice`.
        verify: "store": what is stored is added up on its way, and the sums kept beside the slots,
            for exports (`Chunk.sums`). "load": they are compared too by every load; one that brings
            other bytes fails (`ChecksumError`), and its wrong chunks look up as missing. "off": no
            sums. "off" because of what it costs in CPU memory: README.md has the figures.

    Every method may be called from any thread of the process that made it; in a fork of it they
    raise RuntimeError. What a call was given (ids, keys) is the caller's again when it returns. A
    key (bytes) names one chunk of one group and must stand for the same content for ever: engines
    use a hash of all tokens up to the chunk's end.

    Use it in a `with` statement, or call `close`. One that is dropped without is closed in the
    background, with a ResourceWarning.
    """

    def __init__(
        self,
        kv_caches: Sequence[torch.Tensor] | Mapping[str, torch.Tensor],
        host_bytes: int | str,
        blocks_per_chunk: int = 1,
        *,
        groups: Sequence[Sequence[int | str]] | None = None,
        path: PathChoice = "auto",
        policy: PolicyChoice = "lru",
        enable_events: bool = False,
        calibration: Calibration | str | os.PathLike[str] = "auto",
        options: PipelineOptions | None = None,
        device: Device | None = None,
        verify: Verify = "off",
    ) -> None:
        layout = CacheLayout.named(kv_caches, blocks_per_chunk, groups)
        if device is not None and (isinstance(device, type) or not hasattr(device, "check_stream")):
            raise TypeError(f"device: expected a Device or None, got {shown(device)}")
        check_verify(verify)
        size = parse_bytes("host_bytes", host_bytes)
        check_memory("host_bytes", size)  # before anything grows with it
        slabs = Slabs.fit(size, layout.slot_sizes)
        manager = CPUOffloadingManager(
            slabs,
            policy=policy,
            blocks_per_chunk=blocks_per_chunk,
            enable_events=enable_events,
        )
        measured = None
        if device is None:
            measured = calibration_for(layout.device, calibration)
            device = device_for(layout.device, measured)
        pool = HostPool.allocate(device, slabs.num_slabs, slabs.slab_bytes, layout.slot_sizes)
        try:
            queue = transfer_queue(layout, pool, path, options, measured, verify)
        except BaseException:
            pool.close()
            raise
        super().__init__(layout, manager, queue, pool)
        self._layers = NamedLayers(layout, kv_caches if isinstance(kv_caches, Mapping) else None)
        self._lookups = self._hits = 0

    @property
    def num_chunks(self) -> int:
        """How many chunks the host pool holds; where groups differ in size, if all are of the
        smallest."""
        return self._pool.slabs.most_chunks

    def num_chunks_of(self, group: int) -> int:
        """How many chunks of one group the host pool holds, if it holds nothing else."""
        slabs, layout = self._pool.slabs, self._layout.groups[self._reader.group(group)]
        return slabs.num_slabs * slabs.sizes[layout.size].per_slab

    def store(
        self,
        keys: Sequence[bytes],
        block_ids: BlockIds,
        *,
        first_block: int = 0,
        group: int = 0,
        stream: Any = None,
    ) -> OffloadJob:
        """Offload blocks under one key per chunk, and return at once.

        `block_ids`: consecutive blocks of a request, the first at `first_block` of it; a first or
        last chunk may be incomplete, and a later store may add what it lacks. The pages are read
        after what is queued on `stream` now (default: the current stream). Chunks that are stored
        already are not moved again; those that another job is storing, the job waits for.

        Raises PoolFullError where nothing more can be evicted, ValueError for wrong arguments,
        RuntimeError when closed or where a policy of yours failed; nothing has changed then. Raises
        what the device does, too, where it refuses the store; no more has changed then than that
        chunks may have been evicted.
        """
        with self._lock:
            stored, span, ids = self._request(
                keys, block_ids, first_block, group, stream, distinct=False
            )
            masks = None if span.is_whole else span.masks()
            output = self._reserve(stored, masks, self._layout.groups[group].size)
            spec = output.store_spec
            with self._submitting(
                Direction.STORE, output.keys_to_store, spec.slot_ids, output.pending_keys
            ) as entry:
                runs = _runs(stored, span, output)
                for run in runs:
                    part = spec
                    if len(runs) > 1:
                        assert spec.fresh is not None
                        part = CPULoadStoreSpec(spec.slot_ids[run.chunks], spec.fresh[run.chunks])
                    pages = self._reader.device_spec(ids[run.blocks], run.first, group)
                    entry.transfers.add(self._queue.transfer_async(pages, part, stream=stream))
            return entry.job

    def load(
        self,
        keys: Sequence[bytes],
        block_ids: BlockIds,
        *,
        first_block: int = 0,
        group: int = 0,
        expedited: bool = False,
        stream: Any = None,
        layers: SupportsIndex | Sequence[Sequence[int | str]] | None = None,
    ) -> OffloadJob:
        """Load the chunks of `keys` into blocks, and return at once.

        `block_ids`, `first_block`, `group`, `stream`: as for `store`; blocks are written after
        what is queued on the stream now. `expedited`: do not queue behind other loads.

        `layers`: the tensors of each layer of the model, in the order in which layers are computed,
        by name (dict) or index (list): each tensor of the group once. A number: so many layers of
        equally many tensors, in the group's order. The pages of the first layer come first, those
        of the others behind, several layers at a time; `job.wait_on(stream, layer=i)` lets a stream
        wait for those of layer i alone. It is one job still, which ends when all have landed, and
        fails where any did not. A load below 8 MiB is moved as without.

        Raises UnknownKeyError, PendingKeyError (being stored), UnwrittenBlocksError (blocks of a
        partial chunk that no store wrote), ValueError, RuntimeError when closed; nothing has
        changed then.
        """
        with self._lock:
            stored, span, ids = self._request(
                keys, block_ids, first_block, group, stream, distinct=True
            )
            parts, numbers = self._layers.read(layers, group)
            masks = None if span.is_whole else span.masks()
            spec = self._manager.prepare_load(stored, masks)
            self._manager.touch(stored)
            with self._submitting(Direction.LOAD, stored, spec.slot_ids) as entry:
                entry.job._layers = numbers
                if len(ids):
                    pages = self._reader.device_spec(ids, span.first, group)
                    transfer = self._queue.transfer_async(
                        spec, pages, expedited=expedited, stream=stream, layers=parts
                    )
                    entry.transfers.add(transfer)
            return entry.job

    def lookup(
        self,
        keys: Sequence[bytes],
        *,
        num_blocks: int | None = None,
        first_block: int = 0,
        group: int = 0,
    ) -> int:
        """How many leading chunks of `keys` can be loaded now.

        A chunk of which any block was stored counts; with `num_blocks`, only one of which all the
        blocks were that a load of `num_blocks` blocks from `first_block` on needs.
        """
        with self._lock:
            self._check_open()
            self._collect()
            stored = self._reader.keys(keys, group)
            masks = None
            if num_blocks is not None:
                masks = self._reader.span(len(stored), num_blocks, first_block).masks()
            hits = self._manager.lookup(stored, masks)
            self._lookups += len(stored)
            self._hits += hits
            return hits

    def touch(self, keys: Sequence[bytes], *, group: int = 0) -> None:
        """Mark chunks as used now, so that they are evicted late. Loads and stores do so too."""
        with self._lock:
            self._check_open()
            self._manager.touch(self._reader.keys(keys, group))

    def take_events(self) -> list[OffloadingEvent]:
        """What was stored and removed since the last call (`enable_events`)."""
        with self._lock:
            return list(self._manager.take_events())

    def reset(self) -> None:
        """Forget every key. Transfers under way end as they would have."""
        with self._lock:
            self._check_open()
            self._manager.reset()

    def stats(self) -> OffloadingStats:
        """What was done since construction, and how it stands now; after `close` too."""
        with self._lock:
            self._collect()
            slabs, manager, is_open = self._pool.slabs, self._manager, self._finalizer.alive
            sizes = tuple(
                SizeStats(size.num_bytes, slabs.num_slabs * size.per_slab, used)
                for size, used in zip(slabs.sizes, manager.used_by_size(), strict=True)
            )
            return OffloadingStats(
                self._ledger.totals[Direction.STORE].stats(),
                self._ledger.totals[Direction.LOAD].stats(),
                self._lookups,
                self._hits,
                self._evictions,
                manager.num_chunks,
                manager.num_used,
                manager.num_pinned,
                slabs.num_bytes if is_open else 0,
                sum(size.used_bytes for size in sizes) if is_open else 0,
                self._pool.pinned,
                self._pool.pin_failure,
                self._queue.broken_paths,
                imported=self._ledger.medium_totals[Direction.STORE].stats(),
                exported=self._ledger.medium_totals[Direction.LOAD].stats(),
                limits=(*self._pool.device.limits, *self._pool.notes),
                wasted_bytes=manager.wasted_bytes if is_open else 0,
                sizes=sizes,
            )

    # -- under the lock --

    def _request(
        self,
        keys: Sequence[bytes],
        block_ids: BlockIds,
        first_block: int,
        group: int,
        stream: Any,
        *,
        distinct: bool,
    ) -> tuple[list[Key], ChunkSpan, Ids]:
        """The blocks of a call, all checked before anything is evicted or pinned for it."""
        self._check_open()
        self._pool.device.check_stream(stream)
        if self._pool.device.capturing(stream):
            which = "the current stream" if stream is None else "stream"
            raise RuntimeError(f"{which} captures a graph: expected no transfers in it")
        stored = self._reader.keys(keys, group)
        ids = self._reader.block_ids(block_ids, group, distinct=distinct)
        span = self._reader.span(len(stored), len(ids), first_block)
        self._collect()
        return stored, span, ids


def _runs(keys: Sequence[Key], span: ChunkSpan, output: PrepareStoreOutput) -> list[StoreRun]:
    """The runs of a store of these chunks."""
    if output.all_new:  # the common store
        return [StoreRun(slice(None), span.first, slice(None))] if keys else []
    place = {key: i for i, key in enumerate(keys)}
    return runs_to_store(span, [place[key] for key in output.keys_to_store], output.blocks)
