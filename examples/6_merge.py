"""The adapter into the base's weights, with a certificate.      python examples/6_merge.py"""

import json

from lora_cmqa import merge

print(json.dumps(merge("runs/example", "runs/example-merged"), indent=2))
