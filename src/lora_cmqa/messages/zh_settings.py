"""各项设置的中文说明；英文说明写在设置自己的旁边（config.py、cli.py）。

键是设置的全名；同名而含义不同的，前面加上命令："eval data"。
"""

SETTINGS: dict[str, str] = {
    # model
    "model.name_or_path": "模型名、本地文件夹、embedded（demo 附带的 Gemma 3 270M）或 tiny（内置的随机小模型）。",
    "model.dtype": (
        "冻结基座的精度；LoRA 权重总是 float32（基座为 float64 时也是 float64）。"
        "auto：设备以 bfloat16 计算时用 bfloat16，否则 float32。"
    ),
    "model.quantization": (
        "各层冻结矩阵的量化，读入时逐个进行：nf4（QLoRA：4 位，常数也量化）占 16 位的四分之一，int8 占一半。"
        "需要 bitsandbytes（gpu 附加项）；计算精度仍由 dtype 决定。"
    ),
    "model.device": "cpu、cuda、cuda:1；auto 在有显卡时用显卡。",
    "model.num_hidden_layers": "只保留基座的前若干层（原脚本为放进显卡而取 16 层）；剩下的是受损的模型。",
    # data
    "data.path": "cmqa prepare 生成的文件夹、messages 格式的 JSONL，或 conversations 格式的 JSON。",
    "data.model_max_length": "一行最长多少词元；超长的行按 on_too_long 处理，绝不悄悄截断。",
    "data.on_too_long": "drop：舍弃；shorten：在放得下的最后一个句末截短回答并补上结束符；error：报错。",
    "data.system": "给没有系统提示的行加上的系统提示；不设则不加。",
    "data.chat_template": "chatml、gemma 或 .jinja 文件；不设：Qwen 用 ChatML，其余用分词器自带的模板。",
    "data.replay": "混入训练的通用问答（messages 格式的 JSONL），减轻遗忘。",
    "data.dev_path": "另给的验证集文件或文件夹，代替 path 中的 dev。",
    "data.dev_fraction": "单个文件没有划分 dev 时，取出这一比例作验证集。",
    "data.token_cache_gib": "大数据集的词元留在缓存文件夹（CMQA_CACHE）供下次使用，总共最多多少 GiB；0 表示不保留。",
    "data.shared_prefixes": (
        "一个包内各行相同的开头只算一次：系统提示词、有多个回答的问题（其回答放在同一步）。"
        "不改变梯度；有 dropout 时关闭。"
    ),
    # lora
    "lora.r": "A 与 B 的宽度；适配器大小随之增长。",
    "lora.lora_alpha": "更新量乘以 lora_alpha / r。",
    "lora.lora_dropout": "原脚本用 0.05；这里默认 0：每行只看几遍，且 0 能让各条快速路径保持精确。",
    "lora.target_modules": "加 LoRA 的模块名；all-linear 为全部线性层（输出头除外）。",
    "lora.modules_to_save": "整体参与训练的模块，如 wte lm_head；所需内存会先打印出来。",
    "lora.trainable_tokens": (
        "训练这些词元在词嵌入和输出头中的行：none、词元本身，或 auto（对话模板中基座没学过的轮次词元）。"
        "这样的适配器不属于可移植格式。"
    ),
    "lora.use_rslora": "按 lora_alpha / sqrt(r) 缩放；保存时折算进 lora_alpha。",
    # train
    "train.output_dir": "训练文件夹；再次运行同一命令即可续训。",
    "train.num_train_epochs": "训练几遍。",
    "train.max_steps": "训练到这一步为止；-1 由遍数决定。",
    "train.per_device_train_batch_size": "每个设备每次的行数。",
    "train.gradient_accumulation_steps": "累积几次更新一步；一步的行数 = 两者相乘。",
    "train.per_device_eval_batch_size": "为兼容原命令行而保留；评估按 max_tokens 打包。",
    "train.fit": "auto：未指定的 max_tokens、gradient_checkpointing 和 head_chunk 按空闲内存选取（见 `cmqa plan`），"
    "放不下的训练会被拒绝。off：2048、不重算、512。梯度都不变。",
    "train.max_tokens": "一个微批最多多少词元（更长的单行独占一批）；不改变梯度。未指定时见 fit。",
    "train.learning_rate": "学习率的峰值。",
    "train.weight_decay": "AdamW 的权重衰减。",
    "train.adam_beta1": "AdamW 一阶矩的衰减率。",
    "train.adam_beta2": "AdamW 二阶矩的衰减率。",
    "train.adam_epsilon": "AdamW 分母中的小量。",
    "train.max_grad_norm": "按全局 L2 范数裁剪梯度；0 为不裁剪。",
    "train.warmup_ratio": "学习率上升阶段占总步数的比例；与 HF 相同，第一步为 0。",
    "train.warmup_steps": "上升阶段的步数；大于 0 时优先于 warmup_ratio。",
    "train.lr_scheduler_type": "学习率的变化方式。",
    "train.gradient_checkpointing": "各层只保留输入，反向时重算：省内存，最多多用一半时间。未指定时见 fit。",
    "train.checkpoint_layers": "与 gradient_checkpointing 同用：只重算前这么多层；0 为全部。",
    "train.head_chunk": "同时保存多少行的 logits；不改变梯度。未指定时见 fit。",
    "train.bf16": "原脚本的开关：基座用 bfloat16（等于 model.dtype bfloat16）。",
    "train.logging_steps": "每隔多少步记入跟踪器。",
    "train.eval_steps": "每隔多少步算一次验证损失与排序；0 为每遍结束时。",
    "train.eval_rank_questions": "每次验证时对多少个问题的 20 个候选排序（数据带候选时）；0 为不排序。",
    "train.metric_for_best_model": "按哪个指标选最好的适配器、决定提前停止。",
    "train.early_stopping_patience": "连续多少次验证没有变好就提前停止；0 为从不。",
    "train.save_steps": "每隔多少步存一个检查点；0 为每遍结束时。",
    "train.save_total_limit": "保留几个检查点；0 为全部保留。",
    "train.seed": "决定行的顺序与 LoRA 的初值。",
    "train.report_to": "跟踪器：tensorboard。",
    "train.resume": "anyway：在其他版本或处理器上继续原来的训练，并记录下来。",
    "train.deterministic": "只用每次结果逐位相同的内核：显卡上据此可以精确续训，但更慢；CPU 本来就精确。",
    "train.memory_limit": "如 8GiB：超出时报错而不被系统杀掉，训练改用更小的微批。显卡：分配器；否则：进程数据段。",
    "train.max_bad_steps": "损失或梯度不是有限数的一步不会生效；连续超过这么多步就结束训练。",
    # evaluate
    "evaluate.max_new_tokens": "每个回答最多生成多少词元。",
    "evaluate.quick": "最多 100 行、60 个问题 × 20 个候选（各取 32 个词元）、100 道通用题、80 个新词元。",
    "evaluate.generate_rows": "由基座和适配器各答一遍的问题数；0 为不生成，-1 为全部。",
    "evaluate.loss_rows": "计算损失的行数；0 为整个划分。",
    "evaluate.rank_questions": "做候选排序的问题数；0 为不排序，-1 为全部。",
    "evaluate.rank_candidates": "每个问题的候选数；0 为整个列表。",
    "evaluate.rank_tokens": "每个候选计分的词元数；0 为全部。",
    "evaluate.general_chat": "问内置的日常问题。",
    "evaluate.red_flags": "问内置的警示问题。",
    "evaluate.probe": "选择题文件夹或 CSV（C-Eval、CMMLU、CMExam 格式），用来衡量遗忘。",
    "evaluate.probe_questions": "问多少道选择题；0 为全部。",
    "evaluate.probe_shots": "每道选择题之前给几道带答案的例题（取自该科目的 dev 文件），最多五道。",
    "evaluate.lm_eval": "用 EleutherAI 的 harness 在两边运行的任务（需安装 harness 附加包）；会联网。",
    "evaluate.max_forgetting": "允许适配器答错的比例增加多少。",
    "evaluate.gate": "除非任务更好、遗忘与安全都在限度之内，否则以退出码 4 结束。",
    "evaluate.split": "在 dev 还是 test 上评估。",
    "evaluate.bootstrap_samples": "自助法重抽样的次数。",
    "evaluate.bootstrap_seed": "重抽样的随机种子。",
    # demo
    "demo model": "基座：内置模型、模型名或本地文件夹。",
    "demo max_steps": "提前结束训练；-1 为完整演示。",
    # prepare
    "prepare source": (
        "cMQA / cMedQA 文件夹或压缩包、CSV、JSONL、Alpaca、ShareGPT、conversations 格式的 JSON、含上述文件的文件夹、"
        "hf:owner/name，或列出多个来源及权重的 YAML 文件。"
    ),
    "prepare out": "要写入的文件夹。",
    "prepare format": "conversations：另写一份原脚本用的 train.json。",
    "prepare limit": "最多取多少训练行。",
    "prepare seed": "划分的随机种子。",
    "prepare on_orphan": "找不到问题的回答：报错，还是舍弃。",
    "prepare no_clean": "要关闭的清洗规则；名称见 report.json。",
    "prepare mask_names": "把姓氏后面的医生、患者姓名也遮盖；默认不遮盖，因为按姓氏匹配偶有误判。",
    "prepare against": "要检查是否与之重复的文件（例如评测集）。",
    "prepare drop_leaks": "舍弃与其他划分或 against 文件重复的训练行。",
    "prepare allow_spun": "即使数据像是机器改写的，也继续。",
    "prepare show": "打印若干训练行在模型眼中的样子，要学的部分为绿色。",
    "prepare model": "--show 使用哪个模型的分词器和模板；内置的 tiny 无需下载，对话格式与 Qwen 相同。",
    "prepare licence": "写入数据卡和模型卡的许可证。",
    # plan
    "gpu_memory": "如 24GiB；默认取 nvidia-smi 所见显卡的空闲显存，没有显卡则取本机空闲内存。",
    "gpu": "显卡型号，用于估计一遍的时间：RTX 3090、RTX 4090、A100、L40S、H100、H200。",
    "recipe": "qwen-finetune：改为列出 Qwen 原脚本的账目，并说明它为何放不下。",
    "html": "把各时刻的条形图写入这个网页。",
    # serve
    "adapters": "其下每个子文件夹是一个适配器，以文件夹名提供服务。",
    "serve model": "基座；默认为各适配器所记的那个，否则为内置基座。",
    "host": "本机回环地址以外的任何地址都要求 --api-keys。",
    "port": "监听的端口。",
    "api_keys": "密钥文件，每行为 `user 密钥` 或 `admin 密钥`。",
    "serve num_hidden_layers": "基座裁到多少层；默认以各适配器的 fingerprint.json 为准。",
    "max_batch": "同时计算的请求数；其余排队。",
    "adapter_memory": "内存中保留的适配器总量；最久未用的先移出。",
    "prefix_memory": "保留已算好的提示开头的内存；0MiB 为不保留。",
    "max_waiting": "最多多少请求排队；再多则返回 429。",
    "max_prompt_tokens": "提示最多多少词元。",
    "serve max_new_tokens": "最长可要求多少词元的回答。",
    "request_seconds": "单个请求的时限（秒）。",
    "drain_seconds": "收到 SIGTERM 后，进行中的回答最多再用多少秒。",
    "notice": "附在每个回答旁的说明，代替默认的一句。",
    "allow_other_base": "也提供指纹属于另一基座的适配器；/v1/models 会注明。",
    # eval, chat, compare, merge
    "run": "训练文件夹，或任何 PEFT 适配器的文件夹。",
    "model": "基座；默认为适配器所记的那个。",
    "num_hidden_layers": "基座裁到多少层；默认以训练文件夹的 fingerprint.json 为准。",
    "quantization": "基座各层的量化：none、nf4、int8；默认以训练文件夹的 fingerprint.json 为准。",
    "device": "cpu、cuda、cuda:1；auto 在有显卡时用显卡。",
    "dtype": "计算精度；auto 由设备决定。",
    "system": "系统提示；默认与训练时相同。",
    "max_new_tokens": "每个回答最多生成多少词元。",
    "temperature": "0 为贪心解码；越大越随机。",
    "top_p": "只在累积概率达到 top_p 的最小集合中抽取。",
    "top_k": "只在概率最高的 k 个词元中抽取；0 为不限。",
    "repetition_penalty": "大于 1 时压低已出现过的词元。",
    "seed": "抽样的随机种子。",
    "eval data": "cmqa prepare 生成的文件夹或文件；默认为训练所用的数据。",
    "eval name": "报告写入 RUN/eval/NAME；默认为划分的名字。",
    "compare questions": "一个或多个问题，各加引号。",
    "merge out": "要写入的文件夹。",
    "merge dtype": "合并后权重的精度；auto 与基座相同。",
    # convert, adapter
    "convert source": "Qwen v1 检查点的文件夹。",
    "convert out": "要写入的文件夹。",
    "convert num_hidden_layers": "只写出前若干层。",
    "convert dtype": "转换后权重的精度；auto 与原来相同。",
    "adapter import old": "Qwen v1 / peft 0.6 时代的适配器文件夹。",
    "adapter import model": "训练它时所用的基座：Qwen v1 文件夹或其转换结果。",
    "adapter import out": "要写入的文件夹。",
    "adapter import num_hidden_layers": "它的基座被裁到多少层（原脚本为 16）。",
    "adapter import without_missing": "声明了 modules_to_save 却缺少其权重时，仍然导入其余部分。",
    "adapter rebase adapter": "适配器文件夹。",
    "adapter rebase model": "同一基座的新位置，例如 cmqa convert 写出的文件夹。",
    "adapter rebase out": "要写入的文件夹。",
}


def settings_of(verb: str) -> dict[str, str]:
    """全名 -> 说明；带有本命令前缀的优先。"""
    own = {k.removeprefix(verb + " "): v for k, v in SETTINGS.items() if k.startswith(verb + " ")}
    return {k: v for k, v in SETTINGS.items() if " " not in k} | own
