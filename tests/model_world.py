"""One KVOffloader, and what is known of it from outside: what it must answer, and must hold."""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import numpy as np
import numpy.typing as npt
from model_content import Content, Pages, Setting, Span

from triton_offload import KVOffloader
from triton_offload.scheduler.manager import PrepareStoreOutput
from triton_offload.testing import SimulatedDevice
from triton_offload.transfer.layout import CacheLayout
from triton_offload.transfer.pipeline import PipelineOptions


@dataclass(frozen=True, slots=True)
class Offer:
    """What could be loaded of a key at most, and how many stores had named it."""

    blocks: int
    num_stores: int


class Known:
    """What is known of the pool from outside: what was stored, and which keys events took away.

    `offered` bounds from above what can be loaded of a key, `held` from below.
    """

    def __init__(self) -> None:
        self.offered: dict[bytes, int] = {}
        self.held: dict[bytes, int] = {}
        self.now = 0
        self._gone: dict[bytes, int] = {}
        self._num_stores: Counter[bytes] = Counter()

    def removed(self, keys: Sequence[bytes]) -> None:
        self.now += 1
        for key in keys:
            self.offered.pop(key, None)
            self.held.pop(key, None)
            self._gone[key] = self.now

    def forget(self) -> None:
        self.removed(list(self.offered))

    def offers(self, names: Sequence[bytes]) -> list[Offer]:
        """What there is of these keys, for `taken_back`."""
        return [Offer(self.offered.get(name, 0), self._num_stores[name]) for name in names]

    def taken_back(self, names: Sequence[bytes], before: Sequence[Offer]) -> None:
        """A store has stored nothing: what it offered nobody has, unless another did since."""
        for name, offer in zip(names, before, strict=True):
            if name in self.offered and self._num_stores[name] == offer.num_stores + 1:
                self.offered[name] &= offer.blocks

    def submitted(self, names: Sequence[bytes], masks: Sequence[int]) -> int:
        """Returns the time, for `stored`."""
        self._num_stores.update(names)
        for key, mask in zip(names, masks, strict=True):
            self.offered[key] = self.offered.get(key, 0) | mask
        return self.now

    def stored(self, names: Sequence[bytes], masks: Sequence[int], since: int) -> None:
        for key, mask in zip(names, masks, strict=True):
            if self._gone.get(key, -1) <= since:
                self.held[key] = self.held.get(key, 0) | mask


class World:
    """One offloader, its pages, and what is known of both.

    `exact`: no two calls overlap, as on the simulated device: then every answer is foretold.
    `faulty`: jobs may fail. `closing`: calls may be refused.
    """

    def __init__(self, device: Any, setting: Setting, num_blocks: int) -> None:
        self.device = device
        self.setting = setting
        self.num_blocks = num_blocks
        self.content = Content(setting)
        self.pages = Pages(device, setting, self.content, num_blocks)
        self.exact = isinstance(device, SimulatedDevice)
        self.known = Known()
        self.faulty = self.closing = False
        self.num_cancels = self.num_jobs = self.num_loaded = self.num_failed = 0
        self.lock = threading.Lock()  # of the counts here, never held over a call
        self.storing: Counter[bytes] = Counter()  # stores whose end nobody has seen, by key
        self.recent: deque[Span] = deque(maxlen=6)  # stored lately
        self._unreported: Counter[int] = Counter()
        layout = CacheLayout(
            self.pages.tensors, setting.blocks_per_chunk, setting.groups, packed=setting.packed
        )
        window = setting.window_chunks
        # Groups with padded pages are those of vLLM: KVOffloader itself has no argument for them.
        with patch.object(CacheLayout, "named", return_value=layout):
            self.offloader = KVOffloader(
                self.pages.tensors,
                setting.num_chunks * setting.slot_bytes,
                setting.blocks_per_chunk,
                policy=setting.policy,
                enable_events=True,
                options=PipelineOptions(
                    path=setting.path,
                    buffer_bytes=setting.buffer_chunks * setting.slot_bytes,
                    num_buffers=2,
                    max_indices=setting.max_indices,
                    window_bytes=window and max(1, int(window * setting.slot_bytes)),
                ),
                device=device,
            )

    def accepted(self, job_id: int) -> None:
        with self.lock:
            self.num_jobs += 1
            self._unreported[job_id] += 1

    def collect(self) -> None:
        """Every accepted job is reported once (perhaps before its caller has noted it)."""
        finished = self.offloader.get_finished()
        with self.lock:
            for result in finished:
                self._unreported[result.job_id] -= 1
            self._unreported = Counter({i: n for i, n in self._unreported.items() if n})
            if self.exact:
                assert all(n == 1 for n in self._unreported.values()), "reported twice"

    def check_reported(self) -> None:
        self.collect()
        assert not self._unreported, "a job was not reported, or twice"

    def take_events(self) -> None:
        for event in self.offloader.take_events():
            if self.exact and event.removed:
                self.known.removed(event.keys)
            elif self.exact:
                assert all(key in self.known.offered for key in event.keys), "stored by nobody"

    def lookup(self, span: Span) -> int:
        """How many leading chunks of a span can be loaded; compared with what is known."""
        found = self.offloader.lookup(
            self.content.keys(span),
            num_blocks=span.count,
            first_block=span.first,
            group=span.group,
        )
        names, masks = self.content.known_as(span), self.content.masks(span)
        assert 0 <= found <= len(names)
        if self.exact:
            self.take_events()
            for key, mask in list(zip(names, masks, strict=True))[:found]:
                assert not mask & ~self.known.offered.get(key, 0), f"{key!r} was never stored"
            if found < len(names):
                held = self.known.held.get(names[found], 0)
                assert masks[found] & ~held, f"{names[found]!r} is lost"
        return found

    def check(self) -> None:
        """What holds between any two calls."""
        self.offloader._check()
        self.pages.check()

    def close(self) -> None:
        """Close (again, perhaps), and look at all that is left."""
        self.closing = True
        self.offloader.close()
        self.check_reported()
        if isinstance(self.device, SimulatedDevice):
            self.device.drain()
            self.device.check()
            assert not self.device.background_names
            assert len(self.device.streams) == 2
            self.pages.check_all()
        assert self.offloader.stats().num_pinned == 0
        self.check()


