"""Runs for long, and looks for what grows and for wrong bytes: `python tests/soak.py SECONDS`.

One part replays simulated serving, seed after seed; the other lets several threads store, load and
cancel on the host device, in one offloader that lives all the time. Exits with 1 where a byte was
wrong or anything grew.
"""

from __future__ import annotations

import argparse
import gc
import os
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sized
from contextlib import contextmanager
from dataclasses import dataclass, field

from clients import Client
from model_content import ONE_GROUP, OVERLAYS, Setting
from model_world import World
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from schedules import CONFIGURATIONS, run_schedule

from triton_offload.calibration import Path
from triton_offload.device.host import HostDevice
from triton_offload.testing import SimulatedDevice

# What may be more at the end than after the warm-up. Allocators keep what threads gave
# back, and a buffer that was not used before remembers an event.
BOUNDS = {"memory, MiB": 32, "threads": 0, "open files": 0, "slots in use": 0, "events": 8}
NUM_THREADS = 4
WARM_UP = 0.2  # of a part's time

Counts = dict[str, int]
Advance = Callable[[str], None]


@dataclass(slots=True)
class Part:
    """What one part did, and what there was of everything after its warm-up and at its end."""

    name: str
    done: Counts = field(default_factory=dict)
    start: Counts = field(default_factory=dict)
    end: Counts = field(default_factory=dict)
    error: BaseException | None = None

    @property
    def grown(self) -> list[str]:
        return [name for name, n in self.end.items() if n > self.start[name] + BOUNDS[name]]

    @property
    def ok(self) -> bool:
        return self.error is None and bool(self.end) and not self.grown

    def add(self, **counts: int) -> None:
        for name, count in counts.items():
            self.done[name] = self.done.get(name, 0) + count


def left_over(world: World) -> Counts:
    """What an offloader knows of jobs, by the name of what holds it; nothing once all ended and
    were reported."""
    offloader = world.offloader
    kept = {**vars(offloader._ledger), "_worker_of": offloader._queue._worker_of}
    del kept["totals"], kept["medium_totals"]
    return {name: len(held) for name, held in kept.items() if isinstance(held, Sized)}


def resources(world: World | None = None) -> Counts:
    """What this process holds, and a world in which nothing is under way."""
    gc.collect()
    with open("/proc/self/statm") as statm:
        pages = int(statm.read().split()[1])
    kinds = ("_HostEvent", "Event", "OffloadJob", "Job")
    slots = waiting = 0
    if world is not None:
        offloader = world.offloader
        offloader._check()
        slots = offloader.stats().num_pinned
        waiting = sum(left_over(world).values())
    return {
        "memory, MiB": pages * os.sysconf("SC_PAGE_SIZE") >> 20,
        "threads": threading.active_count(),
        "open files": len(os.listdir("/proc/self/fd")),
        "slots in use": slots,
        # A device's, and what is still to be reported.
        "events": sum(type(thing).__name__ in kinds for thing in gc.get_objects()) + waiting,
    }


def simulated(seconds: float, first_seed: int, advance: Advance) -> Part:
    """Serving engines and clients on the simulated device, each from a seed."""
    part = Part("simulated serving")
    begin = time.monotonic()
    seed = first_seed
    names = list(CONFIGURATIONS)
    try:
        while (elapsed := time.monotonic() - begin) < seconds or not part.start:
            if not part.start and elapsed >= seconds * WARM_UP and part.done:
                part.start = resources()
            advance(f"seed {seed}")
            facts = run_schedule(CONFIGURATIONS[names[seed % len(names)]], seed)
            part.add(schedules=1, operations=facts.operations, jobs=facts.jobs)
            _serve(seed, part)
            seed += 1
        part.end = resources()
    except BaseException as error:
        error.add_note(f"seed {seed}")
        part.error = error
        if not isinstance(error, Exception):
            raise
    return part


