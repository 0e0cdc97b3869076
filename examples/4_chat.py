"""Ask the base and the adapter the same question.      python examples/4_chat.py"""

from lora_cmqa import Chat
from lora_cmqa.engine.sampling import SamplingParams

chat = Chat("runs/example", device="cpu", dtype="float32")
short = SamplingParams(max_new_tokens=24)
print("base:   ", repr(chat.ask("头痛怎么办？", adapter=False, sampling=short)))
print("adapter:", repr(chat.ask("头痛怎么办？", sampling=short)))
