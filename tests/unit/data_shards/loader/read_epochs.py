"""A reader to be killed: `read_epochs.py URI CONSUMED...`; prints digest, epoch and `consumed` of each global batch.

It goes on behind the last of the states EPOCH:CONSUMED that it is given, through two epochs, with two processes.
"""

import hashlib
import sys

from data_shards.loader import BatchPlan, Loader
from data_shards.loader.pixels import Crop
from data_shards.manifest import open_dataset


def main() -> None:
    loader = Loader(open_dataset(sys.argv[1]), workers=2, processes=True)
    plan = BatchPlan("train", 6, 16, train=True, crop=Crop(0.3), seed=4)
    first, consumed = (int(part) for part in sys.argv[2].split(":"))
    print("began", flush=True)
    for epoch in range(first, 2):
        for batch in loader.epoch(plan, epoch, start=consumed if epoch == first else 0):
            digest = hashlib.sha256(batch.images.tobytes() + batch.labels.tobytes() + batch.index.tobytes())
            print(digest.hexdigest(), f"{epoch}:{batch.consumed}", flush=True)


if __name__ == "__main__":
    main()
