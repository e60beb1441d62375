"""The doctor: what it reads of made-up machines, what it finds, and what it tells."""

from __future__ import annotations

import ast
import itertools
import json
import tomllib
from dataclasses import replace
from pathlib import Path as FilePath
from types import SimpleNamespace

import pytest
import torch
from terminal import columns, without_spaces
from typer.testing import CliRunner

from triton_offload.calibration import Calibration, Path, PathRule, PathTable, default_calibration
from triton_offload.cli import machine as cli_machine
from triton_offload.cli.main import app
from triton_offload.device.host import HostDevice
from triton_offload.device.numa import node_of_card
from triton_offload.doctor import checks as doctor
from triton_offload.doctor import facts
from triton_offload.doctor.checks import Status, examine, sound
from triton_offload.doctor.facts import Facts, Speed, gather
from triton_offload.specs import Direction
from triton_offload.tuning import machine
from triton_offload.tuning.calibration_file import Machine, cache_file
from triton_offload.tuning.machine import Link, LinkWidth, Roots

ROOT = FilePath(__file__).parent.parent
CPU = torch.device("cpu")
GPU = "0000:17:00.0"
GIB = 1 << 30
SOUND = Facts(
    "cuda",
    Machine("NVIDIA H100", "580.65.06", "Gen5 x16", "0.1.0"),
    64 * GIB,
    link=Link(LinkWidth(5, 16), LinkWidth(5, 16), LinkWidth(5, 16)),
    node=1,
    pool_nodes={1: 16384},
    pinned_bytes=64 << 20,
    locked_limit=None,
    memory_limit=None,
    memory_available=500 * GIB,
    shm_bytes=256 * GIB,
    huge_pages="within_size",
    versions={
        "torch": "2.13.0+cu130",
        "triton": "3.6.0",
        "vllm": "0.33.1",
        "cuda-bindings": "13.0.1",
    },
    calibration=default_calibration("cuda"),
    speeds=tuple(
        Speed(way, 4096, path, 40.0 if path else 55.0)
        for way in Direction
        for path in (*Path, None)
    ),
)
HOST = replace(SOUND, device_type="cpu", link=None, node=None, pinned_bytes=0)


def without(path: Path | None) -> tuple[Speed, ...]:
    return tuple(speed for speed in SOUND.speeds if speed.path is not path)


def limited_to(gb_per_s: float) -> tuple[Speed, ...]:
    return (*without(None), *(Speed(way, 4096, None, gb_per_s) for way in Direction))


# -- findings --


def test_a_sound_machine_has_nothing_but_ok():
    findings = examine(SOUND)
    assert {finding.status for finding in findings} == {Status.OK}
    assert sound(findings)
    assert {finding.name for finding in findings} >= {"link", "NUMA", "pinned memory", "paths"}


