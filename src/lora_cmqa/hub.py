"""Fetch a model or a dataset by name. The only room that opens a socket, and only when a name is not a local path.

    fetch("Qwen/Qwen3-0.6B")       -> folder in the hub's own cache
    fetch_dataset("owner/name")    -> its rows by split

The Hugging Face hub, or where HF_ENDPOINT points (a mirror); CMQA_HUB=modelscope takes ModelScope.
Only weights as safetensors, JSON and tokenizer files come: no Python file, no pickle.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .errors import DataError, ModelError

FILES = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt", "*.tiktoken", "LICENSE*"]
LEAVE = ["*/*"]  # sub-folders hold other formats (onnx/, original/, gguf/)


def fetch(name: str) -> Path:
    """The folder of a hub model `owner/name`, downloaded on first use.

    Raises ModelError: no such model, no access, no network; the hint names the way without a hub.
    """
    return _fetch(name, FILES)


def _fetch(name: str, files: list[str]) -> Path:
    hub = os.environ.get("CMQA_HUB", "huggingface").lower()
    if hub not in ("huggingface", "modelscope"):
        raise ModelError(f"CMQA_HUB is {hub!r}", hint="CMQA_HUB=huggingface or CMQA_HUB=modelscope")
    return _from_modelscope(name, files) if hub == "modelscope" else _from_huggingface(name, files)


def fetch_config(name: str) -> Path:
    """config.json of a hub model, and nothing else: enough to plan with. Raises ModelError as `fetch` does."""
    folder = _fetch(name, ["config.json"])
    return folder / "config.json"


def fetch_dataset(name: str) -> dict[str, Iterable[Mapping[str, Any]]]:
    """The rows of a Hugging Face dataset by split: `owner/name`, `owner/name:config`, `owner/name@revision`.

    Downloaded on first use into the hub's own cache, memory-mapped from there. From version 4 on `datasets` runs no
    script of a dataset. Raises DataError: the package is missing, no such dataset, no access, no network.
    """
    endpoint = os.environ.get("HF_ENDPOINT", "the Hugging Face hub")
    if os.environ.get("CMQA_HUB", "huggingface").lower() == "modelscope":
        raise DataError(
            f"{name} would come from {endpoint}, and CMQA_HUB=modelscope says otherwise",
            hint="Unset CMQA_HUB for this command (HF_ENDPOINT names a mirror), or download the files and name them.",
        )
    try:
        import datasets
    except ImportError:
        raise DataError(
            f"{name} needs the datasets package, which is not installed", hint='pip install "lora-cmqa[datasets]"'
        ) from None
    if int(datasets.__version__.split(".")[0]) < 4:
        raise DataError(
            f"datasets {datasets.__version__} may run a dataset's own script", hint='pip install "datasets>=4"'
        )
    where, _, revision = name.partition("@")
    where, _, config = where.partition(":")
    try:
        return dict(datasets.load_dataset(where, config or None, revision=revision or None))
    except Exception as e:  # the package raises its own errors, the hub's, OSError and ValueError for like causes
        raise DataError(
            f"dataset {name} cannot be fetched from {endpoint}: {(str(e).splitlines() or [type(e).__name__])[0][:200]}",
            hint="Without a hub: download its files (CSV, JSON, JSON lines) and name the folder.",
        ) from None


def _from_huggingface(name: str, files: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    endpoint = os.environ.get("HF_ENDPOINT", "the Hugging Face hub")
    try:
        return Path(snapshot_download(name, allow_patterns=files, ignore_patterns=LEAVE))
    except GatedRepoError:
        raise ModelError(
            f"{name} is there, but its owner asks you to accept terms first",
            hint="Accept them on the model's page and log in with `hf auth login`, or give a local folder.",
        ) from None
    except RepositoryNotFoundError:
        raise ModelError(f"{endpoint} has no model {name} (or it is private)", hint=_local(name)) from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as e:
        raise ModelError(f"{name} cannot be fetched from {endpoint}: {_reason(e)}", hint=_local(name)) from None


def _from_modelscope(name: str, files: list[str]) -> Path:
    try:
        from modelscope import snapshot_download
    except ImportError:
        raise ModelError(
            "CMQA_HUB=modelscope needs the modelscope package, which is not installed", hint="pip install modelscope"
        ) from None
    try:
        return Path(snapshot_download(name, allow_patterns=files, ignore_patterns=LEAVE))
    except Exception as e:  # the package raises its own errors, requests' and ValueError for the same cause
        raise ModelError(f"{name} cannot be fetched from ModelScope: {_reason(e)}", hint=_local(name)) from None


def _reason(error: Exception) -> str:
    """The first line of the innermost error: what failed, not where."""
    while (inner := error.__cause__ or error.__context__) is not None and isinstance(inner, Exception):
        error = inner
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:200]


def _local(name: str) -> str:
    return (
        f"Without a hub: copy the model's folder here and give its path, --model ./{name.rsplit('/', 1)[-1]} "
        "(config.json, *.safetensors, tokenizer files), set HF_ENDPOINT to a mirror or CMQA_HUB=modelscope, "
        "or take --model embedded."
    )
