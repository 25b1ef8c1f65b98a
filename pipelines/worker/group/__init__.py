"""The group of workers of a training under Ray Train: how it meets, how large it is, when it stops or starts again."""