class PoolWatch:
    """Whose bytes every slot of the pool holds, looked at whole."""

    def __init__(self, world: World) -> None:
        self._world = world
        count = world.setting.num_chunks
        # By slot: the keys whose bytes may be there, and whether its chunk was stored in parts.
        self._residue: list[set[bytes]] = [set() for _ in range(count)]
        self._in_parts = [False] * count
        self._rows = world.offloader._pool.slots.numpy()  # which outlives the pool
        manager = world.offloader._manager
        self._prepare_store = manager.prepare_store
        manager.prepare_store = self._noted  # type: ignore[method-assign]

    def look(self) -> None:
        """What can be loaded of a key is its own, and the rest of its slot its own or zeros. A
        slot that nobody can load from holds what was there last.

        A transfer that failed may have left anything: where nobody can load from, and where the
        blocks of a chunk lie that a failed store was to add.
        """
        world, manager = self._world, self._world.offloader._manager
        rows = self._rows
        ready = {slot: key for key, slot in manager._slot_of.items() if manager._loadable(key)}
        used = manager._orphans.slots | set(manager._slot_of.values())
        for slot, key in ready.items():
            self._residue[slot] = {key}
            own, blocks = world.content.slot_of(key), self._of_blocks(manager._loadable(key))
            assert (rows[slot] == own)[blocks & (own != 0)].all(), f"{key!r} is not in slot {slot}"
        for slot, (row, residue) in enumerate(zip(rows, self._residue, strict=True)):
            if world.faulty and (slot not in ready or self._in_parts[slot]):
                continue
            owners = [(row == 0) | (row == world.content.slot_of(key)) for key in residue]
            assert np.logical_or.reduce([row == 0, *owners]).all(), f"slot {slot}: foreign bytes"
            if slot not in used and residue:
                assert any(owner.all() for owner in owners), f"slot {slot}: bytes of several keys"

    def _noted(self, *args: Any, **kwargs: Any) -> PrepareStoreOutput | None:
        output = self._prepare_store(*args, **kwargs)
        if output is not None:
            spec = output.store_spec
            for key, slot, fresh in zip(
                output.keys_to_store, spec.slot_ids, spec.fresh, strict=True
            ):
                self._residue[slot].add(key)
                self._in_parts[slot] = not fresh
        return output

    def _of_blocks(self, mask: int) -> npt.NDArray[np.bool_]:
        """The bytes of a slot that belong to these blocks of its chunk."""
        setting = self._world.setting
        blocks = [mask >> position & 1 for position in range(setting.blocks_per_chunk)]
        return np.concatenate([np.repeat(blocks, size) for size in setting.page_bytes]) != 0
