"""`vllm serve` with the words of our pages, on vLLM's CPU platform."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from http.client import HTTPConnection
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

from processes import of_session, resident_bytes, shared_files, wait_until
from prometheus_client.parser import text_string_to_metric_families

TESTS = Path(__file__).parent
ROOT = TESTS.parent

# A model's block of 32 tokens is the smallest that vLLM's CPU attention takes.
_SERVE = "--dtype float32 --block-size 32 --enforce-eager --served-model-name tiny"
_ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}


def words(page: str, connector: str) -> dict[str, Any]:
    """The `--kv-transfer-config` that a page gives for `vllm serve` with this connector."""
    for text in re.findall(r"--kv-transfer-config '(.*?)'", (ROOT / page).read_text(), re.DOTALL):
        config: dict[str, Any] = json.loads(text)
        if config["kv_connector"] == connector:
            return config
    raise LookupError(f"{page} has no command with {connector}")


def add_metadata(site: Path) -> Path:
    """What the page tells users of the CPU wheel to do, done in `site`; returns what it made."""
    page = (ROOT / "docs" / "vllm.md").read_text()
    (command,) = re.findall(r"^mkdir \"\$site.*?(?=^```)", page, re.MULTILINE | re.DOTALL)
    subprocess.run(["sh", "-ec", command], env={**os.environ, "site": str(site)}, check=True)
    (made,) = site.glob("vllm-*.dist-info")
    assert made.name.startswith(f"vllm-{version('vllm-cpu')}"), "the page names another version"
    return made


class Server:
    """`vllm serve` in processes of its own.

    `kv_transfer`: what `--kv-transfer-config` is to be, None: no connector. `plugin`: a function of
    `served_faults.py` that vLLM calls in each of its processes.
    """

    def __init__(
        self,
        model: Path,
        folder: Path,
        arguments: str,
        kv_transfer: dict[str, Any] | None = None,
        plugin: str | None = None,
    ) -> None:
        folder.mkdir()
        made = add_metadata(folder)
        if plugin is not None:
            entry = f"[vllm.general_plugins]\n{plugin} = served_faults:{plugin}\n"
            (made / "entry_points.txt").write_text(entry)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port: int = free.getsockname()[1]
        command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model)]
        command += ["--host", "127.0.0.1", "--port", str(self.port)]
        command += f"{_SERVE} {arguments}".split()
        if kv_transfer is not None:
            command += ["--kv-transfer-config", json.dumps(kv_transfer)]
        path = os.pathsep.join(map(str, (folder, ROOT, TESTS)))
        self._log = folder / "log"
        self._shared: set[Path] = set()
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                env={**os.environ, **_ENVIRONMENT, "PYTHONPATH": path},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def __enter__(self) -> Self:
        try:
            wait_until(self.is_healthy, self.log, seconds=600)
            self._shared = shared_files(self.processes)
            assert self._shared  # vLLM's processes talk through it
        except BaseException:
            self._kill()
            raise
        return self

    def __exit__(self, *args: object) -> None:
        self._kill()

    @property
    def processes(self) -> dict[int, str]:
        """Names by id, of those that run."""
        return of_session(self._process.pid)

    def log(self) -> str:
        """What it printed."""
        return self._log.read_text(errors="replace")

    def connect(self) -> HTTPConnection:
        return HTTPConnection("127.0.0.1", self.port, timeout=600)

    def is_healthy(self) -> bool:
        """Raises AssertionError where it has ended."""
        assert self._process.poll() is None, self.log()
        with suppress(ConnectionError):
            return self._get("/health")[0] == 200
        return False

    def metrics(self) -> Metrics:
        """What `GET /metrics` says."""
        status, text = self._get("/metrics")
        assert status == 200, text
        return Metrics(text)

    def resident_bytes(self) -> int:
        """Of all its processes."""
        return resident_bytes(self.processes)

    def stop(self) -> int:
        """SIGTERM, and what `wait` returns."""
        self._process.send_signal(signal.SIGTERM)
        return self.wait()

    def wait(self) -> int:
        """Its exit status. Raises AssertionError where a process or shared memory is left."""
        status = self._process.wait(300)
        wait_until(lambda: not self.processes, lambda: (self.processes, self.log()))
        assert not {path for path in self._shared if path.exists()}
        return status

    def _get(self, path: str) -> tuple[int, str]:
        connection = self.connect()
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, response.read().decode()
        finally:
            connection.close()

    def _kill(self) -> None:
        for process in self.processes:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        self._process.wait()


class Metrics:
    """The samples of a scrape."""

    def __init__(self, text: str) -> None:
        families = text_string_to_metric_families(text)
        self._samples = [sample for family in families for sample in family.samples]

    def total(self, name: str, **labels: str) -> float:
        """The sum of the samples that have these labels; KeyError where there are none."""
        found = [
            sample.value
            for sample in self._samples
            if sample.name == name and labels.items() <= sample.labels.items()
        ]
        if not found:
            raise KeyError(f"{name} {labels}")
        return sum(found)
