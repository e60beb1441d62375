"""What a layout is made of is checked, and its caller's again; jobs are cut into runs."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from triton_offload import KVOffloader
from triton_offload.kernels.reference import gather_pages, scatter_pages
from triton_offload.kernels.table import PageTable
from triton_offload.specs import CPULoadStoreSpec, Direction, GPULoadStoreSpec
from triton_offload.transfer.layout import CacheLayout

STORE, LOAD = Direction.STORE, Direction.LOAD


def caches(*page_bytes: int, num_blocks: int = 8) -> list[torch.Tensor]:
    return [torch.zeros(num_blocks, size, dtype=torch.uint8) for size in page_bytes]


BY_NAME = dict(zip("abc", caches(8, 4, 2), strict=True))


@pytest.mark.parametrize("make", [CacheLayout, CacheLayout.named])
@pytest.mark.parametrize(
    ("kv_caches", "message"),
    [
        (None, "^kv_caches: expected a list or dict of tensors, got NoneType"),
        (5, "^kv_caches: expected a list or dict of tensors, got int"),
        (torch.zeros(2, 3), "^kv_caches: expected a list or dict of tensors, got one tensor"),
        ([], "^kv_caches: expected at least one tensor, got none"),
        ({}, "^kv_caches: expected at least one tensor, got none"),
        ([torch.zeros(3), None], r"^kv_caches\[1\]: expected a torch\.Tensor, got NoneType"),
        ([np.zeros((2, 3))], r"^kv_caches\[0\]: expected a torch\.Tensor, got ndarray"),
        (np.zeros((2, 3)), r"^kv_caches\[0\]: expected a torch\.Tensor, got ndarray"),
        ("ab", r"^kv_caches\[0\]: expected a torch\.Tensor, got str"),
        ({"k": [torch.zeros(3)]}, r"^kv_caches\['k'\]: expected a torch\.Tensor, got list"),
        ([torch.zeros(3, device="meta")], r"^kv_caches\[0\]: .* cpu or cuda, got one on meta"),
        (
            {"k": torch.zeros(3), "v": torch.zeros(3, device="meta")},
            r"^kv_caches\['v'\]: expected a tensor on cpu or cuda, got one on meta",
        ),
        (
            [torch.zeros(3, 3).to_sparse()],
            r"^kv_caches\[0\]: expected a strided tensor, got torch\.sparse_coo",
        ),
        ([torch.tensor(1.0)], r"^kv_caches\[0\]: expected \[num_blocks, \.\.\.\]"),
        ({"k": torch.zeros(0, 3)}, r"^kv_caches\['k'\]: .*no empty dim, got \[0, 3\]"),
        ({"k": torch.zeros(3, 4, 5).transpose(1, 2)}, r"^kv_caches\['k'\]: .*contiguous dims"),
        ({"k": torch.zeros(1, 4).expand(3, 4)}, r"^kv_caches\['k'\]: .*block stride"),
    ],
)
def test_wrong_caches_are_refused_by_name(make, kv_caches, message):
    with pytest.raises(ValueError, match=message):
        make(kv_caches)


def test_caches_on_two_devices_are_refused_by_name(monkeypatch):
    class OnGPU(torch.Tensor):
        device = torch.device("cuda", 0)

    away = torch.zeros(3, 4).as_subclass(OnGPU)
    with pytest.raises(
        ValueError, match=r"^kv_caches\[1\]: expected a tensor on cpu, as kv_caches"
    ):
        CacheLayout([torch.zeros(3, 4), away])


def test_a_table_alone_names_its_own_argument():
    with pytest.raises(ValueError, match=r"^tensors\[0\]: .* got one on meta"):
        PageTable([torch.zeros(3, device="meta")])
    with pytest.raises(ValueError, match=r"^tensors: expected at least one"):
        PageTable({})


@pytest.mark.parametrize("make", [PageTable, CacheLayout, CacheLayout.named, KVOffloader])
@pytest.mark.parametrize("value", [True, np.True_, 2.0, None, "2", 0, -1, np.int64(0)], ids=repr)
def test_blocks_per_chunk_is_a_positive_integer(make, value):
    sizes = ("1MiB",) if make is KVOffloader else ()
    with pytest.raises(ValueError, match=r"^blocks_per_chunk: expected a"):
        make(caches(8), *sizes, blocks_per_chunk=value)


@pytest.mark.parametrize("value", [64, np.int64(64), np.uint8(64), torch.tensor(64)], ids=repr)
def test_blocks_per_chunk_may_be_an_integer_of_numpy(value):
    for made in (PageTable(caches(8), value), CacheLayout.named(caches(8), value)):
        assert (type(made.blocks_per_chunk), made.blocks_per_chunk) == (int, 64)
        assert (type(made.slot_bytes), made.slot_bytes) == (int, 512)


@pytest.mark.parametrize(
    ("kv_caches", "groups", "message"),
    [
        (BY_NAME, [], "^groups: expected at least one group, got none"),
        (BY_NAME, 5, "^groups: expected a list, got 5"),
        (BY_NAME, "abc", "^groups: expected a list, got 'abc'"),
        (BY_NAME, {"a": 1}, "^groups: expected a list, got {'a': 1}"),
        (BY_NAME, ["a"], r"^groups\[0\]: expected a list, got 'a'"),
        (BY_NAME, [["a"], None], r"^groups\[1\]: expected a list, got None"),
        (BY_NAME, [["a"], []], r"^groups\[1\]: expected at least one tensor, got none"),
        (BY_NAME, [["a"], ["b", "d"]], r"^groups\[1\]: expected members of \['a', 'b', 'c'\]"),
        (BY_NAME, [["b", "a", "b"]], r"^groups\[0\]: expected each tensor once, got \[1, 0, 1\]"),
        (BY_NAME, [[0]], r"^groups\[0\]: expected members of .*, got 0"),
        (BY_NAME, [[["a"]]], r"^groups\[0\]: expected members of .*, got \['a'\]"),
        (caches(8, 4), [[0, 2]], r"^groups\[0\]: expected members of \[0, 1\], got 2"),
        (caches(8, 4), [[-1]], r"^groups\[0\]: expected members of \[0, 1\], got -1"),
        (caches(8, 4), [[True]], r"^groups\[0\]: expected members of \[0, 1\], got True"),
        (caches(8, 4), [[1.0]], r"^groups\[0\]: expected members of \[0, 1\], got 1\.0"),
        (caches(8, 4), [["0"]], r"^groups\[0\]: expected members of \[0, 1\], got '0'"),
        (caches(8, 4), [[None]], r"^groups\[0\]: expected members of \[0, 1\], got None"),
    ],
)
def test_wrong_groups_are_refused_by_name(kv_caches, groups, message):
    with pytest.raises(ValueError, match=message):
        CacheLayout.named(kv_caches, 2, groups)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([], "^groups: expected at least one group"),
        ([[(0, 8)], []], r"^groups\[1\]: expected at least one tensor"),
        ([[(0, 8)], [(2, 4)]], r"^groups\[1\]\[0\]: expected a tensor index in \[0, 2\), got 2"),
        ([[(0, 8), (1, 5)]], r"^groups\[0\]\[1\]: expected page bytes in \[1, 4\] for tensor 1"),
        ([[(0, 0)]], r"^groups\[0\]\[0\]: expected page bytes in \[1, 8\] for tensor 0, got 0"),
        ([[(-1, 8)]], r"^groups\[0\]\[0\]: expected .* at least 0, got -1"),
        ([[(0, 8.0)]], r"^groups\[0\]\[0\]: expected an integer .*got 8\.0"),
        ([[(True, 4)]], r"^groups\[0\]\[0\]: expected an integer .*got True"),
        ([[0]], r"^groups\[0\]\[0\]: expected \(tensor index, page bytes\), got 0"),
        ([[(0, 4, 2)]], r"^groups\[0\]\[0\]: expected \(tensor index, page bytes\), got \(0, 4, 2"),
        ([[(0, 4), (0, 8)]], r"^groups\[0\]: expected each tensor once, got \[0, 0\]"),
    ],
)
def test_wrong_pages_of_groups_are_refused_by_name(groups, message):
    with pytest.raises(ValueError, match=message):
        CacheLayout(caches(8, 4), 2, groups)


def test_members_of_groups_may_be_integers_of_numpy():
    layout = CacheLayout.named(caches(8, 4), 2, [np.array([1]), (np.int64(0), 1)])
    assert [group.table.bytes_per_block for group in layout.groups] == [4, 12]
    (group,) = CacheLayout(caches(8, 4), 2, [[(np.int64(1), np.int32(3))]]).groups
    assert group.table.bytes_per_block == 3


def test_groups_by_name_have_whole_pages():
    layout = CacheLayout.named(BY_NAME, 2, [["c", "a"], ["b"]])
    assert [[row.page_bytes for row in group.table.pages] for group in layout.groups] == [
        [2, 8],
        [4],
    ]
    # Each in slots of its own size, with nothing of the other's tensors.
    assert [group.table.offsets for group in layout.groups] == [(16, 0), (0,)]
    assert [(group.size, group.fills_slot) for group in layout.groups] == [(0, True), (1, True)]
    assert layout.slot_sizes == [20, 8]
    assert not layout.leaves_stale.any()


def test_only_a_shorter_page_leaves_bytes_of_a_longer_one():
    layout = CacheLayout(caches(8, 4), 1, [[(0, 8)], [(0, 6)], [(0, 8), (1, 4)]])
    assert layout.leaves_stale.tolist() == [
        [False, False, True],
        [True, False, True],
        [False, False, False],
    ]


def test_lists_that_a_layout_was_made_of_are_the_callers_again():
    tensors, groups = caches(8, 4), [[(0, 8)], [(1, 4)]]
    layout = CacheLayout(tensors, 2, groups)
    first = tensors[0].data_ptr()
    tensors[0] = tensors[1]
    groups[0][0] = (1, 2)
    del groups[1], tensors[1]
    assert layout.groups[0].table.pages[0].view.data_ptr() == first
    assert [group.table.bytes_per_block for group in layout.groups] == [8, 4]


def test_columns_say_where_every_page_lies():
    memory = torch.zeros(8, 40, dtype=torch.uint8)
    layout = CacheLayout([memory[:, :12], memory[:, 16:32]], 3, [[(1, 10), (0, 12)]])
    (group,) = layout.groups
    start = memory.data_ptr()
    assert group.columns.T.tolist() == [[start + 16, 40, 10, 36, 16], [start, 40, 12, 0, 12]]
    assert group.has_gaps  # of 16 bytes for a page 10 are the group's
    assert not CacheLayout(caches(8, 4), 3).groups[0].has_gaps


@pytest.mark.parametrize("make", [CacheLayout, CacheLayout.named])
def test_a_layout_made_in_inference_mode_is_written_to_outside_of_it(make):
    with torch.inference_mode():
        tensors = caches(8, 4)
        groups = [[(1, 3)], [(0, 8), (1, 4)]] if make is CacheLayout else None
        layout = make(tensors, 2, groups)
    for group in layout.groups:
        for table in (group.table, group.packed):
            for page in table.pages:
                assert not page.view.is_inference()
                page.view[1].fill_(7)
    assert tensors[0][1].tolist() == [7] * 8
    slots = torch.ones(1, layout.slot_bytes, dtype=torch.uint8)
    scatter_pages(layout.groups[-1].table, [5], slots)
    assert tensors[0][5].tolist() == [1] * 8


@pytest.fixture
def default_device_meta():
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


def test_the_default_device_plays_no_part(default_device_meta):
    cache = torch.arange(32, dtype=torch.uint8, device="cpu").view(8, 4)
    layout = CacheLayout.named([cache], 2)
    assert layout.device == torch.device("cpu")
    slots = torch.zeros(2, layout.slot_bytes, dtype=torch.uint8, device="cpu")
    for move in (gather_pages, scatter_pages):
        move(layout.groups[0].packed, [3, 1, 2], slots)
    assert slots.view(4, 4)[:3].tolist() == cache[torch.tensor([3, 1, 2], device="cpu")].tolist()


def test_keys_and_values_in_one_tensor_are_two():
    """As FlashAttention has them: [2, num_blocks, block, heads, dim]."""
    layers = [torch.randn(2, 6, 4, 2, 8).to(torch.bfloat16) for _ in range(3)]
    before = [layer.clone() for layer in layers]
    halves = [half for layer in layers for half in layer]
    with KVOffloader(halves, "1MiB", blocks_per_chunk=2) as offloader:
        offloader.store([b"1", b"2"], [4, 1, 5]).wait(60)
        for layer in layers:
            layer.fill_(0)
        offloader.load([b"1", b"2"], [2, 0, 3]).wait(60)
    for layer, was in zip(layers, before, strict=True):
        assert torch.equal(layer[:, [2, 0, 3]], was[:, [4, 1, 5]])
        assert not layer[:, [1, 4, 5]].any()


def two_groups(blocks_per_chunk: int = 4) -> CacheLayout:
    return CacheLayout(caches(8, 4, num_blocks=16), blocks_per_chunk, [[(0, 8)], [(0, 3), (1, 4)]])


def test_a_job_is_planned_as_one_run_a_group():
    spec = GPULoadStoreSpec([9, 3, 1, 7, 2, 8], [5, 1], [6, 3])
    first, second = two_groups().plan(
        STORE, spec, CPULoadStoreSpec([5, 0, 4], [True, True, False]), 6
    )
    assert (first.block_ids.tolist(), first.slot_ids.tolist(), first.first) == (
        [9, 3, 1, 7, 2],
        [5, 0],
        2,
    )
    assert (second.block_ids.tolist(), second.slot_ids.tolist(), second.first) == ([8], [4], 3)
    assert (first.fresh.tolist(), second.fresh.tolist()) == ([True, True], [False])
    assert (first.num_bytes, second.num_bytes) == (40, 7)
    assert (first.group.index, second.group.index) == (0, 1)
    assert [first.blocks_of_chunk(0), first.blocks_of_chunk(1)] == [(2, 4), (0, 3)]
    assert (first.partial_chunks(), second.partial_chunks()) == ([0, 1], [0])


def test_a_group_without_blocks_has_no_run():
    spec = GPULoadStoreSpec([9, 3], [0, 2], [7, 0])
    (run,) = two_groups().plan(LOAD, spec, CPULoadStoreSpec([1]), 2)
    assert (run.group.index, run.first, run.fresh) == (1, 0, None)
    assert two_groups().plan(LOAD, GPULoadStoreSpec([], [0, 0]), CPULoadStoreSpec([]), 2) == []


@pytest.mark.parametrize(
    ("direction", "blocks", "slots", "message"),
    [
        (STORE, ([16], [1, 0]), [0], r"block_ids: expected ids in \[0, 16\), got 16"),
        (STORE, ([1, -2], [1, 1]), [0, 1], r"block_ids: .*got -2"),
        (STORE, ([1], [1, 0]), [4], r"slot_ids: expected ids in \[0, 4\), got 4"),
        (STORE, ([1, 2], [1, 1]), [3, 3], "slot_ids: .*once, got 3 2 times"),
        (STORE, ([1] * 5, [5, 0]), [0], "slot_ids: expected 2 slots .*4 blocks per chunk, got 1"),
        (STORE, ([1] * 4, [4, 0], [1, 0]), [0], "slot_ids: expected 2 slots .*got 1"),
        (STORE, ([1] * 4, [4, 0]), [0, 1], "slot_ids: expected 1 slots .*got 2"),
        (STORE, ([1, 1], [1, 1]), [0], "slot_ids: expected 2 slots .*got 1"),
        (STORE, ([1], [1]), [0], "group_sizes: expected one size for each of 2 groups, got 1"),
        (LOAD, ([3, 3], [2, 0]), [0], "block_ids: .*once, got 3 2 times"),
        (LOAD, ([3, 5, 3], [2, 1]), [0, 1], "block_ids: .*block 3 in groups 0 and 1"),
    ],
)
def test_a_job_that_cannot_be_is_refused(direction, blocks, slots, message):
    with pytest.raises(ValueError, match=message):
        two_groups().plan(direction, GPULoadStoreSpec(*blocks), CPULoadStoreSpec(slots), 4)


def test_block_ids_are_those_of_their_own_group():
    tensors = [torch.zeros(n, 4, dtype=torch.uint8) for n in (4, 9)]
    layout = CacheLayout(tensors, 1, [[(0, 4)], [(1, 4)], [(0, 4), (1, 4)]])
    layout.plan(STORE, GPULoadStoreSpec([3, 8, 3], [1, 1, 1]), CPULoadStoreSpec(range(3)), 4)
    for blocks, most in (([4, 8, 3], 4), ([3, 9, 3], 9), ([3, 8, 4], 4)):
        with pytest.raises(ValueError, match=rf"block_ids: expected ids in \[0, {most}\)"):
            layout.plan(STORE, GPULoadStoreSpec(blocks, [1, 1, 1]), CPULoadStoreSpec(range(3)), 4)


def test_what_is_only_read_may_repeat():
    layout = two_groups()
    assert (
        len(layout.plan(STORE, GPULoadStoreSpec([3, 3], [1, 1]), CPULoadStoreSpec([0, 1]), 4)) == 2
    )
    assert (
        len(layout.plan(LOAD, GPULoadStoreSpec([3, 2], [1, 1]), CPULoadStoreSpec([1, 1]), 4)) == 2
    )
    apart = CacheLayout(caches(8, 4), 1, [[(0, 8)], [(1, 4)]])
    assert len(apart.plan(LOAD, GPULoadStoreSpec([3, 3], [1, 1]), CPULoadStoreSpec([0, 1]), 4)) == 2


@pytest.mark.parametrize("num_blocks", range(1, 14))
@pytest.mark.parametrize("first", range(4))
def test_parts_of_a_run_are_the_run(num_blocks, first):
    layout = CacheLayout(caches(8, num_blocks=16), 4)
    chunks = -(-(first + num_blocks) // 4)
    fresh = [i % 2 == 0 for i in range(chunks)]
    spec = GPULoadStoreSpec(range(num_blocks), None, [first])
    (run,) = layout.plan(STORE, spec, CPULoadStoreSpec(range(10, 10 + chunks), fresh), 20)
    wanted = [(i, 10 + (first + i) // 4, (first + i) % 4) for i in range(num_blocks)]
    for most, ends in itertools.product(range(1, chunks + 2), ((0, 0), (1, 0), (0, 1))):
        parts = list(run.split(most, *ends))
        assert all(1 <= len(part.slot_ids) <= most for part in parts)
        if ends == (0, 0):
            assert [len(part.slot_ids) for part in parts[:-1]] == [most] * (len(parts) - 1)
        found = [
            (int(block), int(part.slot_ids[(part.first + i) // 4]), (part.first + i) % 4)
            for part in parts
            for i, block in enumerate(part.block_ids)
        ]
        assert found == wanted
        assert [bool(flag) for part in parts for flag in part.fresh] == fresh
        for part in parts:
            live = [part.blocks_of_chunk(chunk) for chunk in range(len(part.slot_ids))]
            assert sum(end - begin for begin, end in live) == len(part.block_ids)
            assert live[0][0] == part.first
            incomplete = [chunk for chunk, span in enumerate(live) if span != (0, 4)]
            assert part.partial_chunks() == incomplete
