"""The model of how long transfers take: its shape, its limits, and the figures of others."""

from __future__ import annotations

from dataclasses import replace

import pytest
from cards import GB300, H100_PCIE, H100_SXM, KNOWN, PCIE_5, PREDICTED, Card, card_of
from model import (
    BUFFERS,
    NO_HOST,
    RING_KERNEL,
    STAGED_KERNEL,
    ZERO_COPY_KERNEL,
    Host,
    Kernel,
    batch_seconds,
    both_ways_seconds,
    cta_rate,
    fastest_path,
    gather_seconds,
    link_rate,
    memory_share,
    path_seconds,
    plain_copy_seconds,
    ramped,
    room_beside,
    segments_of,
    small_copy_wait,
    staged_seconds,
    zero_copy_seconds,
)
from published import TABLE, WITHIN, Figure, Role, figures, fitted_depth, fitted_small_rate
from units import GB, GIB, KIB, MIB

from triton_offload.calibration import Path
from triton_offload.kernels.tiling import choose_config
from triton_offload.specs import Direction

PAGES = [512 << i for i in range(12)]  # up to 1 MiB
PATHS = list(Path)
STORE, LOAD = Direction.STORE, Direction.LOAD
every_card = pytest.mark.parametrize("card", KNOWN, ids=lambda card: card.name)
each_way = pytest.mark.parametrize("direction", Direction, ids=lambda direction: direction.value)
each_path = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.value)


@every_card
@each_way
@each_path
def test_no_path_is_faster_than_the_link_and_a_larger_job_never_ends_sooner(
    card: Card, direction: Direction, path: Path
) -> None:
    for page_bytes in PAGES:
        before = 0.0
        pages = 1
        while pages * page_bytes <= GIB:
            seconds = path_seconds(card, path, direction, page_bytes, pages)
            assert seconds >= before
            link = pages * page_bytes / link_rate(card, direction)
            assert seconds >= 0.999999 * (card.start_seconds + link)
            before = seconds
            pages *= 4


