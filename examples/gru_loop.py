"""A GRU written as a loop: the input's share of the gates moves out, the rest is one kernel.

    python examples/gru_loop.py
"""

from __future__ import annotations

import looplift
import torch
from torch import Tensor, nn


class LoopedGRU(nn.Module):
    """Gated recurrent unit (Cho et al., 2014), one step after another. x: (B, T, width)."""

    def __init__(self, width: int = 16, hidden: int = 32) -> None:
        super().__init__()
        self.hidden = hidden
        self.from_input = nn.Linear(width, 3 * hidden)
        self.from_state = nn.Linear(hidden, 3 * hidden)

    def forward(self, x: Tensor) -> Tensor:
        h, outputs = x.new_zeros(x.shape[0], self.hidden), []
        for t in range(x.shape[1]):
            r_x, z_x, n_x = self.from_input(x[:, t]).chunk(3, -1)
            r_h, z_h, n_h = self.from_state(h).chunk(3, -1)
            r, z = torch.sigmoid(r_x + r_h), torch.sigmoid(z_x + z_h)
            h = (1 - z) * torch.tanh(n_x + r * n_h) + z * h
            outputs.append(h)
        return torch.stack(outputs, 1)


def main(measure: bool = True) -> looplift.OptimizedModule:
    torch.manual_seed(0)
    model, x = LoopedGRU(), torch.randn(8, 32, 16)
    fast = looplift.apply_passes(model, (x,), measure=measure)
    print(fast.report)
    print(fast.code)
    torch.testing.assert_close(fast(x), model(x))
    return fast


if __name__ == "__main__":
    main()
