"""What all tests share: one thread, and the same random numbers in every run."""

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def manual_seed() -> None:
    torch.manual_seed(0)
