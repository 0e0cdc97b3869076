"""Single rows of embedding and head trained beside LoRA: which ones, the exact gradient, and the way out and in."""

from __future__ import annotations

import json

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors import safe_open
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from lora_cmqa.core import IGNORE
from lora_cmqa.data.pack import make_pack
from lora_cmqa.data.template import ChatTemplate
from lora_cmqa.errors import AdapterError
from lora_cmqa.lora.adapter import load_adapter, save_adapter
from lora_cmqa.lora.decoder import head_logits, hidden_states, pack_losses
from lora_cmqa.lora.inject import inject_lora, lora_parameters, remove_lora
from lora_cmqa.lora.low_rank import low_rank_from_folder
from lora_cmqa.lora.merge import merge, unmerge
from lora_cmqa.lora.tokens import choose_tokens, find_untrained, token_indices, unused_ids
from lora_cmqa.models.load import load_model, load_tokenizer, resolve
from lora_cmqa.models.tiny import byte_tokenizer, tiny_folder, tiny_model

from .conftest import adapted, make_rows
from .test_decoder import gradients, hf_losses, relative_distance, take_the_plain_way

START, END = 257, 258
TIED = {"qwen3", "gemma3"}
ROWS = ".token_adapter.trainable_tokens_delta"


def rows_with_turns():
    """Rows that read and predict both tokens, as conversations do."""
    rows = make_rows()
    for row in rows[:4]:
        row.input_ids[0] = START
        row.input_ids[1] = row.input_ids[-1] = END
        row.labels[-1] = END
        row.input_ids[len(row) // 2] = START
        row.labels[len(row) // 2] = START
    return rows


# ---- exact -----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("exact_norms")
@pytest.mark.parametrize("way", ["fast", "plain"])
def test_packed_gradient_is_row_by_row_is_transformers(kind, way, monkeypatch):
    if way == "plain":
        take_the_plain_way(monkeypatch)
    model, rows = adapted(kind, trainable_token_ids=(START, END)).train(), rows_with_turns()
    packed = pack_losses(model, make_pack(rows), chunk=7)
    ours = gradients(model, packed)
    deltas = [n for n in ours if ROWS in n]
    assert len(deltas) == (1 if kind in TIED else 2)
    assert all(ours[n].shape == (2, 64) and (ours[n].abs().sum(1) > 0).all() for n in deltas)
    ways = {
        "rows one by one": torch.cat([pack_losses(model, make_pack([r]), chunk=7) for r in rows]),
        "transformers": torch.cat([hf_losses(model, r, "sdpa") for r in rows]),
    }
    for name, losses in ways.items():
        torch.testing.assert_close(packed, losses, rtol=1e-10, atol=0, msg=name)
        assert relative_distance(ours, gradients(model, losses)) < 1e-10, name


def test_the_rows_gradient_is_that_of_the_whole_matrices(kind):
    """Beside a model whose embedding and head are trained whole: its gradient at those rows is ours."""
    rows = rows_with_turns()
    model = inject_lora(tiny_model(kind, torch.float64), r=2, trainable_token_ids=(START, END))
    ours = {n: g for n, g in gradients(model, pack_losses(model, make_pack(rows))).items() if ROWS in n}
    whole = tiny_model(kind, torch.float64).requires_grad_(True)
    torch.cat([hf_losses(whole, r, "sdpa") for r in rows]).sum().backward()
    count = sum(int((r.labels[1:] != IGNORE).sum()) for r in rows)
    for name, gradient in ours.items():
        place = name.split(ROWS)[0].removeprefix("base_model.model.")
        full = whole.get_submodule(place).weight.grad[[START, END]] / count
        assert (gradient - full).norm() <= 1e-6 * full.norm()  # transformers' norms round to float32


class Shapes(TorchDispatchMode):
    """Of whatever is made while it is on, and is no view of the model's own weights."""

    def __init__(self, model) -> None:
        super().__init__()
        self.own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.seen: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        made = [out] if isinstance(out, torch.Tensor) else out if isinstance(out, (list, tuple)) else []
        new = (t for t in made if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in self.own)
        self.seen |= {tuple(t.shape) for t in new}
        return out


def test_no_copy_and_no_gradient_of_a_whole_matrix_is_made(kind):
    """What makes it cheap: two rows of 1.2 GB are trained without another 1.2 GB, forward or backward."""
    model, pack = adapted(kind, trainable_token_ids=(START, END)), make_pack(rows_with_turns())
    pack_losses(model, pack)  # q, k, v and gate, up find their joined places
    with Shapes(model) as made:
        pack_losses(model, pack, chunk=7).sum().backward()
    assert (2, 64) in made.seen
    assert not {(259, 64), (64, 259)} & made.seen


def test_switched_off_it_is_the_base_and_taken_off_too(kind):
    base, pack = tiny_model(kind, torch.float64), make_pack(rows_with_turns())
    want = pack_losses(base, pack)
    model = adapted(kind, trainable_token_ids=(START, END))
    assert not torch.equal(pack_losses(model, pack), want)
    with model.disable_adapter():
        assert torch.equal(pack_losses(model, pack), want)
        assert torch.equal(head_logits(model, hidden_states(model, pack)), head_logits(base, hidden_states(base, pack)))
    assert torch.equal(pack_losses(remove_lora(model), pack), want)


def test_fresh_rows_begin_as_they_are_and_are_float32_over_a_16_bit_base(kind):
    model = inject_lora(tiny_model(kind, torch.bfloat16), r=2, trainable_token_ids=(END, START))
    for name, weight in lora_parameters(model).items():
        assert weight.dtype == torch.float32
        if ROWS in name:
            place = name.split(ROWS)[0].removeprefix("base_model.model.")
            matrix = tiny_model(kind, torch.bfloat16).get_submodule(place).weight
            assert torch.equal(weight, matrix[[END, START]].float())


# ---- out and in ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def logits(model):
    ids = torch.tensor([[START, 104, 105, END, 10, START, 97, END]])
    return model(input_ids=ids, use_cache=False).logits


@pytest.fixture
def saved(kind, tmp_path):
    """(folder, its logits): an adapter with both rows on the tiny model, float32."""
    model = adapted(kind, torch.float32, trainable_token_ids=(START, END))
    save_adapter(model, tmp_path / "run", base_model_name_or_path=str(tiny_folder(kind)))
    return tmp_path / "run", logits(model)


def test_plain_peft_loads_it_and_so_do_we(kind, saved):
    folder, want = saved
    tensors = load_file(folder / "adapter_model.safetensors")
    rows = {k: tuple(t.shape) for k, t in tensors.items() if "lora_" not in k}
    matrices = ["model.embed_tokens"] if kind in TIED else ["lm_head", "model.embed_tokens"]
    assert rows == {f"base_model.model.{m}{ROWS}": (2, 64) for m in matrices}
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["trainable_token_indices"] == {m.rsplit(".", 1)[-1]: [START, END] for m in matrices}
    assert config["modules_to_save"] is None
    plain = logits(AutoPeftModelForCausalLM.from_pretrained(folder))
    assert (plain - want).abs().max() <= 1e-5 * want.std()
    ours = load_adapter(tiny_model(kind), folder)
    assert (logits(ours) - want).abs().max() <= 1e-5 * want.std()
    trained = lora_parameters(load_adapter(tiny_model(kind), folder, is_trainable=True))
    assert sum(ROWS in n for n in trained) == len(matrices)


def test_merged_equals_unmerged(kind, saved, tmp_path):
    folder, want = saved
    merge(folder, tmp_path / "merged")
    assert (logits(load_model(tmp_path / "merged")[0]) - want).abs().max() <= 1e-5 * want.std()
    with pytest.raises(AdapterError, match="trainable_token_indices replaced weights"):
        unmerge(tmp_path / "merged", folder, tmp_path / "base")


def test_beside_other_adapters_on_one_base_it_is_refused(saved, kind):
    with pytest.raises(AdapterError, match="only LoRA can answer") as caught:
        low_rank_from_folder(saved[0], tiny_model(kind))
    assert caught.value.field == "trainable_token_indices"


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ({"embed_tokens": [START, 259]}, "rows 0 to 258"),
        ({"embed_tokens": [END, END]}, "each named once"),
        ({"embed_tokens": [True]}, "rows 0 to 258"),
        ({"q_proj": [1]}, "neither embedding nor head"),
        ({"embed_tokens": []}, "neither embedding nor head"),
        ({"embed_tokens": [START, END]}, "belong to no layer"),  # the file has the head's too
        ([START], "belong to no layer"),
    ],
)
def test_a_config_that_names_other_rows_is_refused(rows, says, tmp_path):
    model = adapted("llama", torch.float32, trainable_token_ids=(START, END))
    save_adapter(model, tmp_path / "run", base_model_name_or_path=str(tiny_folder("llama")))
    file = tmp_path / "run" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"trainable_token_indices": rows}))
    with pytest.raises(AdapterError, match=says):
        load_adapter(tiny_model("llama"), tmp_path / "run")


