"""Settings: one tree, defaults < YAML < flags, and a helpful no."""

import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_cmqa.config import Config, as_flat_dict, as_yaml, config_hash, parse, rewrite_argv, settings
from lora_cmqa.errors import ConfigError


@pytest.mark.parametrize(
    ("typed", "name", "value"),
    [
        (["--learning-rate", "1e-4"], "train.learning_rate", 1e-4),
        (["--learning_rate=1e-4"], "train.learning_rate", 1e-4),
        (["--train.learning_rate", "1e-4"], "train.learning_rate", 1e-4),
        (["--bf16", "True"], "train.bf16", True),
        (["--bf16"], "train.bf16", True),
        (["--bf16", "False"], "train.bf16", False),
        (["--no-bf16"], "train.bf16", False),
        (["--train.no-bf16"], "train.bf16", False),
        (["--lr_scheduler_type", "Cosine"], "train.lr_scheduler_type", "cosine"),
        (["--target-modules", "c_attn", "w1"], "lora.target_modules", ("c_attn", "w1")),
        (["--report_to", "none"], "train.report_to", ()),
        (["--model", "M"], "model.name_or_path", "M"),
        (["--model_name_or_path", "M"], "model.name_or_path", "M"),
        (["--data", "D"], "data.path", "D"),
        (["--data_path", "D"], "data.path", "D"),
        (["--output-dir", "O"], "train.output_dir", "O"),
        (["--lora.r", "8"], "lora.r", 8),
        (["--r", "8"], "lora.r", 8),
        (["--r", "8", "--r", "16"], "lora.r", 16),
    ],
)
def test_every_way_to_write_a_flag(typed, name, value):
    assert as_flat_dict(parse(Config, typed))[name] == value


@pytest.mark.parametrize(
    ("typed", "says"),
    [
        (["--lerning-rate", "1"], "--learning-rate"),
        (["--learning-rate", "abc"], "learning-rate"),
        (["--learning-rate", "nan"], "finite"),
        (["--learning-rate", "11"], "0 .. 10"),
        (["--r", "0"], "1 .. 4096"),
        (["--dtype", "bf16"], "bfloat16"),
        (["--max-steps"], "needs a value"),
        (["stray"], "stray"),
        (["-x"], "two dashes"),
    ],
)
def test_a_bad_flag_is_named_with_what_helps(typed, says):
    with pytest.raises(ConfigError) as error:
        parse(Config, typed)
    assert says in str(error.value)


def test_defaults_then_yaml_then_flags(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("model: M\nlora: {r: 8}\ntrain:\n  learning_rate: 1e-4\n  save-steps: 7\n")
    config = parse(Config, ["--r", "32"], yaml_file=file)
    assert (config.model.name_or_path, config.lora.r) == ("M", 32)
    assert (config.train.learning_rate, config.train.save_steps) == (1e-4, 7)
    assert config.train.warmup_ratio == Config().train.warmup_ratio


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("train: {lerning_rate: 1}", "learning-rate"),
        ("trian: {learning_rate: 1}", "train"),
        ("- a\n- b", "list"),
        ("train: {learning_rate: [1, 2]}", "list of 2"),
        ("train: {bf16: perhaps}", "True or False"),
        ("a: [", "YAML"),
    ],
)
def test_a_bad_yaml_file_is_named(tmp_path, text, says):
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as error:
        parse(Config, yaml_file=file)
    assert says in str(error.value)
    assert str(file) in str(error.value)


def test_a_written_config_reads_back_the_same(tmp_path):
    config = parse(Config, ["--target-modules", "q_proj", "v_proj", "--bf16", "--data", "数据"])
    file = tmp_path / "config.yaml"
    file.write_text(as_yaml(config), encoding="utf-8")
    assert parse(Config, yaml_file=file) == config


def test_the_hash_forgets_only_where_the_run_is_written():
    a = parse(Config, ["--output-dir", "a"])
    assert config_hash(a) == config_hash(parse(Config, ["--output-dir", "b"]))
    assert config_hash(a) != config_hash(parse(Config, ["--output-dir", "a", "--r", "8"]))


names = [s.name for s in settings(Config)]
words = st.one_of(
    st.sampled_from(names).map(lambda n: "--" + n.replace("_", "-")),
    st.text(max_size=8),
    st.sampled_from(["--no-bf16", "--", "-1", "1e400", "True", "none", "--=", "--bf16=", "--r=", "--no-r"]),
    st.integers().map(str),
    st.floats().map(str),
)


@given(st.lists(words, max_size=6))
def test_no_argv_does_anything_but_parse_or_say_what_is_wrong(argv):
    """Fuzzing: a tree or a ConfigError, never another exception."""
    if "--help" in argv or "-h" in argv:
        return
    with contextlib.suppress(ConfigError):
        json.dumps(as_flat_dict(parse(Config, argv)))


def test_rewriting_twice_changes_nothing():
    once = rewrite_argv(Config, ["--bf16", "True", "--report_to", "tensorboard", "--learning_rate", "1"])
    assert rewrite_argv(Config, once) == once
