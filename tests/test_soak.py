"""The soak run, for a few seconds."""

from __future__ import annotations

import soak


def test_nothing_grows_and_no_byte_is_wrong():
    parts = soak.soak(2.0)
    for part in parts:
        assert part.error is None
        assert part.grown == []
        assert part.ok
        assert part.done["loads"] > 0
    assert soak.table(parts).row_count > 10


def test_growth_is_told():
    part = soak.Part("x", start=dict.fromkeys(soak.BOUNDS, 1), end=dict.fromkeys(soak.BOUNDS, 1))
    assert part.ok
    part.end["threads"] = 2
    part.end["memory, MiB"] = 33
    assert part.grown == ["threads"]
    assert not part.ok
