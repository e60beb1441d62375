"""Prints requirements for pip, one a line: of an installed distribution or of this package."""

from __future__ import annotations

import argparse
import importlib.metadata
import sys
import tomllib
from pathlib import Path

from pip._vendor.packaging.requirements import Requirement  # a fresh environment has only pip


def of_distribution(name: str, skip: list[str]) -> list[str]:
    """What the installed distribution `name` requires here, without extras and without `skip`."""
    wanted = []
    for line in importlib.metadata.requires(name) or []:
        requirement = Requirement(line)
        applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if applies and requirement.name.lower() not in skip:
            requirement.marker = None
            wanted.append(str(requirement))
    return wanted


def is_installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--of", help="an installed distribution")
    parser.add_argument("--skip", nargs="*", default=[], help="names to leave out of --of")
    parser.add_argument("--package", action="store_true", help="this package's dependencies")
    parser.add_argument("--group", help="a dependency group of pyproject.toml")
    parser.add_argument("--has", nargs="*", help="exit with 0 if one of these is installed")
    args = parser.parse_args()
    if args.has:
        return 0 if any(map(is_installed, args.has)) else 1
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())
    lines: list[str] = []
    if args.of:
        lines += of_distribution(args.of, args.skip)
    if args.package:
        lines += project["project"]["dependencies"]
    if args.group:
        lines += project["dependency-groups"][args.group]
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
