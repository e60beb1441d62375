"""What the bytes of every key must be: keys, pages and pool of a KVOffloader, in plain words."""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import numpy as np
import numpy.typing as npt

from triton_offload import KVOffloader
from triton_offload.calibration import Path
from triton_offload.scheduler.manager import PrepareStoreOutput
from triton_offload.testing import SimulatedDevice
from triton_offload.transfer.layout import CacheLayout
from triton_offload.transfer.pipeline import PipelineOptions

Bytes = npt.NDArray[np.uint8]
POISON = 0xEE

ONE_GROUP = (((0, 16), (1, 8)),)
# One of all tensors, one of a few of their bytes, and one with padded pages: staging has gaps.
OVERLAYS = (((0, 16), (1, 8)), ((1, 8),), ((0, 9), (1, 3)))


@dataclass(frozen=True, slots=True)
class Setting:
    """What an offloader is made of. `groups`: (tensor, page bytes) of each group's pages.
    `packed`: each group's slots are as large as it needs."""

    path: Path = Path.STAGED
    groups: Sequence[Sequence[tuple[int, int]]] = ONE_GROUP
    policy: str = "lru"
    page_bytes: tuple[int, ...] = (16, 8)
    blocks_per_chunk: int = 2
    num_chunks: int = 6
    num_requests: int = 4
    chunks_per_request: int = 5
    window_chunks: float | None = None  # less than one: a block or two at a time
    buffer_chunks: int = 1
    max_indices: int = 1  # the least that it takes
    packed: bool = False

    @property
    def block_bytes(self) -> int:
        return sum(self.page_bytes)

    @property
    def slot_bytes(self) -> int:
        return self.block_bytes * self.blocks_per_chunk


@dataclass(frozen=True, slots=True)
class Span:
    """Consecutive blocks of a request, in one group."""

    group: int
    request: int
    first: int
    count: int