@every_card
@each_way
@each_path
def test_larger_pages_of_the_same_bytes_never_take_longer(
    card: Card, direction: Direction, path: Path
) -> None:
    for num_bytes in (1 * MIB, 64 * MIB, GIB):
        times = [
            path_seconds(card, path, direction, size, num_bytes // size)
            for size in PAGES
            if size <= num_bytes
        ]
        assert times == sorted(times, reverse=True)


@every_card
@each_path
def test_both_ways_share_a_link_and_never_end_before_one_way(card: Card, path: Path) -> None:
    for page_bytes in PAGES:
        pages = 512 * MIB // page_bytes
        both = both_ways_seconds(card, path, page_bytes, pages)
        assert both >= 2 * page_bytes * pages / card.link.both
        alone = [path_seconds(card, path, each, page_bytes, pages) for each in Direction]
        assert both >= max(alone)
        assert both <= 1.4 * sum(alone)


@each_way
def test_a_staged_job_takes_the_link_and_what_fills_or_drains_the_pipeline(
    direction: Direction,
) -> None:
    card = H100_SXM
    segment = 16 * MIB
    pages, copy = gather_seconds(card, segment), segment / link_rate(card, direction)
    assert pages < copy
    for count in (1, 2, 7):
        seconds = staged_seconds(card, direction, [segment] * count)
        assert seconds == pytest.approx(2 * card.start_seconds + pages + count * copy)
    # Where the kernel is the slower one, copies hide behind it.
    slow = replace(card, memory_seconds=100e-6)
    pages = gather_seconds(slow, segment)
    assert pages > copy
    seconds = staged_seconds(slow, direction, [segment] * 2)
    assert seconds == pytest.approx(2 * card.start_seconds + 2 * pages + copy)


def test_no_segment_begins_before_it_is_queued_or_has_a_buffer() -> None:
    card = H100_SXM
    host = Host(job_seconds=1.0, segment_seconds=2.0)
    last = staged_seconds(card, STORE, [16 * MIB] * 3, host)
    alone = staged_seconds(card, STORE, [16 * MIB])
    assert last == pytest.approx(1 + 3 * 2 + alone)
    # Gathers that cost nothing run ahead of the copies, but for want of a buffer.
    quick = replace(card, memory_seconds=0.0, memory=1e30, start_seconds=1.0)
    few = staged_seconds(quick, STORE, [16 * MIB] * BUFFERS)
    more = staged_seconds(quick, STORE, [16 * MIB] * (BUFFERS + 1))
    copy = 16 * MIB / quick.link.to_host
    assert few == pytest.approx(2 + BUFFERS * copy)
    # The first buffer is free 2 + copy after the start: a gather, and a copy, start anew.
    assert more == pytest.approx(max(few, 2 + copy + 1 + 1) + copy)


def test_ramps_cover_the_job_and_mirror_each_other() -> None:
    for num_bytes in (1, 2 * MIB, 3 * MIB, 16 * MIB, 100 * MIB + 5):
        store, load = ramped(num_bytes, STORE), ramped(num_bytes, LOAD)
        assert sum(store) == sum(load) == sum(segments_of(num_bytes)) == num_bytes
        assert store == load[::-1]
        assert all(0 < size <= 16 * MIB for size in store)
    assert [size // MIB for size in ramped(46 * MIB, STORE)] == [2, 4, 8, 16, 16]


@each_way
def test_a_ramp_pays_where_the_host_is_quick_and_only_there(direction: Direction) -> None:
    card, size = H100_SXM, 16 * MIB
    plain = plain_copy_seconds(card, direction, size)
    flat, ramp = segments_of(size), ramped(size, direction)

    def ratio(segments: list[int], host: Host) -> float:
        return plain / staged_seconds(card, direction, segments, host)

    assert ratio(ramp, NO_HOST) > 0.95 > ratio(flat, NO_HOST)
    assert ratio(ramp, Host(0, 200e-6)) < ratio(flat, Host(0, 200e-6))


@each_way
def test_ctas_are_bytes_in_flight_over_a_round_trip_up_to_the_knee(direction: Direction) -> None:
    card = H100_SXM
    trip = card.link.write_seconds if direction is STORE else card.link.read_seconds
    assert cta_rate(card, direction, 8 * KIB) == pytest.approx(8 * KIB / trip)
    knee = 32 * KIB if direction is STORE else 64 * KIB
    assert cta_rate(card, direction, 1 * MIB) == pytest.approx(knee / trip)
    few, many = (
        zero_copy_seconds(card, direction, GIB, Kernel(ctas, 64 * KIB, 1024, 64))
        for ctas in (1, 64)
    )
    assert few == pytest.approx(card.start_seconds + GIB * trip / knee)
    assert many == pytest.approx(card.start_seconds + GIB / link_rate(card, direction))
    # A job of one tile keeps one CTA busy, and none is quicker than a round trip.
    one = zero_copy_seconds(card, direction, 64 * KIB, Kernel(64, 64 * KIB, 1024, 64))
    assert one == pytest.approx(card.start_seconds + 64 * KIB * trip / knee)
    assert zero_copy_seconds(card, direction, 1) == pytest.approx(card.start_seconds + trip)


def test_a_gather_reads_and_writes_and_is_bound_by_its_ctas_or_by_memory() -> None:
    kernel = Kernel(16, 32 * KIB, 256, 64)
    card = replace(H100_SXM, memory_seconds=1e-6)
    assert gather_seconds(card, GIB, kernel) == pytest.approx(GIB / (16 * 32 * KIB / 1e-6))
    assert gather_seconds(card, GIB, replace(kernel, ctas=132)) == pytest.approx(
        2 * GIB / card.memory
    )
    assert gather_seconds(card, 1, kernel) == 1e-6


def test_a_batch_is_queued_ahead_or_bound_by_its_descriptors() -> None:
    card, start = H100_SXM, H100_SXM.start_seconds
    enqueue, depth = card.driver.enqueue_seconds, card.driver.depth
    few = batch_seconds(card, STORE, MIB, 100)
    assert few == pytest.approx(start + 100 * enqueue + 100 * MIB / card.link.to_host)
    tiny = batch_seconds(card, STORE, 512, 1_000_000)
    assert tiny == pytest.approx(start + 1_000_000 * enqueue + 512 / card.link.to_host)
    # Small loads take the driver's own way, stores don't.
    move = 16 * KIB / card.driver.small_rate
    assert batch_seconds(card, LOAD, 16 * KIB, depth) == pytest.approx(start + depth * move)
    assert batch_seconds(card, LOAD, 16 * KIB, depth + 1) == pytest.approx(
        start + (depth + 1) * (move + enqueue)
    )
    assert batch_seconds(card, STORE, 16 * KIB, depth) < batch_seconds(card, LOAD, 16 * KIB, depth)


def test_units_a_gib_over_a_gb_per_second_and_a_slice_in_a_sixth_of_a_millisecond() -> None:
    card = replace(H100_SXM, link=replace(PCIE_5, to_device=1 * GB), start_seconds=0.0)
    assert plain_copy_seconds(card, LOAD, 1_000_000_000) == pytest.approx(1.0)
    assert small_copy_wait(H100_SXM, 8 * MIB) == pytest.approx(156e-6, rel=0.01)


def test_the_launches_are_those_of_the_kernels_and_what_they_leave_of_an_sm() -> None:
    for kernel, zero_copy in ((STAGED_KERNEL, False), (ZERO_COPY_KERNEL, True)):
        config = choose_config(zero_copy=zero_copy)
        assert (kernel.ctas, kernel.flight_bytes) == (config.programs, config.tile_bytes)
        assert kernel.threads == 32 * config.warps
    assert room_beside(H100_SXM, ZERO_COPY_KERNEL) == 0.0
    assert room_beside(H100_SXM, RING_KERNEL) > 0.9 > room_beside(H100_SXM, STAGED_KERNEL) > 0.7


def test_staging_passes_device_memory_three_times() -> None:
    once = memory_share(H100_SXM, Path.ZERO_COPY, LOAD)
    assert once == pytest.approx(55.6 / 3350)
    assert memory_share(H100_SXM, Path.STAGED, LOAD) == pytest.approx(3 * once)


def test_the_fastest_path_is_the_one_with_the_least_seconds() -> None:
    assert fastest_path(H100_SXM, STORE, 4 * KIB, 100_000) is Path.STAGED
    assert fastest_path(H100_SXM, STORE, 4 * KIB, 1) is Path.COPY_ENGINE


# -- the figures of others --


@pytest.mark.parametrize("figure", figures(), ids=lambda figure: f"{figure.what}")
def test_a_figure_is_reached_or_it_is_said_why_not(figure: Figure) -> None:
    assert figure.reached == (not figure.why)
    assert 0 < figure.predicted < 1000


def test_what_was_fitted_is_what_the_card_has() -> None:
    driver = H100_SXM.driver
    assert driver.small_rate == pytest.approx(fitted_small_rate(), rel=0.02)
    assert driver.depth == pytest.approx(fitted_depth(), rel=0.02)
    fitted = [figure for figure in figures() if figure.role is Role.FITTED]
    assert len(fitted) == 5


def test_vllms_table_and_sglangs_cta_are_within_a_fifth() -> None:
    table = [figure for figure in figures() if figure.source.startswith("vLLM pull request 42212")]
    assert len(table) == 3 * len(TABLE) == 18
    missed = [figure.what for figure in table if abs(figure.error) > WITHIN]
    assert missed == ["24 KiB x 10,000"]
    assert cta_rate(GB300, LOAD, 64 * KIB) / GB == pytest.approx(48, rel=WITHIN)


def test_five_checks_are_not_reached() -> None:
    checks = [figure for figure in figures() if figure.role is Role.CHECK]
    assert sum(figure.reached for figure in checks) == len(checks) - 5


# -- which card --


def facts(**more: str) -> dict[str, str]:
    return {"GPU": "NVIDIA H200", "SMs": "132", **more}


def test_a_card_is_known_by_its_name_and_described_by_what_it_reports() -> None:
    card = card_of(facts())
    assert card is not None
    assert card.name == "H200"
    assert card.link is PCIE_5
    fewer = card_of(facts(SMs="100", **{"memory bandwidth, by clock and bus": "4000 GB/s"}))
    assert fewer is not None
    assert (fewer.sms, fewer.memory) == (100, 4e12)
    assert [card_of({"GPU": f"{card.reported} X"}) for card in KNOWN] == list(KNOWN)
    assert card_of({"GPU": "none"}) is None
    assert card_of({}) is None


def test_a_known_card_in_a_slower_slot_has_that_slots_link() -> None:
    slow = card_of(facts(**{"PCIe generation": "4", "PCIe lanes": "16"}))
    assert slow is not None
    assert slow.link.name == "PCIe Gen4 x16"
    assert slow.link.to_device == pytest.approx(PCIE_5.to_device / 2, rel=0.01)
    assert slow.link.read_seconds == PCIE_5.read_seconds
    grace = card_of({"GPU": "NVIDIA GB300", "PCIe generation": "5", "PCIe lanes": "1"})
    assert grace == GB300  # which reaches its host another way


def test_an_unknown_card_is_made_of_its_attributes() -> None:
    card = card_of(
        {
            "GPU": "Example 9000",
            "SMs": "48",
            "memory bandwidth, by clock and bus": "1000.5 GB/s",
            "threads per SM": "1536",
            "PCIe generation": "5",
            "PCIe lanes": "8",
        }
    )
    assert card is not None
    assert (card.name, card.sms, card.memory, card.threads_per_sm) == (
        "Example 9000",
        48,
        1000.5e9,
        1536,
    )
    assert card.link.to_device == pytest.approx(PCIE_5.to_device / 2)
    assert card.link.both == pytest.approx(PCIE_5.both / 2)


def test_cards_have_names_of_their_own() -> None:
    assert len({card.name for card in KNOWN}) == len(KNOWN)
    assert set(PREDICTED) < set(KNOWN)
    assert H100_PCIE.sms < H100_SXM.sms
