"""The parts of all ranks make up a split exactly, or there is no result."""

import numpy as np
import pytest

from pipelines.worker.inference import join


def part(*index: int):
    at = np.array(index, dtype=np.int64)
    return at, np.eye(8, dtype=np.uint8)[at], at[:, None].astype(np.float32) * np.ones(8, np.float32)


def test_parts_are_joined_in_the_order_of_the_split():
    labels, logits = join([part(0, 2, 4), part(1, 3)], 5, "test")
    assert labels.argmax(1).tolist() == [0, 1, 2, 3, 4]
    assert logits[:, 0].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("parts", "missing", "doubled"),
    [
        ([part(0, 2), part(1, 3)], 1, 0),
        ([part(0, 1, 2), part(3)], 1, 0),
        ([part(0, 2, 4), part(1, 3, 4)], 0, 1),
        ([part(0, 2), part(1, 3, 3)], 1, 1),
        ([part(0, 1, 2, 3, 4), part(5)], 0, 0),
    ],
    ids=["one dropped in the middle", "the last dropped", "one doubled", "one dropped, one doubled", "one too many"],
)
def test_a_dropped_or_doubled_sample_is_refused(parts, missing, doubled):
    with pytest.raises(ValueError, match=f"5 samples, but {missing} were never evaluated and {doubled} more than once"):
        join(parts, 5, "test")
