"""What is logged while something is done."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager


class _Kept(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


@contextmanager
def logged() -> Iterator[list[logging.LogRecord]]:
    """The warnings of `triton_offload`, as they come."""
    handler, logger = _Kept(), logging.getLogger("triton_offload")
    logger.addHandler(handler)
    try:
        yield handler.records
    finally:
        logger.removeHandler(handler)


@contextmanager
def warned(module: str, match: str) -> Iterator[None]:
    """One warning, of this module, that says what a user can do."""
    with logged() as records:
        yield
    (record,) = records
    assert (record.name, record.levelno) == (f"triton_offload.{module}", logging.WARNING)
    assert re.search(match, record.getMessage()), record.getMessage()
    assert "triton-offload doctor" in record.getMessage()
