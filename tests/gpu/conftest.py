"""The card of these tests. With CMQA_GPU_TESTS_ON=cpu those that are not CUDA's own run on the processor."""

import os

import pytest
import torch


@pytest.fixture
def device() -> torch.device:
    where = os.environ.get("CMQA_GPU_TESTS_ON", "cuda")
    if where == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return torch.device(where)
