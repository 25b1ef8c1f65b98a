"""The Ray that a command works on, embedded or a cluster; what runs on it, and how jobs are submitted to it."""
