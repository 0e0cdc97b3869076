"""The verbs. Each parses its settings, calls one public function, and prints.

    argv -> take off --json and --lang -> VERBS[verb] -> parse(arguments) -> run -> result (a dict)

No traceback for bad input: a CmqaError becomes one message on stderr and its exit code (errors.py draws the tree).
"""

from __future__ import annotations

import contextlib
import difflib
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from .config import Config, EvaluateConfig, parse
from .errors import CmqaError, ConfigError, ResourceError
from .messages import language, say, set_language, zh_settings

Result = dict[str, Any]


# ---- what each verb takes ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DemoArgs:
    model: str = "embedded"
    """Base model: the embedded one, a hub name or a local folder."""
    max_steps: int = -1
    """Stop training earlier; -1 is the whole demo."""


@dataclass(frozen=True)
class PrepareArgs:
    source: str = ""
    """cMQA / cMedQA folder or zip, CSV, JSONL, Alpaca, ShareGPT, the seed's conversations JSON, a folder of such files,
    hf:owner/name, or a YAML file of several sources with weights."""
    out: str = ""
    """Folder to write."""
    format: Literal["messages", "conversations"] = "messages"
    """conversations: also the seed's train.json."""
    limit: int | None = None
    """At most this many training rows."""
    seed: int = 42
    on_orphan: Literal["error", "drop"] = "error"
    """An answer whose question is missing."""
    no_clean: tuple[str, ...] = ()
    """Cleaning rules to switch off; report.json names them."""
    mask_names: bool = False
    """Mask doctors' and patients' names after a surname pattern."""
    against: tuple[str, ...] = ()
    """Files (a benchmark, say) to look for leaks against."""
    drop_leaks: bool = False
    allow_spun: bool = False
    licence: str = "unknown"
    """Goes into the data card and the model card."""
    show: int = 0
    """Print so many training rows as a model reads them, what is taught in green."""
    model: str = "tiny"
    """Whose tokenizer and template --show uses; the built-in one needs no download and has Qwen's turns."""


@dataclass(frozen=True)
class PlanArgs(Config):
    gpu_memory: str | None = None
    """"24GiB"; default: the free memory of the card that nvidia-smi names, else of this machine."""
    gpu: str | None = None
    """The card, for the time of an epoch: RTX 3090, RTX 4090, A100, L40S, H100, H200."""
    recipe: Literal["ours", "qwen-finetune"] = "ours"
    """qwen-finetune: the ledger of Qwen's own script, and why it did not fit."""
    html: str | None = None
    """Write the bars of every moment into this page."""


@dataclass(frozen=True)
class EvalArgs:
    run: str = ""
    data: str | None = None
    """Prepared folder or file; default: what the run was trained on."""
    name: str | None = None
    """RUN/eval/NAME; default: the split's name."""
    model: str | None = None
    """Base model; default: the one the adapter names."""
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    num_hidden_layers: int | None = None
    """Depth that the base is cut to; default: what the run's fingerprint.json says."""
    quantization: Literal["none", "nf4", "int8"] | None = None
    """Of the base's layers; default: what the run's fingerprint.json says."""
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)


@dataclass(frozen=True)
class ChatArgs:
    run: str = ""
    model: str | None = None
    """Base model; default: the one the adapter names."""
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    num_hidden_layers: int | None = None
    """Depth that the base is cut to; default: what the run's fingerprint.json says."""
    quantization: Literal["none", "nf4", "int8"] | None = None
    """Of the base's layers; default: what the run's fingerprint.json says."""
    system: str | None = None
    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class CompareArgs(ChatArgs):
    questions: tuple[str, ...] = ()
    """One or more questions, each in quotes."""


@dataclass(frozen=True)
class MergeArgs:
    run: str = ""
    out: str = ""
    model: str | None = None
    """Base model; default: the one the adapter names."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the merged weights; auto keeps the base's."""
    num_hidden_layers: int | None = None
    """Depth that the base is cut to; default: what the run's fingerprint.json says."""


@dataclass(frozen=True)
class ConvertArgs:
    source: str = ""
    """Folder of a Qwen v1 checkpoint."""
    out: str = ""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    num_hidden_layers: int | None = None
    """Write the first so many layers only."""


@dataclass(frozen=True)
class AdapterImportArgs:
    old: str = ""
    """Adapter folder of the Qwen v1 / peft 0.6 time."""
    model: str = ""
    """The base it was trained on: a Qwen v1 folder or its converted form."""
    out: str = ""
    without_missing: bool = False
    """Import although modules_to_save is declared and its weights are absent."""
    num_hidden_layers: int | None = None
    """Depth that its base was cut to (the seed's 16)."""


