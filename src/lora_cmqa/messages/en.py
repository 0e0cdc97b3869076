"""English sentences, keyed by room.moment; zh.py holds the same keys."""

TEXT: dict[str, str] = {
    # cli
    "cli.about": "lora-cmqa: from medical question-and-answer files to a LoRA adapter that proves its gain.",
    "cli.common": "Every verb takes --json (one object on stdout), --lang en|zh and --help.",
    "cli.language": "Language: {language} (--lang, CMQA_LANG, or the locale).",
    "cli.demo": "The whole walk on the embedded sample and base, in a few minutes.",
    "cli.prepare": "Read, clean, split and account for every row.",
    "cli.plan": "Every GiB of a run, whether it fits, and what to change.",
    "cli.train": "Train a LoRA adapter; run again to resume.",
    "cli.eval": "Base against adapter on held-out rows, with intervals.",
    "cli.chat": "Talk to the adapter; /base and /reset inside.",
    "cli.compare": "Base and adapter side by side on your question.",
    "cli.merge": "Adapter into the base's weights, with a certificate.",
    "cli.convert": "A Qwen v1 checkpoint into a native one.",
    "cli.adapter_import": "An adapter of the Qwen v1 time into today's layout.",
    "cli.adapter_rebase": "The same adapter, named for the base's new place.",
    "cli.trained": "The adapter is in {run}.",
    # chat
    "chat.base": "base",
    "chat.adapter": "adapter",
    "chat.silence": "(no answer: the end token came first)",
    "chat.welcome": "{run} on {base}. /base and /adapter switch, /reset forgets, /exit leaves. No medical advice.",
    "chat.forgotten": "The conversation is forgotten.",
    "chat.base_answers": "The base answers now; /adapter switches back.",
    "chat.adapter_answers": "The adapter answers now.",
    "chat.no_adapter": "There is no adapter here, only a base.",
    "chat.unknown_command": "{command} is not one of /base /adapter /reset /exit.",
    # models
    "models.layers_dropped": (
        "Keeping the first {kept} of {layers} layers: {dropped} of {total} million parameters are left out. What is "
        "left is a damaged model, for it was trained with all of them (docs/qwen-v1.md: what such a cut costs); an "
        "adapter of it fits only a base cut in the same way."
    ),
    # decoder
    "decoder.unknown_model": "{model} is no class that the fast path knows",
    "decoder.other_part": "{part} is {kind}, which the fast path does not know",
    "decoder.merged": "{part}: an adapter is merged into the weight",
    "decoder.lora_variant": "{part}: {kind} is not plain LoRA",
    "decoder.long_rows": "rows of {tokens} tokens: in evaluation Qwen v1 scales what lies beyond {most}",
    # train
    "train.plain_path": "The plain path trains this, slower, with the same result: {reason}.",
    "train.progress": "loss {loss}  {speed} tokens/s  {left} left  {memory} GiB",
    "train.evaluated": "step {step}: dev loss {loss}",
    "train.evaluated_best": "step {step}: dev loss {loss}, the best so far",
    "train.rows": "{name}: {kept} rows, {tokens} tokens, longest {longest}.",
    "train.dropped": "{name}: {dropped} of {read} rows left out "
    "({too_long} longer than {max_length} tokens, {no_supervised} without an answer).",
    "train.shortened": "{name}: {shortened} answers shortened at a sentence end to fit {max_length} tokens.",
    "train.model": "{base} in {dtype} on {device} ({threads} CPU threads); "
    "{trained} weights are trained beside its {total}.",
    "train.saved_modules": "modules_to_save {modules}: {parameters} more weights are trained, "
    "about {gib} GiB with gradients and optimizer states.",
    "train.resumed": "Resumed from {checkpoint}.",
    "train.passed_over": "Passed over a checkpoint: {reason}",
    "train.already_done": "{run} is complete already; nothing was changed.",
    "train.bad_batch": "step {step}: loss or gradient is not finite; nothing was changed, the rows are in {file}.",
    "train.loss_spike": "step {step}: loss {loss} where {usual} was usual. The step was applied.",
    "train.recut": "step {step}: out of memory; its rows and all later ones are cut into "
    "micro-batches of at most {max_tokens} tokens. No gradient changes.",
    "train.done": "{steps} steps in {minutes} min. Adapter: {which}.",
    "train.which_best": "step {step}, best dev loss {dev_loss}",
    "train.which_last": "the last step (no dev set)",
    "train.accepted": "--{flag} is accepted and has no effect here: {why}.",
    # data
    "data.report": "{source}: what was read, repaired, rejected",
    "data.questions": "questions",
    "data.answers": "answers",
    "data.lengths": "Length in characters",
    "data.rules": "Rules and the rows they touched",
    "data.before": "before",
    "data.after": "after",
    "data.summary": "{read} rows read, {kept} kept ({repaired} of them repaired), {rejected} rejected.",
    "data.splits": "train {train}, dev {dev}, test {test} rows.",
    "data.rule": "  {name}: {rows} rows",
    "data.flag": "  {name}: {rows} rows to look at; their ids are in report.json.",
    "data.leak": "{pair}: {questions} of {of_questions} questions and {answers} of {of_answers} answers "
    "have a near-duplicate.",
    # plan
    "plan.title": "{model}, {recipe}: the fullest moment is {phase}",
    "plan.row": "what",
    "plan.sum": "peak",
    "plan.fits": "It fits: {peak} of {memory} GiB ({device}).",
    "plan.fits_not": "It does not fit: {peak} GiB are needed, {memory} GiB are there ({device}).",
    "plan.changed": "As asked it would take {asked} GiB; the fastest that fits, with the same gradients: {changes}",
    "plan.switch": "  {flag}: frees {frees} GiB, time {time} %, fits: {fits}",
    "plan.switch_changes": "  {flag}: frees {frees} GiB, time {time} %, fits: {fits} (trains something else)",
    "plan.yes": "yes",
    "plan.no": "no",
    "plan.phase": "  {name}: {gib} GiB ({where})",
    "plan.host": "host",
    "plan.device": "device",
    "plan.epoch": "An epoch: {rows} rows, about {tokens} tokens (from characters), {flops} operations.",
    "plan.epoch_time": "About {minutes} min on {device}, if it reaches {mfu} of its peak (an assumption).",
    "plan.why_embeddings": 'The path {name} lacks "chat", so Qwen\'s finetune.py trains wte and lm_head whole, '
    "{millions} million parameters with their gradients, moments and temporaries, {now} in all; {memory} are there. "
    "Cutting the model to {half} layers gives {half_bytes}. Without wte and lm_head all layers take {without}, "
    "and here the same job takes {ours}: no layer has to go.",
    "plan.why_lora_only": 'The path {name} holds the word "chat", so Qwen\'s finetune.py trains LoRA alone: {now}; '
    "{memory} are there. Here the same job takes {ours}.",
    # eval
    "eval.title": "{run} against its base {base}",
    "eval.metric": "metric",
    "eval.base": "base",
    "eval.adapter": "adapter",
    "eval.difference": "difference",
    "eval.interval": "95 % interval",
    "eval.p": "p",
    "eval.says": "says",
    "eval.question": "question",
    "eval.nll": "loss per answer token",
    "eval.nll_shuffled": "loss on shuffled answers (style)",
    "eval.content_gain": "content gain",
    "eval.repetition": "repetition rate",
    "eval.length": "answer length (characters)",
    "eval.ended": "answers that end by themselves",
    "eval.not_shown": "no difference shown",
    "eval.better": "better",
    "eval.worse": "worse",
    "eval.more": "more",
    "eval.less": "less",
    "eval.verdict": "Verdict: {verdict} ({rows} held-out rows).",
    "eval.verdict_better": "better",
    "eval.verdict_style_only": "style only",
    "eval.verdict_worse": "worse",
    "eval.verdict_no_difference_shown": "no difference shown",
    "eval.explained": "Difference = adapter - base, paired on the same rows; intervals by bootstrap over questions. "
    "Content gain = how much more the adapter prefers a question's own answer to another's than the base does.",
    # demo
    "demo.prepare": "Sample rows (written for this project, no medical advice) -> {data}",
    "demo.train": "Train a LoRA adapter on {base}",
    "demo.evaluate": "Base and adapter on the held-out rows",
    "demo.compare": "Three questions, answered by both",
    "demo.done": "{minutes} min in all. Run folder: {run}  Report: {page}\nNext: cmqa chat {run}",
}
