"""Stats as Prometheus metrics: what a scrape shows, of whom, and that it never fails."""

from __future__ import annotations

import gc
import importlib.util
import os
import subprocess
import sys
import weakref
from pathlib import Path as File

import pytest
import torch
from logs import warned
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from triton_offload import ChunkSpec, KVOffloader, LoadStoreSpec
from triton_offload.calibration import Path
from triton_offload.metrics import OffloaderCollector
from triton_offload.testing import InjectedError, SimulatedDevice
from triton_offload.transfer.pipeline import PipelineOptions

ROOT = File(__file__).resolve().parent.parent
EXAMPLE = ROOT / "examples" / "serve_metrics.py"
PAGE = 64
CHUNK = 2 * PAGE


def offloader(device=None, path: str = "staged", num_chunks: int = 4) -> KVOffloader:
    caches = [torch.full((16, PAGE), i, dtype=torch.uint8) for i in range(2)]
    options = PipelineOptions(path=Path(path), buffer_bytes=1 << 10)
    return KVOffloader(caches, num_chunks * CHUNK, device=device, options=options)


def registry_of(offloaders) -> CollectorRegistry:
    registry = CollectorRegistry()
    registry.register(OffloaderCollector(offloaders))
    return registry


def samples(text: str) -> dict[tuple[str, ...], float]:
    """By the metric's name and the values of its labels, sorted by the labels' names."""
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            values = (value for _, value in sorted(sample.labels.items()))
            found[sample.name.removeprefix("triton_offload_"), *values] = sample.value
    return found


def scrape(registry: CollectorRegistry) -> dict[tuple[str, ...], float]:
    return samples(generate_latest(registry).decode())


def test_a_scrape_shows_what_the_stats_say():
    with offloader() as kv:
        kv._pool.wait_ready(60)
        registry = registry_of({"a": kv})
        for block in range(5):  # one more than there is room for
            kv.store([bytes([block])], [block]).wait()
        assert kv.lookup([b"\x04", b"no"]) == 1
        kv.load([b"\x04"], [9]).wait()
        found, stats = scrape(registry), kv.stats()
        assert {key: found[key] for key in found if key[0] == "jobs_total"} == {
            ("jobs_total", "store", "a", "success"): 5,
            ("jobs_total", "store", "a", "failed"): 0,
            ("jobs_total", "store", "a", "cancelled"): 0,
            ("jobs_total", "load", "a", "success"): 1,
            ("jobs_total", "load", "a", "failed"): 0,
            ("jobs_total", "load", "a", "cancelled"): 0,
        }
        assert {key: found[key] for key in found if key[0] == "bytes_total"} == {
            ("bytes_total", way, "a", path.value): num_bytes if path is Path.STAGED else 0
            for way, num_bytes in (("store", 5 * CHUNK), ("load", CHUNK))
            for path in Path
        }
        for way, each in (("store", stats.store), ("load", stats.load)):
            assert found["transfer_seconds_total", way, "a"] == each.seconds > 0
            assert found["path_seconds_total", way, "a", "staged"] == each.seconds
            assert found["path_seconds_total", way, "a", "zero_copy"] == 0
            assert found["queue_wait_seconds_total", way, "a"] == each.queue_seconds > 0
            assert found["queue_waits_total", way, "a"] == each.jobs
        assert found["lookups_total", "a"] == 2
        assert found["hits_total", "a"] == 1
        assert found["evictions_total", "a"] == 1
        assert found["pool_bytes", "a"] == 4 * CHUNK
        assert found["pool_used_bytes", "a"] == 4 * CHUNK
        assert found["pool_pinned", "a"] == 1
        assert found["chunks_in_transfer", "a"] == 0
        assert not any(found["path_broken", "a", path.value] for path in Path)


