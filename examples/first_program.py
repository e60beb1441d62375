"""The first program: offload blocks of a KV cache, and load them back into other blocks.

    python examples/first_program.py

Runs in CPU memory. With tensors on a GPU nothing else changes.
"""

from __future__ import annotations

import torch

from triton_offload import KVOffloader

NUM_LAYERS, NUM_BLOCKS = 4, 64
BLOCK_SHAPE = 2, 16, 8, 64  # keys and values; tokens; heads; numbers of a head


def main() -> None:
    # The engine's: one tensor a layer, which it owns and writes.
    kv_caches = [torch.randn(NUM_BLOCKS, *BLOCK_SHAPE).bfloat16() for _ in range(NUM_LAYERS)]

    with KVOffloader(kv_caches, host_bytes="64MiB", blocks_per_chunk=4) as offloader:
        # A request of eight blocks, wherever they lie: two chunks, each with a key. Engines take a
        # hash of all tokens up to the chunk's end.
        block_ids = [3, 9, 4, 60, 17, 21, 2, 33]
        keys = [b"tokens 0-63", b"tokens 0-127"]
        offloader.store(keys, block_ids).wait()

        # Another request begins with the same tokens.
        hits = offloader.lookup(keys)
        other_block_ids = [40, 41, 42, 43, 50, 51, 52, 53]
        job = offloader.load(keys[:hits], other_block_ids[: 4 * hits])
        result = job.wait()

        for layer in kv_caches:
            if not torch.equal(layer[block_ids], layer[other_block_ids]):
                raise SystemExit("wrong bytes")
        print(f"{hits} chunks, {result.num_bytes:,} bytes loaded, all of them right")


if __name__ == "__main__":
    main()
