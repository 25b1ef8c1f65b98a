"""The command shards: verifies and shows a dataset, and lists its duplicates, quarantine and file names."""