def test_failures_broken_paths_and_an_unpinned_pool_are_shown():
    device = SimulatedDevice(1)
    device.register = lambda host: False
    with offloader(device) as kv:
        kv._pool.wait_ready(60)
        registry = registry_of(kv)
        device.gather = None  # staged can't be queued: the copy engine stands in
        kv.store([b"a"], [0]).wait()
        device.copy_batch = None
        kv.store([b"b"], [1]).block()
        found = scrape(registry)
        assert found["path_broken", "default", "staged"] == 1
        assert found["path_broken", "default", "copy_engine"] == 0
        assert found["pool_pinned", "default"] == 0
        assert found["failures_total", "TypeError", "store", "default"] == 1
        assert found["jobs_total", "store", "default", "failed"] == 1
        assert found["jobs_total", "store", "default", "success"] == 1
        del device.gather, device.copy_batch


class Nowhere(LoadStoreSpec):
    """A medium that counts three bytes for each chunk, and can't be read."""


def drop(src: ChunkSpec, dst: Nowhere) -> int:
    return 3 * len(src.chunks)


def refuse(src: Nowhere, dst: ChunkSpec) -> int:
    raise InjectedError("injected: nothing to read")


def test_what_media_moved_is_shown_apart():
    with offloader() as kv:
        kv.register_worker(ChunkSpec, Nowhere, drop)
        kv.register_worker(Nowhere, ChunkSpec, refuse)
        registry = registry_of(kv)
        kv.store([b"a", b"b"], [0, 1]).wait()
        kv.export_chunks([b"a", b"b"], Nowhere()).wait()
        kv.import_chunks([b"c"], Nowhere()).block()
        found, stats = scrape(registry), kv.stats()
        assert {key[1:]: found[key] for key in found if key[0] == "medium_jobs_total"} == {
            ("import", "default", "success"): 0,
            ("import", "default", "failed"): 1,
            ("import", "default", "cancelled"): 0,
            ("export", "default", "success"): 1,
            ("export", "default", "failed"): 0,
            ("export", "default", "cancelled"): 0,
        }
        assert found["medium_failures_total", "InjectedError", "import", "default"] == 1
        assert found["medium_bytes_total", "export", "default"] == 6
        assert found["medium_bytes_total", "import", "default"] == 0
        assert found["medium_seconds_total", "export", "default"] == stats.exported.seconds > 0
        assert found["medium_seconds_total", "import", "default"] == 0
        assert found["jobs_total", "load", "default", "success"] == 0
        assert found["jobs_total", "store", "default", "failed"] == 0
        assert not any(key[0] == "failures_total" for key in found)


def test_chunks_under_transfer_are_shown_while_they_are():
    device = SimulatedDevice(1)
    with offloader(device) as kv:
        kv._pool.wait_ready(60)
        registry = registry_of(kv)
        job = kv.store([b"a", b"b", b"c"], [0, 1, 2])
        assert scrape(registry)["chunks_in_transfer", "default"] == 3
        job.wait()
        assert scrape(registry)["chunks_in_transfer", "default"] == 0


def test_several_offloaders_have_a_name_each_and_one_family_for_all():
    with offloader() as one, offloader() as two:
        two.store([b"a"], [0]).wait()
        registry = registry_of({"one": one, "two": two})
        text = generate_latest(registry).decode()
        found = samples(text)
        assert found["jobs_total", "store", "one", "success"] == 0
        assert found["jobs_total", "store", "two", "success"] == 1
        kinds = [line for line in text.splitlines() if line.startswith("# TYPE")]
        assert len(kinds) == len(set(kinds)) == 22


def test_what_is_closed_keeps_its_counts_and_has_no_pool():
    kv = offloader()
    registry = registry_of(kv)
    kv.store([b"a"], [0]).wait()
    kv.close()
    found = scrape(registry)
    assert found["jobs_total", "store", "default", "success"] == 1
    assert found["bytes_total", "store", "default", "staged"] == CHUNK
    assert found["pool_bytes", "default"] == found["pool_used_bytes", "default"] == 0
    assert found["pool_pinned", "default"] == 0


