"""The cost of MedMamba for one image, computed from its configuration: scan updates and multiply-accumulates."""

from __future__ import annotations

from itertools import pairwise

from medmamba.config import MedMambaConfig
from medmamba.model import NUM_DIRECTIONS


def scan_updates(config: MedMambaConfig, side: int) -> int:
    """State updates of the selective scan for one image: one per position, direction, channel and state."""
    total = 0
    for length, channels, depth in _stages(config, side):
        total += depth * NUM_DIRECTIONS * length * channels * config.d_state
    return total


def macs(config: MedMambaConfig, side: int) -> int:
    """Multiply-accumulates of one image: convolutions, matrix products and the scan (two per update)."""
    stages = _stages(config, side)
    total = stages[0][0] * stages[0][1] * 3 * 4 * 4 + stages[-1][1] * config.num_classes
    for length, channels, depth in stages:
        half, rank = channels // 2, -(-channels // 32)
        convolutions = (9 + 9 + 1) * half * half + 9 * channels
        products = half * 2 * channels + channels * half
        into_scan = channels * NUM_DIRECTIONS * (2 * rank + 2 * config.d_state)
        total += depth * length * (convolutions + products + into_scan)
    for (_, channels, _), (length, _, _) in pairwise(stages):
        total += length * 4 * channels * 2 * channels
    return total + 2 * scan_updates(config, side)


def _stages(config: MedMambaConfig, side: int) -> list[tuple[int, int, int]]:
    """(positions, inner channels of the scan, blocks) of each stage."""
    found, edge = [], side // 4
    for dim, depth in zip(config.resolved_dims, config.resolved_depths, strict=True):
        found.append((edge * edge, dim, depth))
        edge //= 2
    return found
