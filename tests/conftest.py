"""What holds for every test."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
from hypothesis import settings

# How many cases are generated for a test, by `--hypothesis-profile` in the Makefile. Without one it
# is hypothesis' own 100. A test that needs more takes a multiple of them. None is timed: a machine
# may be busy.
settings.register_profile("untimed", deadline=None)
settings.register_profile("quick", max_examples=20, deadline=None)
settings.register_profile("deep", max_examples=1000, deadline=None)
settings.load_profile("untimed")

# Left out of `make quick`, whole: each takes seconds to start or many to run.
SLOW_FILES = {
    "test_bench_imitation.py",
    "test_card_kernels.py",
    "test_card_rules.py",
    "test_cuda_device.py",
    "test_cuda_imitation.py",
    "test_door.py",
    "test_examples.py",
    "test_exit.py",
    "test_faults.py",
    "test_gpu_run.py",
    "test_isolation.py",
    "test_kernels_compiled.py",
    "test_kernels_ring.py",
    "test_kernels_sums.py",
    "test_life.py",
    "test_mutants.py",
    "test_offloader_machine.py",
    "test_packaging.py",
    "test_performance.py",
    "test_schedules.py",
    "test_shared_room.py",
    "test_slot_sizes.py",
    "test_soak.py",
    "test_stress.py",
    "test_trace_hit_rates.py",
    "test_vllm_canonical.py",
    "test_vllm_connector.py",
    "test_vllm_group_manager.py",
    "test_vllm_group_pool.py",
    "test_vllm_group_slots.py",
    "test_vllm_layers.py",
    "test_vllm_layouts.py",
    "test_vllm_ranks.py",
    "test_vllm_spec.py",
    "test_vllm_tiers.py",
}
# And of other files these tests, whatever their parameters.
SLOW_TESTS = {
    "test_a_forked_child_is_told_so_and_does_not_hang",
    "test_a_part_loads_no_more_than_it_needs",
    "test_every_byte_of_an_hour_of_real_requests",
    "test_pass_the_same_cases_in_the_interpreter",
}


def pytest_ignore_collect(collection_path, config):
    """Where slow tests are not wanted, their files are not even imported: vllm takes seconds."""
    if "not slow" in config.option.markexpr and collection_path.name in SLOW_FILES:
        return True
    return None


def pytest_collection_modifyitems(items):
    for item in items:
        name = item.name.partition("[")[0]
        if Path(item.path).name in SLOW_FILES or name in SLOW_TESTS:
            item.add_marker(pytest.mark.slow)
    # The longest first: of what is left at the end, there is something for every process.
    items.sort(key=lambda item: [item.get_closest_marker(n) is None for n in ("engine", "slow")])


@pytest.fixture(autouse=True, scope="session")
def empty_cache(tmp_path_factory):
    """No test reads or writes what the user's own measurements left."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True, scope="module")
def quick_collections():
    """What modules and earlier tests left for good is not looked through at every `gc.collect`."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish():
    gc.unfreeze()  # what goes with the process goes in order
