"""Measuring a card: what it takes of the card, and gives back (run by tests/test_cuda_device.py,
on the imitated card)."""

from __future__ import annotations

import gc

import torch
from card.asking import ask
from cards import named, use
from cuda.bindings import driver

from triton_offload.tuning import calibrate, rig

CARD = torch.device("cuda", 0)
MIB = 1 << 20


def taken() -> int:
    free, total = ask(driver.cuMemGetInfo())
    return int(total) - int(free)


def test_measuring_takes_little_of_the_card_and_gives_it_back(monkeypatch):
    """Of the sizes that a card is measured with only the pages differ: running them takes long."""
    use("12.8")
    before, most = taken(), []
    seconds = rig.Rig.seconds
    monkeypatch.setattr(rig, "_REPEATS", 1)
    monkeypatch.setattr(calibrate, "PAGE_BYTES", (64 << 10,))

    def watched(self, pipelines, direction, pages):
        most.append(taken())
        return seconds(self, pipelines, direction, min(pages, 16))

    monkeypatch.setattr(rig.Rig, "seconds", watched)
    monkeypatch.setattr(torch.cuda, "empty_cache", None)  # nothing of it is torch's
    calibrate.measure(CARD, lambda done, total: None, rig.RIG_BYTES)
    gc.collect()
    torch.cuda.synchronize()  # the stream on which torch frees
    assert taken() == before
    assert max(most) - before <= 264 * MIB


def test_measuring_waits_for_events_and_does_not_poll(monkeypatch):
    """A wait with a timeout asks again and again, and a short job ends when it asks next."""
    use("12.8")
    monkeypatch.setattr(rig, "_REPEATS", 1)
    with rig.Rig(calibrate.device_for(CARD), 4096, 64 << 10) as one:
        waits = []
        synchronize = one._device.synchronize
        monkeypatch.setattr(
            one._device, "synchronize", lambda *args: waits.append(args[1]) or synchronize(*args)
        )
        for direction in calibrate.Direction:
            took = one.seconds(one.pipelines(direction, 64 << 10), direction, 16)
            assert {*took} == {*calibrate.Path}
            assert all(seconds > 0 for seconds in took.values())
        assert one.plain_copy(calibrate.Direction.LOAD) > 0
    assert len(waits) >= 12
    assert set(waits) == {None}


def test_streams_of_what_was_measured_are_destroyed(monkeypatch):
    card = use("12.8")
    monkeypatch.setattr(rig, "_REPEATS", 1)
    monkeypatch.setattr(calibrate, "PAGE_BYTES", (4096,))
    monkeypatch.setattr(calibrate, "PAGES", (16,))
    monkeypatch.setattr(calibrate, "_BUFFER_BYTES", (64 << 10,))
    calibrate.measure(CARD, lambda done, total: None, 256 << 10)
    made = named(card, "cuStreamCreateWithPriority", "cuStreamCreate")
    ended = named(card, "cuStreamDestroy_v2")
    assert len(made) == len(ended)
    assert {call.result for call in ended} == {0}
    assert card.complaints() == []