PROBLEMS = {
    "a Gen3 x8 link in a Gen5 x16 slot": (
        {
            "link": replace(SOUND.link, now=LinkWidth(3, 8)),
            "speeds": limited_to(6.5),
        },
        "link",
        "Gen3 x8, where card and slot can do Gen5 x16: 8 of 63 GB/s",
        "reseat the card",
    ),
    "an old generation": (
        {"link": replace(SOUND.link, now=LinkWidth(3, 16)), "speeds": limited_to(12.0)},
        "link",
        "Gen3 x16, where card and slot can do Gen5 x16: 16 of 63 GB/s",
        "set by hand",
    ),
    "half the lanes": (
        {"link": replace(SOUND.link, now=LinkWidth(5, 8))},
        "link",
        "Gen5 x8, where card and slot can do Gen5 x16",
        "all lanes",
    ),
    "a link that something else holds up": (
        {"speeds": limited_to(20.0)},
        "plain copy",
        "store 20.0 GB/s, load 20.0 GB/s, where Gen5 x16 carries 63",
        "iommu=pt",
    ),
    "small /dev/shm": (
        {"shm_bytes": 64 << 20},
        "shared memory",
        "/dev/shm holds 64.0 MiB: behind vLLM a pool of 64.0 GiB lies there",
        "--shm-size",
    ),
    "low memlock": (
        {"locked_limit": 64 << 10, "pinned_bytes": 0},
        "pinned memory",
        "can't be pinned (ulimit -l: 64.0 KiB)",
        "--ulimit memlock=-1",
    ),
    "pool on the wrong node": (
        {"pool_nodes": {0: 16384}},
        "NUMA",
        "the card is on node 1, 100% of a trial pool's pages are not (nodes 0)",
        "numactl --cpunodebind=1 --membind=1",
    ),
    "pool on both nodes": (
        {"pool_nodes": {0: 8192, 1: 8192}},
        "NUMA",
        "50% of a trial pool's pages are not (nodes 0, 1)",
        "numactl --cpunodebind=1",
    ),
    "torch too old": (
        {"versions": {**SOUND.versions, "torch": "2.9.1+cu128"}},
        "torch",
        "2.9.1+cu128: expected 2.11 or later",
        "pip install 'torch>=2.11'",
    ),
    "no triton": (
        {"versions": {**SOUND.versions, "triton": None}},
        "triton",
        "not installed: expected 3.6 or later",
        "pip install 'triton>=3.6'",
    ),
    "another vllm": (
        {"versions": {**SOUND.versions, "vllm": "0.31.2"}},
        "vllm",
        "0.31.2: the plug-in is for 0.32 and 0.33",
        "pip install 'vllm==0.33.*'",
    ),
    "a container that is too small": (
        {"memory_limit": 32 * GIB},
        "memory",
        "the control group's limit is 32.0 GiB, too little for a pool of 64.0 GiB",
        "docker run --memory",
    ),
    "no memory left": (
        {"memory_available": GIB},
        "memory",
        "available memory is 1.0 GiB, too little",
        "host_bytes",
    ),
    "no batched copies": (
        {"speeds": without(Path.COPY_ENGINE)},
        "paths",
        "copy_engine: the driver takes no batches of copies",
        "CUDA 12.8",
    ),
    "a card that torch can't use": (
        {"device_type": "cpu", "unused_cards": (GPU,)},
        "device",
        "torch 2.13.0+cu130 can't use the card at 0000:17:00.0",
        "nvidia-smi",
    ),
    "no kernels": ({"speeds": without(Path.STAGED)}, "paths", "do not run here", "triton"),
    "a card without memory": (
        {"speeds": (), "failure": "OutOfMemoryError: no room"},
        "paths",
        "trial transfers failed: OutOfMemoryError: no room",
        "free memory",
    ),
    "a broken calibration": (
        {"calibration": None, "calibration_warning": "calibration ignored, x is broken"},
        "calibration",
        "x is broken",
        "triton-offload calibrate",
    ),
}


@pytest.mark.parametrize(("changes", "name", "what", "advice"), PROBLEMS.values(), ids=PROBLEMS)
def test_what_is_wrong_is_one_problem_with_advice(changes, name, what, advice):
    findings = examine(replace(SOUND, **changes))
    problems = [finding for finding in findings if finding.status is Status.PROBLEM]
    assert [problem.name for problem in problems] == [name]
    assert what in problems[0].what
    assert advice in problems[0].advice
    assert "\n" not in problems[0].advice
    assert not sound(findings)


NOTES = {
    "a slot that can do less than the card": (
        {"link": Link(LinkWidth(4, 16), LinkWidth(5, 16), LinkWidth(4, 16))},
        "link",
        "Gen4 x16, all that the slot can do; the card can do Gen5 x16",
    ),
    "no link to be seen": ({"link": None}, "link", "does not show"),
    "a limit that may count": (
        {"locked_limit": 8 * GIB},
        "pinned memory",
        "64.0 GiB are to be pinned, and ulimit -l is 8.0 GiB",
    ),
    "no huge pages": ({"huge_pages": "never"}, "huge pages", "no huge pages (never)"),
    "not calibrated": ({"calibration": None}, "calibration", "published figures"),
}


