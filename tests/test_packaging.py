"""What is built and installed: wheel and sdist, also where the symlink to the kernels is lost."""

from __future__ import annotations

import email
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

from triton_offload import __version__
from triton_offload.device import native

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NAME = f"triton_offload-{__version__}"
#: what a checkout is made of
PARTS = (".ci", "bench", "docs", "examples", "kernels", "tests", "tools", "triton_offload")
FILES = ("*.md", "LICENSE", "MANIFEST.in", "Makefile", "pyproject.toml")
LINK = "triton_offload/kernels"
_BUILD = """
import sys
from setuptools import build_meta
print(getattr(build_meta, f"build_{sys.argv[1]}")(sys.argv[2]))
"""
_STORE_AND_LOAD = """
import os, sys
target = sys.argv[1]
os.environ["XDG_CACHE_HOME"] = os.path.join(target, "cache")  # so that it compiles
sys.path.insert(0, target)
import torch
import triton_offload
import triton_offload.kernels.pages as pages
from triton_offload.device import native
assert triton_offload.__file__.startswith(target), triton_offload.__file__
assert pages.__file__.startswith(target), pages.__file__
tensors = [torch.randint(0, 256, (8, 64), dtype=torch.uint8) for _ in range(2)]
before = [tensor.clone() for tensor in tensors]
with triton_offload.KVOffloader(tensors, "4KiB", blocks_per_chunk=2) as offloader:
    offloader.store([b"a", b"b"], [0, 3, 5]).wait()
    for tensor in tensors:
        tensor.fill_(0xA5)
    assert native.SOURCE.is_relative_to(target) and native.load().failure == sys.argv[2]
    assert offloader.lookup([b"a", b"b"]) == 2
    offloader.load([b"a", b"b"], [7, 1, 2]).wait()
for now, then in zip(tensors, before, strict=True):
    assert torch.equal(now[[7, 1, 2]], then[[0, 3, 5]])
    assert bool((now[[0, 3, 4, 5, 6]] == 0xA5).all())
"""


def python(*arguments: object, cwd: Path) -> str:
    """Runs Python with neither the environment's paths nor the checkout's."""
    command = [sys.executable, "-I", *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build(kind: str, tree: Path, place: Path) -> Path:
    """Calls setuptools itself: nothing is downloaded, and no other package needed."""
    return place / python("-c", _BUILD, kind, place, cwd=tree).splitlines()[-1]


def copy_of_project(place: Path, kernels: str) -> Path:
    """`kernels`: whether triton_offload/kernels is the link, or what a zip may make of one."""
    place.mkdir()
    ignored = shutil.ignore_patterns("__pycache__", ".*", "out")
    for part in PARTS:
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, place / part, symlinks=True, ignore=ignored)
    for file in (file for pattern in FILES for file in ROOT.glob(pattern)):
        shutil.copy2(file, place)
    link = place / LINK
    shutil.rmtree(link) if link.is_dir() and not link.is_symlink() else link.unlink(missing_ok=True)
    if kernels == "a link":
        link.symlink_to("../kernels")
    else:
        link.write_text("../kernels")
    return place


def source_of(tree: Path) -> dict[str, bytes]:
    """Every file by its path, the kernels under theirs."""
    return {
        str(file.relative_to(tree)): file.read_bytes()
        for file in tree.rglob("*")
        if file.is_file() and not file.is_relative_to(tree / LINK)
    }


def files_of(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        assert not any(info.external_attr >> 16 & 0o170000 == 0o120000 for info in archive.filelist)
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture(scope="module", params=["a link", "a text file"])
def built(request, tmp_path_factory):
    """(the files of the tree, the wheel, the sdist)"""
    place = tmp_path_factory.mktemp("built")
    tree = copy_of_project(place / "tree", request.param)
    source = source_of(tree)
    return source, build("wheel", tree, place), build("sdist", tree, place)


def test_the_wheel_holds_every_module_and_nothing_else(built):
    source, wheel, _ = built
    expected = {
        name.replace("kernels/", LINK + "/") if name.startswith("kernels/") else name: data
        for name, data in source.items()
        if name.startswith(("triton_offload/", "kernels/"))
    }
    needed = {"kernels/pages.py", "device/host_pages.c", "py.typed"}
    assert {f"triton_offload/{name}" for name in needed} <= set(expected)
    found = files_of(wheel)
    assert {n: data for n, data in found.items() if ".dist-info/" not in n} == expected
    notes = {name.partition("/")[2] for name in found if ".dist-info/" in name}
    assert {"METADATA", "entry_points.txt", "licenses/LICENSE"} <= notes


def test_the_sdist_holds_what_its_own_tests_need(built):
    source, _, sdist = built
    with tarfile.open(sdist) as archive:
        members = archive.getmembers()
        assert all(member.isfile() or member.isdir() for member in members)
        found = {
            member.name.removeprefix(f"{NAME}/"): archive.extractfile(member).read()
            for member in members
            if member.isfile()
        }
    made = {n for n in found if n.startswith("triton_offload.egg-info/")} | {
        "PKG-INFO",
        "setup.cfg",
    }
    assert {name: data for name, data in found.items() if name not in made} == source
    needed = {"Makefile", "LICENSE", "kernels/pages.py", "tests/breaks.py", "bench/timing.py"}
    assert needed <= set(source)


def test_a_wheel_of_the_sdist_is_the_same(built, tmp_path):
    _, wheel, sdist = built
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    again = files_of(build("wheel", tmp_path / NAME, tmp_path))
    assert again == files_of(wheel)


@pytest.mark.parametrize("built", ["a text file"], indirect=True)  # the wheels are the same
def test_the_wheel_installs_and_moves_bytes(built, tmp_path):
    _, wheel, _ = built
    target = tmp_path / "site"
    options = ["--quiet", "--no-deps", "--no-index", "--no-compile", "--target", target]
    python("-m", "pip", "--disable-pip-version-check", "install", *options, wheel, cwd=tmp_path)
    assert (target / "bin" / "triton-offload").is_file()
    python("-c", _STORE_AND_LOAD, target, native.load().failure, cwd=tmp_path)


def test_metadata_say_what_the_project_does(built):
    _, wheel, _ = built
    found = email.message_from_bytes(files_of(wheel)[f"{NAME}.dist-info/METADATA"])
    assert (found["Name"], found["Version"]) == ("triton-offload", __version__)
    assert found["License-Expression"] == "Apache-2.0"
    assert found.get_all("License-File") == ["LICENSE"]
    assert found["Author"] == "The triton-offload authors"
    assert found["Requires-Python"] == PROJECT["requires-python"]
    assert found.get_all("Provides-Extra") == ["cuda", "metrics"]
    assert found.get_all("Classifier") == PROJECT["classifiers"]
    assert found["Keywords"]
    assert found["Description-Content-Type"] == "text/markdown"
    assert found.get_payload().startswith("# triton-offload\n")
    assert not {"Project-URL", "Home-page", "Download-URL", "Author-email"} & set(found)


def test_what_developers_install_has_the_extras():
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["dependency-groups"]
    for extra, wanted in PROJECT["optional-dependencies"].items():
        assert set(wanted) <= set(groups["dev"]), extra


def test_the_version_is_the_same_everywhere():
    assert PROJECT["version"] == __version__


def test_the_license_is_the_text_of_apache_2_0():
    words = " ".join((ROOT / "LICENSE").read_text().split())
    assert words.startswith("Apache License Version 2.0, January 2004 http://www.apache.org/")
    assert words.count(" TERMS AND CONDITIONS ") == 2  # their beginning and their end
    assert words.endswith("limitations under the License.")
