"""Prepare the built-in sample and see, in colour, what a row teaches.      python examples/1_prepare_and_look.py"""

from importlib.resources import files

from rich.console import Console
from rich.text import Text

from lora_cmqa import load_model, prepare
from lora_cmqa.data.prepare import load_split
from lora_cmqa.data.template import ChatTemplate, encode_all, preview

report = prepare(str(files("lora_cmqa") / "data" / "sample"), "data/example")
print(f"{len(report)} parts of the report: {', '.join(report)}")

_, tokenizer = load_model("tiny")
rows, counts = encode_all(load_split("data/example", "train"), ChatTemplate.from_tokenizer(tokenizer), max_length=2048)
print(f"{counts.kept} of {counts.read} rows, {counts.tokens} tokens; green is taught:")
for text, taught in preview(rows[0], tokenizer):
    Console().print(Text(text, style="green" if taught else "dim"), end="")
print()
