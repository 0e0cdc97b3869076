"""Is the plan true? Predicted growth of the process beside the measured one, each configuration in its own process.

    python benchmarks/memory.py            what results/memory.jsonl lacks for this commit, and the table
    python benchmarks/memory.py --keeps-freed     where the C library keeps freed blocks, over twelve more steps
    python benchmarks/memory.py --long     240 steps of ever new sizes: does it still grow after the first quarter?
    python benchmarks/memory.py --table    prints the tables only
    python benchmarks/memory.py --device cuda     presets with random weights under their cap, on a card

A child builds the model (random weights of a shape, or the embedded base), puts LoRA on it, notes its resident memory,
sets the kernel's high-water mark back, trains one row, then a full micro-batch, and notes the mark. Freed blocks go
back to the system at once, as under --memory-limit. What is predicted is the ledger's fullest moment without the
weights: in a line by the ledger of its commit, in the table by the ledger as it is now. Constants of train/ledger.py
are fitted on the even configurations alone.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from result_line import commit, keep, kept, result_line, versions

from lora_cmqa.core import Pack, TokenizedExample
from lora_cmqa.data.pack import pack
from lora_cmqa.models.sizes import Shape, shape_of
from lora_cmqa.train.ledger import Setup, growth


@dataclass(frozen=True)
class Case:
    model: str  # embedded, or family:hidden:layers:heads:kv_heads:head_dim:ffn:vocab
    dtype: str = "float32"
    length: int = 256  # longest row; rows are drawn between half of it and all of it
    max_tokens: int = 2048
    checkpoint_layers: int = 0
    head_chunk: int = 256
    r: int = 16


QWEN2 = "qwen2:896:12:14:2:64:4864:32000"  # half the layers of Qwen2.5-0.5B
QWEN2_SMALL = "qwen2:768:8:12:2:64:3072:50000"
QWEN3 = "qwen3:1024:14:16:8:128:3072:32000"  # half the layers of Qwen3-0.6B
QWEN3_SMALL = "qwen3:512:8:8:4:128:2048:151936"
LLAMA = "llama:1536:10:12:4:128:4096:32000"
LLAMA_BIG = "llama:2048:12:16:8:128:8192:64000"  # 0.95 billion
CASES = (
    Case("embedded", "bfloat16", 512, 2048),
    Case("embedded", "float32", 512, 1024),
    Case("embedded", "bfloat16", 256, 2048, r=64),
    Case("embedded", "float32", 256, 2048, checkpoint_layers=18, head_chunk=512),
    Case("embedded", "bfloat16", 512, 2048, checkpoint_layers=6),
    Case("embedded", "float32", 128, 1024, head_chunk=512),
    Case(QWEN2, "float32", 256, 1024),
    Case(QWEN2, "bfloat16", 512, 2048, r=64),
    Case(QWEN2, "float32", 512, 1024, checkpoint_layers=6),
    Case(QWEN2, "bfloat16", 256, 2048, checkpoint_layers=4),
    Case(QWEN2_SMALL, "float32", 128, 2048),
    Case(QWEN2_SMALL, "float32", 1024, 2048, checkpoint_layers=2),
    Case(QWEN3, "float32", 256, 1024),
    Case(QWEN3, "bfloat16", 256, 2048),
    Case(QWEN3, "bfloat16", 512, 2048, checkpoint_layers=6),
    Case(QWEN3_SMALL, "float32", 512, 2048, head_chunk=64),
    Case(QWEN3_SMALL, "float32", 256, 1024, head_chunk=512, r=64),
    Case(QWEN3_SMALL, "bfloat16", 1024, 3072),
    Case(LLAMA, "float32", 512, 768),
    Case(LLAMA, "bfloat16", 512, 1536, r=64),
    Case(LLAMA, "float32", 256, 1024, checkpoint_layers=3, head_chunk=64),
    Case(LLAMA_BIG, "bfloat16", 256, 768, r=64),
    Case(LLAMA_BIG, "bfloat16", 512, 1024, checkpoint_layers=2),
    Case(QWEN2_SMALL, "bfloat16", 1024, 3072, head_chunk=512),
)


# ---- one configuration, in a process of its own ----------------------------------------------------------------------


def measure(case: Case, more_steps: int = 0) -> dict[str, Any]:
    """{"predicted", "measured"} bytes of growth, {"ledger"} rows and {"phase"} of the fullest moment.

    more_steps  that many micro-batches of other sizes follow, and freed blocks are left to the C library
    """
    shape = shape_of_case(case)
    small, full, *others = packs_of(case, shape, more_steps)
    marks = _growth_after_each(case, (small, full, *others), gives_back=not more_steps)
    return _beside_the_plan(setup_of_case(case, more_steps), full, marks[-1])


def _beside_the_plan(setup: Setup, full: Pack, measured: int) -> dict[str, Any]:
    predicted = growth(setup)
    return {
        "pack": {"tokens": full.tokens, "longest": max(full.row_lengths), "taught": full.supervised_tokens},
        "predicted": predicted.bytes,
        "measured": measured,
        "error": round(predicted.bytes / measured - 1, 4),
        "phase": predicted.name,
        "ledger": [asdict(row) for row in predicted.rows],
        "parameters": setup.shape.parameters,
        "threads": 1,
    }


def _growth_after_each(case: Case, packs: Sequence[Pack], *, gives_back: bool) -> list[int]:
    """Bytes of the high-water mark above the level after loading, after a step on each of `packs`: a small one first,
    which makes the moments that the full one then finds there."""
    import torch

    from lora_cmqa.core import Batch
    from lora_cmqa.kernels.compiled import bound_compiled_products
    from lora_cmqa.lora.decoder import checkpoint_activations, why_plain
    from lora_cmqa.lora.inject import inject_lora, lora_parameters
    from lora_cmqa.train.memory import give_back_what_is_freed, read_mapped_weights, trim_heap
    from lora_cmqa.train.optim import adamw
    from lora_cmqa.train.step import train_step

    torch.set_num_threads(1)
    bound_compiled_products()
    if gives_back:
        give_back_what_is_freed()
    model, _ = _model(case)
    model = inject_lora(model, r=case.r)
    if case.checkpoint_layers:
        checkpoint_activations(model, case.checkpoint_layers)
    reason = why_plain(model)
    assert reason is None, reason
    optimizer = adamw(lora_parameters(model))
    read_mapped_weights(model)
    trim_heap()
    level = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    marks = []
    for packed in packs:
        batch = Batch((packed,), step=1, epoch=1.0, step_supervised_tokens=packed.supervised_tokens)
        train_step(model, batch, optimizer, learning_rate=1e-4, head_chunk=case.head_chunk)
        marks.append(_resident("VmHWM") - level)
    return marks


def packs_of(case: Case, shape: Shape, more: int = 0) -> tuple[Pack, ...]:
    """One row, a full micro-batch, `more` others, all of random rows, two thirds of each taught."""
    draw = np.random.default_rng(0)
    count = (4 + 2 * more) * case.max_tokens // case.length
    rows = [_row(draw, int(n), shape) for n in draw.integers(case.length // 2, case.length + 1, count)]
    packs = pack(rows, max_tokens=case.max_tokens)
    return pack(rows[-1:], max_tokens=case.max_tokens)[0], *packs[: 1 + more]


def _row(draw: np.random.Generator, tokens: int, shape: Shape) -> TokenizedExample:
    ids = draw.integers(0, shape.vocab, tokens).astype(np.int32)
    return TokenizedExample(ids, np.where(np.arange(tokens) < tokens // 3, -100, ids), "row", "row")


def shape_of_case(case: Case) -> Shape:
    if case.model == "embedded":
        return shape_of("embedded")
    family, *numbers = case.model.split(":")
    hidden, layers, heads, kv, dim, ffn, vocab = map(int, numbers)
    return Shape(case.model, family, vocab, hidden, layers, heads, kv, dim, ffn, True)


def setup_of_case(case: Case, more_steps: int = 0) -> Setup:
    shape = shape_of_case(case)
    return _setup(case, shape, packs_of(case, shape, more_steps)[1], gives_back=not more_steps)


def _setup(case: Case, shape: Shape, full: Pack, *, gives_back: bool) -> Setup:
    return Setup(
        shape,
        dtype=case.dtype,
        r=case.r,
        max_tokens=full.tokens,
        step_tokens=full.tokens,
        longest_row=max(full.row_lengths),
        mean_row=sum(n * n for n in full.row_lengths) / full.tokens,
        supervised=full.supervised_tokens / full.tokens,
        checkpoint_layers=case.checkpoint_layers,
        head_chunk=case.head_chunk,
        on_gpu=False,
        gives_back=gives_back,
    )


def _model(case: Case) -> tuple[Any, Shape]:
    from lora_cmqa.models.load import load_model

    shape = shape_of_case(case)
    if case.model == "embedded":
        return load_model("embedded", dtype=case.dtype)[0], shape
    return random_model(shape, case.dtype, "cpu"), shape


def random_model(shape: Any, dtype: str, device: str, quantization: str = "none") -> Any:
    """Random weights of a shape, frozen; a quantised one is made a matrix at a time."""
    import torch
    from peers.setting import without_weights

    from lora_cmqa.models.load import DTYPES

    model = without_weights(shape).to(DTYPES[dtype])
    generator = torch.Generator(device).manual_seed(0)

    def drawn(like: torch.Tensor) -> torch.Tensor:
        weight = torch.empty(like.shape, dtype=DTYPES[dtype], device=device)
        return weight.normal_(0, 0.02, generator=generator) if weight.dim() == 2 else weight.fill_(1)

    if quantization != "none":
        from lora_cmqa.models.quantized import QuantizedLinear, place_quantized

        place_quantized(model, quantization)
        for module in model.modules():
            if isinstance(module, QuantizedLinear):
                module.take(drawn(torch.empty(module.out_features, module.in_features, device="meta")))
    for module in model.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            if weight.is_meta:
                setattr(module, name, torch.nn.Parameter(drawn(weight), requires_grad=False))
    model.tie_weights()
    decoder = model.get_decoder()  # its table is a buffer that lies on the meta device
    decoder.rotary_emb = type(decoder.rotary_emb)(config=model.config).to(device)
    return model.eval().requires_grad_(False)


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"/proc/self/status has no {field}")


# ---- on a card: a preset under a cap -------------------------------------------------------------------------------


ON_A_CARD = {"qwen-7b-24gb": 24, "qwen2.5-7b-8gb": 8}  # configs/NAME.yaml: GiB
STEPS = 20


def measure_on_a_card(preset: str) -> dict[str, Any]:
    """Twenty steps of a preset with random weights, where no more than its memory can be had.

    The cap leaves the plan's own constant for the context out of what torch's allocator may reserve; measured is what
    it reserved at most, and what the driver says that this process holds beside it.
    """
    import numpy as np
    import torch

    from lora_cmqa.config import Config, parse
    from lora_cmqa.core import TokenizedExample
    from lora_cmqa.data.stream import BatchStream
    from lora_cmqa.lora.decoder import checkpoint_activations, why_plain
    from lora_cmqa.lora.inject import inject_lora, lora_parameters
    from lora_cmqa.models.sizes import shape_of
    from lora_cmqa.train.fit import setup_of_pack
    from lora_cmqa.train.ledger import CUDA_CONTEXT, peak
    from lora_cmqa.train.loop import train_steps
    from lora_cmqa.train.optim import Schedule, adamw
    from lora_cmqa.train.plan import Memory, choose

    device, cap = torch.device("cuda"), ON_A_CARD[preset] * 2**30
    config = parse(Config, yaml_file=Path(__file__).parents[1] / "configs" / f"{preset}.yaml")
    t, shape = config.train, shape_of(config.model.name_or_path)
    free_before, total = torch.cuda.mem_get_info(device)
    torch.cuda.set_per_process_memory_fraction((cap - CUDA_CONTEXT) / total, device)
    plan = choose(config, shape, Memory(cap, torch.cuda.get_device_name(device), free=False)).chosen
    model = inject_lora(random_model(shape, plan.dtype, "cuda", plan.quantization), r=config.lora.r)
    if plan.checkpoint_layers:
        checkpoint_activations(model, plan.checkpoint_layers)
    reason = why_plain(model)
    assert reason is None, reason
    draw, longest = np.random.default_rng(0), config.data.model_max_length
    per_step = t.per_device_train_batch_size * t.gradient_accumulation_steps
    rows = []
    for i, n in enumerate(draw.integers(longest // 2, longest + 1, STEPS * per_step)):
        ids = draw.integers(0, shape.vocab, n).astype(np.int32)
        rows.append(TokenizedExample(ids, np.where(np.arange(n) < n // 3, -100, ids), str(i), str(i)))
    stream = BatchStream(rows, rows_per_step=per_step, max_tokens=plan.max_tokens, max_steps=STEPS)
    fullest = stream.largest().packs[0]
    cuts: list[int] = []
    torch.cuda.reset_peak_memory_stats(device)
    steps = list(
        train_steps(
            model,
            stream,
            adamw(lora_parameters(model)),
            Schedule("constant", 1e-4, 0, STEPS),
            head_chunk=plan.head_chunk,
            on_recut=lambda _, cut: cuts.append(cut),
        )
    )
    free_after, _ = torch.cuda.mem_get_info(device)
    beside = total - free_after - torch.cuda.memory_reserved(device)  # others' too, if anyone else is on the card
    measured = torch.cuda.max_memory_reserved(device) + beside
    setup = replace(
        setup_of_pack(config, shape, fullest, plan.dtype, device),
        checkpoint_layers=plan.checkpoint_layers,
        head_chunk=plan.head_chunk,
        quantization=plan.quantization,
    )
    predicted = peak(setup)
    return {
        "cap": cap,
        "planned": peak(plan).bytes,
        "plan": {"max_tokens": plan.max_tokens, "checkpoint_layers": plan.checkpoint_layers, "chunk": plan.head_chunk},
        "pack": {"tokens": fullest.tokens, "longest": max(fullest.row_lengths), "taught": fullest.supervised_tokens},
        "predicted": predicted.bytes,
        "measured": measured,
        "allocated": torch.cuda.max_memory_allocated(device),
        "beside": beside,
        "free_before": free_before,
        "error": round(predicted.bytes / measured - 1, 4),
        "phase": predicted.name,
        "ledger": [asdict(row) for row in predicted.rows],
        "steps": len(steps),
        "cuts": cuts,
        "losses": [steps[0].loss, steps[-1].loss],
    }


def run_on_a_card() -> None:
    for preset in ON_A_CARD:
        child = subprocess.run([sys.executable, __file__, "--card-child", preset], capture_output=True, text=True)
        if child.returncode:
            print(f"{preset}: {child.stderr.strip().splitlines()[-1]}", file=sys.stderr)
            continue
        values, device = json.loads(child.stdout.splitlines()[-1])
        line = result_line(
            "memory",
            values,
            device=device,
            versions=versions("torch", "transformers", "peft"),
            data="random rows, two thirds taught",
            settings={"preset": preset},
            seed=0,
        )
        keep(line, "memory")
        print(f"{preset}: {values['predicted'] / 1e9:.2f} GB predicted, {values['measured'] / 1e9:.2f} GB measured")


# ---- a long run ------------------------------------------------------------------------------------------------------


LONG, LONG_STEPS = Case("qwen3:512:18:8:4:128:2048:32000", "bfloat16", 512, 1024), 240  # 0.1 billion


def measure_long(gives_back: bool) -> dict[str, Any]:
    """As `measure`, over LONG_STEPS steps whose rows and sizes are drawn anew; growth after each quarter beside it."""
    shape, draw = shape_of_case(LONG), np.random.default_rng(0)
    packs = []
    for room in draw.integers(LONG.max_tokens // 2, LONG.max_tokens + 1, LONG_STEPS):
        rows, tokens = list[TokenizedExample](), 0
        while (n := int(draw.integers(LONG.length // 8, LONG.length + 1))) + tokens <= room or not rows:
            rows, tokens = [*rows, _row(draw, n, shape)], tokens + n
        packs.append(pack(rows, max_tokens=LONG.max_tokens)[0])
    marks = _growth_after_each(LONG, packs, gives_back=gives_back)
    setups = [_setup(LONG, shape, p, gives_back=gives_back) for p in packs]
    fullest = max(range(LONG_STEPS), key=lambda i: growth(setups[i]).bytes)
    steps = (1, 10, *(LONG_STEPS * k // 4 for k in (1, 2, 3, 4)))
    return _beside_the_plan(setups[fullest], packs[fullest], marks[-1]) | {
        "sizes": len({p.tokens for p in packs}),
        "fullest_step": fullest + 1,
        "after_steps": {str(step): marks[step - 1] for step in steps},
    }


def run_long() -> None:
    import lora_cmqa.train.loop  # noqa: F401

    with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:
        for gives_back in (True, False):
            line = result_line(
                "memory",
                pool.apply(measure_long, (gives_back,)),
                device=_processor(),
                versions=versions("torch", "transformers", "peft"),
                data="random rows, two thirds taught",
                settings=asdict(LONG) | {"steps": LONG_STEPS, "gives_back": gives_back},
                seed=0,
            )
            keep(line, "memory")
            values = line["values"]
            after = "  ".join(f"{step}: {mark / 1e9:.2f}" for step, mark in values["after_steps"].items())
            print(
                f"gives back {gives_back}: {values['predicted'] / 1e9:.2f} GB predicted, after steps {after}",
                flush=True,
            )


# ---- all of them -----------------------------------------------------------------------------------------------------


# Where the C library keeps freed blocks; as above the even ones are for fitting.
KEEPS_FREED, MORE_STEPS = (0, 1, 6, 9, 12, 13, 14, 15), 12


def known() -> dict[str, dict[str, Any]]:
    """The newest line of each configuration."""
    return {json.dumps(line["settings"], sort_keys=True): line for line in kept("memory")}


def settings_of_case(case: Case, more_steps: int) -> dict[str, Any]:
    return asdict(case) | ({"keeps_freed_for_steps": more_steps} if more_steps else {})


def run(numbers: Sequence[int], more_steps: int = 0) -> None:
    """Libraries are read once; each configuration has a fork of its own."""
    import lora_cmqa.train.loop  # noqa: F401

    now, done = commit(), known()
    with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:
        for number in numbers:
            settings = settings_of_case(CASES[number], more_steps)
            key = json.dumps(settings, sort_keys=True)
            if key in done and done[key]["commit"] == now:
                continue
            line = result_line(
                "memory",
                pool.apply(measure, (CASES[number], more_steps)),
                device=_processor(),
                versions=versions("torch", "transformers", "peft"),
                data="random rows, two thirds taught",
                settings=settings,
                seed=0,
            )
            keep(line, "memory")
            print(f"{number:2} {line['values']['error']:+.1%}  {settings}", flush=True)


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return "cpu, " + next((x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), platform.machine())


def predicted_and_measured(more_steps: int = 0) -> dict[int, tuple[int, int]]:
    """{number of a configuration: bytes by the ledger as it is now, bytes of its newest line}."""
    done, found = known(), {}
    for number, case in enumerate(CASES):
        line = done.get(json.dumps(settings_of_case(case, more_steps), sort_keys=True))
        if line is not None:
            found[number] = growth(setup_of_case(case, more_steps)).bytes, line["values"]["measured"]
    return found


def table(more_steps: int = 0) -> None:
    print("| | half | model | dtype | length | tokens | recomputed | chunk | r | predicted GB | measured GB | error |")
    print("|---|---|---|---|---|---|---|---|---|---|---|---|")
    errors: dict[str, list[float]] = {"fitted": [], "tested": []}
    for number, (predicted, measured) in predicted_and_measured(more_steps).items():
        case, half, error = CASES[number], "tested" if number % 2 else "fitted", predicted / measured - 1
        if predicted >= 500e6:
            errors[half].append(error)
        print(
            f"| {number} | {half} | {case.model} | {case.dtype} | {case.length} | {case.max_tokens} "
            f"| {case.checkpoint_layers} | {case.head_chunk} | {case.r} | {predicted / 1e9:.2f} | {measured / 1e9:.2f} "
            f"| {error:+.1%} |"
        )
    for half, found in errors.items():
        if found:
            within = sum(abs(e) <= 0.1 for e in found)
            print(f"{half}: {within} of {len(found)} within 10 %, largest error {max(map(abs, found)):.1%}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", type=int, nargs="*", help="numbers of CASES; all of them where none is named")
    parser.add_argument("--keeps-freed", action="store_true")
    parser.add_argument("--long", action="store_true")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--card-child", choices=tuple(ON_A_CARD))
    asked = parser.parse_args()
    if asked.card_child is not None:
        import torch

        print(json.dumps((measure_on_a_card(asked.card_child), torch.cuda.get_device_name(0))))
        return
    if asked.device == "cuda":
        run_on_a_card()
        return
    if asked.long:
        run_long()
        return
    if asked.table:
        table()
        table(MORE_STEPS)
        return
    more_steps = MORE_STEPS if asked.keeps_freed else 0
    run(asked.cases or (KEEPS_FREED if more_steps else range(len(CASES))), more_steps)
    table(more_steps)


if __name__ == "__main__":
    main()
