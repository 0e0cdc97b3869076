"""Base and adapter on the seed's two questions, with plain peft and transformers.

python load_lora_adapter.py [RUN or RUN/checkpoint-N] [--max-new-tokens 256]
"""

import argparse

import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer, GenerationConfig

QUESTIONS = (
    "我家宝宝六个月，吃奶、睡觉常常满头冒汗，以前是不出汗的。请问这是不是病，如何医治？",
    "手毛，脚毛都很多，很密，都不知道怎么办，有什么永远脱毛方法，不想激光脱毛？",
)


def answer(model, tokenizer, question: str, generation: GenerationConfig) -> str:
    """The greedy answer to one question; `generation` holds the stop ids that the run was trained with."""
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    ).to(model.device)
    with torch.inference_mode():
        ids = model.generate(**prompt, generation_config=generation)
    return tokenizer.decode(ids[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True).strip()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", default="output_qwen", help="run folder or checkpoint (default: output_qwen)")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    args = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(args.run, trust_remote_code=False)
    model = AutoPeftModelForCausalLM.from_pretrained(args.run, trust_remote_code=False, dtype="auto").to(device).eval()
    generation = GenerationConfig.from_pretrained(args.run, max_new_tokens=args.max_new_tokens, do_sample=False)
    for question in QUESTIONS:
        print(f"问：{question}")
        with model.disable_adapter():
            print(f"基座 base：{answer(model, tokenizer, question, generation)}")
        print(f"适配器 adapter：{answer(model, tokenizer, question, generation)}\n")
