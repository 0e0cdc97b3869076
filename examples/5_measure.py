"""Base against adapter on held-out rows, with paired intervals.      python examples/5_measure.py"""

from lora_cmqa import evaluate
from lora_cmqa.config import EvaluateConfig

few = EvaluateConfig(generate_rows=2, max_new_tokens=8, rank_questions=4, general_chat=False, red_flags=False)
report = evaluate("runs/example", "data/example", few, device="cpu", dtype="float32")
for name, numbers in report["metrics"].items():
    print(name, numbers["base"], numbers["adapter"], numbers["difference"], numbers["ci95"])
