"""Settings: one tree, defaults < YAML < flags, and a helpful no."""

import contextlib
import difflib
import json
import math
import re
import tempfile
from pathlib import Path

import pytest
import yaml
from hypothesis import assume, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from lora_cmqa.config import (
    _RANGES,
    Config,
    DataConfig,
    TrainConfig,
    _names,
    as_flat_dict,
    as_yaml,
    config_hash,
    parse,
    rewrite_argv,
    settings,
)
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


# ---- fuzzing: unknown keys, wrong types, out of range, in flags and in YAML ----------------------------------------

every = list(settings(Config))
fuzzed = hypothesis_settings(max_examples=50, deadline=None)


def refused(argv=(), yaml=None) -> str:
    """What a ConfigError says; nothing else may come out of settings that are wrong."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "c.yaml"
        file.write_text(yaml or "", encoding="utf-8")
        with pytest.raises(ConfigError) as error:
            parse(Config, argv, yaml_file=file)
    return str(error.value)


@st.composite
def misspelt(draw):
    """A setting and its name with one letter too many, too few, wrong, or two of them swapped; lora.r has too few."""
    setting = draw(st.sampled_from([s for s in every if len(s.name.rsplit(".", 1)[1]) > 1]))
    name = setting.name.rsplit(".", 1)[1]
    at = draw(st.integers(0, len(name) - 2))
    letter = draw(st.sampled_from("abexz"))
    how = draw(st.integers(0, 3))
    wrong = (
        name[:at] + letter + name[at:],
        name[:at] + name[at + 1 :],
        name[:at] + letter + name[at + 1 :],
        name[:at] + name[at + 1] + name[at] + name[at + 2 :],
    )[how]
    assume(wrong.replace("_", "-").lower() not in _names(Config) and not wrong.startswith("no_"))
    return setting, name, wrong


@fuzzed
@given(misspelt())
def test_an_unknown_key_is_named_with_the_nearest_one(case):
    setting, name, wrong = case
    room = setting.name.partition(".")[0]
    shown = wrong.replace("_", "-")
    for said, typed in (
        (refused([f"--{shown}", "1"]), shown),
        (refused(yaml=f"{room}:\n  {wrong}: 1\n"), f"{room}.{shown}"),
    ):
        assert f"unknown setting --{typed}" in said
        suggested = re.search(r"Did you mean --(\S+)\?", said)[1]
        assert near(typed, suggested) >= near(typed, name.replace("_", "-"))  # that one, or one that is nearer still


def near(a: str, b: str) -> float:
    return difflib.SequenceMatcher(None, b, a).ratio()


@pytest.mark.parametrize("setting", [s for s in every if s.is_bool or s.choices or s.kind in (int, float)], ids=str)
def test_a_wrong_type_is_named(setting):
    shown, (room, _, name) = setting.name.replace("_", "-"), setting.name.partition(".")
    assert shown in refused([f"--{shown}=perhaps"])
    for value in ("perhaps", "[1, 2]"):
        said = refused(yaml=f"{room}: {{{name}: {value}}}")
        assert shown in said or setting.name in said
    if setting.kind is int:
        assert shown in refused([f"--{shown}", "1.5"])


def test_every_number_has_a_range():
    assert {s.name for s in every if s.kind in (int, float)} == _RANGES.keys()


@pytest.mark.parametrize(("name", "ends"), _RANGES.items(), ids=str)
def test_out_of_range_is_named(name, ends):
    low, high = ends
    kind = next(s.kind for s in every if s.name == name)
    beyond = [low - 1] if math.isinf(high) else [low - 1, high + 1]
    for value in beyond:
        said = refused([f"--{name}={kind(value)}"])
        assert f"--{name.replace('_', '-')} is {kind(value)}" in said
        assert f"{low:g} .. {high:g}" in said
    if kind is float:
        for value in (".nan", ".inf"):
            assert "finite" in refused(yaml=f"{name.partition('.')[0]}: {{{name.partition('.')[2]}: {value}}}")


leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6) | st.dates()
keys = st.sampled_from([*names, *(n.partition(".")[2] for n in names), "model", "data", "lora", "train"]) | st.text()
trees = st.recursive(leaves, lambda t: st.lists(t, max_size=3) | st.dictionaries(keys, t, max_size=3), max_leaves=8)


@fuzzed
@given(st.dictionaries(keys, trees, min_size=1, max_size=4))
def test_no_yaml_does_anything_but_parse_or_say_what_is_wrong(content):
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(ConfigError):
        file = Path(folder) / "c.yaml"
        file.write_text(yaml.safe_dump(content, allow_unicode=True), encoding="utf-8", errors="ignore")
        json.dumps(as_flat_dict(parse(Config, yaml_file=file)))


texts = st.text(st.characters(exclude_categories=("Cs", "Cc")), max_size=12).filter(lambda t: t != "None")


@fuzzed
@given(texts | texts.map(lambda t: "-" + t), st.floats(0, 10), st.integers(0, 2**63 - 1), st.booleans())
def test_any_text_and_number_is_read_back_from_a_written_config(text, rate, seed, flag):
    """config.yaml is what a resume compares with; a text that begins with a dash is no flag there."""
    config = Config(
        data=DataConfig(system=text, path=text),
        train=TrainConfig(learning_rate=rate, seed=seed, bf16=flag),
    )
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.yaml"
        file.write_text(as_yaml(config), encoding="utf-8")
        assert parse(Config, yaml_file=file) == config


def test_rewriting_twice_changes_nothing():
    once = rewrite_argv(Config, ["--bf16", "True", "--report_to", "tensorboard", "--learning_rate", "1"])
    assert rewrite_argv(Config, once) == once
