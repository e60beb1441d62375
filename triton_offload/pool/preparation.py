"""What goes on beside the first transfers: memory is touched and pinned, piece by piece."""

from __future__ import annotations

import ctypes
import logging
import math
import mmap
import os
import threading
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from functools import partial

import torch

from triton_offload.device.base import Device
from triton_offload.device.threads import OwnThread, on_own_thread

_log = logging.getLogger(__name__)

# Not in Python 3.11's mmap; Linux 5.14 and later.
_MADV_POPULATE_WRITE = 23


class Preparation:
    """Touches the pieces in parallel, a few at a time, and pins each few while the next are
    touched. No thread that touches outlives the step that started it."""

    def __init__(self, device: Device, pieces: Sequence[torch.Tensor]) -> None:
        #: nothing more is done; `pinned`: all of it was
        self.ended = False
        self.pinned = False
        #: what kept it from being pinned, where that was an error
        self.error: Exception | None = None
        #: why it could not be pinned, error or not
        self.failure: str | None = None
        self._device = device
        self._num_bytes = sum(piece.numel() for piece in pieces)
        width = min(8, os.cpu_count() or 1)
        self._batches: list[Sequence[torch.Tensor]] = [
            [],  # what is pinned while the first few are touched
            *(pieces[i : i + width] for i in range(0, len(pieces), width)),
            [],  # what is touched while the last few are pinned
        ]
        self._registered: list[torch.Tensor] = []
        self._closing = False
        self._process = os.getpid()
        self._lock = threading.Lock()  # held by the step, or by what takes its work back
        self._background = device.background("triton-offload-pool", self._step)

    def close(self) -> None:
        """Stop, and unpin all. Idempotent; what unpinning raises is raised at the end."""
        if on_own_thread():  # a finalizer's, and a thread of ours must not wait for another
            self.abandon()
            return
        self._closing = True
        with ExitStack() as rest:
            rest.callback(self._unpin)
            self._background.stop()

    def abandon(self) -> None:
        """The same for a finalizer, which may find itself on any thread, in the midst of a step
        too: waits for none. Where a step is under way, that unpins at its end."""
        self._closing = True
        self._unpin()

    def _step(self) -> float:
        """A few pieces more. Whatever goes wrong, the pool is as good as before, but not pinned."""
        with self._lock:
            try:
                more = self._advance()
            except Exception as error:
                self.error = error
                more = False
        failed = not (more or self.pinned or self._closing)
        if failed:
            self.failure = repr(self.error) if self.error else "the device refuses to pin it"
        self.ended = not more
        if self._closing:
            with suppress(Exception):  # nobody is there to be told
                self._unpin()
        # On the host device a copy never waits for memory to be pinned, nor does a kernel need it.
        if failed and self._device.name != "host":
            _log.warning(
                "a host pool of %d bytes could not be pinned (%s): copies are slower, and wait on "
                "threads of their own, and zero_copy is not to be had; `triton-offload doctor` "
                "says what stands in the way",
                self._num_bytes,
                self.failure,
            )
        return 0.0 if more else math.inf

    def _advance(self) -> bool:
        """Whether something is left to do."""
        if self._closing:
            return False
        pinned_now, touched_now = self._batches[:2]
        with ExitStack() as touching:
            for piece in touched_now:
                thread = OwnThread("triton-offload-touch", partial(_populate, piece), _ends_itself)
                touching.callback(thread.join)
            for piece in pinned_now:
                if self._closing or not self._device.register(piece):
                    return False
                self._registered.append(piece)
        del self._batches[0]
        self.pinned = len(self._batches) == 1
        return not self.pinned

    def _unpin(self) -> None:
        if not self._lock.acquire(blocking=False):
            return  # whoever holds it looks at `_closing` when it is released, or is doing this
        try:
            self.pinned = False
            self._batches.clear()
            if self._process != os.getpid():  # what is pinned is the parent's
                self._registered.clear()
            with ExitStack() as rest:
                while self._registered:
                    rest.callback(self._device.unregister, self._registered.pop())
        finally:
            self._lock.release()


def _ends_itself() -> None:
    """After a piece at most."""


def _populate(piece: torch.Tensor) -> None:
    # Never by writing: transfers are already under way.
    start = piece.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    length = piece.data_ptr() + piece.numel() - start
    with suppress(AttributeError, OSError):  # an older kernel: the first transfer touches it
        ctypes.CDLL(None).madvise(
            ctypes.c_void_p(start), ctypes.c_size_t(length), _MADV_POPULATE_WRITE
        )