def test_a_collector_keeps_no_offloader_alive_and_shows_nothing_of_one_that_is_gone():
    kv, other = offloader(), offloader()
    registry = registry_of({"kv": kv, "other": other})
    assert {key[1] for key in scrape(registry) if key[0] == "hits_total"} == {"kv", "other"}
    kv.close()
    gone = weakref.ref(kv)
    del kv
    gc.collect()
    assert gone() is None
    assert {key[1] for key in scrape(registry) if key[0] == "hits_total"} == {"other"}
    other.close()


def test_a_scrape_fails_for_no_offloader_and_tells_of_it_once():
    with offloader() as kv, offloader() as other:
        registry = registry_of({"kv": kv, "other": other})

        def fail():
            raise InjectedError("injected: no stats")

        kv.stats = fail
        with warned("metrics", r"kv is left out of metrics: InjectedError\('injected: no stats'\)"):
            for _ in range(3):
                assert {k[1] for k in scrape(registry) if k[0] == "hits_total"} == {"other"}
        del kv.stats
        assert {k[1] for k in scrape(registry) if k[0] == "hits_total"} == {"kv", "other"}


def test_a_registry_learns_the_names_before_there_is_a_sample():
    registry = CollectorRegistry(auto_describe=True)
    with offloader() as kv:
        asked = []
        kv.stats = lambda: asked.append(1)
        registry.register(OffloaderCollector(kv))
        assert asked == []
        with pytest.raises(ValueError, match="Duplicated timeseries"):
            registry.register(OffloaderCollector(kv))
        del kv.stats


@pytest.mark.parametrize("wrong", [None, 3, {"a": None}, {1: "x"}])
def test_what_is_no_offloader_is_refused(wrong):
    with pytest.raises(TypeError, match="offloaders: expected a KVOffloader, or several by name"):
        OffloaderCollector(wrong)


def test_names_and_help_follow_the_conventions():
    with offloader() as kv:
        for family in OffloaderCollector(kv).describe():
            assert family.name.startswith("triton_offload_")
            assert family.documentation.endswith(".")
            assert family.samples == []
            if "seconds" in family.name:
                assert "econds" in family.documentation
            if family.name.endswith("bytes"):
                assert "Bytes" in family.documentation


def test_without_the_client_the_extra_is_named():
    code = (
        "import sys\n"
        "sys.modules['prometheus_client'] = None\n"
        "try:\n"
        "    import triton_offload.metrics\n"
        "except ImportError as error:\n"
        "    assert 'pip install triton-offload[metrics]' in str(error), error\n"
        "else:\n"
        "    sys.exit('no error')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


# -- the example --


@pytest.fixture
def example():
    spec = importlib.util.spec_from_file_location("serve_metrics", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_the_example_serves_is_scraped_over_loopback(example):
    with offloader() as kv, example.serving({"mine": kv}) as address:
        assert address.startswith("http://127.0.0.1:")
        assert samples(example.scrape(address))["jobs_total", "store", "mine", "success"] == 0
        kv.store([b"a"], [0]).wait()
        assert samples(example.scrape(address))["jobs_total", "store", "mine", "success"] == 1
    with pytest.raises(OSError, match=r"refused|closed"):
        example.scrape(address)


def test_the_example_ends_by_itself_and_prints_what_it_scraped():
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(EXAMPLE)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env=environment, cwd=ROOT
    )
    assert (done.returncode, done.stderr) == (0, "")
    first, _, text = done.stdout.partition("\n")
    assert first.startswith("serving on http://127.0.0.1:")
    found = samples(text)
    for way in ("store", "load"):
        moved = sum(found["bytes_total", way, "example", path.value] for path in Path)
        assert moved == 8 * 4 * 16 * 64 * 4  # blocks, tensors, floats of a page, bytes of one
        assert found["jobs_total", way, "example", "success"] == 1
