"""A reader to be killed: `read_kept.py URI FIRST_EPOCH LAST_EPOCH`; prints epoch, `consumed` and digest of each batch.

It keeps decoded images in the machine's file, as beside a GPU, with two processes.
"""

import hashlib
import sys

import numpy as np

from data_shards.loader import BatchPlan, GpuMemory, Loader
from data_shards.manifest import open_dataset


def main() -> None:
    memory = GpuMemory(lambda shape: np.empty(shape, np.uint8))
    loader = Loader(open_dataset(sys.argv[1]), workers=2, memory=memory)
    plan = BatchPlan("train", 6, 24, train=True, seed=4)
    first, last = int(sys.argv[2]), int(sys.argv[3])
    print("began", flush=True)
    for epoch in range(first, last + 1):
        for batch in loader.epoch(plan, epoch, next_epoch=epoch < last):
            digest = hashlib.sha256(batch.images.tobytes() + batch.index.tobytes()).hexdigest()
            print(f"{epoch}:{batch.consumed} {digest}", flush=True)


if __name__ == "__main__":
    main()
