"""A tier of files behind the host pool: what the pool forgets, or a restart loses, is read back.

    python examples/file_tier.py [FOLDER]

Each chunk is a file: a header with the blocks that were written and a checksum, and the slot.
"""

from __future__ import annotations

import os
import struct
import sys
import tempfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from triton_offload import KVOffloader
from triton_offload.job import OffloadJob
from triton_offload.medium import ChunkSpec
from triton_offload.specs import LoadStoreSpec

_HEADER = struct.Struct("<8sQI")  # magic, blocks of the chunk, crc32 of what follows
_MAGIC = b"kvchunk1"


@dataclass(frozen=True)
class FileSpec(LoadStoreSpec):
    """A folder of chunks of one model, in which each has the name of its key."""

    folder: Path

    def path(self, key: bytes) -> Path:
        return self.folder / f"{key.hex()}.kv"

    def blocks(self, key: bytes) -> int:
        """The blocks that the chunk's file holds, as a bitmask; 0 where there is no good one."""
        try:
            with self.path(key).open("rb") as file:
                magic, blocks, _ = _HEADER.unpack(file.read(_HEADER.size))
        except (OSError, struct.error):
            return 0
        return int(blocks) if magic == _MAGIC else 0


def write_files(src: ChunkSpec, dst: FileSpec) -> int:
    """Runs on a thread of the offloader's; the chunks are pinned meanwhile."""
    written = 0
    for chunk in src.chunks:
        if chunk.blocks | dst.blocks(chunk.key) == dst.blocks(chunk.key):
            continue  # a key's content never changes
        data = chunk.data
        # Not there under its name before all of it is.
        with tempfile.NamedTemporaryFile(dir=dst.folder, suffix=".new", delete=False) as file:
            file.write(_HEADER.pack(_MAGIC, chunk.blocks, zlib.crc32(data)))
            file.write(data)
        os.replace(file.name, dst.path(chunk.key))
        written += len(data)
    return written


def read_files(src: FileSpec, dst: ChunkSpec) -> int:
    """What it raises ends the job as failed, and none of its chunks can be loaded then."""
    for chunk in dst.chunks:
        content = src.path(chunk.key).read_bytes()
        _, blocks, checksum = _HEADER.unpack_from(content)
        data = memoryview(content)[_HEADER.size :]
        if zlib.crc32(data) != checksum or chunk.blocks & ~blocks:
            src.path(chunk.key).unlink(missing_ok=True)  # not to be found a second time
            raise ValueError(f"{src.path(chunk.key)}: not what was written")
        chunk.write(data)
    return sum(src.path(chunk.key).stat().st_size for chunk in dst.chunks)


class FileTier:
    """Chunks in files, for an offloader with one group."""

    def __init__(self, offloader: KVOffloader, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._offloader, self._files = offloader, FileSpec(folder)
        offloader.register_worker(ChunkSpec, FileSpec, write_files, num_threads=2)
        offloader.register_worker(FileSpec, ChunkSpec, read_files, num_threads=2)

    def save(self, keys: Sequence[bytes]) -> OffloadJob:
        """Write chunks that are in the pool, so that nothing is lost when they are evicted."""
        return self._offloader.export_chunks(keys, self._files)

    def lookup(self, keys: Sequence[bytes]) -> int:
        """How many leading chunks are in the pool or in files."""
        for i, key in enumerate(keys):
            if not self._offloader.lookup([key]) and not self._files.blocks(key):
                return i
        return len(keys)

    def fetch(self, keys: Sequence[bytes]) -> OffloadJob:
        """Bring into the pool what it lacks and files have; loadable when the job has ended."""
        blocks = {key: mask for key in keys if (mask := self._files.blocks(key))}
        return self._offloader.import_chunks([*blocks], self._files, blocks=[*blocks.values()])


def main() -> int:
    kv = [torch.randint(256, (64, 4096), dtype=torch.uint8) for _ in range(4)]
    keys, want = [b"document %d" % i for i in range(8)], [tensor[:31].clone() for tensor in kv]
    room = 8 * 4 * 4 * 4096  # for eight chunks of four blocks; the last of ours has three

    def loaded(offloader: KVOffloader) -> bool:
        for tensor in kv:
            tensor.fill_(0xA5)
        offloader.load(keys, range(63, 32, -1)).wait()
        return all(
            torch.equal(page[32:].flip(0)[:31], was) for page, was in zip(kv, want, strict=True)
        )

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(sys.argv[1] if len(sys.argv) > 1 else scratch)
        with KVOffloader(kv, room, blocks_per_chunk=4) as offloader:
            tier = FileTier(offloader, folder)
            offloader.store(keys, range(31)).wait()
            print(f"written: {tier.save(keys).wait().num_bytes} bytes")
            offloader.store([b"other %d" % i for i in range(5)], range(20)).wait()
            print(f"in the pool: {offloader.lookup(keys)} of 8, with files: {tier.lookup(keys)}")
            tier.fetch(keys).wait()
            equal = loaded(offloader)
        with KVOffloader(kv, room, blocks_per_chunk=4) as offloader:  # as after a restart
            tier = FileTier(offloader, folder)
            print(
                f"restarted: {offloader.lookup(keys)} in the pool, with files: {tier.lookup(keys)}"
            )
            tier.fetch(keys).wait()
            equal = loaded(offloader) and equal and offloader.lookup(keys, num_blocks=32) == 7
    print("every byte is as it was" if equal else "WRONG BYTES")
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
