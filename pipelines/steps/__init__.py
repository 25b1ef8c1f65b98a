"""What writes a record, one file a step: shard, train, tune, evaluate, register, promote."""
