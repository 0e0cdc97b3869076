"""The command line: quick, quiet about itself, helpful when wrong."""

import json
import subprocess
import sys
import time

import pytest

import lora_cmqa
from lora_cmqa.cli import VERBS, main
from lora_cmqa.config import settings
from lora_cmqa.messages import en, zh
from lora_cmqa.messages.zh_settings import settings_of

FRONT_DOOR = {
    *("Chat", "CmqaError", "Config", "compare", "convert", "evaluate", "import_adapter", "inject_lora"),
    *(
        "load_adapter",
        "load_model",
        "merge",
        "plan",
        "prepare",
        "read_examples",
        "save_adapter",
        "serve",
        "train",
        "train_steps",
    ),
}


def test_the_front_door_is_what_was_promised():
    assert set(lora_cmqa.__all__) == FRONT_DOOR
    for name in FRONT_DOOR:
        assert callable(getattr(lora_cmqa, name))


def test_a_room_does_not_hide_the_function_of_its_name():
    import lora_cmqa.evaluate.bootstrap
    import lora_cmqa.train.optim

    assert lora_cmqa.train.__name__ == "train"
    assert lora_cmqa.evaluate.__name__ == "evaluate"
    assert not isinstance(lora_cmqa.train, type(sys))


@pytest.mark.parametrize("verb", VERBS)
def test_every_setting_is_explained_in_chinese_too(verb):
    explained = settings_of(verb)
    assert [s.name for s in settings(VERBS[verb].args) if not explained.get(s.name)] == []


def test_help_speaks_chinese(capsys):
    with pytest.raises(SystemExit):
        main(["--lang", "zh", "train", "--help"])
    assert "学习率的峰值" in capsys.readouterr().out


@pytest.mark.parametrize("code", ["import lora_cmqa", "from lora_cmqa.cli import main; main(['--help'])"])
def test_starts_without_torch_in_under_a_second(code):
    started = time.perf_counter()
    script = f"{code}; import sys; assert 'torch' not in sys.modules, 'torch was imported'"
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
    assert time.perf_counter() - started < 1


@pytest.mark.parametrize(
    ("argv", "code", "says"),
    [
        (["trian"], 2, "cmqa train"),
        (["train", "--lerning-rate", "1"], 2, "--learning-rate"),
        (["train", "no-such.yaml"], 2, "no-such.yaml"),
        (["merge"], 2, "RUN is missing"),
        (["--lang", "fr", "train"], 2, "--lang en"),
        (["adapter", "imprt"], 2, "adapter import"),
        (["adapter", "import", "OLD", "--out", "NEW"], 2, "--model is missing"),
        (["adapter", "rebase", "OLD", "--base", "B", "--out", "NEW"], 2, "unknown setting --base"),
        (["compare", "somewhere"], 2, "no question"),
    ],
)
def test_bad_input_is_one_message_and_an_exit_code(argv, code, says, capsys):
    assert main(argv) == code
    err = capsys.readouterr().err
    assert says in err
    assert "Traceback" not in err


def test_json_errors_are_one_object_on_stdout(capsys):
    assert main(["merge", "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["error"] == "ConfigError"


def test_both_languages_say_the_same_things():
    assert en.TEXT.keys() == zh.TEXT.keys()
    for key, text in en.TEXT.items():
        assert _fields(text) == _fields(zh.TEXT[key]), key


def _fields(text):
    import string

    return sorted({name for _, name, _, _ in string.Formatter().parse(text) if name})


def test_help_follows_the_language(capsys):
    for verb in VERBS:
        assert "cli." + verb.replace(" ", "_") in en.TEXT
    main(["--lang", "zh", "--help"])
    assert "适配器" in capsys.readouterr().out
    main(["--lang", "en", "--help"])
    assert "适配器" not in capsys.readouterr().out
