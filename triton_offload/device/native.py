"""The C code of the host device: compiled where it is first used, by the compiler at hand (which
Triton needs, too), and kept for the next process.

It is compiled for any processor of the machine's architecture, and kept by a hash of all that it is
made of. (`-march=native` would be for one model alone, and copied no faster.)
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from triton_offload.cache_files import cache_folder, whole
from triton_offload.kernels.table import ROW_BYTES

SOURCE = Path(__file__).with_name("host_pages.c")
_FLAGS = ("-std=c11", "-O3", "-fPIC", "-shared", "-pthread", f"-DROW_BYTES={ROW_BYTES}")
_COMPILERS = ("cc", "gcc", "clang")
_TIMEOUT_SECONDS = 60  # it takes a third of one


@dataclass(frozen=True, slots=True)
class Native:
    """The function `move_pages` of host_pages.c, of a pointer to its struct; or why there is
    none."""

    move_pages: Callable[..., int] | None
    failure: str = ""


@cache
def load() -> Native:
    """Once per process; blocks while it compiles, once per machine."""
    try:
        move_pages = _library().move_pages
    except Exception as error:  # compiler, disk, linker: numpy and torch do without
        return Native(None, f"{type(error).__name__}: {error}")
    move_pages.argtypes = (ctypes.c_void_p,)
    move_pages.restype = ctypes.c_int
    return Native(move_pages)


def _library() -> ctypes.CDLL:
    if sys.byteorder != "little" or ctypes.sizeof(ctypes.c_void_p) != 8:
        raise RuntimeError("it is for little-endian processors of 64 bits")
    file = cache_folder() / f"host-pages-{_key()}.so"
    # None is there yet, or one that was linked on a system with a later C library.
    with suppress(OSError):
        return ctypes.CDLL(str(file))
    command = _compiler()
    try:
        with whole(file) as made:
            _compile(command, made)
        return ctypes.CDLL(str(file))
    except OSError:  # there is no place to keep it
        with tempfile.TemporaryDirectory() as folder:
            _compile(command, Path(folder) / file.name)
            return ctypes.CDLL(str(Path(folder) / file.name))


def _key() -> str:
    """Of what the library is made of, but for the compiler: any makes the same of it."""
    system = sysconfig.get_platform(), sysconfig.get_config_var("MULTIARCH")  # which C library
    digest = hashlib.sha256(repr((_FLAGS, system)).encode())
    digest.update(SOURCE.read_bytes())
    return digest.hexdigest()[:16]


def _compiler() -> list[str]:
    """The command, which may have arguments of the user's."""
    named = shlex.split(os.environ.get("CC", ""))
    for command in [named] if named else [[name] for name in _COMPILERS]:
        if shutil.which(command[0]) is not None:
            return command
    raise RuntimeError(f"no C compiler: {' '.join(named) or 'cc, gcc or clang'} is not installed")


def _compile(command: list[str], made: Path) -> None:
    done = subprocess.run(
        [*command, *_FLAGS, "-o", str(made), str(SOURCE)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=_TIMEOUT_SECONDS,
        check=False,
    )
    if done.returncode != 0:
        said = next((line for line in done.stderr.splitlines() if "error" in line), "")
        raise RuntimeError(f"{command[0]} exited with {done.returncode}: {said.strip()}")
