"""docs/evaluation.md names what the report shows."""

from pathlib import Path

from lora_cmqa.config import EvaluateConfig
from lora_cmqa.evaluate import evaluation
from lora_cmqa.evaluate.forgetting import general_prompts
from lora_cmqa.evaluate.safety import red_flags

DOCS = (Path(__file__).parents[2] / "docs/evaluation.md").read_text(encoding="utf-8")


def test_the_numbers_in_the_docs_are_those_of_the_code():
    quick = evaluation._sizes(EvaluateConfig(quick=True))
    assert f"{len(red_flags())} bundled messages" in DOCS
    assert f"one of {len(general_prompts())} bundled everyday questions" in DOCS
    assert f"{quick.loss_rows} rows, {quick.rank_questions} questions x {quick.rank_candidates} candidates" in DOCS
    assert f"of which {quick.rank_tokens} tokens are scored, {quick.max_new_tokens} new tokens" in DOCS
    assert f"`--max-forgetting` ({EvaluateConfig().max_forgetting})" in DOCS
