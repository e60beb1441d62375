"""Every file in examples/ is a program that ends well, and is typed."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from triton_offload import KVOffloader
from triton_offload.job import TransferFailedError

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
#: what makes a long one short
ARGUMENTS = {"tiny_engine.py": ["--tiny"]}


def python(*arguments: object, cwd: Path) -> str:
    """What Python prints, from this checkout; warnings are errors, as in the tests."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(cwd / "cache")}
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda file: file.stem)
def test_an_example_runs_and_ends_well(example, tmp_path):
    python("-W", "error", example, *ARGUMENTS.get(example.name, []), cwd=tmp_path)


def test_the_examples_are_typed():
    # With the settings, and what is kept, of `make check`: torch alone takes half a minute anew.
    assert "Success" in python("-m", "mypy", "--strict", *EXAMPLES, cwd=ROOT)


def test_the_tiny_engine_loads_what_it_says(tmp_path):
    """An engine whose loads bring nothing ends with an error: its pages are poisoned."""
    source = (ROOT / "examples" / "tiny_engine.py").read_text()
    line = "            self.offloader.load(keys[here : here + hits], into).wait()\n"
    assert source.count(line) == 1
    broken = tmp_path / "broken.py"
    broken.write_text(source.replace(line, ""))
    with pytest.raises(AssertionError, match="WRONG ANSWERS"):
        python(broken, "--tiny", cwd=tmp_path)


def test_the_file_tier_keeps_partial_chunks_and_notices_what_is_broken(tmp_path):
    spec = importlib.util.spec_from_file_location("file_tier", ROOT / "examples" / "file_tier.py")
    file_tier = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "file_tier", file_tier)  # dataclasses look themselves up
        spec.loader.exec_module(file_tier)
    pages = torch.randint(256, (1, 8, 16), dtype=torch.uint8)
    was = pages.clone()
    with KVOffloader([*pages], "1KiB", blocks_per_chunk=2) as offloader:
        tier = file_tier.FileTier(offloader, tmp_path)
        offloader.store([b"a"], [1]).wait(60)
        tier.save([b"a"]).wait(60)
        assert tier._files.blocks(b"a") == 0b01
        offloader.store([b"a", b"b"], [1, 2, 3, 4]).wait(60)
        tier.save([b"a", b"b"]).wait(60)
        assert tier._files.blocks(b"a") == 0b11, "a chunk that has grown is written anew"
        assert tier.save([b"a", b"b"]).wait(60).num_bytes == 0
        offloader.reset()
        file = tmp_path / f"{b'b'.hex()}.kv"
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
        (tmp_path / f"{b'c'.hex()}.kv").write_bytes(b"short")
        assert tier.lookup([b"a", b"b", b"c"]) == 2
        with pytest.raises(TransferFailedError, match="not what was written"):
            tier.fetch([b"b"]).wait(60)
        assert tier.lookup([b"a", b"b"]) == 1
        tier.fetch([b"a", b"b", b"c"]).wait(60)
        offloader.load([b"a"], [6, 5]).wait(60)
        assert torch.equal(pages[0, [6, 5]], was[0, [1, 2]])
        assert not list(tmp_path.glob("*.new"))
