"""What every room's tests share."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def _shared_or_skip(part: str) -> Path:
    folder = Path(os.environ.get("CMQA_SHARED", ROOT.parent / "shared")) / part
    if not folder.exists():
        message = f"needs {part} under CMQA_SHARED (default ../shared), which is not here"
        if os.environ.get("CMQA_REQUIRE_SHARED") == "1":
            pytest.fail(message)
        pytest.skip(message)
    return folder


@pytest.fixture(scope="session")
def cmqa_mini() -> Path:
    """5,000 real cMedQA2 pairs in the cMQA layout (not part of the project)."""
    return _shared_or_skip("data/cmqa-mini")


@pytest.fixture(scope="session")
def cepilepsyqa() -> Path:
    return _shared_or_skip("data/cepilepsyqa")


@pytest.fixture(scope="session")
def general_probe() -> Path:
    """Chinese multiple choice in the CSV forms of C-Eval, CMMLU and CMExam (not part of the project)."""
    return _shared_or_skip("data/general-probe")


@pytest.fixture(scope="session")
def qwen_v1() -> Path:
    """Reference data made by the original Qwen-v1 stack (not part of the project)."""
    return _shared_or_skip("fixtures/qwen-v1")


@pytest.fixture
def benchmark_script(monkeypatch):
    """benchmark_script("train") -> benchmarks/train.py as a module, with what stands beside it importable."""
    folder = ROOT / "benchmarks"
    monkeypatch.syspath_prepend(str(folder))

    def load(name: str):
        spec = importlib.util.spec_from_file_location(f"bench_{name}", folder / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        return module

    yield load
    for name in [n for n in sys.modules if n.split(".")[0] == "peers"]:
        del sys.modules[name]


@pytest.fixture
def tiny():
    """The doll's house: (model, tokenizer) of the built-in tiny model in float64, random weights, no download."""
    from lora_cmqa.models.load import load_model

    return load_model("tiny", dtype="float64", device="cpu")


@pytest.fixture
def exact_norms(monkeypatch):
    """transformers' norms compute in float32 even in a float64 model; for the time of a test, in the model's own
    precision. Nothing else of its arithmetic is touched, and 16-bit and float32 models compute as before."""
    import torch
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

    def direction(x, eps):
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)

    for norm in (LlamaRMSNorm, Qwen2RMSNorm, Qwen3RMSNorm):
        monkeypatch.setattr(
            norm, "forward", lambda self, x: self.weight * direction(x, self.variance_epsilon).to(x.dtype)
        )
    monkeypatch.setattr(
        Gemma3RMSNorm,
        "forward",
        lambda self, x: (direction(x, self.eps) * (1.0 + self.weight)).type_as(x),
    )
