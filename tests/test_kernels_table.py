"""PageTable describes the slot format, and refuses what would corrupt memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from triton_offload.kernels.block_run import check_ids, check_run
from triton_offload.kernels.reference import gather_pages, scatter_pages
from triton_offload.kernels.table import ByteRange, PageTable
from triton_offload.kernels.tiling import KernelConfig


def table_of(*page_bytes: int, num_blocks: int = 8, blocks_per_chunk: int = 2) -> PageTable:
    tensors = [torch.zeros(num_blocks, size, dtype=torch.uint8) for size in page_bytes]
    return PageTable(tensors, blocks_per_chunk)


def test_slots_hold_tensor_by_tensor_the_blocks_of_a_chunk_in_order() -> None:
    table = table_of(10, 6, 4, blocks_per_chunk=3)
    assert table.offsets == (0, 30, 48)
    assert table.slot_bytes == 60
    assert table.bytes_per_block == 20
    assert [row.pitch for row in table.pages] == [10, 6, 4]
    assert table.byte_ranges == (ByteRange(0, 0, 60),)


def test_number_of_blocks_is_the_smallest() -> None:
    assert PageTable([torch.zeros(9, 2), torch.zeros(7, 2)]).num_blocks == 7


def test_pages_are_views_of_the_callers_memory() -> None:
    cache = torch.zeros(4, 3, 5, dtype=torch.bfloat16)[:, 1]
    (row,) = PageTable([cache]).pages
    assert (row.page_bytes, row.block_stride) == (10, 30)
    assert row.view.data_ptr() == cache.data_ptr()
    row.view[2].fill_(1)
    assert bool((cache[2] != 0).all())
    assert bool((cache[1] == 0).all())


def test_one_block_has_no_stride() -> None:
    for stride in (0, 3, 1000):
        (row,) = PageTable([torch.zeros(2000).as_strided((1, 5), (stride, 1))]).pages
        assert (row.block_stride, row.page_bytes) == (20, 20)


def test_blocks_may_touch_and_not_overlap() -> None:
    memory = torch.zeros(100, dtype=torch.uint8)
    (row,) = PageTable([memory.as_strided((3, 5), (5, 1))]).pages
    assert row.block_stride == 5
    with pytest.raises(ValueError, match=r"block stride of at least a page \(5 bytes\), got 4"):
        PageTable([memory.as_strided((3, 5), (4, 1))])


def test_rows_of_slots_may_touch_and_not_overlap() -> None:
    memory, table = torch.zeros(100, dtype=torch.uint8), table_of(4)
    gather_pages(table, [0, 1, 2], memory.as_strided((3, 8), (8, 1)))
    gather_pages(table, [0, 1], memory.as_strided((1, 8), (1, 1)))  # one row has no stride
    with pytest.raises(ValueError, match=r"slots: .*overlap, got strides"):
        gather_pages(table, [0], memory.as_strided((3, 8), (7, 1)))


def test_a_group_keeps_the_slot_format_of_the_whole() -> None:
    group = table_of(10, 6, 4).group([(2, 4), (0, 8), (0, 3)])
    assert group.offsets == (32, 0, 0)
    assert [row.page_bytes for row in group.pages] == [4, 8, 3]
    assert [row.pitch for row in group.pages] == [4, 10, 10]
    assert group.slot_bytes == 40
    assert group.byte_ranges == (ByteRange(0, 0, 20), ByteRange(32, 20, 8))
    assert group.packed().offsets == (20, 0, 0)
    assert group.packed().slot_bytes == 28
    assert group.packed().byte_ranges == (ByteRange(0, 0, 28),)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PageTable([]), "tensors: expected at least one"),
        (
            lambda: table_of(4, blocks_per_chunk=0),
            "blocks_per_chunk: .*at least 1, got 0",
        ),
        (lambda: PageTable([torch.zeros(3, 4, 5).transpose(1, 2)]), r"tensors\[0\]: .*contiguous"),
        (lambda: PageTable([torch.zeros(1, 5).expand(3, 5)]), r"tensors\[0\]: .*block stride"),
        (lambda: PageTable([torch.zeros(0, 5)]), r"tensors\[0\]: .*no empty dim"),
        (
            lambda: PageTable([torch.zeros(2, 5), torch.zeros(2, 5, device="meta")]),
            r"tensors\[1\]: expected a tensor on cpu",
        ),
        (lambda: table_of(4).group([]), "refs: expected at least one"),
        (lambda: table_of(4).group([(1, 4)]), r"refs\[0\]: .*got 1"),
        (lambda: table_of(4).group([(0, 5)]), r"refs\[0\]: .*got 5"),
        (lambda: KernelConfig(3, 1024, 1), "warps: expected a power of two"),
    ],
)
def test_refuses_a_wrong_table(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("block_ids", "slot_ids", "first", "direction", "message"),
    [
        ([8], None, 0, "gather", r"block_ids: expected ids in \[0, 8\), got 8"),
        ([0, -1], None, 0, "gather", r"block_ids: .*got -1 at index 1"),
        ([3, 1, 3], None, 0, "scatter", "block_ids: .*once, got 3 2 times"),
        ([0, 1, 2], [5, 5], 0, "gather", "slot_ids: .*once, got 5 2 times"),
        ([0, 1, 2], [0, 6], 0, "gather", r"slot_ids: expected ids in \[0, 6\), got 6"),
        ([0, 1, 2], [0], 0, "gather", "slot_ids: expected 2 ids .*got 1"),
        ([0, 1], [0], 1, "gather", "slot_ids: expected 2 ids .*got 1"),
        ([0], None, -1, "gather", "first_block: expected .* at least 0, got -1"),
        (list(range(8)) + list(range(5)), None, 0, "gather", "slots: expected at least 7"),
    ],
)
def test_refuses_a_wrong_run(
    block_ids: list[int], slot_ids: list[int] | None, first: int, direction: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        check_run(table_of(4), block_ids, 6, slot_ids, first, direction=direction)


def test_finds_duplicates_that_lie_far_apart() -> None:
    table = PageTable([torch.zeros(1_000_000, 1, dtype=torch.uint8)])
    with pytest.raises(ValueError, match="got 999999 2 times"):
        check_run(table, [999_999, 0, 999_999], 3, direction="scatter")


@pytest.mark.parametrize("start", [0, 1, 5000, 2**40])
def test_a_destination_named_twice_is_found_wherever_ids_lie(start: int) -> None:
    for ids in ([0, 1], [1, 0, 2, 5], [0, 200], [3, 0, 6, 900], [0, 64 * 3, 7]):
        apart = np.array(ids) + start
        check_ids("ids", apart, start + 1000, distinct=True)
        for first in range(len(ids)):
            with pytest.raises(ValueError, match=f"ids: .*once, got {apart[first]} 2 times"):
                check_ids("ids", np.append(apart, apart[first]), start + 1000, distinct=True)
        check_ids("ids", np.append(apart, apart[0]), start + 1000, distinct=False)


def test_sources_may_repeat() -> None:
    check_run(table_of(4), [3, 3, 3], 6, direction="gather")
    check_run(table_of(4), [1, 2, 3], 6, [5, 5], direction="scatter")


@pytest.mark.parametrize(
    "ids", [[2, 0], np.array([2, 0], np.uint16), torch.tensor([2, 0], dtype=torch.int32)]
)
def test_takes_ids_as_lists_arrays_and_tensors(ids: Any) -> None:
    run = check_run(table_of(4), ids, 6, direction="gather")
    assert torch.equal(run.block_ids, torch.tensor([2, 0]))
    assert torch.equal(run.slot_ids, torch.tensor([0]))


@pytest.mark.parametrize("ids", [[0.5], np.zeros((1, 1), np.int64), torch.tensor([True])])
def test_refuses_ids_that_are_not_integers(ids: Any) -> None:
    with pytest.raises(ValueError, match=r"block_ids: expected a one-dim.* of integers"):
        check_run(table_of(4), ids, 6, direction="gather")


@pytest.mark.parametrize("move", [gather_pages, scatter_pages])
@pytest.mark.parametrize(
    ("slots", "message"),
    [
        (torch.zeros(2, 8), "slots: expected uint8"),
        (torch.zeros(2, 7, dtype=torch.uint8), "slots: expected rows of at least 8 bytes, got 7"),
        (torch.zeros(8, 2, dtype=torch.uint8).t(), "slots: expected contiguous"),
        (torch.zeros(1, 8, dtype=torch.uint8).expand(2, 8), "slots: .*overlap"),
        (torch.zeros(2, 8, dtype=torch.uint8, device="meta"), "slots: expected a tensor on cpu"),
    ],
)
def test_refuses_wrong_slots(move: Any, slots: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        move(table_of(4), [0], slots)


@pytest.mark.parametrize("count", [1, 2, 32, 33, 200])
def test_few_ids_are_held_to_what_many_are(count: int) -> None:
    limit = 300
    for distinct in (False, True):
        check_ids("ids", np.arange(limit - count, limit), limit, distinct=distinct)
        check_ids("ids", np.arange(count), limit, distinct=distinct)
        for wrong in (-1, limit, -(1 << 40), 1 << 40):
            for place in (0, count - 1):
                ids = np.arange(count)
                ids[place] = wrong
                with pytest.raises(
                    ValueError, match=rf"ids: expected ids in .0, 300., got {wrong} at"
                ):
                    check_ids("ids", ids, limit, distinct=distinct)
    if count > 1:
        ids = np.arange(count)
        ids[-1] = 0
        check_ids("ids", ids, limit, distinct=False)
        with pytest.raises(ValueError, match="ids: expected each destination once, got 0 2 times"):
            check_ids("ids", ids, limit, distinct=True)
