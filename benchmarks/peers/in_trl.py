"""TRL's SFTTrainer, in its own environment: prompts and completions, loss on the completion (default)."""

from __future__ import annotations

from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer
from watch import Watch, job

asked = job()
tokenizer = AutoTokenizer.from_pretrained(asked["model"])
watch = Watch(tokenizer.pad_token_id)
packing = asked["how"] == "packing"
micro = 1 if packing else int(asked["batch"])
trainer = SFTTrainer(
    asked["model"],
    train_dataset=load_dataset(
        "json", data_files=f"{asked['data']}/prompts.jsonl", split="train", cache_dir=asked["out"]
    ),
    processing_class=tokenizer,
    args=SFTConfig(
        asked["out"],
        max_length=asked["max_length"],
        packing=packing,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=asked["packs" if packing else "rows_per_step"] // micro,
        num_train_epochs=1,
        learning_rate=asked["learning_rate"],
        lr_scheduler_type="cosine",
        gradient_checkpointing=False,
        bf16=asked["bf16"],
        use_cpu=asked["cpu"],
        model_init_kwargs={"dtype": "float32" if asked["how"] == "autocast" or not asked["bf16"] else "bfloat16"},
        save_strategy="no",
        report_to="none",
        logging_strategy="no",
        disable_tqdm=True,
    ),
    peft_config=LoraConfig(
        r=asked["r"], lora_alpha=asked["lora_alpha"], target_modules="all-linear", task_type="CAUSAL_LM"
    ),
)
trainer.train()
watch.report()
