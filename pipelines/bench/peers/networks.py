"""Networks of other projects, by timm, that `medmamba bench --compare` measures."""

from __future__ import annotations

from torch import nn


def create_network(name: str, side: int, num_classes: int) -> nn.Module:
    """timm's network of this name for images of `side` px, not trained.

    Raises ValueError where timm cannot be imported or has no such network for this side.
    """
    try:
        import timm
    except (ImportError, RuntimeError) as error:  # RuntimeError: its torchvision is of another torch
        raise ValueError(f"needs the extra compare ({str(error).splitlines()[0]})") from None
    sized = {"img_size": side} if "patch" in name else {}  # convolutions take any side
    try:
        return timm.create_model(name, num_classes=num_classes, **sized)
    except (AssertionError, ValueError) as error:
        raise ValueError(f"timm has no {name} for {side} px ({error})") from None