@pytest.mark.parametrize(("changes", "name", "what"), NOTES.values(), ids=NOTES)
def test_what_could_be_better_is_a_note_and_not_wrong(changes, name, what):
    findings = examine(replace(SOUND, **changes))
    notes = [finding for finding in findings if finding.status is not Status.OK]
    assert [(note.name, note.status) for note in notes] == [(name, Status.NOTE)]
    assert what in notes[0].what
    assert sound(findings)


def test_a_machine_without_a_gpu_is_sound_whatever_only_a_gpu_needs():
    findings = examine(
        replace(HOST, locked_limit=1024, shm_bytes=1024, huge_pages="never", pool_nodes={0: 1})
    )
    assert sound(findings)
    assert findings[0].what.startswith("no GPU here: the host device is used")


def test_a_limit_that_the_driver_does_not_apply_is_no_problem():
    findings = examine(replace(SOUND, locked_limit=8 << 20))
    (pinning,) = [finding for finding in findings if finding.name == "pinned memory"]
    assert (pinning.status, "does not apply" in pinning.what) == (Status.OK, True)


def by_direction(store: tuple[float, ...], load: tuple[float, ...]) -> tuple[Speed, ...]:
    """Plain copies of 4 KiB pages, of 64 KiB pages and so on."""
    ways = zip(Direction, (store, load), strict=True)
    limits = [
        Speed(way, 4096 * 16**i, None, speed) for way, it in ways for i, speed in enumerate(it)
    ]
    return (*without(None), *limits)


@pytest.mark.parametrize(
    ("speeds", "problems"),
    [
        (by_direction((55.0,), (20.0,)), ["plain copy"]),
        (by_direction((20.0,), (55.0,)), ["plain copy"]),
        (by_direction((20.0, 55.0), (55.0, 20.0)), []),  # the best of several page sizes
        (by_direction((37.9,), (37.9,)), []),  # 63 * 0.6 = 37.8
        (by_direction((37.7,), (37.9,)), ["plain copy"]),
    ],
)
def test_one_slow_direction_is_enough(speeds, problems):
    findings = examine(replace(SOUND, speeds=speeds))
    assert [f.name for f in findings if f.status is Status.PROBLEM] == problems


def test_zero_copy_that_is_lost_is_for_pinning_to_explain():
    findings = examine(replace(SOUND, speeds=without(Path.ZERO_COPY), pinned_bytes=0))
    problems = [finding.name for finding in findings if finding.status is Status.PROBLEM]
    assert problems == ["pinned memory"]
    (paths,) = [finding for finding in findings if finding.name == "paths"]
    assert paths.what == "staged, copy_engine"


def test_a_pool_that_just_fits_is_no_problem():
    size = SOUND.host_bytes
    just = replace(SOUND, memory_limit=size, memory_available=size, shm_bytes=size)
    assert sound(examine(just))
    assert not sound(examine(replace(just, memory_limit=size - 1)))
    assert not sound(examine(replace(just, memory_available=size - 1)))
    assert not sound(examine(replace(just, shm_bytes=size - 1)))


@pytest.mark.parametrize(
    ("name", "version", "fits"),
    [
        ("vllm", "0.32.0", True),
        ("vllm", "0.321.0", False),
        ("vllm", "0.3.2", False),
        ("torch", "2.11.0", True),
        ("torch", "2.9.1", False),
        ("torch", "10.0", True),
        ("triton", "3.10", True),
        ("triton", "3", False),
    ],
)
def test_a_version_is_known_by_two_whole_numbers(name, version, fits):
    findings = examine(replace(SOUND, versions={**SOUND.versions, name: version}))
    assert sound(findings) is fits


def test_vllm_is_not_needed():
    findings = examine(replace(SOUND, versions={**SOUND.versions, "vllm": None}))
    assert sound(findings)


