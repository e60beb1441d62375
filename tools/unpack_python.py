"""Unpacks the Python files and the metadata of a wheel: enough to import it without its kernels."""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path


def main(wheel: str, target: str) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = [n for n in archive.namelist() if n.endswith(".py") or ".dist-info/" in n]
        archive.extractall(Path(target), names)
    print(f"{len(names)} files of {Path(wheel).name} unpacked into {target}")


if __name__ == "__main__":
    main(*sys.argv[1:])
