"""Threads of an engine at one offloader, without a simulator: `python tests/stress.py SECONDS`.

Callers store, load, take back, look up, touch and forget, each with one block table and one list of
keys that it overwrites as soon as a call returns, and with pages that it uses again the moment that
the rules allow; another thread polls. Page sizes, groups, chunks, pools, paths and queues are small
and odd, and drawn anew every few seconds. What a key's bytes are follows from the key alone, so
every loaded byte is compared, and so is every byte that no load named.

Exits with 1 and says what replays it where a byte was wrong, where nothing moved for a minute (with
the stacks of all threads), or where anything grew.
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import random
import sys
import threading
import time
import traceback
from dataclasses import dataclass, field

import torch
from clients import Client
from model_content import Setting
from model_world import World
from soak import Counts, left_over, resources

from triton_offload.calibration import Path
from triton_offload.device.host import HostDevice

PAGE_BYTES = (1, 3, 7, 4097)
NUM_CALLERS = 3
BLOCKS_OF_CALLER = 28
GUARD_BLOCKS = 6  # of nobody, before and behind the callers'
ROUND_SECONDS = 5.0  # of one configuration
QUIET_SECONDS = 1.0  # from one quiet moment to the next
HANG_SECONDS = 60.0  # in which no call returned
# What may be more at the end than after the first configurations (see `soak.BOUNDS`): threads hand
# memory back to allocators of their own.
BOUNDS = {"memory, MiB": 64, "threads": 0, "open files": 0, "slots in use": 0, "events": 8}
WARM_UP_ROUNDS = 4


def draw_setting(seed: int) -> Setting:
    """A configuration; the first ones are of each path, with the smallest window."""
    rng = random.Random(seed)
    pages = [rng.choice(PAGE_BYTES) for _ in range(rng.randint(2, 5))]
    tensors = list(range(len(pages)))
    groups = [tensors]
    while len(groups) < 3 and rng.random() < 0.6:
        groups.append(sorted(rng.sample(tensors, rng.randint(1, len(tensors)))))
    blocks_per_chunk = rng.randint(1, 7)
    return Setting(
        path=list(Path)[seed % len(Path)],
        groups=tuple(tuple((tensor, pages[tensor]) for tensor in group) for group in groups),
        policy=rng.choice(("lru", "arc")),
        page_bytes=tuple(pages),
        blocks_per_chunk=blocks_per_chunk,
        num_chunks=rng.randint(5, 12),  # all requests are three to twelve times as many
        num_requests=4,
        chunks_per_request=5,
        window_chunks=rng.choice((0.2, 1, 2, None)),
        buffer_chunks=rng.randint(1, 3),
        max_indices=rng.choice((1, 64, 1 << 12)),
    )


@dataclass(slots=True)
class Round:
    """One configuration under load, and what it came to."""

    setting: Setting
    seed: int
    counts: Counts = field(default_factory=dict)
    errors: list[BaseException] = field(default_factory=list)

    def run(self, seconds: float) -> None:
        device = HostDevice()
        world = World(device, self.setting, 2 * GUARD_BLOCKS + NUM_CALLERS * BLOCKS_OF_CALLER)
        world.pages.poison(range(world.num_blocks))
        callers = [
            Client(
                world,
                range(first, first + BLOCKS_OF_CALLER),
                random.Random(self.seed * NUM_CALLERS + i),
            )
            for i, first in enumerate(
                range(GUARD_BLOCKS, world.num_blocks - GUARD_BLOCKS, BLOCKS_OF_CALLER)
            )
        ]
        try:
            deadline = time.monotonic() + seconds
            while not self.errors and (left := deadline - time.monotonic()) > 0:
                self._load(world, callers, min(left, QUIET_SECONDS))
                if not self.errors:
                    self._look(world)
        except Exception as error:
            self.errors.append(error)
        finally:
            world.closing = True
            world.offloader.close(HANG_SECONDS)
        self.counts = {
            "jobs": world.num_jobs,
            "loads": world.num_loaded,
            "cancels": world.num_cancels,
            "evictions": world.offloader.stats().evictions,
        }

    def _load(self, world: World, callers: list[Client], seconds: float) -> None:
        """Let all of them call, until nothing is under way any more."""
        deadline = time.monotonic() + seconds
        steps = [0] * len(callers)
        ended = threading.Event()

        def call(i: int) -> None:
            try:
                while time.monotonic() < deadline and not self.errors:
                    callers[i].step()
                    steps[i] += 1
                callers[i].drain()
            except BaseException as error:
                self.errors.append(error)

        def poll() -> None:
            try:
                while not ended.is_set():
                    world.collect()
                    world.offloader.stats()
                    time.sleep(0.0005)
            except BaseException as error:
                self.errors.append(error)

        threads = [threading.Thread(target=call, args=(i,)) for i in range(len(callers))]
        poller = threading.Thread(target=poll)
        for thread in (*threads, poller):
            thread.start()
        before: list[int] = []
        since = 0.0
        try:
            while any(thread.is_alive() for thread in threads):
                if steps != before:
                    before, since = list(steps), time.monotonic()
                    # For a call that hangs and keeps the interpreter to itself.
                    faulthandler.dump_traceback_later(HANG_SECONDS + 60, exit=True)
                elif time.monotonic() - since > HANG_SECONDS:
                    end_here()
                threads[0].join(0.05)
                time.sleep(0.05 if not threads[0].is_alive() else 0)
            ended.set()
            poller.join()
        finally:
            faulthandler.cancel_dump_traceback_later()  # it would end whoever runs this process

    def _look(self, world: World) -> None:
        """A quiet moment: all that is left of the calls is what was stored."""
        world.offloader._check()
        world.check_reported()
        world.pages.check_all()
        assert not any(left_over(world).values()), left_over(world)
        assert world.offloader.stats().num_pinned == 0


def end_here() -> None:
    """End the process, and say where each thread is.

    Called with the interpreter's lock: `dump_traceback_later`, which does not wait for that, reads
    frames that threads change meanwhile, and has crashed in them.
    """
    sys.stdout.flush()
    os.write(sys.stderr.fileno(), f"Timeout: no call returned in {HANG_SECONDS} s\n".encode())
    faulthandler.dump_traceback()
    os._exit(1)


def grown(start: Counts, end: Counts) -> list[str]:
    return [
        f"{name}: {start[name]}, then {end[name]}"
        for name in BOUNDS
        if end[name] > start[name] + BOUNDS[name]
    ]


def stress(seconds: float, first_seed: int, round_seconds: float = ROUND_SECONDS) -> list[str]:
    """What was wrong: nothing, or the first thing. Prints every configuration before it is run."""
    torch.set_num_threads(1)
    deadline = time.monotonic() + seconds
    totals: Counts = {}
    start: Counts = {}
    seed = first_seed
    while (left := deadline - time.monotonic()) > 0:
        setting = draw_setting(seed)
        print(f"seed {seed}: {setting}", flush=True)
        done = Round(setting, seed)
        done.run(min(left, round_seconds))
        if done.errors:
            what = "".join(traceback.format_exception(done.errors[0]))
            return [f"{what}again: python tests/stress.py {seconds:g} --seed {seed}"]
        for name, count in done.counts.items():
            totals[name] = totals.get(name, 0) + count
        if seed - first_seed + 1 == WARM_UP_ROUNDS:
            start = resources()
        seed += 1
    print(f"seeds {first_seed} to {seed - 1}, {totals}", flush=True)
    if not start:
        return []
    end = resources()
    print(f"after {WARM_UP_ROUNDS} configurations {start}, at the end {end}", flush=True)
    return grown(start, end)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("seconds", type=float)
    parser.add_argument("--seed", type=int, help="the first one; default: a new one")
    parser.add_argument("--round", type=float, default=ROUND_SECONDS, help="seconds of each")
    chosen = parser.parse_args()
    seed = chosen.seed if chosen.seed is not None else int.from_bytes(os.urandom(3), "big")
    wrong = stress(chosen.seconds, seed, chosen.round)
    print("\n".join(["WRONG", *wrong] if wrong else ["right"]), flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
