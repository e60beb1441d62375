"""gather_pages and scatter_pages move the right bytes, and no other.

The cases run three times: here on the torch reference and on what the host device does, and on the
Triton kernels in a process of its own, because Triton decides at import whether it interprets.
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from page_cases import CASES, SMALL, Case, Move, Tensor, check, noise

from triton_offload.device import host_pages, native
from triton_offload.kernels import pages, reference
from triton_offload.kernels.fragments import Fragment, fragment_table
from triton_offload.kernels.table import PageTable
from triton_offload.kernels.tiling import KernelConfig

# Triton 3.6's interpreter turns arrays of one element into loop bounds in a way numpy deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def move_by_kernels(direction: str, *args: Any, config: KernelConfig | None = SMALL) -> None:
    getattr(pages, f"{direction}_pages")(*args, config=config)


def move_by_reference(direction: str, *args: Any, config: KernelConfig | None = SMALL) -> None:
    getattr(reference, f"{direction}_pages")(*args)


def move_on_host(
    direction: str,
    table: PageTable,
    block_ids: list[int],
    slots: torch.Tensor,
    slot_ids: list[int] | None = None,
    first_block: int = 0,
    config: KernelConfig | None = SMALL,
) -> None:
    if block_ids:  # a device is never given less
        chunks = range(len(slots)) if slot_ids is None else slot_ids
        ids, places = torch.tensor(block_ids), torch.tensor(chunks)
        getattr(host_pages, direction)(table, ids, slots, places, first_block)


def move_by_torch(*args: Any, config: KernelConfig | None = SMALL) -> None:
    """On the host where its C code could not be compiled."""
    switched_off = native.Native(None, "switched off")
    with mock.patch.object(native, "load", return_value=switched_off):
        move_on_host(*args)


WAYS = {
    "kernels": move_by_kernels,
    "reference": move_by_reference,
    "host": move_on_host,
    "torch": move_by_torch,
}


@pytest.fixture(scope="class", params=["kernels"] if INTERPRETED else [*WAYS][1:])
def move(request: pytest.FixtureRequest) -> Move:
    return WAYS[request.param]


class TestBytes:
    @pytest.mark.parametrize("direction", ["gather", "scatter"])
    @pytest.mark.parametrize("name", CASES)
    def test_moves_these_bytes_and_no_other(self, name: str, direction: str, move: Move) -> None:
        check(CASES[name], direction, move)

    @pytest.mark.parametrize("zero_copy", [False, True], ids=["staged", "zero_copy"])
    @pytest.mark.parametrize("direction", ["gather", "scatter"])
    def test_moves_the_same_bytes_in_full_size_tiles(
        self, direction: str, zero_copy: bool, move: Move
    ) -> None:
        config = pages.choose_config(zero_copy=zero_copy)
        check(CASES["pages of several strips"], direction, move, config)
        check(CASES["a different alignment each"], direction, move, config)

    @given(data=st.data())
    @settings(
        max_examples=60 if INTERPRETED else 5 * settings.default.max_examples,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow],
    )
    def test_moves_generated_cases(self, data: st.DataObject, move: Move) -> None:
        sizes = st.one_of(st.integers(1, 80), st.sampled_from([16, 64, 128, 256, 512, 1152, 2048]))
        shifts = st.sampled_from([0, 0, 0, 1, 2, 4, 8, 16])
        tensors = data.draw(
            st.lists(st.builds(Tensor, sizes, shifts, shifts), min_size=1, max_size=4)
        )
        blocks_per_chunk = data.draw(st.integers(1, 4))
        direction = data.draw(st.sampled_from(["gather", "scatter"]))
        block_ids = data.draw(
            st.lists(st.integers(0, 6), max_size=7, unique=direction == "scatter")
        )
        first = data.draw(st.integers(0, 2 * blocks_per_chunk))
        num_chunks = -(-(first + len(block_ids)) // blocks_per_chunk) if block_ids else 0
        slot_ids = data.draw(
            st.one_of(
                st.none(),
                st.lists(
                    st.integers(0, 8),
                    min_size=num_chunks,
                    max_size=num_chunks,
                    unique=direction == "gather",
                ).map(tuple),
            )
        )
        check(
            Case(
                tuple(tensors),
                tuple(block_ids),
                blocks_per_chunk,
                first,
                slot_ids,
                num_slots=9,
                slot_gap=data.draw(shifts),
                slot_start=data.draw(shifts),
            ),
            direction,
            move,
        )

    def test_moves_views_of_one_storage_and_mixed_dtypes(self, move: Move) -> None:
        kv = noise(2 * 6 * 3 * 8 * 2, 1)[:-64].view(torch.bfloat16).view(6, 2, 3, 8)
        scales = torch.arange(6 * 5, dtype=torch.float32).view(6, 5)
        codes = noise(6 * 24, 2)[: 6 * 24].view(torch.float8_e4m3fn).view(6, 3, 8)
        cached = [kv[:, 0], kv[:, 1], scales, codes]
        before = [t.clone() for t in cached]
        table = PageTable(cached, blocks_per_chunk=2)
        slots = torch.full((3, table.slot_bytes + 3), 0xA5, dtype=torch.uint8)
        move("gather", table, [5, 1, 4], slots, [2, 0])
        assert bool((slots[:, table.slot_bytes :] == 0xA5).all())
        assert bool((slots[1] == 0xA5).all())
        for tensor in (kv, scales, codes):
            tensor.view(torch.uint8).fill_(0x5A)
        move("scatter", table, [0, 2, 3], slots, [2, 0])
        for tensor, old in zip(cached, before, strict=True):
            now, was = tensor.contiguous().view(torch.uint8), old.contiguous().view(torch.uint8)
            assert torch.equal(now[[0, 2, 3]], was[[5, 1, 4]])
            assert bool((now[[1, 4, 5]] == 0x5A).all())

    @pytest.mark.parametrize("direction", ["gather", "scatter"])
    def test_reaches_pages_more_than_2_gib_apart(self, direction: str, move: Move) -> None:
        stride = 2**31 + 48
        # Virtual memory: only the pages that are touched are ever backed.
        cache = torch.empty(2 * stride + 256, dtype=torch.uint8)
        pool = torch.empty(2 * stride + 256, dtype=torch.uint8)
        table = PageTable([cache.as_strided((3, 64), (stride, 1), 32)])
        slots = pool.as_strided((3, 64), (stride, 1), 32)
        near = [(memory, i) for memory in (cache, pool) for i in range(3)]
        for seed, (memory, i) in enumerate(near):
            memory[i * stride : i * stride + 128] = noise(64, seed)
        expected = [memory[i * stride : i * stride + 128].clone() for memory, i in near]
        move(direction, table, [2, 0], slots, [1, 2])
        for block, slot in ((2, 1), (0, 2)):
            source, target = (block, 3 + slot) if direction == "gather" else (3 + slot, block)
            expected[target][32:96] = expected[source][32:96]
        for (memory, i), wanted in zip(near, expected, strict=True):
            assert torch.equal(memory[i * stride : i * stride + 128], wanted)

    def test_moves_the_group_of_a_hybrid_model_in_full_and_in_packed_slots(
        self, move: Move
    ) -> None:
        caches = [noise(6 * size, size)[: 6 * size].view(6, size) for size in (64, 48, 32, 80)]
        whole = PageTable(caches, blocks_per_chunk=2)
        group = whole.group([(3, 72), (1, 48)])
        slots = torch.full((2, whole.slot_bytes), 0xA5, dtype=torch.uint8)
        move("gather", group, [4, 2, 5], slots, None, 1)
        expected = torch.full_like(slots, 0xA5)
        for place, block in enumerate((4, 2, 5), start=1):
            slot, position = divmod(place, 2)
            for t, num_bytes in ((3, 72), (1, 48)):
                begin = whole.offsets[t] + position * caches[t].shape[1]
                expected[slot, begin : begin + num_bytes] = caches[t][block, :num_bytes]
        assert torch.equal(slots, expected)

        packed = torch.full((2, group.packed().slot_bytes), 0xA5, dtype=torch.uint8)
        move("gather", group.packed(), [4, 2, 5], packed, None, 1)
        for run in group.byte_ranges:
            assert torch.equal(
                packed[:, run.packed_offset : run.packed_offset + run.num_bytes],
                slots[:, run.slot_offset : run.slot_offset + run.num_bytes],
            )

    @pytest.mark.parametrize("cut", [(64, 32), (24, 40), (7, 5)])
    @pytest.mark.parametrize("span", [1, 3])
    def test_moves_fragments_to_places_of_their_own_in_full_and_in_packed_slots(
        self, move: Move, span: int, cut: tuple[int, int]
    ) -> None:
        caches = [noise(6 * sum(cut), seed)[: 6 * sum(cut)].view(6, -1) for seed in (1, 2)]
        whole = PageTable(caches, blocks_per_chunk=span)
        room = 3 * sum(cut)
        # The second part of a page before the first, between what others have there.
        parts = [
            Fragment(t, begin, size, place)
            for t in range(2)
            for begin, size, place in ((0, cut[0], room - cut[0] - 1), (cut[0], cut[1], 3))
        ]
        table = fragment_table(whole, [room, room], parts)
        blocks, first = [4, 2, 5, 0], 1 % span
        num_slots = -(-(first + len(blocks)) // span)
        slots = torch.full((num_slots, table.slot_bytes), 0xA5, dtype=torch.uint8)
        expected = slots.clone()
        for place, block in enumerate(blocks, start=first):
            slot, position = divmod(place, span)
            for part in parts:
                begin = (part.tensor * span + position) * room + part.place
                page = caches[part.tensor][block]
                cut_out = page[part.page_offset : part.page_offset + part.num_bytes]
                expected[slot, begin : begin + part.num_bytes] = cut_out
        move("gather", table, blocks, slots, None, first)
        assert torch.equal(slots, expected)

        packed = table.packed()
        assert packed.slot_bytes == 2 * span * sum(cut)
        staging = torch.full((num_slots, packed.slot_bytes), 0xA5, dtype=torch.uint8)
        move("gather", packed, blocks, staging, None, first)
        for run in table.byte_ranges:
            assert torch.equal(
                staging[:, run.packed_offset : run.packed_offset + run.num_bytes],
                slots[:, run.slot_offset : run.slot_offset + run.num_bytes],
            )
        before = [cache.clone() for cache in caches]
        for cache in caches:
            cache.fill_(0x5A)
        targets = [1, 3, 0, 2]
        move("scatter", packed, targets, staging, None, first)
        for cache, old in zip(caches, before, strict=True):
            assert torch.equal(cache[targets], old[blocks])
            assert bool((cache[[4, 5]] == 0x5A).all())


class TestTheKernels:
    __test__ = not INTERPRETED

    def test_pass_the_same_cases_in_the_interpreter(self) -> None:
        command = [sys.executable, "-m", "pytest", "-qx", "-p", "no:cacheprovider", __file__]
        done = subprocess.run(
            command,
            env={**os.environ, "TRITON_INTERPRET": "1"},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr

    def test_refuse_host_tensors_and_name_the_reference(self) -> None:
        table = PageTable([torch.zeros(2, 16, dtype=torch.uint8)])
        slots = torch.zeros(1, 16, dtype=torch.uint8)
        with pytest.raises(ValueError, match=r"table: .*GPU.*kernels\.reference"):
            pages.gather_pages(table, [0], slots)
