"""The steps of a workflow, one file each: shard, train, tune, evaluate, register, promote."""
