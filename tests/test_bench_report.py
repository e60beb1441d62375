"""The parts of the benchmark that measure nothing: the report, and what it concludes."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import report
import run
from arbitration import Arbitration, WindowTrial, infer_arbitration, windows_that_suffice
from hardware import H100_SXM
from model import Host, path_seconds
from peers import PACK_VARIABLE, pack_environment
from predictions import predicted
from promises import promises
from results import Record, Results, crossover, largest_jobs, line_of, size_name, slope, time_name
from tables import table
from timing import EventClock, rounds_for
from units import GIB, KIB
from world import World, jobs, recycled_slots

from triton_offload.calibration import Path as Transfer
from triton_offload.specs import Direction


def record(kind: str, seconds: float = 0.001, device: str = "host device", **facts: Any) -> Record:
    return Record("suite", seconds, seconds, {"kind": kind, "device": device, **facts})


def transfer(contender: str, gb_per_s: float, page_bytes: int, pages: int, **facts: Any) -> Record:
    facts = {"direction": "store", "slots": "adjacent", "limit_gb_per_s": 50.0, **facts}
    return record(
        facts.pop("kind", "transfer"),
        contender=contender,
        gb_per_s=gb_per_s,
        page_bytes=page_bytes,
        pages=pages,
        bytes=facts.pop("bytes", page_bytes * pages),
        ratio=gb_per_s / 50.0,
        **facts,
    )


def gpu_results() -> Results:
    """Made up: one record or two of every kind."""
    gpu = {"device": "gpu"}
    records = [
        transfer(name, speed, size, pages, direction=direction, **gpu)
        for direction in ("store", "load")
        for size, pages, speeds in (
            (4 * KIB, 4096, (40.0, 20.0, 5.0)),
            (64 * KIB, 16, (10.0, 12.0, 11.0)),
        )
        for name, speed in zip(("staged", "zero_copy", "copy_engine"), speeds, strict=True)
    ]
    records += [
        transfer("vLLM", 7.0, 4 * KIB, 4096, **gpu),
        transfer("staged", 70.0, 4 * KIB, 4096, kind="both at once", direction="store and load"),
        transfer("staged", 30.0, 4 * KIB, 4096, kind="slots", slots="recycled"),
        transfer("staged", 20.0, 4 * KIB, 4096, kind="slots", slots="ranks"),
        transfer("whole slots", 6.0, 4 * KIB, 512, kind="groups", slots="groups"),
        record("planning", 0.0002, blocks=8192, tensors=80, peer_seconds=0.004, ratio=20.0),
        record("planning", 0.0001, blocks=8, tensors=80),
        record(
            "submission",
            0.001,
            blocks=8,
            tensors=80,
            path="staged",
            slots="adjacent",
            segments=1,
        ),
        record(
            "submission",
            0.003,
            blocks=8192,
            tensors=80,
            path="staged",
            slots="adjacent",
            segments=41,
        ),
        record("polling", 5e-6, jobs=0),
        record("launch", 4e-6, name="staged"),
        record(
            "pool",
            2.0,
            bytes=1 << 30,
            usable_seconds=0.001,
            close_seconds=0.1,
            torch_seconds=4.0,
            pinned=True,
        ),
        record(
            "interference",
            contender="staged",
            model="decode",
            direction="load",
            alone_seconds=0.001,
            beside_seconds=0.0012,
            slowdown=1.2,
            share=1 / 6,
            transfer_gb_per_s=40.0,
            transfer_alone_gb_per_s=50.0,
        ),
        record(
            "kernel", name="gather", page_bytes=512, pages=16, gb_per_s=900.0, gb_per_s_per_cta=60.0
        ),
        record(
            "ctas",
            name="gather",
            memory="device memory",
            page_bytes=512,
            ctas=16,
            gb_per_s=900.0,
        ),
        record(
            "small copy",
            window_bytes=None,
            alone_seconds=1e-5,
            during_seconds=[0.02, 0.05],
            load_seconds=0.08,
            load_gb_per_s=50.0,
            slice_seconds=1.6e-4,
        ),
        record(
            "small copy",
            window_bytes=16 << 20,
            alone_seconds=1e-5,
            during_seconds=[2e-4, 3e-4],
            load_seconds=0.09,
            load_gb_per_s=45.0,
            slice_seconds=1.6e-4,
        ),
        record(
            "scatter latency",
            priority=-1,
            alone_seconds=1e-5,
            behind_seconds=2e-5,
            longest_seconds=3e-5,
            product_seconds=1e-3,
        ),
        record(
            "static",
            kernel="gather",
            name="zero copy, pages of 4 KiB",
            target="sm_90",
            access_bytes=16,
            in_flight_bytes=128 * KIB,
            registers=62,
            stack_bytes=0,
        ),
        record(
            "executed",
            kernel="ours, zero copy",
            direction="scatter",
            page_bytes=4 * KIB,
            target="sm_90",
            programs=2,
            accesses={"8": 49_152, "16": 131_072},
            lines_of_access=3.9,
            in_flight_bytes=128 * KIB,
            host_round_trips=8,
            instructions=13.8,
        ),
        record(
            "manager",
            policy="arc",
            chunks=10_000,
            operations_per_second=9e5,
            peer_speed=5e5,
            ratio=1.8,
        ),
    ]
    facts = {"GPU": "NVIDIA Example", "cores": "16", "load average at the end": "1.0 1.0 1.0"}
    return Results(tuple(records), facts, seconds=300.0)


def test_the_fastest_path_of_each_job_and_its_lead() -> None:
    winners = crossover(
        [
            transfer("staged", 40.0, 4 * KIB, 256),
            transfer("zero_copy", 20.0, 4 * KIB, 256),
            transfer("vLLM", 99.0, 4 * KIB, 256),  # a peer is no path of ours
            transfer("copy_engine", 5.0, 64 * KIB, 16),
        ]
    )
    first, only = winners[4 * KIB, 256], winners[64 * KIB, 16]
    assert (first.path, first.gb_per_s, first.gain) == ("staged", 40.0, 2.0)
    assert (only.path, only.gain) == ("copy_engine", None)


def test_the_largest_job_of_each_page_size() -> None:
    small, large, other = (
        transfer("staged", 1.0, size, pages) for size, pages in ((512, 16), (512, 4096), (4096, 16))
    )
    assert largest_jobs([small, large, other]) == [large, other]


SLICE, LOAD = 150e-6, 80e-3


@pytest.mark.parametrize(
    ("during", "expected"),
    [
        ([11e-6, 12e-6, 40e-6], Arbitration.UNDISTURBED),
        ([160e-6, 170e-6, 320e-6], Arbitration.IN_TURN),
        ([75e-3], Arbitration.FIRST_IN_FIRST_OUT),
        ([40e-3, 20e-6, 15e-6], Arbitration.FIRST_IN_FIRST_OUT),  # only the first came early
        ([3e-3, 3e-3, 4e-3], Arbitration.UNCLEAR),
    ],
)
def test_how_a_copy_engine_serves_is_told_by_what_a_small_copy_waits(
    during: list[float], expected: Arbitration
) -> None:
    assert infer_arbitration(10e-6, during, SLICE, LOAD) is expected


def test_no_latency_tells_nothing() -> None:
    with pytest.raises(ValueError, match="during"):
        infer_arbitration(10e-6, [], SLICE, LOAD)


def test_windows_that_keep_the_wait_short_widest_first() -> None:
    trials = {
        None: WindowTrial(0.08, 54.0),
        64: WindowTrial(0.0009, 50.0),
        256: WindowTrial(0.004, 53.0),
        16: WindowTrial(0.0002, 41.0),
    }
    assert windows_that_suffice(trials, 1e-3) == [64, 16]
    assert windows_that_suffice(trials, 0.1) == [None, 256, 64, 16]
    assert windows_that_suffice(trials, 1e-6) == []


def test_the_cost_of_one_more() -> None:
    assert slope([(1, 5.0), (3, 9.0)]) == pytest.approx(2.0)
    assert slope([(1, 5.0), (1, 9.0)]) is None


def test_the_report_of_a_gpu_has_a_section_for_every_kind() -> None:
    text = report.build(gpu_results(), [Path("bandwidth.png")])
    for words in (
        "Measured on NVIDIA Example",
        "![bandwidth](bandwidth.png)",
        "| 4 KiB | 4,096 | 50 | 40 (0.80) | 20 (0.40) | 5 (0.10) | 7 (0.14) |",
        "Both directions at once",
        "rows that four ranks share",
        "an eighth of its slots",
        "Kernels in device memory",
        "900 (60)",
        "How many CTAs it takes",
        "first in, first out: the small copy waits",
        "A window of 16 MiB is the widest",
        "A scatter of 8 MiB",
        "| decode | load | staged | 1 ms | 1.2 ms | 1.20 | 17 % | 50 -> 40 |",
        "| planning 8,192 blocks x 80 tensors | < 300 us | 200 us | met |",
        "50 us for each further segment",
        "touched and pinned after",
        "16 / 128 / 62 / 0",
        "| ARC | 10,000 | 0.90 M | 0.50 M | 1.8 |",
        "Nowhere in this run",
    ):
        assert words in text, words
    assert "No GPU was here" not in text


def on_an_h100(*records: Record, **facts: str) -> Results:
    """Made up: figures of a card that the model knows."""
    return Results(records, {"GPU": "NVIDIA H100 80GB HBM3", **facts})


def test_beside_each_figure_is_what_the_model_predicts_for_the_card() -> None:
    gpu = {"device": "gpu"}
    size, pages = 4 * KIB, 65_536
    staged = transfer("staged", 40.0, size, pages, **gpu)
    alone = path_seconds(H100_SXM, Transfer.STAGED, Direction.STORE, size, pages, Host())
    expected = size * pages / alone / 1e9
    assert predicted(staged, H100_SXM) == pytest.approx(expected)
    loads = [
        transfer(name, 10.0, size, pages, direction="load", **gpu)
        for name in ("vLLM", "batched copy", "index_select", "auto")
    ]
    text = report.build(on_an_h100(staged, *loads), [])
    assert "what the model predicts for this card (H100 SXM, PCIe Gen5 x16)" in text
    assert f"| 50 [55.5, -10%] | 40 (0.80) [{expected:.3g}, {40 / expected - 1:+.0%}] |" in text
    # vLLM's kernel: 96 KiB over the round trip; 65,536 descriptors at 0.52 + 0.53 us; torch: none
    assert "10 (0.20) [32.2, -69%] | 10 (0.20) [3.94, +154%] | 10 (0.20) |" in text
    kernels = [
        record("kernel", name=name, page_bytes=512, pages=16, gb_per_s=900.0, bytes=GIB, **gpu)
        for name in ("gather", "index_select")
    ]
    ctas = [
        record("ctas", name="gather", memory=memory, page_bytes=512, ctas=2, bytes=GIB,
               gb_per_s=13.5, **gpu)
        for memory in ("device memory", "mapped host memory")
    ]  # fmt: skip
    text = report.build(on_an_h100(*kernels, *ctas), [])
    assert "| 900 [953, -6%] | 900 |" in text  # sixteen CTAs, 32 KiB over 1.1 us, twice counted
    assert "13.5 [119, -89%]" in text
    assert "13.5 [27, -50%]" in text  # two CTAs at the knee of stores


def test_promises_on_a_card_are_beside_what_the_model_predicts() -> None:
    gpu = {"device": "gpu"}
    size, pages = 64 * KIB, 8192
    records = [
        transfer("auto", 45.0, size, pages, direction=direction, **gpu)
        for direction in ("store", "load")
    ]
    records += [
        transfer("auto", 80.0, size, 4096, kind="both at once", direction="store and load",
                 bytes=2 * 4096 * size, **gpu),
        record("small copy", window_bytes=None, during_seconds=[1e-4, 2e-4], alone_seconds=1e-5,
               load_gb_per_s=50.0, slice_seconds=1.6e-4, load_seconds=0.08, **gpu),
    ]  # fmt: skip
    for contender, slowdown in (("auto", 1.06), ("one copy", 1.02)):
        for model in ("decode", "matrix product"):
            facts = {"model": model, "direction": "load", "slowdown": slowdown}
            records.append(record("interference", contender=contender, **facts, **gpu))
    head, _, *rows = promises(on_an_h100(*records)).splitlines()[3:]
    assert head == "| what | wanted | measured |  | predicted | off by |"
    ends = [" | ".join(row.removesuffix(" |").split(" | ")[2:]) for row in rows]
    assert ends == [
        "0.9 | **not met** | 0.986 | -9%",
        "0.9 | **not met** | 0.986 | -9%",
        "1.78 | met | 1.52 | +17%",
        "4.0 points | **not met** | 3.3 points | +0.7 points",
        "4.0 points | **not met** | - | -",
        "200 us | met | 156 us | +28%",
    ]


def test_nothing_is_predicted_for_a_card_that_says_too_little_or_for_none() -> None:
    stored = transfer("staged", 40.0, 4 * KIB, 4096, device="gpu")
    unknown = Results((stored,), {"GPU": "NVIDIA Example"})
    assert unknown.card is None
    assert "predict" not in report.build(unknown, [])
    on_host = on_an_h100(transfer("zero_copy", 4.0, 4 * KIB, 4096))
    assert on_host.card is None
    assert predicted(stored, None) is None


def test_the_report_of_a_cpu_says_what_it_is_and_what_is_missing(tmp_path: Path) -> None:
    benchmark = SimpleNamespace(
        name="test",
        group="polling",
        stats=SimpleNamespace(stats=SimpleNamespace(median=5e-6, min=4e-6)),
        extra_info={"kind": "polling", "device": "host device", "jobs": 1},
    )
    job = {
        "direction": "load",
        "page_bytes": 4096,
        "pages": 512,
        "bytes": 1 << 21,
        "with_seconds": 4e-6,
        "without_seconds": 2e-6,
    }
    summed = copy.copy(benchmark)
    summed.extra_info = {"kind": "checksums", "device": "host device", "times": 2.0, **job}
    notes: dict[str, Any] = {
        "facts": {"cores": "2", "load average at the end": "9 9 9", "GPU": "none"},
        "seconds": 12.0,
        "skipped": {},
        "failed": [],
    }
    (tmp_path / "submission.records.jsonl").write_text(line_of(benchmark) + line_of(summed))
    (tmp_path / "submission.notes.json").write_text(json.dumps(notes))
    notes |= {"skipped": {"needs a GPU": 80}, "failed": ["test_kernels.py::test_x"]}
    (tmp_path / "kernels.notes.json").write_text(json.dumps(notes))  # nothing of it ran
    results = Results.load(tmp_path)
    assert (len(results.records), results.seconds, results.on_gpu) == (2, 24.0, False)
    text = report.build(results, [])
    assert "No GPU was here" in text
    assert "`get_finished`, 1 jobs in flight | 5 us" in text
    assert "| load | 4 KiB | 2 MiB | 4 us | 2 us | 2.00 |" in text
    assert "| kernels | needs a GPU | 80 |" in text
    assert "- `test_kernels.py::test_x`" in text
    assert "Other programs were running" in text
    assert "## Transfers" not in text


def promised(*records: Record) -> list[tuple[str, str]]:
    """(what was measured, whether that is what was promised) of each promise."""
    rows = [line.split(" | ") for line in promises(Results(records)).splitlines()[1:]]
    found = [(row[2], row[3].removesuffix(" |")) for row in rows if len(row) == 4]
    return found[2:]  # without the head of the table


def test_a_promise_that_is_not_kept_is_called_so() -> None:
    missed = "**not met**"
    slow = record("planning", 0.001, blocks=8192, tensors=80, peer_seconds=0.005, ratio=5.0)
    assert promised(slow) == [("1 ms", missed), ("5", missed)]
    small = [
        record(
            "small job", by="queue manager", direction="load", blocks=n, page_bytes=4096, ratio=r
        )
        for n, r in [(16, 0.49), (16, 0.5), (64, 0.89), (64, 0.9)]
    ]
    assert promised(*small) == [("0.49", missed), ("0.5", "met"), ("0.89", missed), ("0.9", "met")]
    sums = [
        record("checksums", direction="load", page_bytes=size, pages=n, bytes=n * size, times=times)
        for size, n, times in [(4096, 9, 1.3), (16384, 9, 1.11), (65536, 1, 2.0), (65536, 9, 1.1)]
    ]
    assert promised(*sums) == [("1.11", missed), ("1.1", "met")]
    lookups = [record("lookup", keys=2048, ratio=ratio) for ratio in (1 / 1.6, 1 / 1.5)]
    assert promised(*lookups) == [("1.6", missed), ("1.5", "met")]
    managers = [record("manager", policy="lru", chunks=1, ratio=ratio) for ratio in (1.99, 2.0)]
    assert promised(*managers) == [("1.99", missed), ("2", "met")]
    assert promised(record("manager", policy="lru", chunks=1)) == []  # without a peer
    assert promises(Results(())) == ""


def test_what_is_promised_of_transfers_depends_on_what_moves_them() -> None:
    missed = "**not met**"

    def largest(contender: str, device: str) -> list[Record]:
        """Of a speed of 50 GB/s, 32, 47 and 48."""
        sizes = ((512, 32.0), (4 * KIB, 32.0), (64 * KIB, 47.0), (2048 * KIB, 48.0))
        return [transfer(contender, speed, size, 4096, device=device) for size, speed in sizes] + [
            transfer(contender, 1.0, 4 * KIB, 16, device=device)
        ]  # small jobs promise nothing

    on_host = largest("zero_copy", "host device")
    assert promised(*on_host) == [("0.64", "met"), ("0.94", "met")]
    assert promised(*largest("staged", "host device")) == []  # not what a user gets
    on_gpu = largest("auto", "gpu")
    assert promised(*on_gpu) == [("0.64", missed), ("0.94", missed), ("0.96", "met")]
    assert promised(*largest("staged", "gpu")) == promised(*on_gpu)  # beside it, on a card

    both = [
        transfer("auto", speed, 64 * KIB, 4096, kind="both at once", device="gpu")
        for speed in (74.0, 76.0)
    ]
    assert promised(*on_gpu, *both)[3:] == [("1.57", missed), ("1.62", "met")]


def test_what_is_promised_of_a_model_beside_transfers_is_said_beside_one_copy() -> None:
    def beside(contender: str, slowdown: float, direction: str = "load") -> Record:
        facts = {"model": "decode", "direction": direction, "slowdown": slowdown}
        return record("interference", device="gpu", contender=contender, **facts)

    plain = beside("one copy", 1.05)
    assert promised(plain, beside("auto", 1.06)) == [("1.0 points", "met")]
    assert promised(plain, beside("auto", 1.08)) == [("3.0 points", "**not met**")]
    assert promised(plain, beside("auto", 1.08, "store")) == []  # nothing to compare it with
    waits = [
        record("small copy", device="gpu", window_bytes=window, during_seconds=[2e-4, longest])
        for window, longest in ((None, 3e-3), (1 << 20, 2e-4))
    ]
    assert promised(*waits) == [("3 ms", "**not met**")]


def test_the_report_names_the_jobs_that_a_peer_moves_faster() -> None:
    records = [
        transfer("staged", 40.0, 4 * KIB, 256),
        transfer("vLLM", 44.0, 4 * KIB, 256),
        transfer("copy per page", 41.0, 4 * KIB, 256),
        transfer("staged", 40.0, 64 * KIB, 16),
        transfer("vLLM", 30.0, 64 * KIB, 16),
        transfer("vLLM", 30.0, 2048 * KIB, 16),  # none of ours to compare it with
    ]
    text = report.transfers(Results(tuple(records)), {})
    ahead = text[text.index("Where a peer is ahead") :]
    assert "| store | 4 KiB | 256 | vLLM | 1.10 |" in ahead
    assert "64 KiB" not in ahead
    assert "2 MiB" not in ahead


def test_plots_are_drawn_of_what_there_is(tmp_path: Path) -> None:
    plots = pytest.importorskip("plots", reason="matplotlib is not here")
    drawn = plots.draw_all(gpu_results(), tmp_path)
    names = {"bandwidth", "crossover", "interference", "kernels", "ctas", "planning"}
    assert {path.stem for path in drawn} == names
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)
    assert plots.draw_all(Results(()), tmp_path) == []


def test_columns_of_figures_are_aligned_to_the_right() -> None:
    text = table(["name", "GB/s", "path"], [["a", "12", "staged|x"], ["b", "-", "zero_copy"]])
    assert text.splitlines()[1:3] == ["| --- | ---: | --- |", "| a | 12 | staged\\|x |"]


def test_sizes_and_times_are_written_for_people() -> None:
    assert [size_name(n) for n in (512, 4096, 1536)] == ["512 B", "4 KiB", "1.5 KiB"]
    assert [time_name(t) for t in (2.5, 0.0123, 4.2e-6)] == ["2.5 s", "12.3 ms", "4.2 us"]


def test_the_clock_of_events_times_what_is_between_a_rounds_two_readings() -> None:
    log: list[str] = []

    class Event:
        def __init__(self) -> None:
            log.append("event")

        def record(self) -> None:
            log.append("record")

        def synchronize(self) -> None:
            log.append("synchronize")

        def elapsed_time(self, end: Event) -> float:
            return 250.0  # ms

    clock = EventClock(Event, lambda: log.append("flush"))
    for _ in range(2):
        start = clock()
        assert log == ["flush", "event", "record"]
        assert clock() - start == pytest.approx(0.25)
        assert log[3:] == ["event", "record", "synchronize"]
        log.clear()


def test_rounds_fill_a_budget_within_bounds() -> None:
    assert [rounds_for(seconds, 1.0) for seconds in (10.0, 0.1, 1e-6)] == [3, 10, 25]


def test_recycled_slots_are_all_slots_and_hardly_adjacent() -> None:
    slots = recycled_slots(1000)
    assert sorted(slots.tolist()) == list(range(1000))
    steps = (slots[1:] - slots[:-1]).tolist()
    assert steps.count(-1) > 900
    assert steps.count(1) < 10


@pytest.mark.parametrize("slots", ["adjacent", "recycled", "ranks", "groups", "duplex"])
def test_a_world_has_the_pages_that_it_says(slots: str) -> None:
    world = World.build(512, 64, slots)
    blocks, places = world.ids(Direction.STORE)
    assert len(blocks) == len(places) == len(set(places.tolist()))
    assert world.num_bytes == 64 * 512
    assert max(places) < world.num_slots
    if slots == "duplex":
        loaded, from_slots = world.ids(Direction.LOAD)
        assert not set(loaded.tolist()) & set(blocks.tolist())
        assert not set(from_slots.tolist()) & set(places.tolist())


def test_jobs_keep_to_the_limit() -> None:
    assert all(size * pages <= 64 << 20 and pages % 16 == 0 for size, pages in jobs(64 << 20))


def test_a_packed_peer_is_found_by_its_script(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert pack_environment(tmp_path) == {}
    (tmp_path / "activate.sh").write_text("echo unpacked; export PYTHONPATH=/packed\n")
    assert pack_environment(tmp_path) == {"PYTHONPATH": "/packed"}
    monkeypatch.setenv(PACK_VARIABLE, str(tmp_path))
    assert pack_environment(None) == {"PYTHONPATH": "/packed"}


def test_a_suite_that_does_not_exist_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["run.py", "transfer"])
    with pytest.raises(SystemExit):
        run.main()
    assert "got transfer" in capsys.readouterr().err