def test_versions_are_those_that_the_package_asks_for():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert f"torch>={doctor.TORCH}" in project["dependencies"]
    assert any(name.startswith(f"triton>={doctor.TRITON};") for name in project["dependencies"])
    tree = ast.parse((ROOT / "triton_offload" / "vllm" / "versions.py").read_text())
    (supported,) = [
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and node.targets[0].id == "SUPPORTED_VERSIONS"
    ]
    assert supported == doctor.VLLM


# -- readers --


@pytest.fixture
def roots(tmp_path):
    return Roots(tmp_path / "sys", tmp_path / "proc", tmp_path)


def write(root: FilePath, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")


def plug_in(roots: Roots, now: tuple[str, int], card: tuple[str, int], slot: tuple[str, int]):
    """A card in a slot, as sysfs shows both."""
    port = roots.sys / "devices/pci0000:16/0000:16:01.0"
    write(
        port / GPU,
        {
            "current_link_speed": f"{now[0]} GT/s PCIe",
            "current_link_width": f"{now[1]}",
            "max_link_speed": f"{card[0]} GT/s PCIe",
            "max_link_width": f"{card[1]}",
            "numa_node": "1",
        },
    )
    write(port, {"max_link_speed": f"{slot[0]} GT/s PCIe", "max_link_width": f"{slot[1]}"})
    devices = roots.sys / "bus/pci/devices"
    devices.mkdir(parents=True)
    (devices / GPU).symlink_to(port / GPU)


def test_a_link_is_read_from_card_and_slot(roots):
    plug_in(roots, ("8.0", 8), ("32.0", 16), ("32.0", 16))
    link = machine.read_link(roots.sys, GPU)
    assert link == Link(LinkWidth(3, 8), LinkWidth(5, 16), LinkWidth(5, 16))
    assert str(link.best) == "Gen5 x16"
    assert node_of_card(GPU, roots.sys) == 1
    assert round(link.now.gb_per_s, 1) == 7.9


def test_nvidia_smi_tells_the_link_too():
    link = machine.parse_link("3, 8, 5, 16\n")
    assert link == Link(LinkWidth(3, 8), LinkWidth(5, 16))
    assert machine.parse_link("[N/A], [N/A], [N/A], [N/A]\n") is None
    assert machine.parse_link("") is None


def test_cards_are_seen_without_a_driver(roots):
    devices = roots.sys / "bus/pci/devices"
    for name, vendor, kind in [
        (GPU, "0x10de", "0x030200"),
        ("0000:18:00.0", "0x10de", "0x068000"),  # a bridge of NVIDIA's
        ("0000:19:00.0", "0x1002", "0x030000"),
    ]:
        write(devices / name, {"vendor": vendor, "class": kind})
    assert machine.read_cards(roots.sys) == [GPU]
    assert machine.read_cards(roots.proc) == []


def test_a_slot_that_can_do_less_than_what_runs_is_not_believed(roots):
    plug_in(roots, ("32.0", 16), ("32.0", 16), ("2.5", 1))
    link = machine.read_link(roots.sys, GPU)
    assert link.best == LinkWidth(5, 16)


@pytest.mark.parametrize(
    ("card", "slot", "best"),
    [
        (LinkWidth(5, 16), LinkWidth(4, 8), LinkWidth(4, 8)),
        (LinkWidth(4, 8), LinkWidth(5, 16), LinkWidth(4, 8)),
        (LinkWidth(5, 8), LinkWidth(4, 16), LinkWidth(4, 8)),
        (LinkWidth(4, 16), LinkWidth(5, 8), LinkWidth(4, 8)),
    ],
)
def test_what_card_and_slot_can_do_together_is_the_less_of_both(card, slot, best):
    assert Link(LinkWidth(3, 4), card, slot).best == best


@pytest.mark.parametrize("slot", ["2.5", "16.0", "32.0"])
def test_a_link_has_one_identity_idle_or_not(roots, slot):
    plug_in(roots, ("2.5", 16), ("32.0", 16), (slot, 16))
    idle = machine.read_link(roots.sys, GPU)
    busy = replace(idle, now=LinkWidth(5, 16))
    assert idle.identity == busy.identity


def test_what_the_system_does_not_say_is_unknown(roots):
    assert machine.read_link(roots.sys, GPU) is None
    assert node_of_card(GPU, roots.sys) is None
    assert machine.read_memory_limit(roots.sys, roots.proc) is None
    assert machine.read_memory_available(roots.proc) is None
    assert machine.read_locked_limit(roots.proc) is None
    assert machine.read_nodes_of(roots.proc, 4096) == {}
    assert machine.read_huge_pages(roots.sys) == ""
    assert machine.read_driver(roots.proc) is None
    plug_in(roots, ("Unknown", 0), ("Unknown", 0), ("Unknown", 255))
    assert machine.read_link(roots.sys, GPU) is None
    write(roots.sys / "bus/pci/devices" / GPU, {"numa_node": "-1"})
    assert node_of_card(GPU, roots.sys) is None


@pytest.mark.parametrize(
    ("cgroup", "files", "limit"),
    [
        ("0::/", {"memory.max": "8589934592"}, 8 * GIB),
        ("0::/", {"memory.max": "max"}, None),
        ("0::/a/b", {"a/memory.max": "1073741824", "a/b/memory.max": "max"}, GIB),
        ("0::/a/b", {"a/memory.max": "8589934592", "a/b/memory.max": "1073741824"}, GIB),
        ("0::/../../outside", {"memory.max": "1073741824"}, GIB),
        ("4:memory:/a", {"memory/a/memory.limit_in_bytes": "1073741824"}, GIB),
        ("4:memory:/a", {"memory/memory.limit_in_bytes": "9223372036854771712"}, None),
        ("3:cpuset:/a", {"a/memory.max": "1073741824"}, None),
    ],
)
def test_the_memory_limit_is_the_least_of_the_control_groups_above(roots, cgroup, files, limit):
    write(roots.proc, {"self/cgroup": cgroup})
    write(roots.sys / "fs/cgroup", files)
    assert machine.read_memory_limit(roots.sys, roots.proc) == limit


def test_proc_is_read(roots):
    write(
        roots.proc,
        {
            "meminfo": "MemTotal:       32 kB\nMemAvailable:       16 kB",
            "self/limits": "Limit      Soft Limit  Hard Limit  Units\n"
            "Max locked memory         65536                131072               bytes",
            "driver/nvidia/version": "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  "
            "580.65.06  Release Build  (builder)  Sun Jul 27\nGCC version:  gcc 12.2.0",
            "cpuinfo": "processor\t: 0\nmodel name\t: Some CPU 9000\n",
            "self/numa_maps": "7f0000000000 default file=/dev/zero dirty=3 N0=1 N1=2 "
            "kernelpagesize_kB=4\n7f0000003000 default anon=5 N0=5",
        },
    )
    write(roots.sys, {"kernel/mm/transparent_hugepage/shmem_enabled": "always [advise] never"})
    assert machine.read_memory_available(roots.proc) == 16 * 1024
    assert machine.read_locked_limit(roots.proc) == 65536
    assert machine.read_driver(roots.proc) == "580.65.06"
    assert machine.read_cpu(roots.proc) == "Some CPU 9000"
    assert machine.read_nodes_of(roots.proc, 0x7F0000000000) == {0: 1, 1: 2}
    assert machine.read_nodes_of(roots.proc, 0x7F0000003000) == {0: 5}
    assert machine.read_huge_pages(roots.sys) == "advise"
    write(roots.proc, {"self/limits": "Max locked memory         unlimited  unlimited  bytes"})
    assert machine.read_locked_limit(roots.proc) is None


def test_facts_of_this_machine_name_every_path_beside_the_limit(roots):
    steps = []
    found = gather(CPU, GIB, lambda done, total: steps.append((done, total)), roots, 8 << 20)
    assert found.failure == ""
    assert found.has_gpu is False
    assert {(s.direction, s.path) for s in found.speeds} == {
        (way, path) for way in Direction for path in (*Path, None)
    }
    assert all(speed.gb_per_s > 0 for speed in found.speeds)
    assert {speed.path for speed in found.speeds if speed.chosen} == {Path.ZERO_COPY}
    assert steps == [(1, 3), (2, 3), (3, 3)]
    assert found.versions["torch"] == torch.__version__
    assert found.versions["cuda-bindings"] is None or found.versions["cuda-bindings"][0].isdigit()
    assert found.shm_bytes > 0
    assert (found.memory_available, found.memory_limit) == (None, None)  # made-up roots are empty


def test_the_path_of_auto_is_that_of_each_direction(roots, monkeypatch):
    load_rule = PathRule(Direction.LOAD, 0, 0, Path.STAGED)
    table = PathTable(Path.COPY_ENGINE, (load_rule,))
    monkeypatch.setattr(facts, "read", lambda *args: Calibration(table))
    found = gather(CPU, GIB, lambda done, total: None, roots, 8 << 20)
    chosen = {(speed.direction, speed.path) for speed in found.speeds if speed.chosen}
    assert chosen == {(Direction.STORE, Path.COPY_ENGINE), (Direction.LOAD, Path.STAGED)}


def test_shared_memory_is_all_there_is_of_it(monkeypatch, tmp_path):
    stat = SimpleNamespace(f_blocks=1000, f_frsize=4096, f_bsize=512, f_bavail=3, f_bfree=5)
    monkeypatch.setattr(facts.os, "statvfs", lambda directory: stat)
    assert facts._size_of(tmp_path) == 4096 * 1000


def test_a_trial_that_could_not_be_pinned_says_so(roots, monkeypatch):
    device = HostDevice()
    monkeypatch.setattr(device, "register", lambda host: False, raising=False)
    monkeypatch.setattr(facts, "device_for", lambda *args: device)
    found = gather(CPU, GIB, lambda done, total: None, roots, 8 << 20)
    assert (found.failure, found.pinned_bytes) == ("", 0)
    assert Path.ZERO_COPY not in {speed.path for speed in found.speeds}


def test_a_trial_that_fails_is_a_fact(roots, monkeypatch):
    def fail(*args):
        raise MemoryError("no room\nand many lines more")

    monkeypatch.setattr(facts, "Rig", fail)
    assert gather(CPU, GIB, lambda done, total: None, roots).failure == "MemoryError: no room"


def test_facts_of_a_card_are_its_slot_its_node_and_where_the_pool_went(roots, monkeypatch):
    plug_in(roots, ("8.0", 8), ("32.0", 16), ("32.0", 16))
    monkeypatch.setattr(facts, "device_for", lambda *args: HostDevice())
    monkeypatch.setattr(machine, "identify", lambda *args: SOUND.identity)
    monkeypatch.setattr(machine, "bus_id", lambda device: GPU)
    monkeypatch.setattr(machine, "read_nodes_of", lambda proc, address: {0: address % 4096 + 7})
    found = gather(torch.device("cuda"), GIB, lambda done, total: None, roots, 8 << 20)
    assert (found.failure, found.node, found.pool_nodes) == ("", 1, {0: 7})
    assert found.link == Link(LinkWidth(3, 8), LinkWidth(5, 16), LinkWidth(5, 16))
    assert found.pinned_bytes == 8 << 20
    names = {finding.name for finding in examine(found) if finding.status is Status.PROBLEM}
    assert names >= {"link", "NUMA"}


def test_a_broken_calibration_is_a_fact(roots, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    file = cache_file(machine.identify(CPU, roots))
    write(file.parent, {file.name: "{"})
    found = gather(CPU, GIB, lambda done, total: None, roots, 8 << 20)
    assert "is broken" in found.calibration_warning


# -- the command --


def run(monkeypatch, found: Facts, *args: str):
    asked = []

    def gathered(device, host_bytes, progress):
        asked.append(host_bytes)
        progress(1, 1)
        return replace(found, host_bytes=host_bytes)

    monkeypatch.setattr(cli_machine, "gather", gathered)
    done = CliRunner().invoke(app, ["doctor", "--device", "cpu", *args], env={"COLUMNS": "200"})
    return done, asked


def test_a_sound_machine_exits_with_0_and_shows_its_speeds(monkeypatch):
    done, asked = run(monkeypatch, SOUND, "--host-bytes", "64GiB")
    assert (done.exit_code, asked) == (0, [64 * GIB])
    assert "Gen5 x16" in done.stdout
    assert "55.00" in done.stdout
    assert "zero_copy" in done.stdout


@pytest.mark.parametrize("changes", [p[0] for p in PROBLEMS.values()], ids=PROBLEMS)
def test_a_problem_exits_with_1_and_one_line_of_advice(monkeypatch, changes):
    done, _ = run(monkeypatch, replace(SOUND, **changes), "--host-bytes", "64GiB")
    assert done.exit_code == 1
    assert "problem" in done.stdout
    assert done.stdout.count("-> ") == 1


def test_what_the_system_says_is_printed_as_it_is(monkeypatch):
    done, _ = run(monkeypatch, replace(HOST, failure="boom [bold] [/nope]"))
    assert "trial transfers failed: boom [bold] [/nope]" in done.stdout


@pytest.mark.parametrize("width", [40, 60])
def test_a_narrow_terminal_cuts_nothing(monkeypatch, width):
    monkeypatch.setattr(cli_machine, "gather", lambda device, size, progress: SOUND)
    arguments = ["doctor", "--device", "cpu"]
    done = CliRunner().invoke(app, arguments, env={"COLUMNS": str(width)})
    assert "…" not in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= width
    findings, speeds = columns(done.stdout)
    found = examine(SOUND)
    assert findings == [
        "ok" * len(found),
        without_spaces(*(finding.name for finding in found)),
        without_spaces(*(finding.what for finding in found)),
    ]
    paths = [f"{path.value}40.0040.00" for path in Path]
    assert speeds == [
        "directionstoreload",
        "pagesof4.0KiB4.0KiB",
        *paths,
        "plaincopy55.0055.00",
    ]


def test_each_speed_is_shown_in_its_place(monkeypatch):
    speeds = tuple(
        Speed(way, size, path, float(number), path is Path.STAGED)
        for number, (way, size, path) in enumerate(
            itertools.product(Direction, (4096, 65536), (*Path, None)), 10
        )
    )
    done, _ = run(monkeypatch, replace(SOUND, speeds=speeds[:-2]))
    *_, shown = columns(done.stdout)
    assert shown == [
        "directionstorestoreloadload",
        "pagesof4.0KiB64.0KiB4.0KiB64.0KiB",
        "staged10.00*14.00*18.00*22.00*",
        "zero_copy11.0015.0019.0023.00",
        "copy_engine12.0016.0020.00-",
        "plaincopy13.0017.0021.00-",
    ]


def test_json_and_nothing_else(monkeypatch):
    done, _ = run(monkeypatch, replace(SOUND, shm_bytes=0), "--json")
    told = json.loads(done.stdout)
    assert (done.exit_code, told["ok"]) == (1, False)
    (problem,) = [finding for finding in told["findings"] if finding["status"] == "problem"]
    assert problem["name"] == "shared memory"
    assert problem["advice"]
    assert told["speeds"][0] == {
        "direction": "store",
        "page_bytes": 4096,
        "path": "staged",
        "gb_per_s": 40.0,
        "chosen": False,
    }
    assert told["machine"]["card"] == "NVIDIA H100"


def test_a_size_that_is_none_exits_with_2(monkeypatch):
    done, asked = run(monkeypatch, SOUND, "--host-bytes", "much")
    assert (done.exit_code, asked) == (2, [])
    assert done.stderr.startswith("triton-offload doctor: --host-bytes: expected a number of bytes")


def test_on_a_machine_without_a_gpu_a_remark_is_not_wrong(monkeypatch):
    done, _ = run(monkeypatch, HOST)
    assert done.exit_code == 0
    assert "no GPU here: the host device is used" in done.stdout
