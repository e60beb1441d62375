"""The host device's copies of pages equal the reference, wherever ids lie and words end."""

from __future__ import annotations

import gc
import random
import weakref

import numpy as np
import page_cases
import pytest
import torch
from page_cases import CASES

from triton_offload.device import host_pages, host_torch, native
from triton_offload.kernels import reference
from triton_offload.kernels.block_run import check_run
from triton_offload.kernels.sums import sum_pages
from triton_offload.kernels.table import ROW_BYTES, PageTable

POISON = 0xA5


def check(pages, blocks_per_chunk, blocks, slots, first, apart=0):
    """Both ways, from and to memory that is poisoned first; `apart`: bytes between two slots."""
    generator = torch.Generator().manual_seed(0)
    caches = [
        torch.randint(0, 256, (max(blocks) + 2, size), dtype=torch.uint8, generator=generator)
        for size in pages
    ]
    table = PageTable(caches, blocks_per_chunk)
    ids = torch.tensor(blocks), torch.tensor(slots)
    shape = (max(slots) + 2, table.slot_bytes + apart)
    ours, wanted = (torch.full(shape, POISON, dtype=torch.uint8) for _ in range(2))
    ours, wanted = (each[:, : table.slot_bytes] for each in (ours, wanted))
    host_pages.gather(table, ids[0], ours, ids[1], first)
    reference.gather_pages(table, ids[0], wanted, ids[1], first_block=first)
    assert torch.equal(ours, wanted)
    found = [cache.clone() for cache in caches]
    for cache in caches:
        cache.fill_(POISON)
    host_pages.scatter(table, ids[0], ours, ids[1], first)
    for cache, before in zip(caches, found, strict=True):
        expected = torch.full_like(cache, POISON)
        expected[blocks] = before[blocks]
        assert torch.equal(cache, expected)


def ids(count, consecutive, rng):
    first = rng.randrange(4)
    return [first + i for i in range(count)] if consecutive else rng.sample(range(2 * count), count)


@pytest.fixture(params=["C", "C, in parts", "numpy", "numpy, page by page", "torch"])
def by(request, monkeypatch):
    if request.param == "C, in parts":
        request.getfixturevalue("by_parts")
    else:
        request.getfixturevalue("with_c" if request.param == "C" else "without_c")
    if request.param == "torch":
        monkeypatch.setattr(host_torch, "_SMALL_BYTES", 0)
    elif request.param == "numpy, page by page":
        monkeypatch.setattr(host_torch, "_ONE_PAGE_BYTES", 1)


@pytest.fixture
def with_c():
    if native.load().failure:
        pytest.skip(native.load().failure)


@pytest.fixture
def by_parts(monkeypatch, with_c):
    """Some blocks per call, or one, by three threads, long pages in pieces."""
    monkeypatch.setattr(host_pages, "_CALL_BYTES", 150)
    monkeypatch.setattr(host_pages, "_THREAD_BYTES", 1)
    monkeypatch.setattr(host_pages, "_TAKE_BYTES", ROW_BYTES)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)


@pytest.fixture
def without_c(monkeypatch):
    monkeypatch.setattr(native, "load", lambda: native.Native(None, "switched off"))


@pytest.fixture
def by_torch(monkeypatch, without_c):
    monkeypatch.setattr(host_torch, "_SMALL_BYTES", 0)


