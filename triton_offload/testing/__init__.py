"""A simulated device for tests: of this package, and of workers of your own."""

from triton_offload.testing.controls import RaceError
from triton_offload.testing.faults import InjectedError
from triton_offload.testing.races import Race
from triton_offload.testing.simulated import Rates, SimulatedDevice
from triton_offload.testing.simulation import Stuck

__all__ = ["InjectedError", "Race", "RaceError", "Rates", "SimulatedDevice", "Stuck"]
