"""How a launch is cut up, and what it is given: without a device, for launches are only noted."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_code import KERNELS, TARGETS

from triton_offload.kernels import compiling, movers, pages
from triton_offload.kernels.block_run import check_run
from triton_offload.kernels.table import PageTable
from triton_offload.kernels.tiling import (
    KernelConfig,
    choose_config,
    cut_into_strips,
    kernel_specs,
)

CONFIG = KernelConfig(warps=4, tile_bytes=4096, programs=6)


def table_of(*page_bytes: int, num_blocks: int = 16, blocks_per_chunk: int = 2) -> PageTable:
    tensors = [torch.zeros(num_blocks, size, dtype=torch.uint8) for size in page_bytes]
    return PageTable(tensors, blocks_per_chunk)


def slots_of(table: PageTable, count: int = 4, start: int = 0, gap: int = 0) -> torch.Tensor:
    memory = torch.zeros(count * (table.slot_bytes + gap) + start + 16, dtype=torch.uint8)
    begin = -memory.data_ptr() % 16 + start
    return memory.as_strided((count, table.slot_bytes), (table.slot_bytes + gap, 1), begin)


def read_ids(address: int, count: int) -> list[int]:
    return list((ctypes.c_int64 * count).from_address(address))


class Launches(list[Any]):
    """What was launched: kernel, spec, programs, arguments by name; `meanwhile` runs first, as the
    host may do much until a kernel runs."""

    meanwhile: Any = staticmethod(lambda: None)

    def launch(
        self, kernel: Any, spec: Any, device: torch.device, programs: int, arguments: Any
    ) -> None:
        named = dict(zip(compiling.ARGUMENT_TYPES, arguments, strict=True))
        self.meanwhile()
        ids = SimpleNamespace(
            blocks=read_ids(named["block_ids"], named["num_blocks"]),
            slots=read_ids(
                named["slot_ids"],
                -(-(named["first_block"] + named["num_blocks"]) // named["blocks_per_chunk"]),
            ),
        )
        self.append(SimpleNamespace(kernel=kernel, spec=spec, programs=programs, ids=ids, **named))


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    noted = Launches()
    monkeypatch.setattr(compiling, "launch", noted.launch)
    # Tables in host memory stand for tables on a GPU.
    monkeypatch.setattr(pages, "_check_table", lambda table: None)
    monkeypatch.setattr(compiling, "backend_of", lambda *_: "cuda")
    return noted


# -- alignment --


def test_slots_of_another_alignment_have_a_plan_of_their_own(launches: Launches) -> None:
    table = table_of(64)
    shapes = [(0, 0), (1, 0), (0, 0), (2, 4), (4, 0), (8, 0), (0, 2), (0, 1), (0, 0)]
    for start, gap in shapes:
        pages.gather_pages(table, [1, 2], slots_of(table, 4, start, gap), config=CONFIG)
        pages.scatter_pages(table, [1, 2], slots_of(table, 4, start, gap), config=CONFIG)
    widths = [call.spec.word_bytes for call in launches]
    assert widths == [width for width in (16, 1, 16, 2, 4, 8, 2, 1, 16) for _ in range(2)]
    # Made once each: the addresses on the device are the same.
    assert len({call.strips for call in launches}) == len(set(widths))


def test_the_stride_of_a_single_slot_makes_no_access_narrower(launches: Launches) -> None:
    table = table_of(64)
    pages.gather_pages(table, [1, 2], slots_of(table, 1, 0, 1), config=CONFIG)
    pages.gather_pages(table, [1, 2], slots_of(table, 2, 0, 1), config=CONFIG)
    one, two = launches
    assert (one.spec.word_bytes, one.stride_slot) == (16, 0)
    assert (two.spec.word_bytes, two.stride_slot) == (1, 129)


@pytest.mark.parametrize("slots_alignment", [16, 8, 4, 2, 1])
@pytest.mark.parametrize("page_bytes", [64, 24, 12, 6, 5])
def test_words_are_as_wide_as_pages_and_slots_allow(page_bytes: int, slots_alignment: int) -> None:
    table = table_of(page_bytes)
    (spec,) = kernel_specs(table, slots_alignment, CONFIG)
    assert spec.word_bytes == min(page_bytes & -page_bytes, 16, slots_alignment)


def test_every_address_of_a_page_counts_for_its_alignment() -> None:
    memory = torch.zeros(16 * 80 + 16, dtype=torch.uint8)
    begin = -memory.data_ptr() % 16

    def alignment(start: int, stride: int, page: int, pitch: int = 64, offset: int = 0) -> int:
        view = memory.as_strided((8, page), (stride, 1), begin + start)
        (row,) = PageTable([view]).pages
        object.__setattr__(row, "pitch", pitch)
        object.__setattr__(row, "offset", offset)
        return row.alignment

    assert alignment(0, 64, 64) == 16
    assert alignment(2, 64, 64) == 2
    assert alignment(0, 68, 64) == 4
    assert alignment(0, 64, 24) == 8
    assert alignment(0, 64, 64, 65) == 1
    assert alignment(0, 64, 64, 64, 8) == 8


def test_each_alignment_has_a_launch_of_its_own(launches: Launches) -> None:
    table = table_of(64, 24, 32, 7)
    pages.gather_pages(table, [1, 2, 3], slots_of(table), config=CONFIG)
    # Only the first lies at a multiple of 16 in the slot of 2 * (64 + 24 + 32 + 7) = 254 bytes.
    assert [call.spec.word_bytes for call in launches] == [2, 1]
    launches.clear()
    pages.gather_pages(table, [1, 2, 3], slots_of(table, gap=2), config=CONFIG)
    assert [call.spec.word_bytes for call in launches] == [16, 8, 1]
    assert [call.num_strips for call in launches] == [2, 1, 1]


# -- plans --


def test_a_plan_is_kept_by_what_it_depends_on(launches: Launches) -> None:
    table = table_of(64, 4096)
    slots = slots_of(table)
    for config in (
        CONFIG,
        KernelConfig(warps=4, tile_bytes=2048, programs=6),
        KernelConfig(warps=8, tile_bytes=4096, programs=6),
        KernelConfig(warps=4, tile_bytes=4096, programs=1),
        KernelConfig(warps=4, tile_bytes=4096, programs=6, stages=4),
    ):
        pages.gather_pages(table, [1, 2], slots, config=config)
        (call,) = launches
        assert (call.spec,) == tuple(kernel_specs(table, 16, config))
        assert call.programs <= config.programs
        launches.clear()
    assert len(table.launch_plans) == 4  # programs share one


def test_tables_of_one_cache_have_plans_of_their_own(launches: Launches) -> None:
    whole = table_of(64, 32)
    group = whole.group([(1, 16)])
    for table in (whole, group, group.packed()):
        pages.gather_pages(table, [1], slots_of(table), config=CONFIG)
    strips = [read_ids(call.strips, 5 * call.num_strips)[-5:] for call in launches]
    assert [strip[2:] for strip in strips] == [[4, 128, 32], [2, 128, 32], [2, 0, 32]]


def test_a_plan_made_in_inference_mode_serves_outside_of_it(launches: Launches) -> None:
    table = table_of(64)
    with torch.inference_mode():
        pages.gather_pages(table, [1], slots_of(table), config=CONFIG)
    ((_, strips),) = table.launch_plans[16, 4, 4096, 1]
    assert not strips.is_inference()


def test_what_is_prepared_is_what_is_launched(
    launches: Launches, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[Any] = []
    monkeypatch.setattr(compiling, "load_kernel", lambda *args: loaded.append(args))
    table = table_of(64, 24)
    pages.prepare(table, 8, CONFIG)
    (plan,) = table.launch_plans.values()
    assert [(kernel, spec) for kernel, spec, _ in loaded] == [
        (kernel, spec) for spec, _ in plan for kernel in KERNELS.values()
    ]
    slots = slots_of(table, 4, start=8)
    pages.gather_pages(table, [1], slots, config=CONFIG)
    pages.scatter_pages(table, [1], slots, config=CONFIG)
    assert len(table.launch_plans) == 1
    assert {(c.kernel, c.spec) for c in launches} == {(kernel, spec) for kernel, spec, _ in loaded}

    loaded.clear()
    pages.prepare(table)
    tiles = {spec.warps for _, spec, _ in loaded}
    assert tiles == {choose_config(zero_copy=zero_copy).warps for zero_copy in (True, False)}
    assert all(spec.word_bytes in (16, 8) for _, spec, _ in loaded)


@pytest.mark.parametrize("alignment", [0, 3, 32, 1.5, None])
def test_only_a_known_alignment_can_be_prepared(launches: Launches, alignment: Any) -> None:
    with pytest.raises(ValueError, match="slots_alignment: expected 16, 8, 4, 2 or 1, got"):
        pages.prepare(table_of(64), alignment)


# -- strips and tiles --


@given(
    page_bytes=st.lists(
        st.one_of(st.integers(1, 5000), st.sampled_from([16, 32, 64, 512, 1152, 4096, 65536])),
        min_size=1,
        max_size=5,
    ),
    slots_alignment=st.sampled_from([16, 8, 4, 2, 1]),
    warps=st.sampled_from([1, 4, 32]),
    tile_bytes=st.sampled_from([1024, 4096, 32768, 131072]),
)
@settings(max_examples=150, deadline=None)
def test_strips_cover_every_page_once(
    page_bytes: list[int], slots_alignment: int, warps: int, tile_bytes: int
) -> None:
    table = table_of(*page_bytes, num_blocks=2)
    plan = cut_into_strips(table, slots_alignment, KernelConfig(warps, tile_bytes, 1))
    assert [spec.word_bytes for spec, *_ in plan] == sorted(
        {min(row.alignment, slots_alignment) for row in table.pages}, reverse=True
    )
    covered: list[tuple[int, int, int]] = []
    for spec, strips, _ in plan:
        assert spec.pages & (spec.pages - 1) == spec.words & (spec.words - 1) == 0
        assert spec.tile_bytes <= tile_bytes // (1 if spec.exact else 2)
        for address, stride, elements, offset, pitch in strips.tolist():
            assert 1 <= elements <= spec.words
            assert not spec.exact or elements == spec.words
            assert (elements * spec.element_bytes) % spec.word_bytes == 0
            for place in (address, stride, offset, pitch):
                assert place % spec.word_bytes == 0
            covered.append((address, elements * spec.element_bytes, offset))
            assert (stride, pitch) in {(row.block_stride, row.pitch) for row in table.pages}
    wanted = {row.view.data_ptr(): row for row in table.pages}
    assert sum(count for _, count, _ in covered) == table.bytes_per_block
    first = end = 0  # of the page that a strip is part of, and of the strip before
    for address, count, offset in sorted(covered):
        first = address if address in wanted else first
        assert address in (first, end)
        assert offset - wanted[first].offset == address - first
        end = address + count
        assert end <= first + wanted[first].page_bytes


@pytest.mark.parametrize(
    ("page_bytes", "words", "exact"),
    [
        ([64], 8, True),  # one page is one strip
        ([256], 32, True),
        ([1024], 128, True),
        ([65536], 512, True),  # as wide as a tile
        ([512, 1024], 64, True),
        ([64, 128], 16, False),
        ([1152], 32, False),  # 1280 bytes would be an eighth of waste too many
        ([1040], 16, False),
        ([2032], 256, False),  # an eighth of waste is taken
    ],
)
def test_strips_are_as_wide_as_little_waste_allows(
    page_bytes: list[int], words: int, exact: bool
) -> None:
    (spec,) = kernel_specs(table_of(*page_bytes), 16, CONFIG)
    assert (spec.words, spec.exact) == (words, exact)


@pytest.mark.parametrize("zero_copy", [False, True], ids=["staged", "zero_copy"])
@pytest.mark.parametrize("alignment", [16, 8, 4, 2, 1])
@pytest.mark.parametrize("page_bytes", [64, 512, 1024, 1152, 4096, 65536])
def test_a_thread_has_few_pages(page_bytes: int, alignment: int, zero_copy: bool) -> None:
    (spec,) = kernel_specs(table_of(page_bytes), alignment, choose_config(zero_copy=zero_copy))
    threads_of_page = spec.span * spec.element_bytes // spec.word_bytes
    pages_of_thread = spec.pages * threads_of_page / (spec.warps * 32)
    accesses = spec.tile_bytes // spec.word_bytes // (spec.warps * 32)
    # Each page takes three 64-bit values, each access the registers of its bytes.
    assert pages_of_thread <= (2 if accesses == 8 and spec.word_bytes == 16 else 4)
    if page_bytes >= 1024 and spec.word_bytes == 16 and spec.exact:
        assert pages_of_thread <= 1


@pytest.mark.parametrize("page_bytes", [512, 1024, 1152, 4096, 65536, 2 << 20])
@pytest.mark.parametrize(
    "config", [CONFIG, choose_config(zero_copy=False), choose_config(zero_copy=True)]
)
def test_a_span_is_a_whole_line_at_least(page_bytes: int, config: KernelConfig) -> None:
    (spec,) = kernel_specs(table_of(page_bytes, num_blocks=2), 16, config)
    assert spec.words % spec.span == 0
    assert spec.span * spec.element_bytes >= 128


@pytest.mark.parametrize("num_blocks", [1, 2, 7, 31, 32, 33, 100, 1000])
@pytest.mark.parametrize("programs", [1, 2, 3, 6, 1000])
def test_programs_share_all_tiles(launches: Launches, num_blocks: int, programs: int) -> None:
    table = table_of(512, 64, num_blocks=1000)
    config = KernelConfig(warps=1, tile_bytes=1024, programs=programs)
    slots = slots_of(table, 500)
    pages.gather_pages(table, range(num_blocks), slots, config=config)
    (call,) = launches
    tiles = call.num_strips * -(-num_blocks // call.spec.pages)
    assert call.programs <= programs
    # None of them without a tile, and no tile without one of them.
    assert (call.programs - 1) * call.tiles_per_program < tiles
    assert tiles <= call.programs * call.tiles_per_program


def test_no_blocks_are_no_launch(launches: Launches) -> None:
    table = table_of(64)
    pages.gather_pages(table, [], slots_of(table), config=CONFIG)
    pages.scatter_pages(table, [], slots_of(table), [], 1, config=CONFIG)
    assert launches == []


@pytest.mark.parametrize(
    ("page_bytes", "blocks", "first", "programs", "fits"),
    [
        (65536, 2**25 - 1, 0, 63, True),  # 64 tiles a block
        (65536, 2**25 - 1, 0, 64, False),
        (65536, 2**25, 0, 1, False),
        (16, 2**31 - 1 - 128, 0, 1, True),  # 64 blocks a tile, and a tile after the last one
        (16, 2**31 - 1 - 128, 1, 1, False),
        (16, 2**31 - 128, 0, 1, False),
    ],
)
def test_more_than_a_launch_can_count_is_refused(
    monkeypatch: pytest.MonkeyPatch,
    page_bytes: int,
    blocks: int,
    first: int,
    programs: int,
    fits: bool,
) -> None:
    launched: list[Any] = []
    monkeypatch.setattr(compiling, "launch", lambda *args: launched.append(args))
    table, config = table_of(page_bytes), KernelConfig(1, 1024, programs)
    ids = torch.zeros(1, dtype=torch.int64).expand(blocks)  # no memory
    if fits:
        pages.launch_gather(table, ids, slots_of(table), ids, first, config)
    else:
        with pytest.raises(ValueError, match=r"block_ids: expected fewer than 2\*\*31 blocks and"):
            pages.launch_gather(table, ids, slots_of(table), ids, first, config)
    assert len(launched) == fits


def test_the_kernel_of_a_direction_is_launched(launches: Launches) -> None:
    table = table_of(64)
    slots = slots_of(table)
    ids = torch.tensor([1])
    pages.gather_pages(table, [1], slots, config=CONFIG)
    pages.launch_gather(table, ids, slots, ids, np.int64(1), CONFIG)  # type: ignore[arg-type]
    pages.scatter_pages(table, [1], slots, config=CONFIG)
    pages.launch_scatter(table, ids, slots, ids, 0, CONFIG)
    assert [call.kernel for call in launches] == [
        *[movers.gather_kernel] * 2,
        *[movers.scatter_kernel] * 2,
    ]
    assert [(type(call.first_block), call.first_block) for call in launches] == [
        (int, first) for first in (0, 1, 0, 0)
    ]


def test_chunks_before_the_first_block_are_left_out_of_a_launch(launches: Launches) -> None:
    table = table_of(64)
    for move in (pages.gather_pages, pages.scatter_pages):
        move(table, [7, 1, 2], slots_of(table), [9, 9, 3, 0], 5, config=CONFIG)
    assert [(call.first_block, call.ids.slots) for call in launches] == [(1, [3, 0])] * 2


def test_slots_in_device_memory_take_the_staged_configuration(launches: Launches) -> None:
    table = table_of(65536)
    pages.gather_pages(table, [1], slots_of(table))
    (call,) = launches
    assert call.spec.warps == choose_config(zero_copy=False).warps


@pytest.mark.parametrize("move", [pages.gather_pages, pages.scatter_pages])
def test_slots_in_memory_that_no_device_maps_are_refused(
    launches: Launches, monkeypatch: pytest.MonkeyPatch, move: Any
) -> None:
    table = table_of(64)
    table.device = torch.device("cuda", 0)
    with pytest.raises(ValueError, match=r"slots: .*one on cpu that is not pinned"):
        move(table, [1], slots_of(table))
    with pytest.raises(ValueError, match=r"slots: .*got one on meta$"):
        move(table, [1], slots_of(table).to("meta"))


# -- what was passed is the caller's again --


@pytest.mark.parametrize("make", [list, np.array, torch.tensor])
@pytest.mark.parametrize("move", [pages.gather_pages, pages.scatter_pages])
def test_ids_may_change_before_the_kernel_runs(launches: Launches, move: Any, make: Any) -> None:
    table = table_of(64)
    blocks, slots = make([5, 3, 6]), make([2, 0])

    def engine_goes_on() -> None:
        for i in range(3):
            blocks[i] = 10**9
        slots[0] = slots[1] = 10**9

    launches.meanwhile = engine_goes_on
    move(table, blocks, slots_of(table), slots, np.int64(1), config=CONFIG)
    (call,) = launches
    assert (call.ids.blocks, call.ids.slots) == ([5, 3, 6], [2, 0])
    assert (type(call.first_block), call.first_block) == (int, 1)


@pytest.mark.parametrize("make", [list, np.array, torch.tensor])
def test_a_checked_run_is_a_copy_that_torch_may_write_to(make: Any) -> None:
    blocks, slots = make([5, 3, 6]), make([2, 0])
    run = check_run(table_of(64), blocks, 4, slots, np.int32(0), direction="gather")
    blocks[0] = slots[0] = 9
    assert (run.block_ids.tolist(), run.slot_ids.tolist()) == ([5, 3, 6], [2, 0])
    run.block_ids[0] = 1


def test_ids_of_a_device_stay_there() -> None:
    ids = torch.zeros(3, dtype=torch.int32, device="meta")
    run = check_run(table_of(64), ids, 4, direction="gather")
    assert (run.block_ids.device.type, run.block_ids.dtype) == ("meta", torch.int64)
    own = torch.zeros(3, dtype=torch.int64, device="meta")
    assert check_run(table_of(64), own, 4, direction="gather").block_ids is own
    apart = torch.zeros(6, dtype=torch.int64, device="meta")[::2]
    assert check_run(table_of(64), apart, 4, direction="gather").block_ids.is_contiguous()
    for wrong in (ids.float(), ids.bool(), ids.view(3, 1)):
        with pytest.raises(ValueError, match="block_ids: expected a one-dimensional tensor of int"):
            check_run(table_of(64), wrong, 4, direction="gather")


def test_chunks_before_the_first_block_have_no_slot() -> None:
    run = check_run(table_of(64), [7, 1, 2], 4, [99, -1, 3, 0], 5, direction="gather")
    assert (run.slot_ids.tolist(), run.first_block) == ([3, 0], 1)
    run = check_run(table_of(64), [7, 1, 2], 4, None, 5, direction="gather")
    assert (run.slot_ids.tolist(), run.first_block) == ([2, 3], 1)
    with pytest.raises(ValueError, match="slots: expected at least 4 slots for 3 blocks from bl"):
        check_run(table_of(64), [7, 1, 2], 3, None, 5, direction="gather")


@pytest.mark.parametrize("first_block", [True, 1.0, None, "1", -1, np.int64(-1)], ids=repr)
def test_the_first_block_is_an_integer_of_at_least_0(first_block: Any) -> None:
    with pytest.raises(ValueError, match="first_block: expected a"):
        check_run(table_of(64), [1], 4, None, first_block, direction="gather")


@pytest.mark.parametrize("slots", [None, np.zeros((4, 128), np.uint8), [[0] * 128]])
def test_slots_that_are_no_tensor_are_refused(launches: Launches, slots: Any) -> None:
    with pytest.raises(ValueError, match=r"slots: expected a torch\.Tensor, got"):
        pages.gather_pages(table_of(64), [1], slots)


# -- configurations --


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: KernelConfig(0, 1024, 1), "warps: expected an integer of at least 1, got 0"),
        (lambda: KernelConfig(6, 1024, 1), "warps: expected a power of two, got 6"),
        (lambda: KernelConfig(4.0, 1024, 1), "warps: expected an integer"),
        (lambda: KernelConfig(4, 512, 1), "tile_bytes: expected .* at least 1024, got 512"),
        (lambda: KernelConfig(4, 1536, 1), "tile_bytes: expected a power of two, got 1536"),
        (lambda: KernelConfig(4, 1024, 0), "programs: expected an integer of at least 1, got 0"),
        (lambda: KernelConfig(4, 1024, 1.5), r"programs: expected an integer .* got 1\.5"),
        (lambda: choose_config(zero_copy=True, backend="rocm"), "backend: .*got 'rocm'"),
    ],
)
def test_a_wrong_configuration_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_configuration_has_as_many_threads_on_every_card() -> None:
    for zero_copy, threads in ((True, 1024), (False, 256)):
        cuda = choose_config(zero_copy=zero_copy, backend="cuda")
        hip = choose_config(zero_copy=zero_copy, backend="hip")
        assert (cuda.warps * 32, hip.warps * 64) == (threads, threads)
        assert (cuda.tile_bytes, cuda.programs) == (hip.tile_bytes, hip.programs)
    assert choose_config(zero_copy=True).programs < choose_config(zero_copy=False).programs


# -- handles --


class Driver:
    """The current device and its streams; `log` says what was loaded and launched where."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.current: int | None = 0
        self.log: list[Any] = []
        self.compiled: list[Any] = []
        monkeypatch.setattr(compiling, "compile_kernel", self.compile_kernel)
        monkeypatch.setattr(compiling, "device_target", lambda device: f"target of {device}")
        monkeypatch.setattr(torch.cuda, "current_device", lambda: self.current)
        monkeypatch.setattr(torch.cuda, "device", self.device)
        monkeypatch.setattr(
            torch.cuda,
            "current_stream",
            lambda device=None: SimpleNamespace(
                cuda_stream=f"stream of {self.current if device is None else device.index}"
            ),
        )

    def device(self, device: torch.device) -> Any:
        driver = self

        class Guard:
            def __enter__(self) -> None:
                self.was, driver.current = driver.current, device.index

            def __exit__(self, *error: object) -> None:
                driver.current = self.was

        return Guard()

    def compile_kernel(self, kernel: Any, spec: Any, target: Any, index: Any = None) -> Any:
        driver = self
        self.compiled.append((kernel, spec, target, index))

        class Handle:
            module = None

            @property
            def run(self) -> None:
                driver.log.append(f"loaded on {driver.current}")
                Handle.module = "loaded"

            def __getitem__(self, grid: Any) -> Any:
                return lambda *arguments, stream: driver.log.append(
                    (grid, arguments, stream, driver.current)
                )

        return Handle()


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    return Driver(monkeypatch)


