"""中文文案，键为“房间.时刻”；en.py 的键与此相同。"""

TEXT: dict[str, str] = {
    # cli
    "cli.about": "lora-cmqa：从医疗问答数据到能证明自己更好的 LoRA 适配器。",
    "cli.common": "每个命令都可加 --json（标准输出只有一个 JSON 对象）、--lang en|zh 和 --help。",
    "cli.language": "语言：{language}（由 --lang、CMQA_LANG 或系统区域决定）。",
    "cli.demo": "用内置样例和内置基座走完全程，只需几分钟。",
    "cli.prepare": "读取、清洗、切分，每一行都有去处。",
    "cli.train": "训练 LoRA 适配器；再次运行即可续训。",
    "cli.eval": "在留出数据上比较基座与适配器，附置信区间。",
    "cli.chat": "与适配器对话；可用 /base 和 /reset。",
    "cli.compare": "同一问题，基座与适配器的回答并排显示。",
    "cli.merge": "把适配器并入基座权重，并出具证书。",
    "cli.convert": "把 Qwen v1 检查点转为原生格式。",
    "cli.adapter_import": "把 Qwen v1 时代的适配器转为今天的格式。",
    "cli.adapter_rebase": "同一适配器，改记基座的新位置。",
    "cli.trained": "适配器已保存在 {run}。",
    # chat
    "chat.base": "基座",
    "chat.adapter": "适配器",
    "chat.silence": "（没有回答：一开始就是结束符）",
    "chat.welcome": "{run}，基座 {base}。/base 与 /adapter 切换，/reset 清空对话，/exit 退出。回答不构成医疗建议。",
    "chat.forgotten": "已清空对话。",
    "chat.base_answers": "现在由基座回答；/adapter 切换回来。",
    "chat.adapter_answers": "现在由适配器回答。",
    "chat.no_adapter": "这里只有基座，没有适配器。",
    "chat.unknown_command": "{command} 不是 /base /adapter /reset /exit 之一。",
}
