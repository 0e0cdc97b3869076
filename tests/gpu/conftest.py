"""The card these tests run on. CMQA_GPU_TESTS_ON=cpu runs what is not CUDA's own on the processor, to see that they work."""

import os

import pytest
import torch


@pytest.fixture
def device() -> torch.device:
    where = os.environ.get("CMQA_GPU_TESTS_ON", "cuda")
    if where == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return torch.device(where)
