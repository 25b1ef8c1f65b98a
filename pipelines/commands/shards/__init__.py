"""The command shards: a dataset verified, looked at, and asked for duplicates, quarantine and files."""
