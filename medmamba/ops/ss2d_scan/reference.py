"""The reference of the 2-D selective scan in plain PyTorch; every other backend must match it.

Per direction k and channel d, over the positions l of the k-th order, with states h of length N and A = -exp(A_log):

    delta_l = softplus(dt_weight · dt_l + dt_bias)
    h_l     = exp(delta_l · A) · h_{l-1} + delta_l · B_l · u_l
    y_l     = C_l · h_l + D · u_l

and the four y are summed per pixel. Orders k = 0..3: row-major, column-major, and both reversed.
Shapes: B batch, K = 4 directions, L = H·W positions, D channels, N states, R rank of dt, F any features.
Upstream scans four reordered copies of the sequence; here all inputs and outputs are in pixel order.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812  (torch's own habit)
from torch import Tensor

from medmamba.ops.ss2d_scan.contract import Operands


def unusable(device_type: str) -> str | None:
    """Why this backend cannot run on such a device: always None, because it runs everywhere."""
    return None


def scan(*operands: Tensor) -> Tensor:
    """Returns y_BHWD in u's dtype, computed in float32 (float64 if u is float64), even under autocast.

    Time and memory grow linearly with L, including backward, which keeps every state: L·N floats per row.
    """
    given = Operands(*operands)
    height, width = given.u_BHWD.shape[1:3]
    exact = torch.promote_types(given.u_BHWD.dtype, torch.float32)
    with torch.autocast(given.u_BHWD.device.type, enabled=False):
        u_BKLD = in_four_orders(given.u_BHWD.to(exact).unsqueeze(3).expand(-1, -1, -1, 4, -1))
        dt_BKLR, B_BKLN, C_BKLN = (in_four_orders(x.to(exact)) for x in (given.dt_BHWKR, given.B_BHWKN, given.C_BHWKN))
        lifted_BKLD = dt_BKLR @ given.dt_weight_KDR.to(exact).transpose(1, 2) + given.dt_bias_KD.to(exact)[:, None]
        delta_BKLD = F.softplus(lifted_BKLD)
        A_KDN = -given.A_log_KDN.to(exact).exp()

        decay_BKLDN = (delta_BKLD[..., None] * A_KDN[:, None]).exp()
        input_BKLDN = (delta_BKLD * u_BKLD)[..., None] * B_BKLN[..., None, :]
        h_BKDN = torch.zeros_like(input_BKLDN[:, :, 0])
        states = []
        # unbind instead of indexing: the gradient of `x[:, :, l]` has the size of x, for every position.
        for decay_BKDN, input_BKDN in zip(decay_BKLDN.unbind(2), input_BKLDN.unbind(2), strict=True):
            h_BKDN = decay_BKDN * h_BKDN + input_BKDN
            states.append(h_BKDN)
        y_BKLD = (torch.stack(states, 2) @ C_BKLN[..., None]).squeeze(-1) + given.D_KD.to(exact)[:, None] * u_BKLD
        return summed_in_pixel_order(y_BKLD, height, width).to(given.u_BHWD.dtype)


def in_four_orders(x_BHWKF: Tensor) -> Tensor:
    """The sequence that each direction reads: (B, K, L, F)."""
    row, column, row_reversed, column_reversed = x_BHWKF.unbind(3)
    return torch.stack(
        (
            row.flatten(1, 2),
            column.transpose(1, 2).flatten(1, 2),
            row_reversed.flatten(1, 2).flip(1),
            column_reversed.transpose(1, 2).flatten(1, 2).flip(1),
        ),
        dim=1,
    )


def summed_in_pixel_order(y_BKLD: Tensor, height: int, width: int) -> Tensor:
    """The sum of the four sequences in pixel order: (B, H, W, D)."""
    row, column, row_reversed, column_reversed = y_BKLD.unbind(1)
    by_row = row + row_reversed.flip(1)
    by_column = column + column_reversed.flip(1)
    return torch.unflatten(by_row, 1, (height, width)) + torch.unflatten(by_column, 1, (width, height)).transpose(1, 2)
