"""The host device's C code: compiled once, by many at once, kept whole; and what is said and done
where it can't be."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from logs import logged, warned

from triton_offload import KVOffloader
from triton_offload.device import host_pages, native
from triton_offload.device.host import HostDevice
from triton_offload.kernels.table import PageTable

ROOT = Path(__file__).parent.parent
COMPILED = native.load().failure == ""

needs_compiler = pytest.mark.skipif(not COMPILED, reason=native.load().failure)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where libraries are kept: nothing yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CC", raising=False)
    return tmp_path / "cache" / "triton-offload"


def anew() -> native.Native:
    """As a new process loads it."""
    return native.load.__wrapped__()


def compiler(place: Path, text: str) -> str:
    """A script that is called as a compiler is: `$out` is the file that it is to write."""
    script = place / "compiler"
    find_out = 'out=; last=\nfor word; do [ "$last" = -o ] && out=$word; last=$word; done\n'
    script.write_text(f"#!/bin/sh\n{find_out}{text}\n")
    script.chmod(0o755)
    return str(script)


def works(found: native.Native, monkeypatch) -> bool:
    table = PageTable([torch.arange(64, dtype=torch.uint8).view(8, 8)])
    slots = torch.zeros(8, 8, dtype=torch.uint8)
    with monkeypatch.context() as patch:
        patch.setattr(native, "load", lambda: found)
        host_pages.gather(table, torch.tensor([3, 5]), slots, torch.tensor([0, 1]), 0)
    return (
        found.move_pages is not None and slots[:2].tolist() == table.pages[0].view[[3, 5]].tolist()
    )


@needs_compiler
def test_it_is_compiled_once_and_kept(folder, monkeypatch):
    first = anew()
    assert works(first, monkeypatch)
    monkeypatch.setenv("CC", "no-such-compiler")
    assert works(anew(), monkeypatch)
    (kept,) = folder.iterdir()
    assert kept.name == f"host-pages-{native._key()}.so"


def test_it_is_loaded_once_per_process():
    assert native.load() is native.load()


@needs_compiler
def test_another_source_or_system_is_another_file(folder, tmp_path, monkeypatch):
    found = [native._key()]
    changed = tmp_path / "host_pages.c"
    changed.write_text(native.SOURCE.read_text() + "\n")
    for name, value in (("SOURCE", changed), ("_FLAGS", (*native._FLAGS, "-g"))):
        with monkeypatch.context() as patch:
            patch.setattr(native, name, value)
            found.append(native._key())
    monkeypatch.setattr(native.sysconfig, "get_config_var", lambda name: "another")
    found.append(native._key())
    assert len(set(found)) == 4


@needs_compiler
def test_two_processes_that_compile_at_once_both_have_it(folder, tmp_path):
    """Each compiler begins to write, and goes on when the other has begun."""
    command = " ".join(native._compiler())
    script = compiler(
        tmp_path,
        f'echo part > "$out"; ls {folder}/*.so > "{tmp_path}/begun-$$" 2> /dev/null\n'
        f'until [ $(ls "{tmp_path}" | grep -c begun) = 2 ]; do sleep 0.01; done\n'
        f'exec {command} "$@"',
    )
    program = "from triton_offload.device import native; print(native.load().failure)"
    environment = {**os.environ, "CC": script, "PYTHONPATH": str(ROOT)}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    assert [process.communicate(timeout=120)[0] for process in started] == ["\n"] * 2
    assert [file.read_text() for file in tmp_path.glob("begun-*")] == ["", ""]  # none to load yet
    (kept,) = folder.iterdir()  # and nothing that was in the making
    ctypes.CDLL(str(kept))


@needs_compiler
@pytest.mark.parametrize("text", ["", "junk"])
def test_a_kept_file_that_does_not_load_is_made_anew(folder, text, monkeypatch):
    folder.mkdir(parents=True)
    file = folder / f"host-pages-{native._key()}.so"
    file.write_text(text)
    assert works(anew(), monkeypatch)
    assert [*folder.iterdir()] == [file]
    monkeypatch.setenv("CC", "no-such-compiler")
    assert works(anew(), monkeypatch)


@needs_compiler
def test_where_nothing_can_be_kept_it_is_compiled_for_the_process(folder, monkeypatch):
    folder.parent.write_text("a file in the folder's place")
    assert works(anew(), monkeypatch)


@needs_compiler
def test_the_compiler_is_the_users(folder, tmp_path, monkeypatch):
    command = " ".join(native._compiler())
    script = compiler(tmp_path, f'echo "$1" > "{tmp_path}/first"; shift; exec {command} "$@"')
    monkeypatch.setenv("CC", f"{script} --with-words")
    assert works(anew(), monkeypatch)
    assert (tmp_path / "first").read_text() == "--with-words\n"


# -- where there is none --

BROKEN = {
    "none": ("no-such-compiler", "no-such-compiler is not installed"),
    "fails": ("echo 'x.c:1: error: injected' >&2; exit 3", "exited with 3: x.c:1: error: injected"),
    "junk": ('echo junk > "$out"', "OSError"),
    "nothing": ("exit 0", "OSError"),
    "other": (
        'echo "int other;" > "$out.c"; cc -shared -o "$out" "$out.c"; rm "$out.c"',
        "AttributeError: .*move_pages",
    ),
    "never ends": ("exec sleep 5", "timed out"),
}


@pytest.fixture
def broken(request, folder, tmp_path, monkeypatch):
    text, why = BROKEN[request.param]
    name = text if request.param == "none" else compiler(tmp_path, text)
    monkeypatch.setenv("CC", name)
    monkeypatch.setattr(native, "_TIMEOUT_SECONDS", 1 if request.param == "never ends" else 60)
    return why


@pytest.mark.parametrize(
    "broken",
    [pytest.param(name, marks=[needs_compiler] * (name == "other")) for name in BROKEN],
    indirect=True,
)
def test_without_a_compiler_it_is_said_once_and_bytes_move(broken, folder, monkeypatch):
    found = anew()
    assert found.move_pages is None
    monkeypatch.setattr(native, "load", lambda: found)
    caches = [torch.arange(8 * 100, dtype=torch.int64).view(torch.uint8).view(64, 100)]
    before = caches[0].clone()
    with warned("device.host", f"could not be compiled.*{broken}"):
        offloader = KVOffloader(caches, "4KiB", verify="load")
    with logged() as records, offloader:
        offloader.store([b"a", b"b"], [3, 5]).wait()
        caches[0].fill_(0xA5)
        offloader.load([b"a", b"b"], [0, 1]).wait()
        (limit,) = offloader.stats().limits
    assert records == []
    assert limit.startswith("copies of pages could not be compiled")
    assert torch.equal(caches[0][:2], before[[3, 5]])
    assert bool((caches[0][2:] == 0xA5).all())
    assert not [*folder.glob("*.tmp")]


@pytest.mark.parametrize(("name", "value"), [("byteorder", "big"), ("sizeof", lambda kind: 4)])
def test_other_processors_do_without(folder, name, value, monkeypatch):
    monkeypatch.setattr(sys if name == "byteorder" else native.ctypes, name, value)
    found = anew()
    assert found.move_pages is None
    assert "little-endian processors of 64 bits" in found.failure
    assert not folder.exists()


def test_nothing_is_compiled_before_there_is_a_device(folder):
    program = (
        "import sys, triton_offload.device.host, triton_offload.device.host_pages\n"
        "from pathlib import Path\n"
        "assert not Path(sys.argv[1]).exists()\n"
        "triton_offload.device.host.HostDevice()\n"
        "assert Path(sys.argv[1]).exists() == (sys.argv[2] == 'True')"
    )
    command = [sys.executable, "-c", program, str(folder), str(COMPILED)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(command, env=environment, check=True, timeout=120)


@needs_compiler
def test_where_it_is_compiled_nothing_is_said():
    with logged() as records:
        assert HostDevice().limits == ()
    assert records == []


@needs_compiler
def test_the_source_is_clean(tmp_path):
    warnings = ["-Wall", "-Wextra", "-Wpedantic", "-Wconversion", "-Werror"]
    command = [*native._compiler(), *native._FLAGS, *warnings, "-o", str(tmp_path / "checked.so")]
    done = subprocess.run(
        [*command, str(native.SOURCE)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
