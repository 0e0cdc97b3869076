"""ms-swift's sft, in its own environment: rows of messages, its template gemma3_text, loss on answers (default).

Attention is asked for by name: left alone it takes the eager one for Gemma. Packing needs flash attention, a GPU's.
"""

from __future__ import annotations

from transformers import AutoTokenizer
from watch import Watch, job

asked = job()
watch = Watch(AutoTokenizer.from_pretrained(asked["model"]).pad_token_id)

from swift import sft_main  # noqa: E402  (after the watch: it subclasses Trainer on import)

options = {
    "model": asked["model"],
    "model_type": "gemma3_text",
    "template": "gemma3_text",
    "tuner_type": "lora",
    "lora_rank": asked["r"],
    "lora_alpha": int(asked["lora_alpha"]),
    "target_modules": "all-linear",
    "dataset": f"{asked['data']}/messages.jsonl",
    "split_dataset_ratio": 0,
    "torch_dtype": "bfloat16" if asked["bf16"] else "float32",
    "attn_impl": "sdpa",
    "max_length": asked["max_length"],
    "num_train_epochs": 1,
    "per_device_train_batch_size": asked["batch"],
    "gradient_accumulation_steps": asked["rows_per_step"] // int(asked["batch"]),
    "learning_rate": asked["learning_rate"],
    "save_strategy": "no",
    "report_to": "none",
    "gradient_checkpointing": "false",
    "use_cpu": str(asked["cpu"]).lower(),
    "output_dir": asked["out"],
    "dataset_num_proc": 1,
    "dataloader_num_workers": 0,
}
sft_main([word for name, value in options.items() for word in (f"--{name}", str(value))])
watch.report()
