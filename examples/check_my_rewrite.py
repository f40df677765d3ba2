"""You rewrote a model by hand: does it still compute the same, and is it faster?

The rewrite below hoists a feedback matrix out of its loop, as one of the stories did.

    python examples/check_my_rewrite.py
"""

from __future__ import annotations

import looplift
import torch
from looplift.models import eigenstate
from torch import Tensor


def main() -> looplift.Differs | looplift.Equal:
    naive = eigenstate.model_with_coupling("tiny")
    published = eigenstate.as_published_coupling("tiny")
    right = eigenstate.by_hand_with_coupling("tiny")
    inputs: tuple[Tensor, ...] = eigenstate.example_inputs("tiny")
    print("by hand, right:", looplift.verify(naive, right, inputs))
    verdict = looplift.verify(naive, published, inputs)
    print("as published:  ", verdict)
    for comparison in looplift.compare(naive, right, inputs, seconds=0.5):
        timing = comparison["b"]
        print(f"{comparison.mode}: {timing.ratio:.2f}x ({timing.low:.2f}–{timing.high:.2f})")
    return verdict


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
