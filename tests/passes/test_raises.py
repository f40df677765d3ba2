"""What PyTorch raises for a value of one step, it raises when all steps run at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.testing import assert_close

eye = torch.eye(4)
STEPS: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {  # of a row [2, 4] and integers [2]
    "one_hot": lambda m, h, i: functional.one_hot(i, 4) * h,
    "embedding": lambda m, h, i: m.table(i),
    "gather": lambda m, h, i: h.gather(1, i[:, None]),
    "index_fill": lambda m, h, i: h.index_fill(1, i, 0.5),
    "index_fill of a tensor": lambda m, h, i: h.index_fill(1, i, h.sum()),
    "index_put": lambda m, h, i: h.index_put((torch.arange(2), i), h[:, 0]),
    "scatter": lambda m, h, i: h.scatter(1, i[:, None], 2.0),
    "cholesky": lambda m, h, i: torch.linalg.cholesky(eye * (i + 1)[:, None, None])[:, 0] * h,
    "inv": lambda m, h, i: torch.linalg.inv(eye * (i + 1)[:, None, None])[:, 0] * h,
    "inverse": lambda m, h, i: torch.inverse(eye * (i + 1)[0])[0] * h,
    "solve": lambda m, h, i: torch.linalg.solve(eye * (i + 1)[:, None, None], h),
    "solve of a fixed matrix": lambda m, h, i: torch.linalg.solve(m.table.weight.T @
                                                                  m.table.weight, (h * i[0]).T).T,
    "solve of one vector": lambda m, h, i: torch.linalg.solve(eye * (i[0] + 1), h[0]) + h,
    "lu_factor": lambda m, h, i: torch.linalg.lu_factor(eye * (i + 1)[:, None, None])[0][:, 0] * h,
}


class Steps(nn.Module):
    """Steps that depend on none before."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.step, self.enter, self.table = STEPS[kind], nn.Linear(4, 4), nn.Embedding(4, 4)

    def forward(self, x: Tensor, i: Tensor) -> Tensor:
        return torch.stack([self.step(self, self.enter(x[:, t]), i[:, t])
                            for t in range(x.shape[1])], 1)


class Carried(Steps):
    """Steps within a recurrence."""

    def forward(self, x: Tensor, i: Tensor) -> Tensor:
        h, states = x.new_zeros(2, 4), []
        for t in range(x.shape[1]):
            h = torch.tanh(self.enter(h) + self.step(self, torch.tanh(h + x[:, t]), i[:, t]))
            states.append(h)
        return torch.stack(states, 1)


class Apart(nn.Module):
    """A module for each step."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.parts = nn.ModuleList(Steps(kind) for _ in range(6))

    def forward(self, x: Tensor, i: Tensor) -> Tensor:
        parts: Any = self.parts
        return torch.stack([part.step(part, part.enter(x[:, t]), i[:, t])
                            for t, part in enumerate(parts)], 1)


@pytest.mark.parametrize("model", [Steps, Carried, Apart])
@pytest.mark.parametrize("kind", STEPS)
def test_what_the_model_raises_is_raised(model: type[nn.Module], kind: str, equal: Any) -> None:
    naive, x, i = model(kind), torch.randn(2, 6, 4), torch.randint(0, 4, (2, 6))
    with torch.no_grad():
        fast = equal(naive, (x, i), mode="inference")
        for wrong in (4, -1, -4, -5):
            for t in (0, 4, 5):
                given = i.clone()
                given[:, t] = wrong
                try:
                    want = naive(x, given)
                except Exception as error:
                    with pytest.raises(type(error)):
                        fast(x, given)
                else:
                    assert_close(fast(x, given), want)
