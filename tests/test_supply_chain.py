"""What the package imports, what it never imports, and what a release pins: cases 19 and 46."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = sorted((ROOT / "src").rglob("*.py"))
BESIDE = [p for pattern in ("*.py", "examples/*.py", "benchmarks/*.py") for p in ROOT.glob(pattern)]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
LOCK = ROOT / "requirements.lock"
LOCKED_EXTRAS = ("demo", "track")

# What turns bytes into objects by running what they say.
UNPICKLERS = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "jsonpickle", "marshal", "shelve"}


_PICKLES = ("torch.save", "serialization.load", "jit.load", "package.PackageImporter", "read_pickle", "to_pickle")


def imports(tree: ast.AST) -> set[str]:
    """Top-level names of absolute imports."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {a.name.split(".")[0] for a in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(str(node.module).split(".")[0])
    return found


def offences(source: str) -> list[str]:
    """Imports of unpicklers, and calls that unpickle or pickle behind another name."""
    tree = ast.parse(source)
    found = [f"imports {name}" for name in sorted(imports(tree) & UNPICKLERS)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and node.value in UNPICKLERS:
            found.append(f"line {node.lineno}: names {node.value!r}")  # importlib.import_module("pickle")
        if isinstance(node, ast.Import) and any(a.name == "torch" and a.asname for a in node.names):
            found.append(f"line {node.lineno}: torch under another name, which hides its load")
        if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] == "torch":
            found += [
                f"line {node.lineno}: {a.name} of torch by itself" for a in node.names if a.name in ("load", "save")
            ]
        if not isinstance(node, ast.Call):
            continue
        call = ast.unparse(node.func)
        given = {k.arg: ast.unparse(k.value) for k in node.keywords}
        if call.endswith("torch.load") and given.get("weights_only") != "True":
            found.append(f"line {node.lineno}: torch.load without weights_only=True")
        if "allow_pickle" in given or call.endswith(_PICKLES):
            found.append(f"line {node.lineno}: {call} pickles")
    return found


@pytest.mark.parametrize("file", sorted([*PACKAGE, *BESIDE]), ids=lambda f: str(f.relative_to(ROOT)))
def test_case_19_nothing_pickles_or_unpickles(file):
    assert offences(file.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "bad",
    [
        *(f"import {name}" for name in sorted(UNPICKLERS)),
        "from joblib.numpy_pickle import load",
        "import os, marshal as m",
        "importlib.import_module('dill')",
        "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "torch.load(f, weights_only=flag)",
        "np.load(f, allow_pickle=True)",
        "torch.save(x, f)",
        "from torch import load",
        "from torch.serialization import load",
        "import torch as t",
        "torch.serialization.load(f)",
        "torch.jit.load(f)",
        "pd.read_pickle(f)",
    ],
)
def test_case_19_the_gate_itself_sees(bad):
    assert offences(bad)


def test_case_01_torch_is_new_enough_for_weights_only():
    """Below 2.10 it can be got round (CVE-2025-32434, CVE-2026-24747)."""
    torch = next(r for r in map(Requirement, PROJECT["dependencies"]) if r.name == "torch")
    assert not torch.specifier.contains("2.9.1")
    assert torch.specifier.contains("2.10.0")


# ---- what is imported is declared ---------------------------------------------------------------------------------


def declared(extras: tuple[str, ...] | None = None) -> dict[str, Requirement]:
    """{canonical name: requirement} of the plain install and of `extras` (None: of all)."""
    optional = PROJECT["optional-dependencies"]
    lines = [*PROJECT["dependencies"], *(r for e in (optional if extras is None else extras) for r in optional[e])]
    found = [Requirement(line) for line in lines]
    return {canonicalize_name(r.name): r for r in found if r.name != PROJECT["name"]}


def test_case_46_every_import_is_a_declared_dependency():
    """By the distribution that really provides the name, so that a look-alike stands out."""
    known, providers, foreign = declared(), packages_distributions(), []
    for file in PACKAGE:
        for name in imports(ast.parse(file.read_text(encoding="utf-8"))) - {"lora_cmqa", *sys.stdlib_module_names}:
            by = {canonicalize_name(d) for d in providers.get(name, [name])}
            if not by & known.keys():
                foreign.append(f"{file.relative_to(ROOT)} imports {name} ({' or '.join(by)})")
    assert foreign == []


def test_case_46_every_plain_dependency_is_imported():
    used = set().union(*(imports(ast.parse(f.read_text(encoding="utf-8"))) for f in PACKAGE))
    providers = packages_distributions()
    provided = {canonicalize_name(d) for name in used for d in providers.get(name, [name])}
    assert declared(()).keys() - provided == set()


# ---- what a release pins ------------------------------------------------------------------------------------------


def locked() -> dict[str, tuple[str, int]]:
    """{canonical name: (version, number of hashes)}"""
    text = re.sub(r"\\\n\s*", " ", LOCK.read_text(encoding="utf-8"))
    found = {}
    for line in text.splitlines():
        if line and not line.startswith("#"):
            name, version = re.match(r"([A-Za-z0-9._-]+)==(\S+)", line).groups()
            found[canonicalize_name(name)] = (version, len(re.findall(r"--hash=sha256:[0-9a-f]{64}\b", line)))
    return found


def test_case_46_the_lock_pins_every_package_by_hash():
    pins = locked()
    assert all(hashes >= 1 for _, hashes in pins.values())
    assert len(pins) <= 90  # a new one is a decision
    for name, requirement in declared(LOCKED_EXTRAS).items():
        assert name in pins, f"`make lock`: {name} is not in {LOCK.name}"
        assert requirement.specifier.contains(pins[name][0]), f"`make lock`: {requirement} and {pins[name][0]}"


def test_case_46_the_lock_names_no_place_to_download_from():
    text = LOCK.read_text(encoding="utf-8")
    assert not re.search(r"https?://|file:|--(index|extra-index|find-links|trusted)", text)
