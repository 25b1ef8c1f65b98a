"""What a training has cost: GPU-hours, energy, and money by the user's own table of prices."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from pathlib import Path

from pipelines.wording import counted, duration
from pipelines.worker.checkpoint.usage import Usage


def read_prices(path: str) -> dict[str, float]:
    """A table of US dollars for an hour of a GPU, by its name, from a TOML file; empty where `path` is.

    Raises ValueError where the file cannot be read or holds something else.
    """
    if not path:
        return {}
    example = 'a line has the form "NVIDIA H200" = 4.0'
    try:
        prices = tomllib.loads(Path(path).read_text(encoding="utf-8-sig"))  # editors of Windows begin with a mark
    except OSError as error:
        raise ValueError(f"--placement.prices {path}: {error.strerror}; name a TOML file that can be read") from None
    except ValueError as error:  # not TOML, or not UTF-8
        raise ValueError(f"--placement.prices {path}: not a TOML file ({error}); {example}") from None
    for name, price in prices.items():
        is_number = isinstance(price, int | float) and not isinstance(price, bool)
        if not is_number or not 0 <= price < math.inf:
            raise ValueError(
                f"--placement.prices {path}: {name} = {price!r}: a price is a number of US dollars per GPU-hour; "
                f"{example}"
            )
    return {name: float(price) for name, price in prices.items()}


def price_usd(usage: Usage, prices: Mapping[str, float]) -> float | None:
    """US dollars for all GPU-hours; None where a GPU has no price, or none was held."""
    if not usage.gpu_s or not usage.gpu_s.keys() <= prices.keys():
        return None
    return sum(seconds / 3600 * prices[name] for name, seconds in usage.gpu_s.items())


def cost_facts(usage: Usage, prices: Mapping[str, float]) -> dict[str, float]:
    """The figures of a complete training, by other names than an epoch's; those that are not known are absent."""
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
    # Checkpoints of older versions do not say what was used until then.
    measured = f", the last {usage.epochs} of them" if 0 < usage.epochs < epochs else ""
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