def _serve(seed: int, part: Part) -> None:
    """Two clients of one offloader, one of which makes calls where the other one blocks."""
    with SimulatedDevice(seed) as device:
        rng = random.Random(seed)
        setting = Setting(rng.choice(list(Path)), rng.choice((ONE_GROUP, OVERLAYS)))
        world = World(device, setting, num_blocks=48)
        first, second = (Client(world, range(i, i + 24), rng) for i in (0, 24))

        def call() -> float | None:
            second.step()
            return 0.0 if rng.random() < 0.7 else None

        other = device.background("client", call)
        for _ in range(100):
            first.step()
            other.wake()
            world.check()
        other.stop()
        first.drain()
        second.drain()
        world.close()
        part.add(operations=device.num_operations, jobs=world.num_jobs, loads=world.num_loaded)


def threaded(seconds: float, seed: int, advance: Advance) -> Part:
    """Threads on the host device; they pause for the counts, with nothing under way."""
    part = Part("threads on the host")
    # Large enough that copies of several threads overlap.
    setting = Setting(
        Path.STAGED, (((0, 4096), (1, 1024)),), page_bytes=(4096, 1024), num_chunks=14
    )
    device = HostDevice()
    with _closing(World(device, setting, NUM_THREADS * 24)) as world:
        clients = [
            Client(world, range(24 * i, 24 * i + 24), random.Random(seed * NUM_THREADS + i))
            for i in range(NUM_THREADS)
        ]
        _run(world, clients, max(0.1, seconds * WARM_UP), part, advance)
        part.start = resources(world)
        _run(world, clients, seconds * (1 - WARM_UP), part, advance)
        part.end = resources(world)
        part.add(jobs=world.num_jobs, loads=world.num_loaded, cancels=world.num_cancels)
    return part


def _run(world: World, clients: list[Client], seconds: float, part: Part, advance: Advance) -> None:
    deadline = time.monotonic() + seconds

    def serve(client: Client) -> None:
        try:
            while time.monotonic() < deadline and part.error is None:
                client.step()
            client.drain()
        except BaseException as error:
            part.error = error

    threads = [threading.Thread(target=serve, args=(client,)) for client in clients]
    for thread in threads:
        thread.start()
    for thread in threads:
        while thread.is_alive():
            thread.join(0.2)
            advance(f"{world.num_jobs} jobs, {world.num_loaded} loads compared")
    if part.error is None:
        world.check()
        world.check_reported()


@contextmanager
def _closing(world: World) -> Iterator[World]:
    try:
        yield world
    finally:
        world.offloader.close()


def soak(seconds: float, seed: int = 0, advance: Advance = lambda text: None) -> list[Part]:
    """Both parts, `seconds` each."""
    return [simulated(seconds, seed, advance), threaded(seconds, seed, advance)]


def table(parts: list[Part]) -> Table:
    shown = Table(title="soak")
    for column in ("part", "what", "after the warm-up", "at the end", "allowed"):
        shown.add_column(column, justify="left" if column in ("part", "what") else "right")
    for part in parts:
        for name, count in part.done.items():
            shown.add_row(part.name, name, "", f"{count:,}", "")
        for name, count in part.end.items():
            style = "bold red" if name in part.grown else None
            row = part.name, name, str(part.start[name]), str(count), f"+{BOUNDS[name]}"
            shown.add_row(*row, style=style)
        shown.add_row(part.name, "right" if part.ok else "WRONG", end_section=True)
    return shown


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("seconds", type=float, help="of each of the two parts")
    parser.add_argument("--seed", type=int, default=0, help="the first one")
    arguments = parser.parse_args()
    console = Console()
    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("soak")
        parts = soak(
            arguments.seconds,
            arguments.seed,
            lambda text: progress.update(task, description=text),
        )
    console.print(table(parts))
    seeds = parts[0].done.get("schedules", 0)
    console.print(f"seeds {arguments.seed} to {arguments.seed + max(0, seeds - 1)}")
    for part in parts:
        if part.error is not None:
            notes = "\n".join(getattr(part.error, "__notes__", []))
            console.print(f"{part.name}: {part.error!r}\n{notes}", markup=False)
    return 0 if all(part.ok for part in parts) else 1


if __name__ == "__main__":
    sys.exit(main())
