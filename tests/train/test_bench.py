"""benchmarks/train.py with the tiny model: it runs every way, repeats nothing, and its sums are the ones it says."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict

import pytest


@pytest.fixture
def bench(benchmark_script, monkeypatch):
    module = benchmark_script("train")
    monkeypatch.setattr(module, "SEARCH", ("hf-bf16-4", "hf-autocast-8"))
    monkeypatch.setattr(
        module.others, "SEARCHES", {"trl": ("trl-dynamic-2", "trl-packing-1"), "msswift": ("msswift-dynamic-2",)}
    )
    for peer in (sys.modules[f"peers.{name}"] for name in ("setting", "hf_trainer", "hf_loop", "ours")):
        monkeypatch.setattr(peer, "ROWS_PER_STEP", 4)
    return module


@pytest.mark.usefixtures("one_thread")
def test_one_round_of_every_way_and_a_second_start(bench, tmp_path):
    rows = ["--rows", "12", "--peer-rows", "8", "--seed-rows", "8", "--feature-rows", "12", "--search-rows", "8"]
    args, ran = bench.arguments(["--model", "tiny", "--rounds", "1", "--threads", "1", *rows]), []

    def run(way, setting):
        ran.append(way)
        if len(ran) == 5:
            raise KeyboardInterrupt
        if way.startswith("msswift"):
            return {"error": "in_msswift.py: code 1: No module | named swift"}
        if way.startswith("trl"):  # another trainer's environment is no matter of a quick test; packing is slower
            rate = 30.0 if "packing" in way else 60.0
            return bench.measure("hf-bf16-4", setting) | {"tokens_per_second": rate}
        return bench.measure(way, setting)

    with pytest.raises(KeyboardInterrupt):
        bench.bench(args, tmp_path, run)
    line = bench.bench(args, tmp_path, run)
    v = json.loads(json.dumps(line))["values"]
    # One was broken off and came again; the rest once: 2 plain loops, 2 of TRL, ms-swift, then 7 of ours and the seed
    # (the searches' rows are the rounds' here, so the best is not measured again).
    assert len(ran) - 1 == len(set(ran)) == 12
    assert set(v["tokens_per_second"]) == {"seed", v["best_peer"], "trl-dynamic-2", *bench.OURS, *bench.SHARED}
    ours = v["tokens_per_second"]["ours"]["median"]
    assert v["ratio_vs"]["trl-dynamic-2"]["median"] == pytest.approx(ours / 60)
    assert v["errors"] == {"msswift-dynamic-2": "in_msswift.py: code 1: No module | named swift"}
    assert v["ratio_vs_seed"]["median"] > 0
    assert v["ratio_vs_best_peer"]["median"] > 0
    assert v["bound_shared_prefix"]["median"] > 1
    assert all(0 < m["median"] < 1 for m in v["mfu"].values())
    text = bench.table(line)
    assert "shared prefixes" in text
    assert "| msswift-dynamic-2 | failed: in_msswift.py: code 1: No module / named swift | | | |" in text
    assert all(f"| {way} |" in text for way in v["tokens_per_second"])


def test_a_rate_leaves_the_first_step_out_and_counts_no_padding(bench, monkeypatch):
    clock = bench.Clock(bench.torch.device("cpu"))
    clock.began, clock.ends = 0.0, [(100.0, 50.0, 999, 999, 9), (101.0, 51.0, 30, 20, 6), (103.0, 53.0, 50, 50, 6)]
    v = clock.values(threads=2)
    assert v["tokens_per_second"] == pytest.approx(80 / 3)
    assert (v["tokens"], v["computed_tokens"], v["supervised_tokens"], v["steps"]) == (80, 70, 12, 2)
    assert v["processor_share"] == pytest.approx(0.5)


def test_operations_are_counted_by_hand(bench):
    body, head = bench.operations(bench.load(bench.Setting("tiny-llama", None, 32, 0), "float32"))
    layer = 64 * 64 + 2 * 64 * 16 + 64 * 64 + 3 * 64 * 128  # q, k and v, o, the gated MLP
    assert (body, head) == (4 * 2 * layer, 4 * 259 * 64)


def test_rounds_have_rows_of_their_own_and_ways_the_same(bench):
    rows = [
        [r.id for r in bench.read_rows(bench.Setting("tiny", None, n, i), 259)] for n, i in ((32, 0), (64, 0), (32, 1))
    ]
    assert rows[0] == rows[1][:32]
    assert rows[0] != rows[2]
    several = bench.read_rows(bench.Setting("tiny", None, 64, 0, several_answers=True), 259)
    assert len({r.question_id for r in several}) < len(several)
    assert asdict(bench.Setting("tiny", None, 32, 0))["several_answers"] is False


def test_a_peer_that_dies_late_costs_its_own_round_only(bench):
    fine = {"tokens_per_second": 100.0, "mfu": 0.5, "computes_in": "bfloat16", "peak_operations_per_second": 1.0}
    fine |= {"peak_memory_bytes": 1, "processor_share": 1.0, "bound": 1.0, "mean_row": 100.0}
    ours = {0: fine, 1: fine | {"tokens_per_second": 300.0}}
    v = bench.summary({"ours": ours, "trl-packing-1": {0: {"error": "out of memory"}, 1: fine}})
    assert v["ratio_vs"]["trl-packing-1"] == {"median": 3.0, "least": 3.0, "most": 3.0}
    assert v["errors"] == {"trl-packing-1": "out of memory"}
    assert v["rounds"] == {"ours": 2, "trl-packing-1": 1}


def test_a_peer_reads_the_rows_it_is_measured_on_and_says_why_it_died(bench, tmp_path):
    others, setting = bench.others, bench.Setting("tiny", None, 32, 0)
    rows = bench.read_rows(setting, 259)
    others.write_rows(setting, rows, tmp_path)
    alpaca = json.loads((tmp_path / "rows.json").read_text(encoding="utf-8"))
    prompts = [json.loads(line) for line in (tmp_path / "prompts.jsonl").read_text(encoding="utf-8").splitlines()]
    texts = {e.id: e for e in others.read_examples_of(setting)}
    wanted = [(texts[row.id].question, texts[row.id].answer) for row in rows]
    assert [(a["instruction"], a["output"]) for a in alpaca] == wanted
    assert [(p["prompt"][0]["content"], p["completion"][0]["content"]) for p in prompts] == wanted
    with pytest.raises(others.PeerFailed, match=r"code 1: .*ZeroDivisionError"):
        others._run([sys.executable, "-c", "1 / 0"], 60)
