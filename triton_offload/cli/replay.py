"""Replay of a request trace: it drives a real offloader, and every loaded byte is verified."""

from __future__ import annotations

import json
import math
import os
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt
import torch

from triton_offload.calibration import PathChoice
from triton_offload.cli.models import geometry
from triton_offload.errors import PoolFullError
from triton_offload.job import OffloadJob
from triton_offload.offloader import KVOffloader
from triton_offload.scheduler.policies import PolicyChoice
from triton_offload.sizes import format_bytes
from triton_offload.specs import Ids

_MIN_PAGE_BYTES = 16
_Words = npt.NDArray[np.int64]


class TraceError(ValueError):
    """A trace that can't be read; the message begins with the file and the line."""


@dataclass(frozen=True, slots=True)
class ReplayOptions:
    """What is replayed on what.

    A chunk holds `chunk_tokens` tokens, as the trace's `hash_ids` do, in blocks of
    `block_tokens`. `num_chunks`: size of the host pool. `scale`: pages are that many times smaller
    than the model's (at least 16 bytes, and a multiple), counts stay: hit rates are those of the
    full size, bytes and times are not. `in_flight`: requests whose transfers may overlap. `limit`:
    only the first requests; None: all.

    On the host device a transfer costs a torch call per layer and place in the chunk, whatever the
    scale: fewer and larger blocks (128 tokens, not an engine's usual 16) keep a long trace short.
    """

    model: str = "llama-3-8b"
    num_chunks: int = 10_000
    chunk_tokens: int = 512
    block_tokens: int = 128
    scale: int = 1024
    policy: str = "lru"
    path: str = "auto"
    in_flight: int = 4
    limit: int | None = None

    def __post_init__(self) -> None:
        for name in ("num_chunks", "chunk_tokens", "block_tokens", "scale", "in_flight"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit: expected at least 1, got {self.limit}")
        if self.chunk_tokens % self.block_tokens:
            raise ValueError(
                f"block_tokens: expected a divisor of chunk_tokens ({self.chunk_tokens}), "
                f"got {self.block_tokens}"
            )
        geometry(self.model)

    @property
    def blocks_per_chunk(self) -> int:
        return self.chunk_tokens // self.block_tokens

    @property
    def page_bytes(self) -> int:
        """Bytes of a page as replayed."""
        scaled = geometry(self.model).page_bytes(self.block_tokens) // self.scale
        return max(_MIN_PAGE_BYTES, scaled - scaled % _MIN_PAGE_BYTES)

    @property
    def chunk_bytes(self) -> int:
        """Bytes of a chunk as replayed."""
        return geometry(self.model).num_layers * self.blocks_per_chunk * self.page_bytes


def chunks_in(host_bytes: int, model: str, chunk_tokens: int) -> int:
    """How many chunks a pool of `host_bytes` holds at the model's full size."""
    shape = geometry(model)
    chunk_bytes = shape.num_layers * shape.page_bytes(chunk_tokens)
    if host_bytes < chunk_bytes:
        raise ValueError(
            f"host_bytes: expected at least one chunk of {chunk_tokens} tokens of {model}, "
            f"{chunk_bytes} bytes, got {host_bytes}"
        )
    return host_bytes // chunk_bytes


@dataclass(frozen=True, slots=True)
class ReplayReport:
    """What a replay came to. `wrong_chunks`: loaded chunks with a byte that was not their key's.

    `requests`: how many were served; the replay is `partial` where they are not `requests_asked`.
    Seconds: `store_seconds` and `load_seconds` the sum over transfers from start to end,
    `waited_seconds` the host blocked for them, `seconds` the whole replay, content and
    verification included. `pinned`, `pin_error`, `broken_paths`: see `OffloadingStats`.
    """

    requests: int
    requests_asked: int
    references: int
    hits: int
    stored_bytes: int
    loaded_bytes: int
    store_seconds: float
    load_seconds: float
    waits: int
    waited_seconds: float
    evictions: int
    verified_chunks: int
    verified_bytes: int
    wrong_chunks: int
    failed_jobs: int
    seconds: float
    page_bytes: int
    pinned: bool
    pin_error: str | None
    broken_paths: tuple[str, ...]

    @property
    def hit_rate(self) -> float:
        """Leading hits over all references to chunks."""
        return self.hits / self.references if self.references else 0.0

    @property
    def store_gb_per_s(self) -> float:
        """10**9 bytes per second of transfer."""
        return self.stored_bytes / self.store_seconds / 1e9 if self.store_seconds else 0.0

    @property
    def load_gb_per_s(self) -> float:
        """10**9 bytes per second of transfer."""
        return self.loaded_bytes / self.load_seconds / 1e9 if self.load_seconds else 0.0

    @property
    def partial(self) -> bool:
        """Whether it was interrupted."""
        return self.requests < self.requests_asked

    @property
    def ok(self) -> bool:
        return self.wrong_chunks == 0 and self.failed_jobs == 0


def read_trace(path: Path, limit: int | None = None) -> list[list[int]]:
    """The `hash_ids` of every request of a trace in Mooncake's format, a JSON object a line.

    Raises TraceError for a line that has none, or that says of times and lengths what can't be.
    """
    requests: list[list[int]] = []
    with path.open("rb") as lines:  # bytes, so that wrong UTF-8 has a line number too
        for number, line in enumerate(lines, 1):
            if limit is not None and len(requests) >= limit:
                break
            if line.strip():
                try:
                    requests.append(_hash_ids(line))
                except ValueError as error:
                    raise TraceError(f"{path}:{number}: {error}") from error
    if not any(requests):
        raise TraceError(f"{path}: expected at least one request with hash_ids")
    return requests


def _hash_ids(line: bytes) -> list[int]:
    """What a line's request reads; raises ValueError where it is no request."""
    try:
        request = json.loads(line)
        ids = request["hash_ids"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        got = repr(line[:60].decode(errors="replace"))
        raise ValueError(f'expected an object with "hash_ids", got {got}') from error
    # Beyond 2**31 the content of two keys could be the same.
    if not isinstance(ids, list) or not all(type(i) is int and 0 <= i < 2**31 for i in ids):
        raise ValueError(f"expected hash_ids from 0 to 2**31 - 1, got {str(ids)[:60]}")
    if len(set(ids)) != len(ids):
        raise ValueError(f"expected distinct hash_ids, got {str(ids)[:60]}")
    for name in ("input_length", "output_length"):
        value = request.get(name, 0)
        if type(value) is not int or value < 0:
            raise ValueError(f"expected {name} of at least 0, got {value!r}")
    time_stamp = request.get("timestamp", 0)
    if type(time_stamp) not in (int, float) or not 0 <= time_stamp < math.inf:
        raise ValueError(f"expected timestamp of at least 0, got {time_stamp!r}")
    return ids


@dataclass(slots=True)
class _Request:
    """A request whose transfers may be under way, in pages of its own."""

    ids: list[int]
    hits: int
    blocks: Ids
    load: OffloadJob
    store: OffloadJob


class _Cache:
    """Device pages for a few requests, and what the bytes of every key must be.

    `pages` is int64 [layers, blocks, words]; a word is a sum of its key, block, layer and word
    numbers times odd constants, so that a page in the wrong place never looks right. In numpy,
    which for arrays this small is several times faster than torch with its threads.
    """

    def __init__(self, options: ReplayOptions, most_chunks: int) -> None:
        layers = geometry(options.model).num_layers
        words = options.page_bytes // 8
        self.span = options.blocks_per_chunk
        self.blocks_of_request = most_chunks * self.span
        blocks = options.in_flight * self.blocks_of_request
        needed = options.num_chunks * options.chunk_bytes + layers * blocks * words * 8
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if needed > memory:
            raise ValueError(
                f"scale: expected one at which pool and pages fit in {format_bytes(memory)} of "
                f"memory, got {options.scale}, which takes {format_bytes(needed)}"
            )
        self.pages: _Words = np.zeros((layers, blocks, words), dtype=np.int64)
        layer_terms = np.arange(layers, dtype=np.int64)[:, None, None] * 0x1E3779B97F4A7C15
        word_terms = np.arange(words, dtype=np.int64) * 0x2545F491
        self._terms: _Words = layer_terms + word_terms
        # One order for every request's blocks: scattered as an engine's are.
        self._order: Ids = np.random.default_rng(0).permutation(self.blocks_of_request)

    @property
    def tensors(self) -> list[torch.Tensor]:
        """The pages of each layer, in the same memory."""
        return list(torch.from_numpy(self.pages))

    def region(self, number: int, num_chunks: int) -> Ids:
        """Block ids for the request in place `number`."""
        return self._order[: num_chunks * self.span] + number * self.blocks_of_request

    def content(self, ids: list[int]) -> _Words:
        """int64 [layers, blocks, words]: what the pages of these keys hold."""
        keys = np.array(ids, dtype=np.int64)[:, None] * self.span + np.arange(self.span)
        return keys.reshape(1, -1, 1) * 0x5851F42D4C957F2D + self._terms


def replay(
    requests: list[list[int]],
    options: ReplayOptions,
    advance: Callable[[int, float], None] = lambda done, hit_rate: None,
    interrupted: Callable[[], bool] = lambda: False,
) -> ReplayReport:
    """Serve the requests: look up, load the leading hits, compute the rest, store it.

    `advance(requests done, hit rate so far)` is called after every request. Where `interrupted()`
    says so before one, what was begun is ended and verified, and the report is partial.

    Transfers of up to `options.in_flight` requests overlap; a request whose next chunk is just
    being stored waits for it, so that hit rates hardly depend on timing (two runs differed by 2 in
    10,000 hits).
    """
    return _Replay(requests, options).run(advance, interrupted)


class _Replay:
    def __init__(self, requests: list[list[int]], options: ReplayOptions) -> None:
        self._requests = requests
        self._options = options
        longest = max(map(len, requests))
        if longest > options.num_chunks:
            raise ValueError(
                f"num_chunks: expected room for the longest request of {longest} chunks, "
                f"got {options.num_chunks}"
            )
        self._cache = _Cache(options, longest)
        self._open: deque[_Request] = deque()
        self._storing: dict[int, OffloadJob] = {}
        self._waits, self._waited = 0, 0.0
        self._served = self._references = self._hits = self._verified = self._wrong = 0

    def run(
        self, advance: Callable[[int, float], None], interrupted: Callable[[], bool]
    ) -> ReplayReport:
        start = time.perf_counter()
        options = self._options
        with KVOffloader(
            self._cache.tensors,
            host_bytes=options.num_chunks * options.chunk_bytes,
            blocks_per_chunk=options.blocks_per_chunk,
            policy=cast(PolicyChoice, options.policy),  # what the user typed is checked there
            path=cast(PathChoice, options.path),
        ) as offloader:
            for number, ids in enumerate(self._requests):
                if interrupted():
                    break
                if len(self._open) == options.in_flight:
                    self._close(self._open.popleft())
                self._serve(offloader, number % options.in_flight, ids)
                offloader.get_finished()
                self._served += 1
                advance(self._served, self._hits / max(1, self._references))
            while self._open:
                self._close(self._open.popleft())
            stats = offloader.stats()
        return ReplayReport(
            requests=self._served,
            requests_asked=len(self._requests),
            references=self._references,
            hits=self._hits,
            stored_bytes=stats.store.num_bytes,
            loaded_bytes=stats.load.num_bytes,
            store_seconds=stats.store.seconds,
            load_seconds=stats.load.seconds,
            waits=self._waits,
            waited_seconds=self._waited,
            evictions=stats.evictions,
            verified_chunks=self._verified,
            verified_bytes=self._verified * options.chunk_bytes,
            wrong_chunks=self._wrong,
            failed_jobs=stats.store.failed + stats.load.failed,
            seconds=time.perf_counter() - start,
            page_bytes=options.page_bytes,
            pinned=stats.pinned,
            pin_error=stats.pin_error,
            broken_paths=stats.broken_paths,
        )

    def _serve(self, offloader: KVOffloader, number: int, ids: list[int]) -> None:
        keys = [i.to_bytes(8, "big") for i in ids]
        hits = self._lookup(offloader, keys, ids)
        blocks = self._cache.region(number, len(ids))
        cut = hits * self._cache.span
        pages = self._cache.pages
        pages[:, blocks[:cut]] = -1  # poison: what a load leaves out is seen
        load = offloader.load(keys[:hits], blocks[:cut])
        pages[:, blocks[cut:]] = self._cache.content(ids[hits:])
        store = self._store(offloader, keys[hits:], blocks[cut:])
        self._storing.update(dict.fromkeys(ids[hits:], store))
        self._references += len(ids)
        self._hits += hits
        self._open.append(_Request(ids, hits, blocks, load, store))

    def _store(self, offloader: KVOffloader, keys: list[bytes], blocks: Ids) -> OffloadJob:
        while True:
            try:
                return offloader.store(keys, blocks)
            except PoolFullError:
                # A pool hardly larger than a request: the ones before must release their pins.
                if not self._open:
                    raise
                self._close(self._open.popleft())

    def _lookup(self, offloader: KVOffloader, keys: list[bytes], ids: list[int]) -> int:
        hits = offloader.lookup(keys)
        while hits < len(ids) and (store := self._storing.get(ids[hits])) is not None:
            self._wait(store)
            for i in [i for i, job in self._storing.items() if job is store]:
                del self._storing[i]
            hits = offloader.lookup(keys)
        return hits

    def _close(self, request: _Request) -> None:
        """Wait for a request's transfers and verify what it loaded."""
        self._wait(request.load)
        if request.hits:
            blocks = request.blocks[: request.hits * self._cache.span]
            expected = self._cache.content(request.ids[: request.hits])
            wrong = self._cache.pages[:, blocks] != expected
            self._verified += request.hits
            if wrong.any():
                wrong_blocks = wrong.any(axis=(0, 2)).reshape(-1, self._cache.span)
                self._wrong += int(wrong_blocks.any(axis=1).sum())
        self._wait(request.store)
        for i in request.ids[request.hits :]:
            if self._storing.get(i) is request.store:
                del self._storing[i]

    def _wait(self, job: OffloadJob) -> None:
        if job.done:
            return
        start = time.perf_counter()
        job.block()
        self._waits += 1
        self._waited += time.perf_counter() - start
