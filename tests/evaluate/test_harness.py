"""The harness's door, with a stand-in behind it: both sides are asked, and their questions are paired."""

import sys
from dataclasses import replace
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest

import lora_cmqa
from lora_cmqa.config import EvaluateConfig
from lora_cmqa.errors import ConfigError
from lora_cmqa.evaluate import harness
from lora_cmqa.evaluate.report import sections

FEW = EvaluateConfig(
    max_new_tokens=2, generate_rows=0, rank_questions=0, general_chat=False, red_flags=False, bootstrap_samples=100
)


@pytest.fixture
def stand_in(monkeypatch):
    """An lm_eval that finds nine of ten right without the adapter and two of ten with it."""

    class HFLM:
        def __init__(self, pretrained, tokenizer, backend):
            self.model = pretrained

    def simple_evaluate(model, tasks, log_samples):
        layer = next(m for m in model.model.modules() if hasattr(m, "lora_A"))
        right = 9 if layer.disable_adapters else 2
        samples = [
            {"doc_id": i, "filter": f, "metrics": ["acc", "note"], "acc": float(i < right), "note": "x"}
            for f in ("none", "second")
            for i in range(10)
        ]
        return {"samples": {f"{tasks[0]}-sub": samples}}

    modules = {n: ModuleType(n) for n in ("lm_eval", "lm_eval.models", "lm_eval.models.huggingface")}
    modules["lm_eval"].simple_evaluate = simple_evaluate
    modules["lm_eval.models.huggingface"].HFLM = HFLM
    for name, module in modules.items():
        module.__spec__ = ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, module)


def test_both_sides_are_asked_and_paired(home, stand_in):
    report = lora_cmqa.evaluate(home / "run", home / "data", replace(FEW, lm_eval=("a,b",)), name="h", device="cpu")
    m = report["metrics"]["lm_eval a acc"]
    assert (m["base"], m["adapter"], m["n"], m["test"]) == (0.9, 0.2, 10, "mcnemar")
    assert m["p"] == pytest.approx(2 / 2**7)
    rows = dict(sections(report, "en"))["lm-evaluation-harness"]
    assert [(r[0], r[-1]) for r in rows] == [("a acc", "worse"), ("b acc", "worse")]


def test_without_the_harness_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert harness.task_names(()) == []
    with pytest.raises(ConfigError, match="ceval-valid, cmmlu need EleutherAI's harness") as e:
        harness.task_names(("ceval-valid,cmmlu",))
    assert "lora-cmqa[harness]" in str(e.value)