@pytest.mark.parametrize("index", [0, 1])
def test_a_kernel_is_compiled_loaded_and_launched_on_its_device(driver: Driver, index: int) -> None:
    (spec,) = kernel_specs(table_of(64), 16, CONFIG)
    kernel, device = KERNELS["gather"], torch.device("cuda", index)
    arguments = tuple(range(len(compiling.ARGUMENT_TYPES)))
    compiling.launch(kernel, spec, device, 5, arguments)
    assert driver.compiled == [(kernel, spec, f"target of cuda:{index}", index)]
    constants = (None, 16, *list(spec.constants().values())[2:])
    assert driver.log == [
        f"loaded on {index}",
        ((5, 1, 1), (*arguments, *constants), f"stream of {index}", index),
    ]
    assert driver.current == 0


def test_a_kernel_is_loaded_once(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    (spec,) = kernel_specs(table_of(64), 16, CONFIG)
    handle = driver.compile_kernel(KERNELS["gather"], spec, "target")
    monkeypatch.setattr(compiling, "compile_kernel", lambda *_: handle)
    for _ in range(2):
        compiling.load_kernel(KERNELS["gather"], spec, torch.device("cuda", 1))
    assert driver.log == ["loaded on 1"]


def test_each_device_has_a_handle_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling.triton, "compile", lambda *_, **__: object())
    spec, target = kernel_specs(table_of(64), 2, CONFIG)[0], TARGETS["sm_90"]
    kernel = KERNELS["gather"]
    compiling.compile_kernel.cache_clear()
    try:
        first, second = (compiling.compile_kernel(kernel, spec, target, i) for i in range(2))
        assert first is not second
        assert compiling.compile_kernel(kernel, spec, target, 0) is first
        assert compiling.compile_kernel(KERNELS["scatter"], spec, target, 0) is not first
    finally:
        compiling.compile_kernel.cache_clear()


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=list(KERNELS))
def test_addresses_strides_and_options_are_compiled_as_they_are(
    kernel: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[Any] = []
    monkeypatch.setattr(
        compiling.triton, "compile", lambda *args, **kwargs: compiled.append((args, kwargs))
    )
    spec = kernel_specs(table_of(64), 4, KernelConfig(8, 4096, 6))[0]
    compiling.compile_kernel.cache_clear()
    try:
        compiling.compile_kernel(kernel, spec, TARGETS["sm_80"])
    finally:
        compiling.compile_kernel.cache_clear()
    (((source,), options),) = compiled
    types = {name: kind for name, kind in source.signature.items() if kind != "constexpr"}
    # A stride may be more than 2 GiB; a count is not, or the launch is refused.
    wide = {"strips", "block_ids", "slots", "stride_slot", "slot_ids"}
    assert types == {name: "i64" if name in wide else "i32" for name in kernel.arg_names[:10]}
    assert list(source.constants.values()) == list(spec.constants().values())
    assert options["target"] == TARGETS["sm_80"]
    assert options["options"]["num_warps"] == spec.warps
    assert options["options"]["num_stages"] == 1
