"""Compiling the page kernels: one function, for running them and for looking at their code."""

from __future__ import annotations

import atexit
import functools
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .tiling import KernelSpec

# The parameters that both kernels share, as the launcher packs them. Addresses are plain
# integers: they come from a table, and the launcher then asks no driver about pointers.
ARGUMENT_TYPES = {
    "strips": "i64",
    "num_strips": "i32",
    "block_ids": "i64",
    "num_blocks": "i32",
    "slots": "i64",
    "stride_slot": "i64",
    "slot_ids": "i64",
    "first_block": "i32",
    "blocks_per_chunk": "i32",
    "tiles_per_program": "i32",
}
# And of kernels that add up: where to.
SUM_TYPES = ARGUMENT_TYPES | {"sums": "i64"}


def is_interpreted(kernel: Any) -> bool:
    """Whether Triton was imported with ``TRITON_INTERPRET=1``, so that ``kernel`` runs on CPU
    tensors and can't be compiled."""
    return not isinstance(kernel, triton.JITFunction)


@functools.cache
def compile_kernel(
    kernel: Any, spec: KernelSpec, target: GPUTarget, device_index: int | None = None
) -> Any:
    """Compile a page kernel ahead of its first launch, for any target, with or without a device.

    No argument takes part in specialisation: a kernel is the same for every number of blocks.

    Args:
        kernel: A Triton JIT function with the parameters ``ARGUMENT_TYPES`` and the constants of
            ``spec``.
        target: ``GPUTarget("cuda", 90, 32)``, ``GPUTarget("hip", "gfx942", 64)``, ...
        device_index: The device that will run it; a handle belongs to one device, because it is
            loaded into it on first use. None to only look at the code.

    Returns:
        Triton's compiled kernel: ``handle.asm``, ``handle.metadata``, and
        ``handle[grid](*args, stream=...)``.
    """
    constants = spec.constants()
    signature = {
        name: "constexpr" if name in constants else SUM_TYPES[name] for name in kernel.arg_names
    }
    source = _source_class(kernel)(fn=kernel, signature=signature, constexprs=constants)
    # One stage: the loads of a tile are in flight together, there is nothing to pipeline. Floats
    # do not occur; fusing them is named because triton 3.9 warns where it is not.
    options = {"num_warps": spec.warps, "num_stages": 1, "enable_fp_fusion": False}
    return triton.compile(source, target=target, options=options)


# Kernels that go with this module, when the interpreter has forgotten much of Triton, are unloaded
# with an error.
atexit.register(compile_kernel.cache_clear)


def _source_class(kernel: Any) -> Any:
    if not kernel.is_gluon():
        return ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    return GluonASTSource


@functools.cache
def device_target(device: torch.device) -> GPUTarget:
    """The target that Triton compiles to for ``device``."""
    with torch.cuda.device(device):
        return triton.runtime.driver.active.get_current_target()


def backend_of(kernel: Any, device: torch.device) -> str:
    """``cuda`` or ``hip``; the interpreter passes for the former."""
    return "cuda" if is_interpreted(kernel) else str(device_target(device).backend)


def load_kernel(kernel: Any, spec: KernelSpec, device: torch.device) -> Any:
    """Compile ``kernel`` for ``device`` and load it there, if that was not done before."""
    handle = compile_kernel(kernel, spec, device_target(device), device.index)
    if handle.module is None:
        with torch.cuda.device(device):
            handle.run  # noqa: B018 - reading it loads the module
    return handle


def launch(
    kernel: Any, spec: KernelSpec, device: torch.device, programs: int, arguments: tuple[int, ...]
) -> None:
    """Run ``programs`` CTAs of ``kernel`` on the current stream of ``device``.

    Args:
        arguments: One integer for each of ``ARGUMENT_TYPES``, in order, or of ``SUM_TYPES``.
            Whoever owns the memory behind the addresses keeps it until the stream has passed the
            launch.
    """
    grid = (programs, 1, 1)
    if is_interpreted(kernel):
        kernel[grid](*arguments, **spec.constants())
        return
    handle = load_kernel(kernel, spec, device)
    stream = torch.cuda.current_stream(device).cuda_stream
    if torch.cuda.current_device() == device.index:
        handle[grid](*arguments, *spec.constants().values(), stream=stream)
    else:
        with torch.cuda.device(device):
            handle[grid](*arguments, *spec.constants().values(), stream=stream)
