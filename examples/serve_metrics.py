"""Serves the metrics of an offloader for Prometheus, moves some chunks, and scrapes itself once.

    pip install triton-offload[metrics]
    python examples/serve_metrics.py            # a free port
    python examples/serve_metrics.py 9400

Then `http://127.0.0.1:9400/metrics` is there until the program ends, which it does by itself.
"""

from __future__ import annotations

import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from prometheus_client import CollectorRegistry, start_http_server

from triton_offload import KVOffloader
from triton_offload.metrics import OffloaderCollector


@contextmanager
def serving(offloaders: dict[str, KVOffloader], port: int = 0) -> Iterator[str]:
    """Serves on this machine alone; gives the address. Port 0: any that is free."""
    registry = CollectorRegistry()
    registry.register(OffloaderCollector(offloaders))
    server, thread = start_http_server(port, "127.0.0.1", registry)
    try:
        yield f"http://127.0.0.1:{server.server_port}/metrics"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def scrape(address: str) -> str:
    # Not by a proxy, whatever the environment says: the server is on this machine.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(address, timeout=30) as answer:
        return str(answer.read().decode())


def transfer(offloader: KVOffloader) -> None:
    """What an engine does: look up, store what is new, load what was there."""
    keys = [bytes([i]) for i in range(8)]
    found = offloader.lookup(keys)
    offloader.store(keys[found:], range(found, 8)).wait()
    offloader.load(keys[: offloader.lookup(keys)], range(8, 16)).wait()


def main(port: int = 0) -> None:
    kv_caches = [torch.rand(16, 16, 64) for _ in range(4)]
    with (
        KVOffloader(kv_caches, host_bytes="1MiB") as offloader,
        serving({"example": offloader}, port) as address,
    ):
        print(f"serving on {address}", flush=True)
        transfer(offloader)
        print(scrape(address), end="")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]))
