"""Epochs of a dataset for tests that do not care who owns what the loader opens."""

from data_shards.loader import BatchPlan, Epoch, Loader

OF_LOADER = {"rank", "ranks", "workers", "processes", "memory", "cache_bytes", "disk_bytes"}
OF_EPOCH = {"epoch", "start", "next_epoch"}


def epoch_of(source, split: str, **options) -> Epoch:
    """An epoch of a loader, or of a dataset by a loader of its own; `options` are of the loader, plan and epoch."""
    of_loader = {name: value for name, value in options.items() if name in OF_LOADER}
    of_epoch = {name: value for name, value in options.items() if name in OF_EPOCH}
    of_plan = {name: value for name, value in options.items() if name not in OF_LOADER | OF_EPOCH}
    if isinstance(source, Loader):
        assert not of_loader, "the loader is there already"
        loader = source
    else:
        loader = Loader(source, **of_loader)
    return loader.epoch(BatchPlan(split, **of_plan), **of_epoch)