def test_whole_and_by_rows_is_one_too_many():
    with pytest.raises(AdapterError, match="embed_tokens is to be trained whole"):
        inject_lora(tiny_model(), modules_to_save=("wte",), trainable_token_ids=(END,))


def test_a_head_that_is_the_embedding_is_named_once():
    assert token_indices(tiny_model("qwen3"), [END]) == {"embed_tokens": [END]}
    assert token_indices(tiny_model("qwen2"), [END]) == {"embed_tokens": [END], "lm_head": [END]}


# ---- which rows ------------------------------------------------------------------------------------------------------


def embedding(unused_scale: float, rows: int = 1200, width: int = 64) -> torch.Tensor:
    """Ids 1000 .. rows: unused, of `unused_scale` times the others' length."""
    weight = torch.randn(rows, width, generator=torch.Generator().manual_seed(0))
    weight[1000:] *= unused_scale
    return weight


def test_a_row_among_the_unused_is_untrained():
    weight = embedding(0.2)
    weight[7] = 0.2 * weight[8]  # as short as theirs: never trained
    verdict = find_untrained(weight, [7, 9], range(1000, 1200))
    assert verdict.untrained == [7]
    assert verdict.distance[7] <= verdict.cut < verdict.distance[9]


def test_rows_of_one_direction_count_as_well():
    """A matrix whose rows all have one length (Gemma's): the unused ones point the same way."""
    weight = embedding(1.0)
    weight[1000:] = weight[1000] + 0.2 * weight[1000:]
    weight[7] = weight[1000] + 0.2 * weight[7]
    weight /= weight.norm(dim=1, keepdim=True)
    assert find_untrained(weight, [7, 9], range(1000, 1200)).untrained == [7]


