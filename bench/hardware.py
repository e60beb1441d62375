"""What is published of cards and of their links to host memory.

Each figure says who published it. *Assumed*: nobody did, and it was taken from the nearest that
somebody did; it is the first to doubt where a measurement disagrees. Bytes, seconds, bytes per
second; GB is 1e9 bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from units import GB, GIB, KIB


@dataclass(frozen=True, slots=True)
class Link:
    """Between device and host memory.

    `to_device`, `to_host`: what a copy engine reaches alone. `both`: the sum when both directions
    run at once. `read_seconds`, `write_seconds`: the effective round trip of a CTA's accesses of
    host memory, so that bytes in flight over it are its speed (Little's law).
    """

    name: str
    to_device: float
    to_host: float
    both: float
    read_seconds: float
    write_seconds: float


@dataclass(frozen=True, slots=True)
class Driver:
    """What a batch of copies costs (`cuMemcpyBatchAsync`): the processor's and the driver's.

    `enqueue_seconds`: of the caller, for a descriptor. `small_bytes`: loads of less take a way of
    the driver's own, at `small_rate`. `depth`: descriptors that are queued before the driver waits
    for the engine.
    """

    enqueue_seconds: float
    small_bytes: int
    small_rate: float
    depth: int


@dataclass(frozen=True, slots=True)
class Card:
    """`memory`: of device memory, reads and writes together. `memory_seconds`: the effective round
    trip of a CTA's accesses of device memory. `start_seconds`: from the end of what an operation
    waits for to its first byte. `reported`: how torch's name of the device begins."""

    name: str
    reported: str
    sms: int
    memory: float
    threads_per_sm: int
    registers_per_sm: int
    link: Link
    memory_seconds: float
    start_seconds: float
    driver: Driver


# PCIe Gen5 x16. To the device: NVIDIA's example of nvbandwidth on an H100, 55.6 GB/s; to the host:
# assumed the same. Both at once: vLLM's blog, H100, copy engine, 83.4. Round trips: TensorRT-LLM's
# comments on a B200. A CTA with 32 KiB in flight writes 13.5 GB/s. Two with 64 KiB read 39.99
# GiB/s: close to what the link carries there, so that the true round trip of a read may be shorter.
# On other cards assumed the same.
_WRITE = 32 * KIB / (13.5 * GB)
_READ = 2 * 64 * KIB / (39.99 * GIB)
PCIE_5 = Link("PCIe Gen5 x16", 55.6 * GB, 55.6 * GB, 83.4 * GB, _READ, _WRITE)
# TensorRT-LLM's comments, B200, copy engine: 42.58 GiB/s in, 43.17 out. Both: assumed, the sum is
# 1.5 times one direction as on the H100.
PCIE_5_B200 = replace(
    PCIE_5, to_device=42.58 * GIB, to_host=43.17 * GIB, both=1.5 * (42.58 + 43.17) / 2 * GIB
)
# nvbandwidth on eight RTX 5090 (an issue of open-gpu-kernel-modules): 56.3 in, 57.3 out; with both
# 50.94 into the device, and assumed as much out.
PCIE_5_5090 = replace(PCIE_5, to_device=56.3 * GB, to_host=57.3 * GB, both=2 * 50.94 * GB)
# SGLang's TMA kernel (pull request 40278), GB300: copy engine some 210 in, 192 out; an effective
# round trip of 1.3 us. Writes: TensorRT-LLM's 43 GB/s per CTA on a GH200, whose knee out is 32 KiB.
# Both: assumed as above.
C2C_GB300 = Link("NVLink-C2C", 210 * GB, 192 * GB, 1.5 * 201 * GB, 1.3e-6, 32 * KIB / (43 * GB))
# TensorRT-LLM's comments: a Grace host sustains 355 GB/s written, 351 read (GiB or GB is not said).
C2C_GH200 = replace(C2C_GB300, to_device=351 * GB, to_host=355 * GB, both=1.5 * 353 * GB)

# vLLM's pull request 48434, H100: 12,288 descriptors of 8 KiB take 6.33 ms to enqueue. Its pull
# request 42212 has the edge at 28 KiB. The rate and the depth are fitted (see `published.py`).
DRIVER = Driver(6.33e-3 / 12_288, 28 * KIB, 7.8 * GB, 10_000)

# Assumed: 1.1 us under load; unloaded, microbenchmarks of an H100 say some 0.6 to 0.8.
_MEMORY_SECONDS = 1.1e-6
# Assumed: a launch or a copy after an event of another stream.
_START_SECONDS = 5e-6
_COMMON = (_MEMORY_SECONDS, _START_SECONDS, DRIVER)

# Warps' instructions that an SM issues: its four schedulers one per clock each (CUDA programming
# guide), of which 1.6 GHz are assumed. The boost clocks of these cards are 1.76 to 2.4.
ISSUES_PER_SECOND = 4 * 1.6e9

# SMs and memory: NVIDIA's data sheets. Threads and registers of an SM: the CUDA programming guide.
H100_PCIE = Card("H100 PCIe", "NVIDIA H100 PCIe", 114, 2.0e12, 2048, 65_536, PCIE_5, *_COMMON)
H100_SXM = Card("H100 SXM", "NVIDIA H100 80GB", 132, 3.35e12, 2048, 65_536, PCIE_5, *_COMMON)
H200 = Card("H200", "NVIDIA H200", 132, 4.8e12, 2048, 65_536, PCIE_5, *_COMMON)
# The driver reports a bus of 7,680 bits at 3,996 MHz (a pull request of pytorch/ao): 7.67 TB/s.
B200 = Card("B200", "NVIDIA B200", 148, 7.67e12, 2048, 65_536, PCIE_5_B200, *_COMMON)
# SMs: SGLang says 152. Memory: the data sheet.
GB300 = Card("GB300", "NVIDIA GB300", 152, 8.0e12, 2048, 65_536, C2C_GB300, *_COMMON)
RTX_5090 = Card(
    "RTX 5090", "NVIDIA GeForce RTX 5090", 170, 1.792e12, 1536, 65_536, PCIE_5_5090, *_COMMON
)
GH200 = Card("GH200", "NVIDIA GH200", 132, 4.0e12, 2048, 65_536, C2C_GH200, *_COMMON)

#: the fact that `machine.facts` has of device memory
BANDWIDTH = "memory bandwidth, by clock and bus"
#: those that predictions are made for; a GH200 is here for the figures of others
PREDICTED = (H100_PCIE, H100_SXM, H200, B200, GB300, RTX_5090)
KNOWN = (*PREDICTED, GH200)

# A lane of PCIe, by generation, in bytes per second of one direction.
_LANE = {3: 0.985 * GB, 4: 1.969 * GB, 5: 3.938 * GB, 6: 7.563 * GB}
_EFFICIENCY = PCIE_5.to_device / (16 * _LANE[5])


def card_of(facts: Mapping[str, str]) -> Card | None:
    """The card that a machine's facts are of (`machine.facts`), None where they name no GPU.

    A known name brings what was published; what the device reports of itself goes before it, and
    a card without a name here is made of that alone: None where it does not say enough.
    """
    name = facts.get("GPU", "none")
    if name == "none":
        return None
    known = next((card for card in KNOWN if name.startswith(card.reported)), None)
    if known is None and not {"SMs", BANDWIDTH} <= facts.keys():
        return None
    card = known or replace(H100_SXM, name=name, reported=name)
    card = replace(
        card,
        sms=int(_number(facts, "SMs", card.sms)),
        memory=_number(facts, BANDWIDTH, card.memory / GB) * GB,
        threads_per_sm=int(_number(facts, "threads per SM", card.threads_per_sm)),
        registers_per_sm=int(_number(facts, "registers per SM", card.registers_per_sm)),
    )
    generation = int(_number(facts, "PCIe generation", 0))
    lanes = int(_number(facts, "PCIe lanes", 0))
    published = known is not None and (generation, lanes) in ((5, 16), (0, 0))
    if known is not None and (published or not known.link.name.startswith("PCIe")):
        return card
    return replace(card, link=_pcie(generation or 5, lanes or 16))


def _pcie(generation: int, lanes: int) -> Link:
    """As much of the lanes' speed as an H100 has of its."""
    share = lanes * _LANE.get(generation, _LANE[5]) * _EFFICIENCY / PCIE_5.to_device
    return replace(
        PCIE_5,
        name=f"PCIe Gen{generation} x{lanes}",
        to_device=PCIE_5.to_device * share,
        to_host=PCIE_5.to_host * share,
        both=PCIE_5.both * share,
    )


def _number(facts: Mapping[str, str], name: str, otherwise: float) -> float:
    """The figure that a fact begins with; `otherwise` where there is none."""
    try:
        return float(facts.get(name, "").split()[0])
    except (ValueError, IndexError):
        return otherwise
