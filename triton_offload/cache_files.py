"""Files that are kept for the next process, in the user's folder for such."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def cache_folder() -> Path:
    """Under $XDG_CACHE_HOME, else ~/.cache. It may not be there yet."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "triton-offload"


@contextmanager
def whole(file: Path) -> Iterator[Path]:
    """A path to write to, that becomes `file` in one step: whoever reads meanwhile sees the old
    file or the new. Where the body raises, `file` stays as it was. Raises OSError."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=file.parent, suffix=".tmp")
    try:
        os.close(handle)
        yield Path(name)
        os.replace(name, file)
    except BaseException:
        os.unlink(name)
        raise
