"""One rank that replaces the checkpoints of a step by the newest of them in the project's first format.

`first_format_rank.py STORE RUN ZERO_STAGE`, with `tests` on the PYTHONPATH. Prints the epoch.
"""

import json
import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).parents[1]))
from first_format import replace_by_first_format

from data_shards.manifest import open_dataset
from data_shards.store import open_store
from medmamba.model import build_model
from pipelines.placement import Placement
from pipelines.worker.checkpoint.resume import FromCheckpoint
from pipelines.worker.checkpoint.stored import Checkpoints
from pipelines.worker.config import TrainStepConfig
from pipelines.worker.engine.engine import build_engine


def main() -> None:
    store, run, zero_stage = sys.argv[1:]
    root = open_store(store)
    out = root.at("runs", run, "train")
    data = open_dataset(root.at("datasets/phantoms/default"))
    config = TrainStepConfig.model_validate(json.loads(out.get("config.json"))["config"])
    config = config.with_classes(len(data.manifest.classes))
    placement = Placement(
        workers=int(os.environ["WORLD_SIZE"]), device="cpu", cpus_per_worker=1, zero_stage=int(zero_stage), scan="auto",
        concurrent_trials=1, nodes=1,
    )  # fmt: skip
    with TemporaryDirectory() as fetched:
        found = Checkpoints(out).newest(Path(fetched))
        assert found is not None
        model = build_model(config.model, scan="auto", device="cpu")
        FromCheckpoint(found).load_weights(model)
        replace_by_first_format(out, found, build_engine(model, config.train, placement))
    print(json.dumps({"epoch": found.described["epoch"]}))


if __name__ == "__main__":
    main()
