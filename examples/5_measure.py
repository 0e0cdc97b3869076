"""Base against adapter on held-out rows, with paired intervals.      python examples/5_measure.py"""

from lora_cmqa import evaluate

report = evaluate("runs/example", "data/example", generate_rows=2, max_new_tokens=8, device="cpu", dtype="float32")
for name, numbers in report["metrics"].items():
    print(name, numbers["base"], numbers["adapter"], numbers["difference"], numbers["ci95"])
