"""The whole evaluation on the tiny model: what is in the report, what is not, and that a null effect shows nothing."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest

import lora_cmqa
from lora_cmqa.cli import main
from lora_cmqa.config import EvaluateConfig
from lora_cmqa.data.template import ChatTemplate
from lora_cmqa.engine.run import OpenRun
from lora_cmqa.errors import AdapterError, ConfigError, DataError, GateFailed
from lora_cmqa.evaluate import evaluation, expected
from lora_cmqa.evaluate.measures import safety_measures
from lora_cmqa.evaluate.report import SECTIONS, sections, verdict_lines
from lora_cmqa.evaluate.safety import red_flags
from lora_cmqa.evaluate.verdict import check_gate, forgetting_verdict, safety_verdict
from lora_cmqa.lora.inject import inject_lora
from lora_cmqa.messages import set_language
from lora_cmqa.models.load import load_model
from lora_cmqa.models.tiny import byte_tokenizer, tiny_model

FEW = EvaluateConfig(
    max_new_tokens=2, generate_rows=2, rank_questions=0, general_chat=False, red_flags=False, bootstrap_samples=100
)


def test_every_number_is_there_with_its_interval(evaluated):
    assert list(evaluated["metrics"]) != []
    assert set(evaluated["metrics"]) == {k for keys in SECTIONS.values() for k in keys}
    for name, m in evaluated["metrics"].items():
        assert set(m) == {"base", "adapter", "difference", "ci95", "p", "n", "detectable", "test"}, name
        assert m["difference"] == pytest.approx(m["adapter"] - m["base"]), name
        assert m["ci95"][0] <= m["ci95"][1], name
        assert 0 < m["p"] <= 1, name
    assert evaluated["metrics"]["top1"]["test"] == evaluated["metrics"]["safe"]["test"] == "mcnemar"
    assert evaluated["metrics"]["perplexity"]["base"] == pytest.approx(np.exp(evaluated["metrics"]["nll"]["base"]))
    assert evaluated["skipped"] == []
    gain, style = (evaluated["metrics"][k]["difference"] for k in ("nll", "nll_shuffled"))
    assert evaluated["metrics"]["content_gain"]["difference"] == pytest.approx(style - gain)  # as a reader subtracts


def test_a_question_that_nearly_stands_in_train_is_left_out_the_second_time(evaluated):
    again = evaluated["without_near_duplicates"]
    assert (evaluated["rows"], again["rows"], again["left_out"]) == (11, 10, 1)  # ten questions, one with two answers
    assert again["metrics"]["nll"]["n"] == evaluated["metrics"]["nll"]["n"] - 1 == 9
    assert again["metrics"]["mrr"]["n"] == again["metrics"]["bleu"]["n"] == 9


def test_no_near_duplicate_is_a_line_and_no_second_table(evaluated):
    titles = [t for t, _ in sections(evaluated, "en")]
    assert titles[-1] == "Without near-duplicates (1 left out)"
    none = evaluated | {"without_near_duplicates": {"rows": 11, "left_out": 0, "metrics": {}}}
    assert [t for t, _ in sections(none, "en")] == titles[:-1]
    assert len(verdict_lines(none, "en")) == len(verdict_lines(evaluated, "en")) + 1


def test_the_same_bytes_twice_and_no_path_or_clock_in_them(home, everything, evaluated):
    lora_cmqa.evaluate(home / "run", home / "data", everything, name="again", device="cpu")
    for name in ("report.json", "report.md", "report.html", "predictions.jsonl"):
        once, twice = ((home / "run/eval" / f / name).read_text(encoding="utf-8") for f in ("test", "again"))
        assert once == twice, name
        assert str(home) not in once, name
        assert name == "report.html" or not re.search(r"20\d\d-\d\d-\d\d|\d\d:\d\d:\d\d", once), name


def test_predictions_hold_both_answers_and_their_scores(home, evaluated):
    rows = [json.loads(line) for line in (home / "run/eval/test/predictions.jsonl").open(encoding="utf-8")]
    kinds = [r["kind"] for r in rows]
    assert (kinds.count("task"), kinds.count("general"), kinds.count("red_flag")) == (10, 40, len(red_flags()))
    assert len(next(r for r in rows if r["question_id"] == "38")["references"]) == 2
    assert all("rouge_l" in r["adapter"]["scores"] and "nll" in r for r in rows if r["kind"] == "task")


def test_the_page_stands_alone(home, evaluated):
    page = (home / "run/eval/test/report.html").read_text(encoding="utf-8")
    assert not re.search(r"<(?:script|link|img)[^>]+(?:src|href)=", page)
    for div in ("differences-nats", "differences-shares", "differences-points", "loss", "lengths", "ranking"):
        assert page.count(f'id="{div}"') == 1, div
    assert page.count("<table class=answers>") >= 2


def test_the_report_speaks_chinese(home, evaluated):
    set_language("zh")
    try:
        titles = [title for title, _ in sections(evaluated)]
    finally:
        set_language(None)
    assert titles[0] == "任务：损失"
    assert sections(evaluated, "en")[0][0] == "The task: loss"


def test_the_model_card_takes_the_table_once(home, evaluated):
    lora_cmqa.evaluate(home / "run", home / "data", FEW, name="card", device="cpu")
    card = (home / "run/README.md").read_text(encoding="utf-8")
    assert card.count("<!-- cmqa eval test -->") == card.count("# Measured on test") == 1
    assert "| loss per answer token |" in card
    assert card.startswith("---\n")
    assert "Top-1" not in card  # the older table is gone


# ---- null ----------------------------------------------------------------------------------------------------------


def test_base_against_base_shows_no_difference_anywhere(home, tmp_path, everything):
    model = inject_lora(load_model("tiny", dtype="float32", device="cpu")[0], r=4, lora_alpha=8, seed=1).eval()
    tokenizer = byte_tokenizer()
    template = ChatTemplate.from_tokenizer(tokenizer)
    opened = OpenRun(model, tokenizer, template, template.stop_ids, tmp_path, "tiny", True)
    report = lora_cmqa.evaluate(opened, home / "data", everything)
    assert len(report["metrics"]) > 25
    for name, m in report["metrics"].items():
        assert m["difference"] == 0, name
        assert m["p"] == 1, name
    rows = [row for _, rows in sections(report, "en") for row in rows]
    assert {row[-1] for row in rows} == {"no difference shown"}
    assert report["verdict"] == "no difference shown"
    assert report["forgetting"]["state"] == report["safety"]["state"] == "within"
    assert not (tmp_path / "README.md").exists()


# ---- verdicts ------------------------------------------------------------------------------------------------------


def says(text):
    return {"text": text, "finish_reason": "stop"}


def test_case_43_an_adapter_that_no_longer_sends_people_to_emergency_care_is_beyond():
    flags = red_flags()
    careful, careless = "请立即拨打120，并告诉家人；尽快就医。", "您好，多休息，多喝水。"

    def verdict(base, adapter):
        rows = [{"base": says(base), "adapter": says(adapter)} for _ in flags]
        found = {m.name: m.paired(samples=500, seed=1) for m in safety_measures(flags, rows)}
        return found, safety_verdict(found)

    worse, beyond = verdict(careful, careless)
    assert (worse["safe"].base, worse["safe"].adapter, worse["safe"].ci95) == (1, 0, (-1, -1))
    assert worse["safe"].p < 1e-9
    assert beyond == {"state": "beyond", "because": ["safe"]}
    assert verdict(careful, careful)[1] == verdict(careless, careful)[1] == {"state": "within", "because": []}
    report = {"verdict": "better", "forgetting": {"state": "within"}, "safety": beyond}
    with pytest.raises(GateFailed, match="safety is beyond") as e:
        check_gate(report, "report.md")
    assert e.value.exit_code == 4


def test_case_43_the_report_measures_it_on_both_sides(evaluated):
    for name in ("safe", "emergency", "doctor"):
        m = evaluated["metrics"][name]
        assert m["n"] == len(red_flags())
        assert m["detectable"] >= 6 / m["n"]
    assert evaluated["safety"]["state"] in ("within", "beyond")


def test_forgetting_is_the_share_lost_against_its_limit(evaluated):
    metrics = {"general_chat": replace_metric(-0.04, (-0.1, 0.02)), "probe": replace_metric(-0.06, (-0.12, 0.0))}
    found = forgetting_verdict(metrics, 0.05)
    assert (found["state"], found["by"], found["lost"], found["not_excluded"]) == ("beyond", "probe", 0.06, 0.12)
    assert forgetting_verdict(metrics, 0.06)["state"] == "within"
    del metrics["probe"]
    assert forgetting_verdict(metrics, 0.05)["by"] == "general_chat"
    assert forgetting_verdict({}, 0.05) is None
    assert evaluated["forgetting"]["by"] == "probe"


def replace_metric(difference, interval):
    from lora_cmqa.evaluate.bootstrap import Paired

    return Paired(0.5, 0.5 + difference, difference, interval, 0.5, 50, 0.1)


def test_the_gate_exits_4_and_leaves_the_report(home, capsys):
    words = ["eval", str(home / "run"), "--data", str(home / "data"), "--gate", "--name", "gated", "--device", "cpu"]
    words += ["--no-general-chat", "--no-red-flags", "--rank-questions", "0", "--generate-rows", "0"]
    assert main([*words, "--bootstrap-samples", "100", "--lang", "en"]) == 4
    out = capsys.readouterr()
    assert "GateFailed" in out.err
    assert "safety was not measured" in out.err
    assert "Verdict: " in out.out
    assert (home / "run/eval/gated/report.html").is_file()


# ---- sizes, time, errors -------------------------------------------------------------------------------------------


def test_quick_makes_no_size_larger():
    quick = evaluation._sizes(EvaluateConfig(quick=True))
    assert (quick.loss_rows, quick.generate_rows, quick.rank_questions, quick.rank_candidates) == (100, 100, 60, 20)
    small = evaluation._sizes(EvaluateConfig(quick=True, loss_rows=7, rank_questions=0, max_new_tokens=500))
    assert (small.loss_rows, small.rank_questions, small.max_new_tokens) == (7, 0, 80)
    assert evaluation._sizes(EvaluateConfig()) == EvaluateConfig()


def test_a_long_evaluation_says_how_long_first(home, monkeypatch, capsys):
    monkeypatch.setattr(expected, "_SMALL", 0)
    monkeypatch.setattr(evaluation, "_WORTH_SAYING", 0)
    lora_cmqa.evaluate(home / "run", home / "data", FEW, name="timed", device="cpu")
    err = capsys.readouterr().err
    assert "min on this machine" in err or "分钟" in err
    assert "--quick" in err


def test_each_error_is_named(home, tmp_path):
    template = ChatTemplate.from_tokenizer(byte_tokenizer())
    bare = OpenRun(tiny_model(), byte_tokenizer(), template, (), tmp_path, "tiny", False)
    with pytest.raises(AdapterError, match="no adapter here"):
        lora_cmqa.evaluate(bare, home / "data")
    (tmp_path / "empty").mkdir()
    for split in ("train", "dev"):
        (tmp_path / f"empty/{split}.jsonl").write_bytes((home / f"data/{split}.jsonl").read_bytes())
    with pytest.raises(DataError, match="no test row"):
        lora_cmqa.evaluate(home / "run", tmp_path / "empty", FEW, device="cpu")
    with pytest.raises(DataError, match="no such file or folder"):
        lora_cmqa.evaluate(home / "run", home / "data", replace(FEW, probe=str(tmp_path / "absent")), device="cpu")
    row = (home / "data/test.jsonl").read_text(encoding="utf-8").splitlines()[0]
    (tmp_path / "empty/test.jsonl").write_text(row + "\n", encoding="utf-8")
    with pytest.raises(DataError, match="cannot be shuffled apart"):
        lora_cmqa.evaluate(home / "run", tmp_path / "empty", FEW, device="cpu")
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (foreign / name).write_bytes((home / "run" / name).read_bytes())
    with pytest.raises(ConfigError, match="does not say what it was trained on"):
        lora_cmqa.evaluate(foreign, None, FEW, device="cpu")
    assert lora_cmqa.evaluate(foreign, home / "data", FEW, device="cpu")["base"].startswith("tiny")
