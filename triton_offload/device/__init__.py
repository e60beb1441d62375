"""Devices behind one seam (`base.Device`)."""

from __future__ import annotations

import torch

from triton_offload.calibration import Calibration
from triton_offload.device.base import Device


def device_for(device: torch.device, calibration: Calibration | None = None) -> Device:
    """The seam for tensors on `device`, its kernels launched as `calibration` says.

    Raises ValueError for a kind of device that is not supported.
    """
    if device.type == "cpu":
        from triton_offload.device.host import HostDevice

        host: Device = HostDevice()
        return host
    if device.type == "cuda":
        if torch.version.hip:  # which torch calls "cuda" too
            raise ValueError(
                "kv_caches: expected tensors on a cpu or an NVIDIA card, got some on a card of "
                f"ROCm {torch.version.hip}: transfers call the CUDA driver (the kernels alone, "
                "triton_offload.kernels, run there)"
            )
        from triton_offload.device.cuda import CUDADevice

        cuda: Device = CUDADevice(device, calibration)
        return cuda
    raise ValueError(f"kv_caches: expected tensors on a cpu or cuda device, got some on {device}")


__all__ = ["Device", "device_for"]