@pytest.mark.parametrize("pages", [(16,), (8, 24), (4, 4), (2, 6), (1, 3), (48, 577, 16)])
@pytest.mark.parametrize("in_order", [(False, False), (True, False), (False, True), (True, True)])
def test_pages_equal_the_reference(pages, in_order, by):
    rng = random.Random(0)
    for span, first, count, apart in [(1, 0, 1, 0), (1, 0, 9, 8), (3, 2, 11, 4), (4, 1, 6, 2)]:
        chunks = -(-(first + count) // span)
        check(
            pages,
            span,
            ids(count, in_order[0], rng),
            ids(chunks, in_order[1], rng),
            first,
            apart,
        )


@pytest.mark.parametrize("more", [-1, 0, 1])
def test_rows_through_a_temporary_are_cut_nowhere_wrong(more, monkeypatch, by_torch):
    monkeypatch.setattr(host_torch, "_SLICE_BYTES", 4 * 64)
    rng = random.Random(0)
    for slices in (1, 2):
        count = 4 * slices + more
        check((64,), 1, ids(count, False, rng), ids(count, False, rng), 0)


def test_pages_wider_than_a_slice_go_one_at_a_time(monkeypatch, by_torch):
    monkeypatch.setattr(host_torch, "_SLICE_BYTES", 32)
    check((64,), 1, [5, 2, 0], [3, 0, 4], 0)


def test_rows_through_a_temporary_take_no_more_memory_than_a_slice(monkeypatch, by_torch):
    taken = []
    select = torch.Tensor.index_select

    def noted(self, *args):
        taken.append(found := select(self, *args))
        return found

    monkeypatch.setattr(torch.Tensor, "index_select", noted)
    monkeypatch.setattr(host_torch, "_SLICE_BYTES", 4 * 64)
    check((64,), 1, [9, 5, 2, 0, 7, 3], [3, 0, 4, 9, 1, 7], 0)
    assert max(each.numel() * each.element_size() for each in taken) == 4 * 64


def test_between_two_parts_of_many_bytes_it_can_be_ended(by_parts):
    table = PageTable([torch.ones(5, 100, dtype=torch.uint8)], 1)
    slots = torch.zeros(5, table.slot_bytes, dtype=torch.uint8)
    calls = iter(())

    def end_at_the_third():
        if next(calls, 1):
            raise KeyError("end")

    each = torch.arange(5)
    for move in (host_pages.gather, host_pages.scatter):
        calls = iter([None, None])
        with pytest.raises(KeyError, match="end"):
            move(table, each, slots, each, 0, end_at_the_third)
        found = slots if move is host_pages.gather else table.pages[0].view
        assert found[:, 0].tolist() == ([1, 1, 0, 0, 0] if found is slots else [2, 2, 1, 1, 1])
        slots.fill_(2)


@pytest.mark.parametrize(
    ("blocks", "slots", "first"),
    [
        ([6], [0], 0),
        ([-1], [0], 0),
        ([0], [4], 0),
        ([0], [-1], 0),
        ([0, 1, 2], [0], 0),
        ([0], [0], 2),
    ],
)
def test_ids_out_of_range_move_nothing(blocks, slots, first, with_c):
    """Whoever calls has checked them; in C they would be written to wherever they point."""
    table = PageTable([torch.ones(6, 8, dtype=torch.uint8)], 2)
    memory = torch.zeros(4, table.slot_bytes, dtype=torch.uint8)
    behind = torch.tensor([*slots, 1])  # one that nobody named
    ids = torch.tensor(blocks), memory, behind[:-1], first
    for move in (host_pages.gather, host_pages.scatter):
        with pytest.raises(IndexError, match="out of range"):
            move(table, *ids)
    assert not memory.any()
    assert bool((table.pages[0].view == 1).all())


@pytest.mark.parametrize("threads", [1, 2, 7, 1000])
@pytest.mark.parametrize("count", [1, 2, 40])
def test_any_number_of_threads_moves_each_page_once(threads, count, monkeypatch, by_parts):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(host_pages, "_CALL_BYTES", 1 << 20)
    rng = random.Random(0)
    check((3000, 1024, 5), 3, ids(count, False, rng), ids(-(-count // 3), False, rng), 0)


@pytest.mark.parametrize("direction", ["gather", "scatter"])
@pytest.mark.parametrize("name", CASES)
def test_pages_of_every_case_are_moved_and_added_up(name, direction, by):
    """The bytes that move, those between, and the sums, which are added to."""

    def move(direction, table, block_ids, slots, slot_ids=None, first_block=0, config=None):
        if not block_ids:  # a device is never given none
            return
        way = check_run(table, block_ids, len(slots), slot_ids, first_block, direction=direction)
        sums = torch.full((len(block_ids),), 7)
        run = way.block_ids, slots, way.slot_ids, way.first_block
        getattr(host_pages, direction)(table, *run, sums=sums)
        expected = np.full(len(block_ids), 7)
        for page in table.pages:
            expected += sum_pages(page.view[block_ids].numpy(), page.first_row)
        assert sums.tolist() == expected.tolist()

    page_cases.check(CASES[name], direction, move)


def test_between_two_tensors_of_many_bytes_it_can_be_ended(by_torch):
    table = PageTable([torch.ones(2, 8, dtype=torch.uint8) for _ in range(3)], 1)
    slots = torch.zeros(2, table.slot_bytes, dtype=torch.uint8)
    calls = iter(())

    def end_at_the_third():
        if next(calls, 1):
            raise KeyError("end")

    each = torch.tensor([0, 1])
    for move in (host_pages.gather, host_pages.scatter):
        calls = iter([None, None])
        with pytest.raises(KeyError, match="end"):
            move(table, each, slots, each, 0, end_at_the_third)
        assert int(slots.sum()) == (2 * 2 * 8 if move is host_pages.gather else slots.numel() * 2)
        slots.fill_(2)
    assert [page.view.unique().tolist() for page in table.pages] == [[2], [2], [1]]


def small_table(num_blocks=6, tensors=3):
    caches = [torch.full((num_blocks, 8), i, dtype=torch.uint8) for i in range(tensors)]
    return PageTable(caches, 1)


def test_each_memory_of_slots_has_places_of_its_own(by):
    table = small_table()
    ids = torch.tensor([1, 4])
    made = [
        torch.full((rows, table.slot_bytes + apart), POISON, dtype=torch.uint8)
        for rows, apart in [(2, 0), (4, 0), (2, 8), (2, 0), (2, 8)]
    ]
    for slots in [*made, *made]:
        slots.fill_(POISON)
        host_pages.gather(table, ids, slots[:, : table.slot_bytes], torch.tensor([0, 1]), 0)
        wanted = torch.full_like(slots, POISON)
        wanted[:2, : table.slot_bytes] = torch.tensor(
            [0, 1, 2], dtype=torch.uint8
        ).repeat_interleave(8)
        assert torch.equal(slots, wanted)


def test_slots_that_shrink_in_the_same_memory_are_seen_as_they_are_now(by):
    table = small_table()
    memory = torch.zeros(4, table.slot_bytes, dtype=torch.uint8)
    ids = torch.tensor([2])
    host_pages.gather(table, ids, memory, torch.tensor([3]), 0)
    with pytest.raises(IndexError, match=r"out of (bounds|range)"):
        host_pages.gather(table, torch.tensor([2, 1]), memory[:2], torch.tensor([3, 1]), 0)


def test_what_is_kept_of_slots_is_bounded_and_owns_no_memory(without_c):
    table = small_table()
    ids = torch.tensor([1])
    for rows in range(1, 3 * host_torch._MAX_PLACES):
        slots = torch.zeros(rows, table.slot_bytes, dtype=torch.uint8)
        gone = weakref.ref(slots.untyped_storage()), weakref.ref(slots)
        host_pages.scatter(table, ids, slots, torch.tensor([rows - 1]), 0)
        assert table.pages[2].view[1].tolist() == [0] * 8
        del slots
        gc.collect()
        assert gone[1]() is None
    assert len(host_torch._plans[table]._tensors) <= host_torch._MAX_PLACES


@pytest.mark.parametrize("kept", [host_pages._tensors, host_torch._plans], ids=["C", "torch"])
def test_what_is_kept_of_a_table_goes_with_it(kept, request):
    request.getfixturevalue("without_c" if kept is host_torch._plans else "with_c")
    before = len(kept)
    table = small_table()
    slots = torch.zeros(1, table.slot_bytes, dtype=torch.uint8)
    host_pages.gather(table, torch.tensor([1]), slots, torch.tensor([0]), 0)
    assert len(kept) == before + 1
    gone = weakref.ref(table.pages[0].view)
    del table
    gc.collect()
    assert gone() is None
    assert len(kept) == before


def test_numbers_whose_ends_fit_are_no_slice(by):
    check((8,), 1, [1, 3, 2, 4], [0, 1, 2, 3], 0)
    check((8,), 1, [0, 1, 2, 3], [2, 4, 3, 5], 0)


def test_pages_that_are_inference_tensors_are_written(by):
    with torch.inference_mode():
        cache = torch.zeros(4, 8, dtype=torch.uint8)
    table = PageTable([cache], 1)
    slots = torch.full((4, 8), 7, dtype=torch.uint8)
    # One at a time and in no order, all ways that pages are written.
    for blocks in ([1], [3, 0]):
        host_pages.scatter(
            table, torch.tensor(blocks), slots, torch.tensor([2, 0][: len(blocks)]), 0
        )
    assert cache[:, 0].tolist() == [7, 7, 0, 7]
    host_pages.scatter(table, torch.tensor([2, 1]), slots, torch.tensor([0, 1]), 0)
    assert cache[:, 0].tolist() == [7, 7, 7, 7]
