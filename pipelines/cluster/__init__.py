"""The Ray that a command works on: its own or a cluster, what runs on it, and what a job there is sent."""