@dataclass(frozen=True)
class AdapterRebaseArgs:
    adapter: str = ""
    model: str = ""
    """The same base in its new place, e.g. the folder `cmqa convert` wrote."""
    out: str = ""
    num_hidden_layers: int | None = None
    """Depth that the base is cut to; default: what the run's fingerprint.json says."""


@dataclass(frozen=True)
class ServeArgs:
    adapters: str | None = None
    """Folder whose sub-folders are adapters, each served under its name."""
    model: str | None = None
    """Base; default: the one that the adapters name, else the embedded one."""
    host: str = "127.0.0.1"
    """Any other than loopback needs --api-keys."""
    port: int = 8000
    api_keys: str | None = None
    """File of lines `user KEY` and `admin KEY`."""
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    num_hidden_layers: int | None = None
    """Depth that the base is cut to; default: what the adapters' fingerprint.json say."""
    max_batch: int = 32
    """Requests computed at once; others wait."""
    adapter_memory: str = "1GiB"
    """Adapters kept in memory; least recently used out."""
    prefix_memory: str = "256MiB"
    """Beginnings of prompts kept computed; 0MiB keeps none."""
    max_waiting: int = 64
    """Requests that may wait; one more gets 429."""
    max_prompt_tokens: int = 4096
    max_new_tokens: int = 2048
    """Longest answer that may be asked for."""
    request_seconds: float = 300.0
    """Time limit of one request."""
    drain_seconds: float = 30.0
    """After SIGTERM: what runs may take this long."""
    notice: str | None = None
    """Beside every answer, in place of the usual sentence."""
    allow_other_base: bool = False
    """Serve adapters whose fingerprint names another base; /v1/models says so."""


# ---- what each verb does -----------------------------------------------------------------------------------------


def run_demo(args: DemoArgs) -> Result:
    from .demo import demo

    return demo(model=args.model, max_steps=args.max_steps)


def run_prepare(args: PrepareArgs) -> Result:
    from .data.prepare import prepare

    tokenizer = _tokenizer(args.model) if args.show > 0 else None  # before the work: a wrong name is said at once
    report = prepare(
        _needed("SRC", args.source),
        _needed("--out", args.out),
        seed=args.seed,
        format=args.format,
        limit=args.limit,
        on_orphan=args.on_orphan,
        no_clean=args.no_clean,
        mask_names=args.mask_names,
        against=args.against,
        drop_leaks=args.drop_leaks,
        allow_spun=args.allow_spun,
        licence=args.licence,
    )
    if tokenizer is None:
        return report
    from .data.show import shown

    return report | {"shown": shown(args.out, tokenizer, args.show), "shown_by": args.model}


def _tokenizer(model: str) -> Any:
    from .models.load import load_tokenizer

    return load_tokenizer(model)


def run_plan(args: PlanArgs) -> Result:
    from .train.plan import plan

    result = plan(args, gpu_memory=args.gpu_memory, gpu=args.gpu, recipe=args.recipe)
    if args.html is not None:
        from .train.plan_page import write_page

        write_page(result, Path(args.html))
    return result


def run_train(config: Config) -> Result:
    from .train.loop import train

    return {"run": str(train(config))}


def run_eval(args: EvalArgs) -> Result:
    from .evaluate.evaluation import evaluate
    from .evaluate.report import print_table
    from .evaluate.verdict import check_gate

    run = _needed("RUN", args.run)
    report = evaluate(
        run,
        args.data,
        args.evaluate,
        base=args.model,
        name=args.name,
        device=args.device,
        dtype=args.dtype,
        num_hidden_layers=args.num_hidden_layers,
        quantization=args.quantization,
    )
    if args.evaluate.gate:
        try:
            check_gate(report, file=Path(run) / "eval" / (args.name or args.evaluate.split) / "report.md")
        except CmqaError:
            print_table(report)
            raise
    return report


def _sampling(args: ChatArgs) -> Any:
    from .engine.sampling import SamplingParams

    return SamplingParams(
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        repetition_penalty=args.repetition_penalty,
        seed=args.seed,
    )


def run_chat(args: ChatArgs) -> Result:
    from .engine.chat import Chat, converse

    chat = Chat(
        _needed("RUN", args.run or args.model),  # a base may be talked to alone
        base=args.model,
        device=args.device,
        dtype=args.dtype,
        num_hidden_layers=args.num_hidden_layers,
        quantization=args.quantization,
        system=args.system,
    )
    converse(chat, sampling=_sampling(args))
    return {}


