"""PEFT is imported and used without bitsandbytes, until a quantised base asks for it. Each in a fresh process."""

import subprocess
import sys

import pytest

pytest.importorskip("bitsandbytes")

_INJECT = """
import sys
import lora_cmqa.train.loop
import peft
assert "bitsandbytes" not in sys.modules
from transformers.utils import is_bitsandbytes_available
from peft.import_utils import is_bnb_available
from lora_cmqa.models.load import load_model
from lora_cmqa.lora.inject import inject_lora
"""


def _run(code):
    done = subprocess.run([sys.executable, "-c", _INJECT + code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.split()


def test_a_16_bit_base_gets_its_lora_without_bitsandbytes_and_others_still_find_it(tmp_path):
    """Put in, run, saved, loaded, taken off. What PEFT and transformers remember of bitsandbytes stays true for whoever
    else uses them in this process."""
    code = f"""
import torch
from lora_cmqa.lora.adapter import load_adapter, save_adapter
from lora_cmqa.lora.inject import remove_lora
wrapped = inject_lora(load_model('tiny')[0], r=2)
wrapped(torch.tensor([[1, 2, 3]])).logits.sum().backward()
save_adapter(wrapped, {str(tmp_path)!r}, base_model_name_or_path='tiny')
remove_lora(load_adapter(load_model('tiny')[0], {str(tmp_path)!r}, allow_inert=True))
print('bitsandbytes' in sys.modules, is_bnb_available(), is_bitsandbytes_available())
import bitsandbytes
print('bitsandbytes' in sys.modules)
"""
    assert _run(code) == ["False", "True", "True", "True"]


def test_a_quantised_base_imports_it_and_gets_its_lora():
    code = "w = inject_lora(load_model('tiny', quantization='nf4')[0], r=2); print('bitsandbytes' in sys.modules)"
    assert _run(code) == ["True"]


def test_peft_asks_again_once_bitsandbytes_is_there():
    code = """
import peft.tuners.lora.model as asking
from lora_cmqa.lora.peft_door import without_bitsandbytes_layers
with without_bitsandbytes_layers():
    print(asking.is_bnb_available())
print(asking.is_bnb_available())
import bitsandbytes
with without_bitsandbytes_layers():
    print(asking.is_bnb_available())
"""
    assert _run(code) == ["False", "True", "True"]
