"""Train an adapter on the tiny built-in model.      python examples/2_train.py"""

from pathlib import Path

from lora_cmqa import Config, train
from lora_cmqa.config import DataConfig, LoraConfig, ModelConfig, TrainConfig

run = train(
    Config(
        model=ModelConfig(name_or_path="tiny", dtype="float32", device="cpu"),
        data=DataConfig(path="data/example", model_max_length=2048),
        lora=LoraConfig(r=8, lora_alpha=16),
        train=TrainConfig(output_dir="runs/example", max_steps=4, learning_rate=1e-3),
    )
)
print((Path(run) / "metrics.jsonl").read_text(encoding="utf-8"))
