"""What a training keeps so that it can resume: its state, weights, moments and use, in the store."""
