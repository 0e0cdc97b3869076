"""benchmarks/serve.py with the tiny model: it runs to its end, repeats no round, and its ratios are those of pairs."""

from __future__ import annotations

import json
import math
import sys

import pytest


@pytest.fixture
def bench(benchmark_script):
    return benchmark_script("serve")


def test_every_pair_of_the_tiny_model_and_a_second_start(bench, tmp_path, monkeypatch):
    args = bench.arguments(["--model", "tiny", "--dtype", "float32", "--rounds", "2", "--tokens", "2"])
    monkeypatch.setattr(bench, "prompts", lambda rows, _: [[i + 10, 20, 30, 40] for i in range(rows)])
    monkeypatch.setattr(bench, "first_token_under_load", lambda *_: {"p95": 1.0})  # 200 steps; below
    file = tmp_path / "rounds.jsonl"
    values = bench.measure(args, bench.Rounds(file))
    ratios = {k: v for k, v in values.items() if " at " in k}
    assert len(ratios) == 11
    assert all(v["ci95"][0] <= v["ratio"] <= v["ci95"][1] and v["rounds"] == 2 for v in ratios.values())
    lines = file.read_text().splitlines()
    assert len(lines) == 11 * 2 + 1

    file.write_text("\n".join(lines[:-3]) + "\n")  # stopped: two rounds and the first tokens are missing
    again = bench.measure(args, bench.Rounds(file))
    assert file.read_text().splitlines()[:-3] == lines[:-3]
    assert {k: v for k, v in again.items() if "one by one" not in k} == {
        k: v for k, v in values.items() if "one by one" not in k
    }


def test_first_tokens_under_load_are_counted_one_by_one(bench):
    model, tokenizer = bench.load_model("tiny")
    pairs = {f"a{i}": bench.random_adapter(model, i) for i in range(8)}
    engine = bench.EmbeddedEngine(model, tokenizer, (), prefix_memory=0, load_adapter=pairs.__getitem__)
    waits = bench.first_token_under_load(engine, list(pairs), 3)
    assert 0 < waits["p50"] <= waits["p95"]
    assert waits["n"] == 3
    assert engine.load == (0, 0)


def test_a_ratio_is_the_geometric_mean_of_pairs_in_changing_order(bench, tmp_path):
    asked, clock = [], iter(range(100))

    def side(name, speeds):
        speeds = iter(speeds)

        def run(rows, tokens):
            asked.append((name, rows, tokens, next(clock)))
            return 1.0 if tokens == bench.WARM_UP else next(speeds)

        return run

    args = bench.arguments(["--rounds", "2", "--tokens", "7"])
    found = bench.paired("x", side("a", [2, 9]), side("b", [1, 2]), 8, args, bench.Rounds(tmp_path / "r.jsonl"))
    assert [a[0] for a in asked] == ["a", "b", "a", "b", "b", "a"]
    assert found["ratio"] == pytest.approx(3)  # of 2 and 4.5
    assert found["median"] == pytest.approx(3.25)
    half = 12.7062 * math.log(4.5 / 2) / 2  # t(0.975, 1 degree) times the deviation / sqrt(2)
    assert found["ci95"] == pytest.approx([3 * math.exp(-half), 3 * math.exp(half)], rel=1e-4)


def test_ten_thousand_names_in_small(bench, monkeypatch, capsys):
    monkeypatch.setattr(
        sys, "argv", ["serve.py", "--registry", "120", "--dry", "--threads", str(bench.torch.get_num_threads())]
    )
    bench.main()
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    v = line["values"]
    assert line["bench"] == "serve-registry"
    assert v["adapters"] == 120
    assert v["cold_load_seconds"]["n"] == 20
    assert 0 < v["adapter_bytes_most"] <= v["adapter_bytes_budget"]
