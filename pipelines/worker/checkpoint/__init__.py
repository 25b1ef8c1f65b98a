"""What a training keeps so that it can resume: its checkpoints in the store, and what it has used so far."""
