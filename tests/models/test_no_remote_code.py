"""No code of a checkpoint ever runs: in the source, and in a booby-trapped folder with a "y" on stdin."""

from __future__ import annotations

import ast
import json
import os
import pickle
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lora_cmqa.errors import ModelError
from lora_cmqa.models.load import load_model, refuse_remote_code
from lora_cmqa.models.tiny import tiny_folder

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted([*(ROOT / "src").rglob("*.py"), *ROOT.glob("*.py")])
WORD = "trust_remote_code"


def offences(source: str, *, is_load: bool) -> list[str]:
    """What a file may not do: the word with anything but False, an Auto* call without it or outside load.py."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.keyword) and node.arg == WORD:
            if not (isinstance(node.value, ast.Constant) and node.value.value is False):
                found.append(f"line {node.value.lineno}: {WORD} is not False")
        elif isinstance(node, (ast.Name, ast.arg)) and getattr(node, "id", getattr(node, "arg", "")) == WORD:
            found.append(f"line {node.lineno}: {WORD} as a variable")
        elif isinstance(node, ast.Constant) and node.value == WORD:
            found.append(f"line {node.lineno}: {WORD} as a key")
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner, method = ast.unparse(node.func.value), node.func.attr
            if "Auto" in owner and method in ("from_pretrained", "from_config"):
                if not any(k.arg == WORD for k in node.keywords):
                    found.append(f"line {node.lineno}: {owner}.{method} without {WORD}")
                if not is_load:
                    found.append(f"line {node.lineno}: {owner}.{method} outside models/load.py")
    return found


@pytest.mark.parametrize("file", SOURCES, ids=lambda f: str(f.relative_to(ROOT)))
def test_the_source_never_trusts_remote_code(file):
    # The seed's second script shows plain peft and transformers, so its Auto* calls are its own.
    is_load = file.name in ("load.py", "load_lora_adapter.py")
    assert offences(file.read_text(encoding="utf-8"), is_load=is_load) == []


@pytest.mark.parametrize(
    "bad",
    [
        "f(trust_remote_code=True)",
        "f(trust_remote_code=x)",
        "f(**{'trust_remote_code': True})",
        "trust_remote_code = True",
        "AutoModelForCausalLM.from_pretrained(p)",
        "transformers.AutoTokenizer.from_pretrained(p, local_files_only=True)",
    ],
)
def test_the_test_itself_sees(bad):
    assert offences(bad, is_load=True)


def test_an_auto_call_outside_load_is_seen():
    assert offences("AutoTokenizer.from_pretrained(p, trust_remote_code=False)", is_load=False)


# ---- booby traps -----------------------------------------------------------------------------------------------------


def trap(folder: Path, canary: Path, *, change: dict, tokenizer: bool = False) -> Path:
    """A copy of the tiny model whose Python files write `canary`, and whose configs ask for them."""
    shutil.copytree(tiny_folder(), folder)
    code = f"open({str(canary)!r}, 'w').write('ran')\n"
    for name in ("modeling_x", "configuration_x", "tokenization_x", "modeling_qwen", "tokenization_qwen"):
        (folder / f"{name}.py").write_text(code)
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(code)
    config = json.loads((folder / "config.json").read_text())
    auto = {
        "AutoConfig": "configuration_x.X",
        "AutoModelForCausalLM": "modeling_x.X",
        "AutoTokenizer": "tokenization_x.X",
    }
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": auto} | change))
    if tokenizer:
        (folder / "tokenizer.json").unlink()
        (folder / "tokenizer_config.json").write_text(
            json.dumps({"tokenizer_class": "X", "auto_map": {"AutoTokenizer": ["tokenization_x.X", None]}})
        )
    return folder


def load_with_yes(folder: Path) -> subprocess.CompletedProcess:
    program = "import sys; from lora_cmqa.models.load import load_model; load_model(sys.argv[1])"
    return subprocess.run(
        [sys.executable, "-c", program, str(folder)],
        input="y\n" * 20,
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HOME": str(folder.parent / "hf")},
        timeout=120,
        check=False,
    )


def test_a_trap_with_a_foreign_type_is_refused_also_with_a_yes(tmp_path):
    canary = tmp_path / "canary"
    folder = trap(tmp_path / "x", canary, change={"model_type": "xmodel", "architectures": ["X"]})
    ran = load_with_yes(folder)
    assert "ModelError" in ran.stderr
    assert "code of a checkpoint is never run" in ran.stderr
    assert not canary.exists()
    with pytest.raises(ModelError, match="'xmodel' is loaded by its own Python code only"):
        refuse_remote_code(folder)


def test_a_trap_beside_a_native_class_loads_the_native_class(tmp_path):
    canary = tmp_path / "canary"
    ran = load_with_yes(trap(tmp_path / "x", canary, change={}))
    assert ran.returncode == 0, ran.stderr
    assert not canary.exists()


def test_a_trapped_tokenizer_is_refused(tmp_path):
    canary = tmp_path / "canary"
    with pytest.raises(ModelError, match="tokenizer is loaded by its own Python code only"):
        load_model(trap(tmp_path / "x", canary, change={}, tokenizer=True))
    assert not canary.exists()


def test_a_kernel_on_a_hub_is_refused(tmp_path):
    folder = trap(tmp_path / "x", tmp_path / "canary", change={"_attn_implementation": "someone/kernel"})
    with pytest.raises(ModelError, match="names code on a hub"):
        load_model(folder)


CODE = ("modeling_qwen", "configuration_qwen", "tokenization_qwen", "qwen_generation_utils", "cpp_kernels")
AUTO_MAP = {
    "AutoConfig": "configuration_qwen.QWenConfig",
    "AutoModel": "modeling_qwen.QWenLMHeadModel",
    "AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel",
    "AutoTokenizer": ["tokenization_qwen.QWenTokenizer", None],
}


def trapped_copy(source: Path, folder: Path, canary: Path) -> Path:
    """Beside the files of `source`: code that writes `canary`, and an auto_map to it wherever one may stand."""
    shutil.copytree(source, folder)
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o755 if path.is_dir() else 0o644)
    (folder / "custom_generate").mkdir()
    for name in (*CODE, "custom_generate/generate"):
        (folder / f"{name}.py").write_text(f"open({str(canary)!r}, 'w').write('ran')\n")
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        if (folder / name).exists():
            content = json.loads((folder / name).read_text())
            (folder / name).write_text(json.dumps(content | {"auto_map": AUTO_MAP}))
    return folder


def test_a_trapped_qwen_v1_loads_and_never_runs_its_code(tmp_path, qwen_v1):
    canary = tmp_path / "canary"
    folder = trapped_copy(qwen_v1 / "qwen_v1_tiny", tmp_path / "v1", canary)
    ran = load_with_yes(folder)
    assert ran.returncode == 0, ran.stderr
    assert not canary.exists()
    runpy.run_path(str(folder / "modeling_qwen.py"))
    assert canary.exists()  # the trap is a live one


EVERY_VERB = """
import json, sys
from lora_cmqa.cli import main
for words in json.loads(sys.argv[1]):
    print("\\nEXIT", main(words), words[0], flush=True)
