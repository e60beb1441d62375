"""A tier of files behind the host pool: what the pool forgets, or a restart loses, is read back.

Each chunk is a file: a header with the blocks that were written and a checksum, and the slot.
"""

from __future__ import annotations

import itertools
import struct
import sys
import tempfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from triton_offload import ChunkSpec, KVOffloader, LoadStoreSpec, OffloadJob

_HEADER = struct.Struct("<8sQI")  # magic, blocks of the chunk, crc32 of what follows
_MAGIC = b"kvchunk1"


@dataclass(frozen=True)
class FileSpec(LoadStoreSpec):
    """A folder of one model's chunks, each under the name of its key."""

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
    new = [chunk for chunk in src.chunks if chunk.blocks & ~dst.blocks(chunk.key)]
    for chunk in new:
        data = chunk.data
        # Not there under its name before all of it is.
        with tempfile.NamedTemporaryFile(dir=dst.folder, suffix=".new", delete=False) as file:
            file.write(_HEADER.pack(_MAGIC, chunk.blocks, zlib.crc32(data)) + data)
        Path(file.name).replace(dst.path(chunk.key))
    return sum(len(chunk.data) for chunk in new)


def read_files(src: FileSpec, dst: ChunkSpec) -> int:
    """What it raises ends the job as failed, and none of its chunks can be loaded then."""
    for path, chunk in ((src.path(chunk.key), chunk) for chunk in dst.chunks):
        content = path.read_bytes()
        _, blocks, checksum = _HEADER.unpack_from(content)
        data = memoryview(content)[_HEADER.size :]
        if zlib.crc32(data) != checksum or chunk.blocks & ~blocks:
            path.unlink(missing_ok=True)  # not to be found a second time
            raise ValueError(f"{path}: not what was written")
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
        """Write chunks of the pool, so that nothing is lost when they are evicted."""
        return self._offloader.export_chunks(keys, self._files)

    def lookup(self, keys: Sequence[bytes]) -> int:
        """How many leading chunks are in the pool or in files."""
        found = (self._offloader.lookup([key]) or self._files.blocks(key) for key in keys)
        return sum(1 for _ in itertools.takewhile(bool, found))

    def fetch(self, keys: Sequence[bytes]) -> OffloadJob:
        """Bring into the pool what it lacks and files have; loadable when the job has ended."""
        blocks = {key: mask for key in keys if (mask := self._files.blocks(key))}
        return self._offloader.import_chunks([*blocks], self._files, blocks=[*blocks.values()])


def main() -> int:
    pages = torch.randint(256, (4, 64, 4096), dtype=torch.uint8)  # four tensors
    keys, want, ok = [b"document %d" % i for i in range(8)], pages[:, :31].clone(), True
    with tempfile.TemporaryDirectory() as folder:
        for run in ("before", "after a restart"):
            with KVOffloader([*pages], "512KiB", blocks_per_chunk=4) as offloader:  # 8 chunks
                tier = FileTier(offloader, Path(folder))
                if run == "before":
                    offloader.store(keys, range(31)).wait()
                    print("bytes written:", tier.save(keys).wait().num_bytes)
                    offloader.store([b"other %d" % i for i in range(5)], range(20)).wait()
                in_pool, in_all = offloader.lookup(keys), tier.lookup(keys)
                print(f"{run}: {in_pool} of 8 chunks are in the pool, with files {in_all}")
                tier.fetch(keys).wait()
                pages.fill_(0xA5)
                offloader.load(keys, range(63, 32, -1)).wait()
                ok &= in_pool < in_all == 8 and torch.equal(pages[:, 33:].flip(1), want)
                ok &= offloader.lookup(keys, num_blocks=32) == 7  # the last is partial
    print("every byte is as it was" if ok else "WRONG BYTES")
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
