"""--deterministic asks cuBLAS for its fixed workspace while there is time, and says so when there is none."""

import os

import pytest
import torch

from lora_cmqa.errors import ConfigError
from lora_cmqa.train.deterministic import SIZE, WORKSPACE, deterministic_kernels


@pytest.fixture
def gpu(monkeypatch):
    """gpu(in_use=True): as on a machine with a GPU that this process has (not) used yet."""

    def make(*, in_use: bool) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: in_use)

    monkeypatch.setenv(WORKSPACE, "x")  # so that it is put back afterwards
    monkeypatch.delenv(WORKSPACE)
    return make


def test_it_is_set_before_the_gpu_is_first_used(gpu):
    gpu(in_use=False)
    with deterministic_kernels(False):
        assert WORKSPACE not in os.environ
    with deterministic_kernels(True):
        assert os.environ[WORKSPACE] == SIZE


@pytest.mark.parametrize("found", [None, ":0:0"])
def test_too_late_is_refused(gpu, monkeypatch, found):
    gpu(in_use=True)
    if found:
        monkeypatch.setenv(WORKSPACE, found)
    with pytest.raises(ConfigError, match=f"before the GPU is first used; it is {found or 'not set'}"):
        deterministic_kernels(True).__enter__()
    assert not torch.are_deterministic_algorithms_enabled()


def test_set_by_the_user_it_is_taken(gpu, monkeypatch):
    gpu(in_use=True)
    monkeypatch.setenv(WORKSPACE, ":16:8")
    with deterministic_kernels(True):
        assert torch.are_deterministic_algorithms_enabled()


def test_other_errors_pass_and_the_state_comes_back():
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with pytest.raises(RuntimeError, match="something else"), deterministic_kernels(True):
            raise RuntimeError("something else")
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
