"""The training loop in your own hands: rows, packs, steps.      python examples/3_own_loop.py"""

from lora_cmqa import inject_lora, load_model, train_steps
from lora_cmqa.core import Example, Message
from lora_cmqa.data.stream import BatchStream
from lora_cmqa.data.template import ChatTemplate, encode_all
from lora_cmqa.lora.inject import lora_parameters
from lora_cmqa.train.optim import Schedule, adamw

examples = [
    Example((Message("user", f"问题 {i}"), Message("assistant", f"回答 {i}。")), id=str(i), question_id=str(i))
    for i in range(16)
]
model, tokenizer = load_model("tiny")
rows, _ = encode_all(examples, ChatTemplate.from_tokenizer(tokenizer), max_length=512)
stream = BatchStream(rows, rows_per_step=4, max_tokens=512, num_train_epochs=2)

model = inject_lora(model, r=4)
schedule = Schedule("cosine", peak=1e-2, warmup_steps=1, total_steps=stream.total_steps)
for metrics in train_steps(model, stream, adamw(lora_parameters(model)), schedule):
    print(f"step {metrics.step}  loss {metrics.loss:.4f}  {metrics.tokens} tokens, {metrics.supervised_tokens} taught")
