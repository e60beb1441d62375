"""torch.cuda on the imitated card: what needs a GPU runs where there is none.

    IMITATED_CARD=13.0 PYTHONPATH=tests python -m pytest -p imitation_cuda tests/test_cuda.py

With this plugin the process has the driver of ``card/``: Triton's own launcher loads the kernels'
PTX there and they are executed, NVIDIA's bindings call it, and torch.cuda, which this build of
torch lacks, is imitated upon it. The environment says which card it is (`card.CONFIGURATIONS`) and
in which order work runs that nothing orders (``IMITATED_SEED``). It says nothing of speed.
"""

from __future__ import annotations

import gc
import os
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from card.card import CONFIGURATIONS, Configuration, start

assert not torch.cuda.is_available(), "there is a GPU here: nothing needs to be imitated"

#: the card of this process
card = start(
    replace(
        CONFIGURATIONS[os.environ.get("IMITATED_CARD", "12.8")],
        seed=int(os.environ.get("IMITATED_SEED", "0")),
    )
)

# Only now: they look for the driver when they are imported.
from card import asking, streams, tensors  # noqa: E402
from cuda.bindings import driver  # noqa: E402
from triton.compiler.compiler import CompiledKernel  # noqa: E402

from triton_offload.kernels import compiling  # noqa: E402

CARD = torch.device("cuda", 0)


def use(configuration: Configuration) -> None:
    """Another card from now on. Nothing of the one before may be used, nor be freed."""
    compiling.compile_kernel.cache_clear()
    compiling.device_target.cache_clear()
    gc.collect()
    card.reset(configuration)
    asking.forget()
    streams.forget()


def _runtime_error(result: tuple[Any, ...]) -> int:
    return int(result[0])


class Runtime:
    """What `torch.cuda.cudart()` returns: the runtime's own functions, which return errors."""

    def cudaHostRegister(self, address: int, num_bytes: int, flags: int) -> int:  # noqa: N802
        asking.current_index()
        return _runtime_error(driver.cuMemHostRegister(address, num_bytes, flags))

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802
        asking.current_index()
        return _runtime_error(driver.cuMemHostUnregister(address))


def _properties(device: Any = None) -> SimpleNamespace:
    return SimpleNamespace(
        pci_domain_id=0,
        pci_bus_id=asking.index_of(device) + 1,
        pci_device_id=0,
        name="imitated card",
        major=card.configuration.compute_major,
        minor=card.configuration.compute_minor,
        total_memory=card.configuration.device_bytes,
        multi_processor_count=card.configuration.num_multiprocessors,
        L2_cache_size=50 << 20,
    )


def _capability(device: Any = None) -> tuple[int, int]:
    return card.configuration.compute_major, card.configuration.compute_minor


def _imitate() -> None:
    functions = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "init": lambda: None,
        "device_count": lambda: card.configuration.num_devices,
        "current_device": asking.current_index,
        "set_device": lambda device: asking.use(asking.index_of(device)),
        "device": asking.OnDevice,
        "get_device_name": lambda device=None: "imitated card",
        "get_device_capability": _capability,
        "get_device_properties": _properties,
        "empty_cache": lambda: None,
        "cudart": Runtime,
        "_sleep": lambda cycles: None,
        "synchronize": streams.synchronize,
        "Stream": streams.Stream,
        "ExternalStream": streams.ExternalStream,
        "Event": streams.Event,
        "current_stream": streams.current_stream,
        "default_stream": lambda device=None: streams.ExternalStream(0, device),
        "set_stream": streams.set_stream,
        "stream": streams.on_stream,
        "CUDAGraph": streams.Graph,
        "graph": streams.capture,
        "is_current_stream_capturing": streams.is_current_stream_capturing,
    }
    for name, function in functions.items():
        setattr(torch.cuda, name, function)
    tensors.install(card)


def _load_ptx() -> None:
    """Let Triton hand its launcher the PTX in place of the machine code that ptxas made of it: a
    driver takes either."""
    make = CompiledKernel.__init__

    def made(self: Any, *args: Any, **options: Any) -> None:
        make(self, *args, **options)
        self.kernel = self.asm["ptx"].encode()

    CompiledKernel.__init__ = made


def _leave_unmeasured() -> None:
    """What an imitation takes is no reason to choose a path."""
    from triton_offload.tuning import calibrate

    calibrate._measure_once = lambda device, machine, file: None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: Any, call: Any) -> Any:
    """A test that fails says what the card had to complain of last."""
    report = yield
    if report.failed:
        told = [each for each in card.complaints() if "context is lost" not in each]
        report.sections.append(("The card's complaints", "\n".join(told[-10:])))
    return report


_imitate()
_load_ptx()
_leave_unmeasured()
