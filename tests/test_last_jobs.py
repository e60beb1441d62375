"""Who used a slot last, where slabs are cut anew."""

from __future__ import annotations

import numpy as np

from triton_offload.slabs import Slabs
from triton_offload.transfer.last_jobs import Cuts, LastJobs

# Slots 0 to 8 are three to a slab, 9 to 11 fill one each.
SLABS = Slabs.of(30, 3, [10, 30])


def jobs(*ids: int) -> np.ndarray:
    return np.array(ids, dtype=np.int64)


def use(last: LastJobs, lane: str, sequence: int, *ids: int) -> dict[str, int]:
    """A job of the lane uses these slots: the last ones before it."""
    last.use(jobs(*ids))
    before = {name: last.on(name, jobs(*ids)) for name in ("store", "load")}
    last.note(lane, jobs(*ids), sequence)
    last._check(lane, sequence)
    return before


def test_the_last_job_on_any_of_the_slots_stands_for_all():
    last = LastJobs(("store", "load"), Slabs.of(10, 8, [10]))
    assert use(last, "store", 1, 2, 3) == {"store": 0, "load": 0}
    assert use(last, "load", 4, 3, 5) == {"store": 1, "load": 0}
    assert use(last, "store", 2, 1, 5) == {"store": 0, "load": 4}
    assert use(last, "store", 3, 3) == {"store": 1, "load": 4}


def test_who_uses_a_slab_that_is_cut_anew_comes_after_all_that_used_it():
    last = LastJobs(("store", "load"), SLABS)
    use(last, "store", 1, 3, 4)
    use(last, "load", 7, 5)
    use(last, "store", 2, 0)
    assert use(last, "store", 3, 10) == {"store": 1, "load": 7}
    assert use(last, "load", 8, 11) == {"store": 0, "load": 0}
    # Back again: every slot of the slab was written.
    assert use(last, "load", 9, 3) == {"store": 3, "load": 7}
    assert use(last, "load", 10, 5) == {"store": 3, "load": 7}
    assert use(last, "load", 11, 1) == {"store": 0, "load": 0}


def test_jobs_of_several_sizes_ask_for_each():
    last = LastJobs(("store", "load"), SLABS)
    use(last, "store", 1, 2)
    use(last, "store", 2, 7)
    assert use(last, "load", 3, 9, 8) == {"store": 1, "load": 0}
    assert use(last, "load", 4, 11) == {"store": 2, "load": 3}


def test_a_slab_is_cut_anew_once():
    cuts = Cuts(SLABS)
    assert cuts.use(0, jobs(0, 4)) == []
    assert cuts.use(1, jobs(9, 10)) == [
        (slice(0, 3), slice(9, 10)),
        (slice(3, 6), slice(10, 11)),
    ]
    assert cuts.use(1, jobs(9, 10)) == []
    assert cuts.use(0, jobs(4, 5)) == [(slice(10, 11), slice(3, 6))]
    assert cuts.use(0, jobs(4, 5)) == []
