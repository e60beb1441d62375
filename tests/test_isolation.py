"""No byte of one key is ever readable under another: every slot of the pool, after every call."""

from __future__ import annotations

import random

import pytest
from clients import Client
from model_content import ONE_GROUP, OVERLAYS, Setting
from model_world import PoolWatch, World

from triton_offload.calibration import Path
from triton_offload.testing import SimulatedDevice

NUM_SEEDS = 6
FAILING = ("gather", "copy", "copy_batch", "fill_zero")


def drive(setting: Setting, seed: int, *, with_faults: bool) -> World:
    """Random stores, partial and again, evictions, loads, cancels, resets, and failures."""
    with SimulatedDevice(seed) as device:
        rng = random.Random(seed)
        world = World(device, setting, num_blocks=36)
        watch = PoolWatch(world)
        client = Client(world, range(36), rng)
        if with_faults:
            world.faulty = True
        for _ in range(80):
            if with_faults and rng.random() < 0.2:
                arm = rng.choice((device.faults.in_run, device.faults.in_call))
                arm(rng.choice(FAILING), rng.randint(1, 3))
            client.step()
            world.check()
            watch.look()
            if rng.random() < 0.3:
                device.sleep(1e-4)
                watch.look()
        device.faults.clear()
        client.drain()
        watch.look()
        world.close()
        watch.look()
        return world


@pytest.mark.parametrize("with_faults", [False, True], ids=["", "with faults"])
@pytest.mark.parametrize("groups", [ONE_GROUP, OVERLAYS], ids=["one group", "overlays"])
@pytest.mark.parametrize("path", list(Path), ids=lambda path: path.value)
def test_a_slot_holds_bytes_of_its_own_key_or_none(path, groups, with_faults):
    setting = Setting(path, groups, blocks_per_chunk=3, num_chunks=4)
    worlds = [drive(setting, seed, with_faults=with_faults) for seed in range(NUM_SEEDS)]
    assert sum(world.offloader.stats().evictions for world in worlds) > 20
    assert sum(world.num_loaded for world in worlds) > 10
    assert sum(world.num_cancels for world in worlds) > 5
    assert (sum(world.num_failed for world in worlds) > 0) is with_faults
