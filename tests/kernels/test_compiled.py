"""A process keeps few compiled products, and the user's own bound where there is one."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from lora_cmqa.kernels.compiled import KEPT, bound_compiled_products

ONEDNN, OLD, IDEEP = "ONEDNN_PRIMITIVE_CACHE_CAPACITY", "DNNL_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {ONEDNN: str(KEPT), IDEEP: str(KEPT)}),
        ({ONEDNN: "500"}, {ONEDNN: "500", IDEEP: str(KEPT)}),
        ({OLD: "500", IDEEP: "7"}, {OLD: "500", IDEEP: "7"}),
    ],
)
def test_the_users_own_bound_stands(given, expected, monkeypatch):
    environment = dict(given)
    monkeypatch.setattr("os.environ", environment)
    bound_compiled_products()
    assert environment == expected


def test_a_loaded_model_has_the_bound_set():
    code = f"import os; from lora_cmqa.models.load import load_model; load_model('tiny'); print(os.environ[{ONEDNN!r}])"
    clean = {k: v for k, v in os.environ.items() if k not in (ONEDNN, OLD, IDEEP)}
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=clean)
    assert found.stdout.split() == [str(KEPT)], found.stderr