def test_where_unused_rows_do_not_stand_apart_nothing_is_told():
    assert find_untrained(embedding(1.0), [7], range(1000, 1200)).cut is None
    assert find_untrained(embedding(0.2), [7], range(1000, 1007)).cut is None  # seven rows are too few to judge by


def test_what_auto_chooses():
    tokenizer = byte_tokenizer()
    template = ChatTemplate.from_tokenizer(tokenizer)
    assert template.turn_ids == (START, END)
    model = tiny_model("llama")
    assert unused_ids(tokenizer, len(model.get_input_embeddings().weight)) == []
    assert unused_ids(tokenizer, 262) == [259, 260, 261]

    def choose(*wanted, **more):
        return choose_tokens(wanted, model, tokenizer, template, **more)

    assert choose() == ([], "")
    assert choose("auto")[0] == []
    assert "cannot be told" in choose("auto")[1]
    model.resize_token_embeddings(300)  # 41 rows that no token has
    with torch.no_grad():
        model.get_input_embeddings().weight[259:] *= 0.01
    assert choose("auto")[0] == []
    assert "this base knows them" in choose("auto")[1]
    with torch.no_grad():
        model.get_input_embeddings().weight[END] *= 0.001
    ids, told = choose("auto")
    assert ids == [END]
    assert told.startswith("<|im_end|>: untrained in this base")
    assert "not in the portable profile" in told
    ids, told = choose("auto", chat_format="chatml")
    assert (ids, "chat model" in told) == ([], True)
    assert choose("auto", chat_format="raw")[0] == [END]
    assert choose("<|im_end|>", "<|im_start|>")[0] == [END, START]
    with pytest.raises(AdapterError, match="no token of this tokenizer"):
        choose("<|im_begin|>")
    with pytest.raises(AdapterError, match="auto stands alone"):
        choose("auto", "<|im_end|>")


@pytest.mark.slow
def test_the_embedded_base_has_not_learned_its_turns():
    """A real base model: Gemma 3 270M as it was pre-trained."""
    pytest.importorskip("gguf")
    tokenizer = load_tokenizer("embedded")
    template = ChatTemplate.from_tokenizer(tokenizer, "gemma")
    with safe_open(resolve("embedded") / "model.safetensors", framework="pt") as file:
        weight = file.get_tensor("model.embed_tokens.weight")
    unused = unused_ids(tokenizer, len(weight))
    ends = tokenizer.convert_tokens_to_ids(["<start_of_turn>", "<end_of_turn>"])
    others = tokenizer.convert_tokens_to_ids(["<eos>", "的", "the"])
    told = find_untrained(weight, [*template.turn_ids, *others], unused)
    assert len(unused) > 6000
    assert set(ends) < set(template.turn_ids)
    assert sorted(told.untrained) == sorted(ends)
