"""Formats amounts for users."""

from __future__ import annotations


def counted(number: float, noun: str, plural: str = "") -> str:
    """The number with its noun: "1 epoch", "1,200 epochs". `plural` is for nouns that do not simply add an s."""
    amount = f"{number:,}" if isinstance(number, int) else f"{number:,g}"
    return f"{amount} {noun if number == 1 else plural or f'{noun}s'}"


def duration(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss: 0:07, 12:30, 3:02:10."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
