"""Replay of a request trace: it drives a real offloader, and every loaded byte is verified."""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from triton_offload.job import OffloadJob
from triton_offload.models import geometry
from triton_offload.offloader import KVOffloader

_MIN_PAGE_BYTES = 16


class TraceError(ValueError):
    """A trace that can't be read; the message names the line."""


@dataclass(frozen=True, slots=True)
class ReplayOptions:
    """What is replayed on what.

    A chunk holds `chunk_tokens` tokens, as the trace's `hash_ids` do, in blocks of
    `block_tokens`. `num_chunks`: size of the host pool. `scale`: pages are that many times smaller
    than the model's (at least 16 bytes, and a multiple), counts stay: hit rates are those of the
    full size, bytes and times are not. `in_flight`: requests whose transfers may overlap.
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


@dataclass(frozen=True, slots=True)
class ReplayReport:
    """What a replay came to. `wrong_chunks`: loaded chunks with a byte that was not their key's.

    Seconds: `store_seconds` and `load_seconds` while transfers ran, `waited_seconds` the host
    blocked for them, `seconds` the whole replay, content and verification included.
    """

    requests: int
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
    wrong_chunks: int
    failed_jobs: int
    seconds: float
    page_bytes: int

    @property
    def hit_rate(self) -> float:
        """Leading hits over all references to chunks."""
        return self.hits / self.references if self.references else 0.0

    @property
    def ok(self) -> bool:
        return self.wrong_chunks == 0 and self.failed_jobs == 0


def read_trace(path: Path, limit: int | None = None) -> list[list[int]]:
    """The `hash_ids` of every request of a trace in Mooncake's format, a JSON object a line."""
    requests: list[list[int]] = []
    with path.open() as lines:
        for number, line in enumerate(lines, 1):
            if limit is not None and len(requests) >= limit:
                break
            if not line.strip():
                continue
            try:
                ids = json.loads(line)["hash_ids"]
            except (ValueError, KeyError, TypeError) as error:
                raise TraceError(
                    f'{path}, line {number}: expected an object with "hash_ids", got {line[:60]!r}'
                ) from error
            # Beyond 2**31 the content of two keys could be the same.
            if not isinstance(ids, list) or not all(type(i) is int and 0 <= i < 2**31 for i in ids):
                raise TraceError(f"{path}, line {number}: expected hash_ids from 0 to 2**31 - 1")
            if len(set(ids)) != len(ids):
                raise TraceError(f"{path}, line {number}: expected distinct hash_ids")
            requests.append(ids)
    if not requests:
        raise TraceError(f"{path}: expected at least one request")
    return requests


@dataclass(slots=True)
class _Request:
    """A request whose transfers may be under way, in pages of its own."""

    ids: list[int]
    hits: int
    blocks: torch.Tensor
    load: OffloadJob
    store: OffloadJob


class _Cache:
    """Device pages for a few requests, and what the bytes of every key must be.

    `storage` is int64 [layers, blocks, words]; a word is a product of its key, block and layer
    numbers with odd constants, so that a page in the wrong place never looks right.
    """

    def __init__(self, options: ReplayOptions, most_chunks: int) -> None:
        layers = geometry(options.model).num_layers
        self.span = options.blocks_per_chunk
        self.blocks_of_request = most_chunks * self.span
        blocks = options.in_flight * self.blocks_of_request
        self.storage = torch.zeros((layers, blocks, options.page_bytes // 8), dtype=torch.int64)
        self._layer_terms = torch.arange(layers).view(-1, 1, 1) * 0x1E3779B97F4A7C15
        self._word_terms = torch.arange(options.page_bytes // 8).view(1, 1, -1) * 0x2545F491

    def region(self, number: int, num_chunks: int) -> torch.Tensor:
        """The request's block ids, scattered as an engine's are."""
        start = number * self.blocks_of_request
        generator = torch.Generator().manual_seed(number)
        order = torch.randperm(self.blocks_of_request, generator=generator)
        return start + order[: num_chunks * self.span]

    def content(self, ids: list[int]) -> torch.Tensor:
        """int64 [layers, blocks, words]: what the pages of these keys hold."""
        keys = torch.tensor(ids, dtype=torch.int64).repeat_interleave(self.span)
        positions = torch.arange(self.span).repeat(len(ids))
        blocks = (keys * self.span + positions).view(1, -1, 1) * 0x5851F42D4C957F2D
        return blocks + self._layer_terms + self._word_terms


def replay(
    requests: list[list[int]],
    options: ReplayOptions,
    advance: Callable[[int, float], None] = lambda done, hit_rate: None,
) -> ReplayReport:
    """Serve the requests: look up, load the leading hits, compute the rest, store it.

    `advance(requests done, hit rate so far)` is called after every request. Transfers of up to
    `options.in_flight` requests overlap; a request whose next chunk is just being stored waits for
    it, so that hit rates do not depend on timing.
    """
    return _Replay(requests, options).run(advance)


class _Replay:
    def __init__(self, requests: list[list[int]], options: ReplayOptions) -> None:
        self._requests = requests
        self._options = options
        self._cache = _Cache(options, max(map(len, requests)))
        self._open: deque[_Request] = deque()
        self._storing: dict[int, OffloadJob] = {}
        self._waits, self._waited = 0, 0.0
        self._references = self._hits = self._verified = self._wrong = 0

    def run(self, advance: Callable[[int, float], None]) -> ReplayReport:
        start = time.perf_counter()
        options = self._options
        chunk_bytes = len(self._cache.storage) * options.blocks_per_chunk * options.page_bytes
        with KVOffloader(
            list(self._cache.storage),
            host_bytes=options.num_chunks * chunk_bytes,
            blocks_per_chunk=options.blocks_per_chunk,
            policy=options.policy,
            path=options.path,
        ) as offloader:
            for number, ids in enumerate(self._requests):
                if len(self._open) == options.in_flight:
                    self._close(self._open.popleft())
                self._serve(offloader, number % options.in_flight, ids)
                offloader.get_finished()
                advance(number + 1, self._hits / max(1, self._references))
            while self._open:
                self._close(self._open.popleft())
            stats = offloader.stats()
        return ReplayReport(
            requests=len(self._requests),
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
            wrong_chunks=self._wrong,
            failed_jobs=stats.store.failed + stats.load.failed,
            seconds=time.perf_counter() - start,
            page_bytes=options.page_bytes,
        )

    def _serve(self, offloader: KVOffloader, number: int, ids: list[int]) -> None:
        keys = [i.to_bytes(8, "big") for i in ids]
        hits = self._lookup(offloader, keys, ids)
        blocks = self._cache.region(number, len(ids))
        cut = hits * self._cache.span
        storage = self._cache.storage
        storage[:, blocks[:cut]] = -1  # poison: what a load leaves out is seen
        load = offloader.load(keys[:hits], blocks[:cut].numpy())
        storage[:, blocks[cut:]] = self._cache.content(ids[hits:])
        store = offloader.store(keys[hits:], blocks[cut:].numpy())
        self._storing.update(dict.fromkeys(ids[hits:], store))
        self._references += len(ids)
        self._hits += hits
        self._open.append(_Request(ids, hits, blocks, load, store))

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
            loaded = self._cache.storage[:, blocks]
            self._verified += request.hits
            if not torch.equal(loaded, expected):
                wrong = (loaded != expected).any(dim=2).any(dim=0)
                self._wrong += int(wrong.view(-1, self._cache.span).any(dim=1).sum())
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
