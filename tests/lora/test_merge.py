"""Merged equals base + adapter; taken out again, the base is back."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_cmqa.errors import AdapterError, RunError
from lora_cmqa.lora.adapter import load_adapter, save_adapter
from lora_cmqa.lora.fingerprint import write_fingerprint
from lora_cmqa.lora.merge import _write, merge, unmerge
from lora_cmqa.models.load import load_model
from lora_cmqa.models.tiny import byte_tokenizer, tiny_folder, tiny_model

from .conftest import adapted

IDS = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(4))


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("CMQA_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def make_run(folder, kind="qwen2", base=None, **settings):
    base = base or tiny_folder(kind)
    save_adapter(adapted(kind, torch.float32, **settings), folder, base_model_name_or_path=str(base))
    write_fingerprint(folder, base)
    return folder


def sharded_base(folder, dtype=torch.float32):
    """The tiny qwen2 in several files and an index."""
    model = tiny_model("qwen2", dtype)
    model.save_pretrained(folder, max_shard_size="200KB")
    byte_tokenizer().save_pretrained(folder)
    assert len(list(folder.glob("*.safetensors"))) >= 2
    return folder


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True, "lora_alpha": 4}], ids=["plain", "rslora"])
def test_merged_equals_unmerged(kind, settings, tmp_path):
    run = make_run(tmp_path / "run", kind, **settings)
    certificate = merge(run, tmp_path / "merged")
    merged, tokenizer = load_model(tmp_path / "merged")
    unmerged = logits(load_adapter(tiny_model(kind), run))
    assert (logits(merged) - unmerged).abs().max() <= 1e-5 * unmerged.std()
    assert (unmerged - logits(tiny_model(kind))).abs().max() > 0.05
    assert tokenizer.chat_template == byte_tokenizer().chat_template
    assert certificate["max_difference_in_std"] <= 1e-5


def test_transformers_alone_loads_it(tmp_path):
    from transformers import AutoModelForCausalLM

    merge(make_run(tmp_path / "run"), tmp_path / "merged")
    merged, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", trust_remote_code=False, output_loading_info=True
    )
    assert not any(info.values())
    assert merged.generation_config.eos_token_id == [258, 256]
    assert {oct(p.stat().st_mode & 0o777) for p in (tmp_path / "merged").iterdir()} == {"0o644"}  # others may read it


def test_shards_keep_their_names_and_the_index_counts(tmp_path):
    base = sharded_base(tmp_path / "base")
    merge(make_run(tmp_path / "run", base=base), tmp_path / "merged")
    names = sorted(f.name for f in base.glob("*.safetensors"))
    assert sorted(f.name for f in (tmp_path / "merged").glob("*.safetensors")) == names
    index, before = (json.loads((d / "model.safetensors.index.json").read_text()) for d in (tmp_path / "merged", base))
    assert index["weight_map"] == before["weight_map"]
    assert index["metadata"]["total_size"] == before["metadata"]["total_size"]


def test_only_what_has_lora_changes_and_the_sum_is_float32_cast_once(tmp_path):
    base = sharded_base(tmp_path / "base", torch.bfloat16)
    run = make_run(tmp_path / "run", base=base, target_modules=("q_proj",))
    merge(run, tmp_path / "merged")
    adapter = load_file(run / "adapter_model.safetensors")
    for file in base.glob("*.safetensors"):
        before, after = load_file(file), load_file(tmp_path / "merged" / file.name)
        for name, weight in before.items():
            assert after[name].dtype == torch.bfloat16
            if not name.endswith("q_proj.weight"):
                assert torch.equal(after[name], weight)
                continue
            path = "base_model.model." + name.removesuffix(".weight")
            a, b = adapter[f"{path}.lora_A.weight"], adapter[f"{path}.lora_B.weight"]
            exact = weight.double() + 8 / 4 * b.double() @ a.double()
            assert not torch.equal(after[name], weight)
            assert ((after[name].double() - exact).abs() <= exact.abs() * 2**-8).all()


def test_dtype_of_choice(tmp_path):
    run = make_run(tmp_path / "run")
    certificate = merge(run, tmp_path / "merged", dtype="bfloat16")
    assert {t.dtype for t in load_file(tmp_path / "merged" / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == "bfloat16"
    assert certificate["compared_in"] == "bfloat16"
    assert certificate["max_kl"] < 0.05


def test_certificate(tmp_path):
    run = make_run(tmp_path / "run")
    returned = merge(run, tmp_path / "merged")
    written = json.loads((tmp_path / "merged" / "certificate.json").read_text())
    assert returned == written | {"out": str(tmp_path / "merged")}
    assert written["base_fingerprint_checked"] is True
    assert list(written["files"]) == ["model.safetensors"]
    for golden in written["golden"]:
        assert golden["token_ids"][:1] == [257]  # <|im_start|>
        assert golden["kl"] < 1e-9
        assert golden["same_next_token"] is True
        assert golden["max_logit_difference"] <= 1e-5 * golden["logit_std"]


def test_unmerge_gives_back_the_base(kind, tmp_path):
    run = make_run(tmp_path / "run", kind)
    merge(run, tmp_path / "merged")
    unmerge(tmp_path / "merged", run, tmp_path / "base")
    before, after = (load_file(d / "model.safetensors") for d in (tiny_folder(kind), tmp_path / "base"))
    assert before.keys() == after.keys()
    for name, weight in before.items():
        torch.testing.assert_close(after[name], weight, rtol=0, atol=1e-6)
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert any((merged[n] - before[n]).abs().max() > 1e-3 for n in before)


def test_a_head_that_was_trained_whole(tmp_path):
    run = make_run(tmp_path / "run", "qwen2", modules_to_save=("lm_head",))
    merge(run, tmp_path / "merged")
    unmerged = logits(load_adapter(tiny_model(), run))
    assert (logits(load_model(tmp_path / "merged")[0]) - unmerged).abs().max() <= 1e-5 * unmerged.std()
    with pytest.raises(AdapterError, match="modules_to_save"):
        unmerge(tmp_path / "merged", run, tmp_path / "base")
    with pytest.raises(AdapterError, match="shares its embedding with its head"):
        merge(make_run(tmp_path / "tied", "gemma3", modules_to_save=("lm_head",)), tmp_path / "no")


# ---- what is refused; nothing is left behind -------------------------------------------------------------------------


def refused(tmp_path, run, says, error=AdapterError, **settings):
    before = {p.name for p in tmp_path.iterdir()}
    with pytest.raises(error, match=says):
        merge(run, tmp_path / "merged", **settings)
    assert {p.name for p in tmp_path.iterdir()} == before


def test_a_quantised_base(tmp_path):
    base = sharded_base(tmp_path / "base")
    run = make_run(tmp_path / "run", base=base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    refused(tmp_path, run, "quantised .gptq.")


def test_another_base_than_it_was_trained_on(tmp_path):
    base = sharded_base(tmp_path / "base")
    run = make_run(tmp_path / "run", base=base)
    file = next(iter(base.glob("*.safetensors")))
    save_file({n: t + 0.01 for n, t in load_file(file).items()}, file, metadata={"format": "pt"})
    refused(tmp_path, run, f"{file.name} differ")


def test_a_base_of_another_family(tmp_path):
    run = make_run(tmp_path / "run", "llama")
    (run / "fingerprint.json").unlink()
    refused(tmp_path, run, "in the base, the adapter's is", base="tiny-qwen3")


def test_a_module_that_the_base_lacks(tmp_path):
    run = make_run(tmp_path / "run")
    file = run / "adapter_model.safetensors"
    save_file({k.replace("0.mlp.up_proj", "0.mlp.x_proj"): t for k, t in load_file(file).items()}, file)
    refused(tmp_path, run, "1 of the adapter's modules have no weight")


def test_a_base_of_another_depth(tmp_path):
    model = tiny_model()
    model.config.num_hidden_layers, model.config.layer_types = 2, model.config.layer_types[:2]
    del model.model.layers[2]
    model.save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    run = make_run(tmp_path / "run")
    (run / "fingerprint.json").unlink()
    refused(tmp_path, run, "the adapter has 3 layers, the base 2", base=str(tmp_path / "base"))


def test_an_out_that_is_not_empty(tmp_path):
    run = make_run(tmp_path / "run")
    (tmp_path / "merged").mkdir()
    merge(run, tmp_path / "merged")  # an empty folder is filled
    refused(tmp_path, run, "not empty", error=RunError)


def test_an_adapter_without_a_base(tmp_path):
    run = make_run(tmp_path / "run")
    file = run / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": None}))
    refused(tmp_path, run, "names no base")


def test_merged_answers_that_differ_are_not_kept(tmp_path, monkeypatch):
    run = make_run(tmp_path / "run")

    def wrong(*args, sign, **settings):
        _write(*args, sign=-sign, **settings)

    monkeypatch.setattr("lora_cmqa.lora.merge._write", wrong)
    refused(tmp_path, run, "merged and unmerged answers differ")
