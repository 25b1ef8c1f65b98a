"""Networks from timm, for `medmamba bench --compare`."""

from __future__ import annotations

from torch import nn


def create_network(name: str, side: int, num_classes: int) -> nn.Module:
    """timm's untrained network of this name for images of `side` px.

    Raises ValueError if timm cannot be imported or does not have the network for this side.
    """
    try:
        import timm
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision built for another torch
        raise ValueError(f"needs the extra compare ({str(error).splitlines()[0]})") from None
    sized = {"img_size": side} if "patch" in name else {}  # convolutions take any side
    try:
        network: nn.Module = timm.create_model(name, num_classes=num_classes, **sized)
    except (AssertionError, ValueError) as error:
        raise ValueError(f"timm cannot create {name} for {side} px ({error})") from None
    return network