def run_compare(args: CompareArgs) -> Result:
    from .engine.chat import compare

    if not args.questions:
        raise ConfigError("no question", hint='cmqa compare RUN "孩子发烧怎么办？"')
    answers = compare(
        _needed("RUN", args.run),
        args.questions,
        base=args.model,
        device=args.device,
        dtype=args.dtype,
        num_hidden_layers=args.num_hidden_layers,
        quantization=args.quantization,
        system=args.system,
        sampling=_sampling(args),
    )
    return {"answers": answers}


def run_merge(args: MergeArgs) -> Result:
    from .lora.merge import merge

    dtype = None if args.dtype == "auto" else args.dtype
    return merge(
        _needed("RUN", args.run),
        _needed("--out", args.out),
        base=args.model,
        dtype=dtype,
        num_hidden_layers=args.num_hidden_layers,
    )


def run_convert(args: ConvertArgs) -> Result:
    from .models.qwen1 import convert

    source, out = _needed("QWEN_V1", args.source), _needed("--out", args.out)
    return {"out": str(convert(source, out, args.dtype, num_hidden_layers=args.num_hidden_layers))}


def run_adapter_import(args: AdapterImportArgs) -> Result:
    from .lora.adapter_import import import_adapter

    old, model, out = _needed("OLD", args.old), _needed("--model", args.model), _needed("--out", args.out)
    kept = args.num_hidden_layers
    return import_adapter(old, model, out, without_missing=args.without_missing, num_hidden_layers=kept)


def run_adapter_rebase(args: AdapterRebaseArgs) -> Result:
    from .lora.adapter_import import rebase

    adapter, model, out = _needed("ADAPTER", args.adapter), _needed("--model", args.model), _needed("--out", args.out)
    return rebase(adapter, model, out, num_hidden_layers=args.num_hidden_layers)


def run_serve(args: ServeArgs) -> Result:
    from .config import bytes_of
    from .serve.server import serve
    from .serve.service import Limits

    return serve(
        args.adapters,
        model=args.model,
        host=args.host,
        port=args.port,
        api_keys=args.api_keys,
        device=args.device,
        dtype=args.dtype,
        num_hidden_layers=args.num_hidden_layers,
        max_batch=args.max_batch,
        adapter_memory=bytes_of(args.adapter_memory, "adapter-memory"),
        prefix_memory=bytes_of(args.prefix_memory, "prefix-memory"),
        limits=Limits(
            prompt_tokens=args.max_prompt_tokens,
            new_tokens=args.max_new_tokens,
            waiting=args.max_waiting,
            seconds=args.request_seconds,
        ),
        notice=args.notice,
        allow_other_base=args.allow_other_base,
        drain_seconds=args.drain_seconds,
    )


def _needed(name: str, value: str | None) -> str:
    if not value:
        raise ConfigError(f"{name} is missing", hint="See --help.")
    return value


# ---- what each verb prints when --json is not asked for ----------------------------------------------------------


def print_nothing(result: Result) -> None:
    """The function spoke while it worked."""


def print_prepared(result: Result) -> None:
    from .data.prepare import print_summary

    print_summary(result)
    if "shown" in result:
        from .data.show import print_shown

        print_shown(result["shown"], result["shown_by"])


def print_planned(result: Result) -> None:
    from .train.plan_page import print_plan

    print_plan(result)


def print_trained(result: Result) -> None:
    print(say("cli.trained", run=result["run"]))


def print_evaluated(result: Result) -> None:
    from .evaluate.report import print_table

    print_table(result)


def print_answers(result: Result) -> None:
    from .engine.chat import print_side_by_side

    print_side_by_side(result["answers"])


def print_json(result: Result) -> None:
    print(json.dumps(result, ensure_ascii=False, indent=2))


@dataclass(frozen=True)
class Verb:
    args: type
    run: Callable[[Any], Result]
    show: Callable[[Result], None]
    positionals: tuple[str, ...] = ()
    usage: str = ""