"""


class Trap:
    """Unpickled, it writes a file."""

    def __init__(self, canary: Path) -> None:
        self.canary = str(canary)

    def __reduce__(self):
        return open, (self.canary, "w")


@pytest.mark.slow
def test_every_verb_passes_the_traps_also_with_a_yes(tmp_path, qwen_v1):
    """Base and adapter of the seed's time, both with the code and the pickles that lay beside them, in one process
    whose folder is the trapped one and whose every question is answered with y."""
    canary, run = tmp_path / "canary", tmp_path / "run"
    base = trapped_copy(qwen_v1 / "qwen_v1_tiny", tmp_path / "v1", canary)
    old = trapped_copy(qwen_v1 / "adapter_chat", tmp_path / "old", canary)
    for name in ("training_args.bin", "rng_state.pth", "optimizer.pt"):
        (old / name).write_bytes(pickle.dumps(Trap(canary)))
    rows = json.loads((qwen_v1 / "train64.json").read_text(encoding="utf-8"))[:4]
    (tmp_path / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    shown = ["--device", "cpu", "--dtype", "float32", "--max-new-tokens", "2"]
    test = {"id": "1", "question_id": "1", "split": "test", "messages": [{"role": "user", "content": "头痛"}]}
    test["messages"].append({"role": "assistant", "content": "休息。"})
    (tmp_path / "data").mkdir()
    for name in ("train", "test"):
        lines = [json.dumps(test | {"id": str(i), "question_id": str(i)}) for i in range(4)]
        (tmp_path / "data" / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    train = ["--data", str(tmp_path / "rows.json"), "--output-dir", str(run), "--r", "2", "--max-steps", "1"]
    train += ["--learning-rate", "0.1", "--warmup-ratio", "0", "--device", "cpu", "--dtype", "float32"]
    out = [str(tmp_path / f"out-{i}") for i in range(4)]
    verbs = [
        ["train", "--model", str(base), *train],
        ["chat", str(run), *shown],
        ["chat", "--model", str(base), *shown],
        ["compare", str(run), "头痛", *shown],
        ["eval", str(run), "--data", str(tmp_path / "data"), "--quick", "--generate-rows", "1", *shown],
        ["merge", str(run), "--out", out[0]],
        ["convert", str(base), "--out", out[1]],
        ["adapter", "import", str(old), "--model", str(base), "--out", out[2]],
        ["adapter", "rebase", str(run), "--model", out[1], "--out", out[3]],
    ]
    ran = subprocess.run(
        [sys.executable, "-c", EVERY_VERB, json.dumps(verbs)],
        input="y\ny\n/exit\n" * 20,  # the chats end
        capture_output=True,
        text=True,
        cwd=base,
        env=os.environ | {"HF_HOME": str(tmp_path / "hf")},
        timeout=500,
        check=False,
    )
    codes = [line for line in ran.stdout.splitlines() if line.startswith("EXIT ")]
    assert codes == [f"EXIT 0 {v[0]}" for v in verbs], ran.stderr[-2000:]
    assert not canary.exists()
    assert not list((tmp_path / "hf").rglob("*.py"))  # where transformers copies a checkpoint's code before it runs it
    assert not [p for o in out for p in Path(o).rglob("*") if p.suffix in (".py", ".bin", ".pt", ".pth")]
