"""English sentences, keyed by room.moment; zh.py holds the same keys."""

TEXT: dict[str, str] = {
    # cli
    "cli.about": "lora-cmqa: from medical question-and-answer files to a LoRA adapter that proves its gain.",
    "cli.common": "Every verb takes --json (one object on stdout), --lang en|zh and --help.",
    "cli.language": "Language: {language} (--lang, CMQA_LANG, or the locale).",
    "cli.demo": "The whole walk on the embedded sample and base, in a few minutes.",
    "cli.prepare": "Read, clean, split and account for every row.",
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
}