VERBS: dict[str, Verb] = {
    "demo": Verb(DemoArgs, run_demo, print_nothing, usage="cmqa demo"),
    "prepare": Verb(PrepareArgs, run_prepare, print_prepared, ("source",), "cmqa prepare SRC --out DIR"),
    "plan": Verb(PlanArgs, run_plan, print_planned, usage="cmqa plan [CONFIG.yaml] --model M --gpu-memory 24GiB"),
    "train": Verb(
        Config, run_train, print_trained, usage="cmqa train [CONFIG.yaml] --model M --data DIR --output-dir RUN"
    ),
    "eval": Verb(EvalArgs, run_eval, print_evaluated, ("run",), "cmqa eval RUN --data DIR"),
    "chat": Verb(ChatArgs, run_chat, print_nothing, ("run",), "cmqa chat RUN"),
    "compare": Verb(CompareArgs, run_compare, print_answers, ("run", "questions"), 'cmqa compare RUN "..."'),
    "merge": Verb(MergeArgs, run_merge, print_json, ("run",), "cmqa merge RUN --out DIR"),
    "serve": Verb(ServeArgs, run_serve, print_nothing, usage="cmqa serve [--model M] --adapters DIR [--port 8000]"),
    "convert": Verb(ConvertArgs, run_convert, print_json, ("source",), "cmqa convert QWEN_V1 --out DIR"),
    "adapter import": Verb(
        AdapterImportArgs,
        run_adapter_import,
        print_json,
        ("old",),
        "cmqa adapter import OLD --model BASE --out NEW",
    ),
    "adapter rebase": Verb(
        AdapterRebaseArgs,
        run_adapter_rebase,
        print_json,
        ("adapter",),
        "cmqa adapter rebase RUN --model BASE --out NEW",
    ),
}


# ---- from argv to exit code --------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """The console script. Returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    as_json = False
    try:
        words, as_json = _take_common(words)
        return _dispatch(words, as_json)
    except CmqaError as e:
        if as_json:
            print(json.dumps(e.as_dict(), ensure_ascii=False))
        print(f"{type(e).__name__}: {e}", file=sys.stderr)
        return e.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `cmqa ... | head` closed our stdout
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except MemoryError:
        return _out_of("memory", "")
    except OSError as e:
        if e.errno == 28:
            return _out_of("disk", str(e))
        print(f"{type(e).__name__}: {e}", file=sys.stderr)
        return 2


def _out_of(what: str, detail: str) -> int:
    error = ResourceError(f"out of {what} {detail}".strip(), hint="Free some and run the same command: it resumes.")
    print(f"ResourceError: {error}", file=sys.stderr)
    return error.exit_code


def _take_common(words: list[str]) -> tuple[list[str], bool]:
    """Takes --json and --lang off, wherever they stand, and fixes the language."""
    rest: list[str] = []
    as_json = False
    lang: str | None = None
    while words:
        word = words.pop(0)
        if word == "--json":
            as_json = True
        elif word == "--lang" or word.startswith("--lang="):
            lang = word.partition("=")[2] or (words.pop(0) if words else "")
            if lang not in ("en", "zh"):
                raise ConfigError(f"--lang is {lang!r}", hint="--lang en or --lang zh")
        else:
            rest.append(word)
    set_language(lang)  # type: ignore[arg-type]
    return rest, as_json


def _dispatch(words: list[str], as_json: bool) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0
    if words[0] in ("-V", "--version"):
        from . import __version__

        print(f"lora-cmqa {__version__}")
        return 0
    name = next((n for n in VERBS if words[: len(n.split())] == n.split()), None)
    if name is None:
        tried = " ".join(words[:2]) if words[0] == "adapter" else words[0]
        near = difflib.get_close_matches(tried, VERBS, n=1, cutoff=0.4)
        raise ConfigError(f"unknown verb {tried!r}", hint=f"Did you mean `cmqa {near[0]}`?" if near else "cmqa --help")
    verb, rest = VERBS[name], words[len(name.split()) :]
    yaml_file = None
    if name in ("train", "plan") and rest and not rest[0].startswith("-"):
        yaml_file = rest.pop(0)
    args: Any = parse(
        verb.args,
        rest,
        yaml_file=yaml_file,
        positionals=verb.positionals,
        prog=f"cmqa {name}",
        description=f"{_about(name)}  {verb.usage}",
        explained=zh_settings.settings_of(name) if language() == "zh" else None,
    )
    _quiet_libraries()
    if as_json:  # stdout is for the one object: whatever is said on the way goes to stderr
        with contextlib.redirect_stdout(sys.stderr):
            result = verb.run(args)
        print(json.dumps(result, ensure_ascii=False))
    else:
        verb.show(verb.run(args))
    return 0


def _quiet_libraries() -> None:
    """Our own lines are the ones a person reads; theirs stay for those who set the variables."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")


def _about(verb: str) -> str:
    return say("cli." + verb.replace(" ", "_"))


def _overview() -> str:
    width = max(len(v.usage) for v in VERBS.values())
    lines = [say("cli.about"), ""]
    lines += [f"  {v.usage:<{width}}  {_about(n)}" for n, v in VERBS.items()]
    lines += ["", say("cli.common"), say("cli.language", language=language())]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
