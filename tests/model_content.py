"""The bytes that every key stands for: in pages, and in the slots of a pool."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from triton_offload.calibration import Path
from triton_offload.testing import SimulatedDevice

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