class Content:
    """Every key's own bytes: at any place in a slot no two keys have the same, and none has 0."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self._slots: dict[tuple[int, int, int], Bytes] = {}

    def keys(self, span: Span) -> list[bytes]:
        return [b"%d.%d" % (span.request, chunk) for chunk in self._chunks(span)]

    def known_as(self, span: Span) -> list[bytes]:
        """Its keys as events name them."""
        several = len(self.setting.groups) > 1
        suffix = span.group.to_bytes(4, "big") if several else b""
        return [key + suffix for key in self.keys(span)]

    def masks(self, span: Span) -> list[int]:
        masks: Counter[int] = Counter()
        for block in range(span.first, span.first + span.count):
            chunk, position = divmod(block, self.setting.blocks_per_chunk)
            masks[chunk] += 1 << position
        return [masks[chunk] for chunk in self._chunks(span)]

    def slot_of(self, name: bytes) -> Bytes:
        """The slot of a key as events name it."""
        group = 0
        if len(self.setting.groups) > 1:
            name, group = name[:-4], int.from_bytes(name[-4:], "big")
        request, chunk = map(int, name.split(b"."))
        return self.slot(group, request, chunk)

    def slot(self, group: int, request: int, chunk: int) -> Bytes:
        """What the slot of a chunk holds when all of it is stored; 0 where the group has none."""
        key = group, request, chunk
        if key not in self._slots:
            setting = self.setting
            number = (group * setting.num_requests + request) * setting.chunks_per_request + chunk
            assert number < 255
            slot = np.zeros(setting.slot_bytes, dtype=np.uint8)
            for tensor, size in setting.groups[group]:
                for position in range(setting.blocks_per_chunk):
                    begin = self._offset(tensor, position)
                    place = np.arange(begin, begin + size)
                    slot[place] = 1 + (place * 31 + number) % 255
            self._slots[key] = slot
        return self._slots[key]

    def page(self, span: Span, i: int, tensor: int, size: int) -> Bytes:
        """The page of the span's block `i` in a tensor of its group."""
        chunk, position = divmod(span.first + i, self.setting.blocks_per_chunk)
        begin = self._offset(tensor, position)
        return self.slot(span.group, span.request, chunk)[begin : begin + size]

    def _offset(self, tensor: int, position: int) -> int:
        pages = self.setting.page_bytes
        return self.setting.blocks_per_chunk * sum(pages[:tensor]) + position * pages[tensor]

    def _chunks(self, span: Span) -> range:
        size = self.setting.blocks_per_chunk
        return range(span.first // size, (span.first + span.count - 1) // size + 1)


class Pages:
    """The engine's pages. `expected`: [tensor][block, bytes] once all that is queued has run."""

    def __init__(self, device: Any, setting: Setting, content: Content, num_blocks: int) -> None:
        self.tensors = [
            device.empty(num_blocks * n).view(num_blocks, n) for n in setting.page_bytes
        ]
        self.expected = [tensor.numpy().copy() for tensor in self.tensors]
        self.wrong: list[str] = []
        self._device = device if isinstance(device, SimulatedDevice) else None
        self._content = content

    def poison(self, blocks: Sequence[int]) -> None:
        self._write(blocks, [(tensor, slice(None), POISON) for tensor in range(len(self.tensors))])

    def fill(self, span: Span, blocks: Sequence[int]) -> None:
        """The engine computes a span's pages, as its kernels do: queued on its stream."""
        for i, block in enumerate(blocks):
            parts = [
                (tensor, slice(size), self._content.page(span, i, tensor, size))
                for tensor, size in self._content.setting.groups[span.group]
            ]
            self._write([block], parts)

    def expect(self, span: Span, blocks: Sequence[int]) -> list[Bytes]:
        """A load of the span into the blocks was queued. Returns what `restore` takes."""
        before = [expected[blocks] for expected in self.expected]
        for i, block in enumerate(blocks):
            for tensor, size in self._content.setting.groups[span.group]:
                page = self._content.page(span, i, tensor, size)
                self.expected[tensor][block, :size] = page
        return before

    def restore(self, blocks: Sequence[int], before: list[Bytes]) -> None:
        for expected, rows in zip(self.expected, before, strict=True):
            expected[blocks] = rows

    def read(self, blocks: Sequence[int], *, on_host: bool) -> None:
        """Compare whole blocks: now by the host, or by a kernel when the engine's stream gets
        there. Where there is no such stream, now."""
        device = self._device
        expected = [rows[blocks] for rows in self.expected]

        def compare() -> None:
            for i, (tensor, rows) in enumerate(zip(self.tensors, expected, strict=True)):
                if not np.array_equal(tensor.numpy()[blocks], rows):
                    self.wrong.append(f"tensor {i}, blocks {list(blocks)}")

        if device is None or on_host:
            if device is not None:
                device.touch(reads=self._rows(blocks, range(len(self.tensors))))
            compare()
        else:
            reads = self._rows(blocks, range(len(self.tensors)))
            device.launch("engine reads", device.compute_stream, reads=reads, run=compare)

    def check(self) -> None:
        assert not self.wrong, self.wrong[:3]

    def check_all(self) -> None:
        """Every page. Everything queued must have run."""
        self.check()
        for i, (tensor, expected) in enumerate(zip(self.tensors, self.expected, strict=True)):
            bad = np.flatnonzero((tensor.numpy() != expected).any(axis=1)).tolist()
            assert not bad, f"tensor {i}: other bytes in blocks {bad}"

    def _write(self, blocks: Sequence[int], parts: list[tuple[int, slice, Any]]) -> None:
        for tensor, part, values in parts:
            self.expected[tensor][blocks, part] = values

        def run() -> None:
            for tensor, part, values in parts:
                self.tensors[tensor].numpy()[blocks, part] = values

        if self._device is None:
            run()
            return
        writes = self._rows(blocks, [tensor for tensor, _, _ in parts])
        self._device.launch("engine writes", self._device.compute_stream, writes=writes, run=run)

    def _rows(self, blocks: Sequence[int], tensors: Sequence[int]) -> list[Any]:
        return [self.tensors[tensor][block] for tensor in tensors for block in blocks]


@dataclass(frozen=True, slots=True)
class Offer:
    """What could be loaded of a key at most, and how many stores had named it."""

    blocks: int
    num_stores: int


class Known:
    """What is known of the pool from outside: what was stored, and which keys events took away.

    `offered` bounds from above what can be loaded of a key, `held` from below.
    """

    def __init__(self) -> None:
        self.offered: dict[bytes, int] = {}
        self.held: dict[bytes, int] = {}
        self.now = 0
        self._gone: dict[bytes, int] = {}
        self._num_stores: Counter[bytes] = Counter()

    def removed(self, keys: Sequence[bytes]) -> None:
        self.now += 1
        for key in keys:
            self.offered.pop(key, None)
            self.held.pop(key, None)
            self._gone[key] = self.now

    def forget(self) -> None:
        self.removed(list(self.offered))

    def offers(self, names: Sequence[bytes]) -> list[Offer]:
        """What there is of these keys, for `taken_back`."""
        return [Offer(self.offered.get(name, 0), self._num_stores[name]) for name in names]

    def taken_back(self, names: Sequence[bytes], before: Sequence[Offer]) -> None:
        """A store has stored nothing: what it offered nobody has, unless another did since."""
        for name, offer in zip(names, before, strict=True):
            if name in self.offered and self._num_stores[name] == offer.num_stores + 1:
                self.offered[name] &= offer.blocks

    def submitted(self, names: Sequence[bytes], masks: Sequence[int]) -> int:
        """Returns the time, for `stored`."""
        self._num_stores.update(names)
        for key, mask in zip(names, masks, strict=True):
            self.offered[key] = self.offered.get(key, 0) | mask
        return self.now

    def stored(self, names: Sequence[bytes], masks: Sequence[int], since: int) -> None:
        for key, mask in zip(names, masks, strict=True):
            if self._gone.get(key, -1) <= since:
                self.held[key] = self.held.get(key, 0) | mask


class World:
    """One offloader, its pages, and what is known of both.

    `exact`: no two calls overlap, as on the simulated device: then every answer is foretold.
    `faulty`: jobs may fail. `closing`: calls may be refused.
    """

    def __init__(self, device: Any, setting: Setting, num_blocks: int) -> None:
        self.device = device
        self.setting = setting
        self.num_blocks = num_blocks
        self.content = Content(setting)
        self.pages = Pages(device, setting, self.content, num_blocks)
        self.exact = isinstance(device, SimulatedDevice)
        self.known = Known()
        self.faulty = self.closing = False
        self.num_cancels = self.num_jobs = self.num_loaded = self.num_failed = 0
        self.lock = threading.Lock()  # of the counts here, never held over a call
        self.storing: Counter[bytes] = Counter()  # stores whose end nobody has seen, by key
        self.recent: deque[Span] = deque(maxlen=6)  # stored lately
        self._unreported: Counter[int] = Counter()
        layout = CacheLayout(
            self.pages.tensors, setting.blocks_per_chunk, setting.groups, packed=setting.packed
        )
        window = setting.window_chunks
        # Groups with padded pages are those of vLLM: KVOffloader itself has no argument for them.
        with patch.object(CacheLayout, "named", return_value=layout):
            self.offloader = KVOffloader(
                self.pages.tensors,
                setting.num_chunks * setting.slot_bytes,
                setting.blocks_per_chunk,
                policy=setting.policy,
                enable_events=True,
                options=PipelineOptions(
                    path=setting.path,
                    buffer_bytes=setting.buffer_chunks * setting.slot_bytes,
                    num_buffers=2,
                    max_indices=setting.max_indices,
                    window_bytes=window and max(1, int(window * setting.slot_bytes)),
                ),
                device=device,
            )

    def accepted(self, job_id: int) -> None:
        with self.lock:
            self.num_jobs += 1
            self._unreported[job_id] += 1

    def collect(self) -> None:
        """Every accepted job is reported once (perhaps before its caller has noted it)."""
        finished = self.offloader.get_finished()
        with self.lock:
            for result in finished:
                self._unreported[result.job_id] -= 1
            self._unreported = Counter({i: n for i, n in self._unreported.items() if n})
            if self.exact:
                assert all(n == 1 for n in self._unreported.values()), "reported twice"

    def check_reported(self) -> None:
        self.collect()
        assert not self._unreported, "a job was not reported, or twice"

    def take_events(self) -> None:
        for event in self.offloader.take_events():
            if self.exact and event.removed:
                self.known.removed(event.keys)
            elif self.exact:
                assert all(key in self.known.offered for key in event.keys), "stored by nobody"

    def lookup(self, span: Span) -> int:
        """How many leading chunks of a span can be loaded; compared with what is known."""
        found = self.offloader.lookup(
            self.content.keys(span),
            num_blocks=span.count,
            first_block=span.first,
            group=span.group,
        )
        names, masks = self.content.known_as(span), self.content.masks(span)
        assert 0 <= found <= len(names)
        if self.exact:
            self.take_events()
            for key, mask in list(zip(names, masks, strict=True))[:found]:
                assert not mask & ~self.known.offered.get(key, 0), f"{key!r} was never stored"
            if found < len(names):
                held = self.known.held.get(names[found], 0)
                assert masks[found] & ~held, f"{names[found]!r} is lost"
        return found

    def check(self) -> None:
        """What holds between any two calls."""
        self.offloader._check()
        self.pages.check()

    def close(self) -> None:
        """Close (again, perhaps), and look at all that is left."""
        self.closing = True
        self.offloader.close()
        self.check_reported()
        if isinstance(self.device, SimulatedDevice):
            self.device.drain()
            self.device.check()
            assert not self.device.background_names
            assert len(self.device.streams) == 2
            self.pages.check_all()
        assert self.offloader.stats().num_pinned == 0
        self.check()


class PoolWatch:
    """Whose bytes every slot of the pool holds, looked at whole."""

    def __init__(self, world: World) -> None:
        self._world = world
        count = world.setting.num_chunks
        # By slot: the keys whose bytes may be there, and whether its chunk was stored in parts.
        self._residue: list[set[bytes]] = [set() for _ in range(count)]
        self._in_parts = [False] * count
        self._rows = world.offloader._pool.slots.numpy()  # which outlives the pool
        manager = world.offloader._manager
        self._prepare_store = manager.prepare_store
        manager.prepare_store = self._noted  # type: ignore[method-assign]

    def look(self) -> None:
        """What can be loaded of a key is its own, and the rest of its slot its own or zeros. A
        slot that nobody can load from holds what was there last.

        A transfer that failed may have left anything: where nobody can load from, and where the
        blocks of a chunk lie that a failed store was to add.
        """
        world, manager = self._world, self._world.offloader._manager
        rows = self._rows
        ready = {slot: key for key, slot in manager._slot_of.items() if manager._loadable(key)}
        used = manager._orphans.slots | set(manager._slot_of.values())
        for slot, key in ready.items():
            self._residue[slot] = {key}
            own, blocks = world.content.slot_of(key), self._of_blocks(manager._loadable(key))
            assert (rows[slot] == own)[blocks & (own != 0)].all(), f"{key!r} is not in slot {slot}"
        for slot, (row, residue) in enumerate(zip(rows, self._residue, strict=True)):
            if world.faulty and (slot not in ready or self._in_parts[slot]):
                continue
            owners = [(row == 0) | (row == world.content.slot_of(key)) for key in residue]
            assert np.logical_or.reduce([row == 0, *owners]).all(), f"slot {slot}: foreign bytes"
            if slot not in used and residue:
                assert any(owner.all() for owner in owners), f"slot {slot}: bytes of several keys"

    def _noted(self, *args: Any, **kwargs: Any) -> PrepareStoreOutput | None:
        output = self._prepare_store(*args, **kwargs)
        if output is not None:
            spec = output.store_spec
            for key, slot, fresh in zip(
                output.keys_to_store, spec.slot_ids, spec.fresh, strict=True
            ):
                self._residue[slot].add(key)
                self._in_parts[slot] = not fresh
        return output

    def _of_blocks(self, mask: int) -> npt.NDArray[np.bool_]:
        """The bytes of a slot that belong to these blocks of its chunk."""
        setting = self._world.setting
        blocks = [mask >> position & 1 for position in range(setting.blocks_per_chunk)]
        return np.concatenate([np.repeat(blocks, size) for size in setting.page_bytes]) != 0
