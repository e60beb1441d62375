"""Building the imitated card: shared libraries of C sources, by the compiler at hand.

A library is kept in a folder of the user's for temporary files, by a hash of all that it is made
of. Many processes may ask for it at once: one builds, the others wait for it.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

HERE = Path(__file__).resolve().parent
FLAGS = ("-std=c11", "-D_GNU_SOURCE", "-O2", "-ftree-vectorize", "-fPIC", "-shared", "-pthread")
#: what executes PTX; a driver is built of these and its own
MACHINE_SOURCES = (
    "access.c",
    "compute.c",
    "counting.c",
    "declarations.c",
    "decode.c",
    "exchange.c",
    "execute.c",
    "memory.c",
    "module.c",
    "parser.c",
    "registers.c",
    "shared.c",
    "statements.c",
    "tokens.c",
)
NO_COMPILER = "no C compiler (cc, gcc, clang or $CC) to build the imitated card with"


def compiler() -> str | None:
    """The C compiler of this machine; None where there is none."""
    for name in (os.environ.get("CC", ""), "cc", "gcc", "clang"):
        found = shutil.which(name) if name else None
        if found:
            return found
    return None


def cache_folder() -> Path:
    """Where built libraries lie: this user's alone, since what lies there is loaded."""
    folder = Path(tempfile.gettempdir()) / f"triton-offload-card-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise RuntimeError(f"{folder}: expected a folder that nobody else can write to")
    return folder


@cache
def shared_library(name: str, sources: Sequence[str], options: Sequence[str] = ()) -> Path:
    """The library ``NAME`` of C sources of this folder, built if it was not before.

    Args:
        name: Of the file, as the loader looks for it: ``libmachine.so``, ``libcuda.so.1``. It lies
            in a folder of its own.
        sources: Names of files in this folder, a tuple. A change of any header builds anew, too.
        options: More for the compiler.

    Raises:
        RuntimeError: There is no compiler, or it failed; with what it said.
    """
    command = compiler()
    if command is None:
        raise RuntimeError(NO_COMPILER)
    files = [HERE / source for source in sources]
    arguments = [command, *FLAGS, *options]
    folder = cache_folder() / _digest(name, arguments, [*files, *sorted(HERE.glob("*.h"))])
    library = folder / name
    if library.exists():
        return library
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            made = folder / f"{name}.{os.getpid()}"
            done = subprocess.run(
                [*arguments, "-o", str(made), *map(str, files)],
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode != 0:
                raise RuntimeError(f"{command} failed to build {name}:\n{done.stderr}")
            made.replace(library)  # whole, or not there
    return library


def _digest(name: str, arguments: list[str], files: list[Path]) -> str:
    """Of all that a library is made of."""
    version = subprocess.run([arguments[0], "--version"], capture_output=True, check=True).stdout
    digest = hashlib.sha256(repr((name, arguments, version)).encode())
    for file in files:
        digest.update(f"{file.name}\0".encode() + file.read_bytes() + b"\0")
    return digest.hexdigest()[:24]
