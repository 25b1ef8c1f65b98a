"""The worker group of a training under Ray Train: how it connects, how large it is, when it stops or restarts."""
