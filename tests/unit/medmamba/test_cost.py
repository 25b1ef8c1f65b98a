"""What a network costs is what torch counts, and what the paper's shapes say."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from medmamba.config import MedMambaConfig
from medmamba.cost import macs, scan_updates
from medmamba.model import build_model


@pytest.mark.parametrize("side", [32, 44])
def test_multiply_accumulates_match_torch_plus_state_updates(side):
    config = MedMambaConfig(variant="nano", num_classes=6)
    model = build_model(config, scan="reference").eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counted:
        model(torch.randn(1, 3, side, side))
    # The definition's read-out is a product, which torch counts; its updates of the states are elementwise.
    assert macs(config, side) == counted.get_total_flops() // 2 + scan_updates(config, side)


def test_the_published_variants_scan_what_their_shapes_say():
    updates = {name: scan_updates(MedMambaConfig(variant=name, num_classes=6), 224) for name in ("T", "S", "B")}
    assert {name: round(number / 1e6, 1) for name, number in updates.items()} == {"T": 81.9, "S": 101.2, "B": 160.6}
