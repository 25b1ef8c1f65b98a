"""How amounts are written."""

import pytest

from pipelines.wording import counted, duration


@pytest.mark.parametrize(
    ("number", "noun", "text"),
    [
        (0, "epoch", "0 epochs"),
        (1, "epoch", "1 epoch"),
        (1_234_567, "image", "1,234,567 images"),
        (1.0, "GPU", "1 GPU"),
        (0.5, "CPU", "0.5 CPUs"),
    ],
)
def test_a_number_has_the_noun_that_fits_it(number, noun, text):
    assert counted(number, noun) == text


def test_a_noun_may_have_a_plural_of_its_own():
    assert [counted(number, "class", "classes") for number in (1, 2)] == ["1 class", "2 classes"]


@pytest.mark.parametrize(("seconds", "text"), [(7.4, "0:07"), (750, "12:30"), (10_930, "3:02:10")])
def test_seconds_are_a_clock(seconds, text):
    assert duration(seconds) == text
