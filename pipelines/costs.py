"""The cost of a training: GPU-hours, energy, and US dollars from the user's price table."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from pathlib import Path

from pipelines.wording import counted, duration
from pipelines.worker.checkpoint.usage import Usage


def read_prices(path: str) -> dict[str, float]:
    """Reads a TOML file of GPU prices; returns GPU name -> US dollars per hour, empty if `path` is empty.

    Raises ValueError if the file cannot be read or a value is not a price.
    """
    if not path:
        return {}
    example = 'example: "NVIDIA H200" = 4.0'
    try:
        prices = tomllib.loads(Path(path).read_text(encoding="utf-8-sig"))  # Windows editors may add a byte order mark
    except OSError as error:
        raise ValueError(f"--placement.prices {path}: {error.strerror}; give a readable TOML file") from None
    except ValueError as error:  # not TOML, or not UTF-8
        raise ValueError(f"--placement.prices {path}: not a TOML file ({error}); {example}") from None
    for name, price in prices.items():
        is_number = isinstance(price, int | float) and not isinstance(price, bool)
        if not is_number or not 0 <= price < math.inf:
            raise ValueError(
                f"--placement.prices {path}: {name} = {price!r} is not a price; give US dollars per GPU-hour, {example}"
            )
    return {name: float(price) for name, price in prices.items()}


def price_usd(usage: Usage, prices: Mapping[str, float]) -> float | None:
    """Price of all GPU-hours in US dollars; None if no GPU was used or one of them has no price."""
    if not usage.gpu_s or not usage.gpu_s.keys() <= prices.keys():
        return None
    return sum(seconds / 3600 * prices[name] for name, seconds in usage.gpu_s.items())


def cost_facts(usage: Usage, prices: Mapping[str, float]) -> dict[str, float]:
    """Totals of a finished training, named differently from an epoch's metrics; unknown ones are omitted."""
    price = price_usd(usage, prices)
    return {
        "images_per_s_sustained": usage.images_per_s,
        "total_s": usage.wall_s,
        "total_validation_s": usage.validation_s,
        "total_checkpoint_s": usage.checkpoint_s,
        **({"gpu_hours": usage.gpu_hours} if usage.gpu_s else {}),
        **({"energy_kwh": usage.energy_kwh} if usage.energy_j else {}),
        **({"price_usd": price} if price is not None else {}),
    }


def cost_line(usage: Usage, epochs: int, prices: Mapping[str, float]) -> str:
    """One line for the user: time, sustained speed, GPU-hours, energy, price."""
    # Checkpoints of older releases did not record usage.
    measured = f" (the last {usage.epochs} measured)" if 0 < usage.epochs < epochs else ""
    parts = [f"trained {counted(epochs, 'epoch')}{measured} in {duration(usage.wall_s)}"]
    parts.append(f"{usage.images_per_s:,.0f} images/s")
    if usage.gpu_s:
        parts.append(f"{usage.gpu_hours:.2f} GPU-hours")
    if usage.energy_j:
        parts.append(f"{usage.energy_kwh:.2f} kWh")
    price = price_usd(usage, prices)
    if price is not None:
        rates = ", ".join(f"${prices[name]:.2f}" for name in sorted(usage.gpu_s))
        parts.append(f"about ${price:.2f} at {rates}/GPU-hour")
    elif prices and usage.gpu_s:
        parts.append(f"no price for {', '.join(sorted(usage.gpu_s.keys() - prices.keys()))}")
    return " · ".join(parts)
