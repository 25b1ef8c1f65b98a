"""reference.py with its loop over positions as one operator of torch, for networks that leave torch.

Plain Python loops are unrolled when a network is traced, and T at 224 px has 8,722 positions in its ten blocks. `scan`
of torch's higher-order operators stays a loop: in a torch.export program, and as the operator Scan in ONNX. Memory
holds one state, not those of all positions. It is not a backend to train or evaluate with: every position costs several
calls from Python.
"""

from __future__ import annotations

import torch.nn.functional as F  # noqa: N812  (torch's own habit)
from torch import Tensor
from torch._higher_order_ops.scan import scan as loop

from medmamba.ops.ss2d_scan.contract import Operands
from medmamba.ops.ss2d_scan.reference import in_four_orders, summed_in_pixel_order


def scan(*operands: Tensor) -> Tensor:
    """Returns y_BHWD, float32; the equation and the axes are those of reference.py."""
    given = Operands(*operands)
    height, width = given.u_BHWD.shape[1:3]
    u_BKLD = in_four_orders(given.u_BHWD.unsqueeze(3).expand(-1, -1, -1, 4, -1))
    dt_BKLR, B_BKLN, C_BKLN = (in_four_orders(x) for x in (given.dt_BHWKR, given.B_BHWKN, given.C_BHWKN))
    delta_BKLD = F.softplus(dt_BKLR @ given.dt_weight_KDR.transpose(1, 2) + given.dt_bias_KD[:, None])
    A_KDN = -given.A_log_KDN.exp()

    def step(h_BKDN: Tensor, at: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        delta_BKD, input_BKD, B_BKN, C_BKN = at
        decayed_BKDN = (delta_BKD[..., None] * A_KDN).exp() * h_BKDN
        h_BKDN = decayed_BKDN + input_BKD[..., None] * B_BKN[..., None, :]
        return h_BKDN, (h_BKDN @ C_BKN[..., None]).squeeze(-1)

    sequences = tuple(x.movedim(2, 0) for x in (delta_BKLD, delta_BKLD * u_BKLD, B_BKLN, C_BKLN))
    start_BKDN = u_BKLD.new_zeros((*sequences[0].shape[1:], A_KDN.shape[-1]))
    _, y_LBKD = loop(step, start_BKDN, sequences, dim=0)
    return summed_in_pixel_order(y_LBKD.movedim(0, 2) + given.D_KD[:, None] * u_BKLD, height, width)
