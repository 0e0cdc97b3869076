"""Names, versions and aliases; what is refused at the door; what goes away comes back as bytes. Cases 24 to 34."""

import itertools
import json
import os
import struct
import threading

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lora_cmqa.engine.chat import Chat
from lora_cmqa.engine.sampling import SamplingParams
from lora_cmqa.errors import AdapterError, ConfigError
from lora_cmqa.serve.registry import Registry, UnknownModel, within
from lora_cmqa.serve.server import open_service

from .conftest import ASK, running, write_adapter

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture
def registry(adapters) -> Registry:
    return open_service(adapters, model="tiny", dtype="float32", device="cpu").registry


def reconfigure(folder, **changes):
    file = folder / CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def reweigh(folder, change):
    tensors = {k: v.copy() for k, v in load_file(folder / WEIGHTS).items()}
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def first(tensors, side):
    return next(k for k in sorted(tensors) if f"lora_{side}" in k)


# ---- 25 adapters that must not get in -------------------------------------------------------------------------------


def drop(side):
    return lambda f: reweigh(f, lambda t: t.pop(first(t, side)))


def fill(side, value):
    return lambda f: reweigh(f, lambda t: t[first(t, side)].fill(value))


def header(length, text=b""):
    return lambda f: (f / WEIGHTS).write_bytes(struct.pack("<Q", length) + text)


def cut(share):
    def change(f):
        data = (f / WEIGHTS).read_bytes()
        (f / WEIGHTS).write_bytes(data[: int(len(data) * share)])

    return change


def all_zero(f):
    reweigh(f, lambda t: [v.fill(0) for k, v in t.items() if "lora_B" in k])


def rename(f):
    reweigh(f, lambda t: t.__setitem__("base_model.model." + first(t, "A"), t.pop(first(t, "A"))))


def reshape(f):
    reweigh(f, lambda t: t.__setitem__(first(t, "A"), np.zeros((4, 3), np.float32)))


def link_weights(f):
    (f / WEIGHTS).rename(f.parent.parent / "elsewhere.safetensors")
    (f / WEIGHTS).symlink_to(f.parent.parent / "elsewhere.safetensors")


DUPLICATE = (
    b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
)
BAD = {
    "nan": fill("A", np.nan),
    "infinity": fill("B", np.inf),
    "overflow": fill("B", 3e38),
    "no_effect": all_zero,
    "missing_a": drop("A"),
    "missing_b": drop("B"),
    "wrong_prefix": rename,
    "wrong_shape": reshape,
    "integers": lambda f: reweigh(f, lambda t: t.__setitem__(first(t, "A"), np.zeros((4, 64), np.int32))),
    "rank_0": lambda f: reconfigure(f, r=0),
    "rank_1e6": lambda f: reconfigure(f, r=10**6),
    "rank_not_the_tensors": lambda f: reconfigure(f, r=8),
    "alpha_nan": lambda f: reconfigure(f, lora_alpha=float("nan")),
    "dora": lambda f: reconfigure(f, use_dora=True),
    "auto_mapping": lambda f: reconfigure(f, auto_mapping={"parent_library": "os"}),
    "modules_to_save": lambda f: reconfigure(f, modules_to_save=["lm_head"]),
    "unknown_key": lambda f: reconfigure(f, run_this="import os"),
    "other_targets": lambda f: reconfigure(f, target_modules=["c_attn"]),
    "config_not_json": lambda f: (f / CONFIG).write_text("{" * 5000),
    "config_a_list": lambda f: (f / CONFIG).write_text("[]"),
    "torn": cut(0.6),
    "empty": cut(0),
    "header_100mb": header(100 * 1024 * 1024, b"{" + b" " * 1000),
    "header_lies": header(2**63 - 1, b"{}"),
    "duplicate_keys": header(len(DUPLICATE), DUPLICATE + b"\0\0\0\0"),
    "code": lambda f: (f / "setup.py").write_text("raise SystemExit"),
    "pickle": lambda f: (f / "adapter_model.bin").write_bytes(b"\x80\x04."),
    "linked_weights": link_weights,
    "template_loops": lambda f: (f / "chat_template.jinja").write_text(
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    ),
    "template_raises": lambda f: (f / "chat_template.jinja").write_text("{{ ''.__class__.__mro__ }}"),
}


@pytest.fixture(scope="module")
def stage(made_adapters, tmp_path_factory):
    """A server beside whose good adapter the bad ones are put."""
    import shutil

    root = tmp_path_factory.mktemp("bad")
    shutil.copytree(made_adapters / "cardio", root / "good")
    with running(root) as server:
        yield server, root, server.text("good")


@pytest.mark.parametrize("kind", BAD)
def test_case_32_a_malformed_adapter_is_refused_and_others_do_not_notice(stage, made_adapters, kind, monkeypatch):
    import shutil

    from lora_cmqa.serve import registry as module

    monkeypatch.setattr(module, "_TEMPLATE_SECONDS", 0.2)
    server, root, good = stage
    BAD[kind](shutil.copytree(made_adapters / "derma", root / kind))
    refused = server.admin("adapters/load", name=kind)
    assert 400 <= refused.status_code < 500, refused.text
    assert refused.json()["error"]["message"]
    assert server.text("good") == good
    assert server.ask(kind).status_code == 404


def test_case_08_a_template_without_end_leaves_no_thread_behind():
    turns, ended = itertools.count(), []

    def endless():
        try:
            for _ in turns:
                pass
        finally:
            ended.append(True)

    with pytest.raises(TimeoutError):
        within(0.1, endless)
    assert ended == [True]
    assert within(5, lambda: "quick") == "quick"
    with pytest.raises(ZeroDivisionError):
        within(5, lambda: 1 / 0)


def test_case_32_a_bad_adapter_found_at_start_is_listed_with_its_reason(adapters):
    BAD["nan"](adapters / "derma")
    with running(adapters) as server:
        listed = {m["id"]: m for m in server.http.get("/v1/models").json()["data"]}
        assert "NaN" in listed["derma"]["refused"]
        assert server.ask("derma").status_code == 409
        assert server.ask("cardio").status_code == 200


def test_case_28_an_adapter_of_another_base_is_refused_unless_told(adapters):
    file = adapters / "derma" / "fingerprint.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"config": "0" * 64}))
    strict = open_service(adapters, model="tiny", dtype="float32", device="cpu").registry
    with pytest.raises(AdapterError, match=r"another base.*config\.json"):
        strict.open("derma")
    with running(adapters, allow_other_base=True) as server:
        listed = {m["id"]: m for m in server.http.get("/v1/models").json()["data"]}
        assert listed["derma"]["base_check"].startswith("overridden: config.json")
        assert listed["cardio"]["base_check"] == "fingerprint"


def test_a_base_is_cut_as_its_adapters_knew_it(tmp_path, capsys):
    """The seed's case, 16 of 32 layers: here 2 of the tiny model's 3."""
    for seed in range(2):
        write_adapter(tmp_path / f"cut-{seed}", seed, layers=2)
    with running(tmp_path) as server:
        assert "Keeping the first 2 of 3 layers" in capsys.readouterr().err
        for seed in range(2):
            alone = Chat(tmp_path / f"cut-{seed}", base="tiny", device="cpu", dtype="float32")
            said = alone.ask("睡不好怎么办", sampling=SamplingParams(max_new_tokens=6))
            assert server.text(f"cut-{seed}") == said


def test_two_depths_of_one_base_need_a_word(tmp_path):
    write_adapter(tmp_path / "cut", 0, layers=2)
    write_adapter(tmp_path / "whole", 1)
    few = {"model": "tiny", "dtype": "float32", "device": "cpu"}
    with pytest.raises(ConfigError, match=r"2 depths of one base \(cut: 2, whole: all layers\)"):
        open_service(tmp_path, **few)
    for asked, served, refused, said in (
        (2, "cut", "whole", "trained on all layers of its base; tiny is served with 2"),
        (3, "whole", "cut", "trained on 2 layers of its base; tiny is served with all"),
    ):
        registry = open_service(tmp_path, num_hidden_layers=asked, **few).registry
        assert registry.open(served)[1].base_check == "fingerprint"
        with pytest.raises(AdapterError, match=said):
            registry.open(refused)


def test_case_29_an_adapter_without_effect_is_refused(registry, adapters):
    folder = adapters / "derma"
    reweigh(folder, lambda t: [v.fill(1e-30) for k, v in t.items() if "lora_B" in k])  # not zero, and changes nothing
    with pytest.raises(AdapterError, match="no effect"):
        registry.load("derma")
    assert registry.open("cardio")[1].effect > 0


# ---- names ----------------------------------------------------------------------------------------------------------

OUTSIDE = [
    "../x",
    "/etc",
    "..",
    ".",
    "a/b",
    "a\\b",
    "a\0b",
    "%2e%2e%2fx",
    "~",
    "x" * 4096,
    "link",
    "",
    "C:\\x",
    "\udce4",
]


def test_case_10_a_name_never_leaves_the_registry(adapters, monkeypatch):
    secret = write_adapter(adapters.parent / "x", 9)
    (adapters / "link").symlink_to(secret)
    registry = open_service(adapters, model="tiny", dtype="float32", device="cpu").registry
    assert "link" not in registry.names()
    touched = []
    real_stat, real_open = os.stat, open

    def watched(function):
        def call(path, *args, **kwargs):
            touched.append(str(path))
            return function(path, *args, **kwargs)

        return call

    monkeypatch.setattr(os, "stat", watched(real_stat))
    monkeypatch.setattr("builtins.open", watched(real_open))
    for name in OUTSIDE:
        for act in (registry.open, registry.load, registry.unload, lambda n: registry.alias("alias", n)):
            with pytest.raises(UnknownModel):
                act(name)
        with pytest.raises(AdapterError):
            registry.alias(name, "cardio") if name != "link" else registry.open("link")
    root = str(adapters)
    assert [p for p in touched if not p.startswith(root) and "adapters" not in p and "site-packages" not in p] == []


def test_case_10_over_http_such_names_are_404_or_400(adapters):
    (adapters / "link").symlink_to(adapters / "cardio")
    with running(adapters) as server:
        for name in OUTSIDE[:-1]:
            assert server.ask(name).status_code in (400, 404)
            assert server.admin("adapters/load", name=name).status_code in (400, 404)


def test_case_24_unknown_names_leave_nothing_behind(registry):
    def sizes():
        return (
            len(registry._entries),
            len(registry._aliases),
            len(registry._folders),
            len(registry.engine.adapters._users),
        )

    before = sizes()
    for i in range(2000):
        with pytest.raises(UnknownModel):
            registry.open(f"random-{i}")
    assert sizes() == before


@pytest.mark.slow
def test_case_24_a_hundred_thousand_unknown_names_keep_memory_flat(made_adapters):
    with running(made_adapters) as server:
        registry, before = server.service.registry, 0
        for i in range(100_000):
            if i == 5_000:
                before = memory()
            with pytest.raises(UnknownModel):
                registry.open(f"random-{i}")
        assert memory() - before < 4 << 20
        assert server.ask("random-1").status_code == 404


def memory() -> int:
    """Resident bytes of this process."""
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


# ---- versions -------------------------------------------------------------------------------------------------------


def test_case_25_a_reload_under_the_same_name_answers_as_a_cold_run(adapters):
    long = [{"role": "user", "content": "睡不好怎么办" * 20}]  # longer than a chunk of the prefix cache
    with running(adapters) as server:
        old = server.text("cardio", messages=long)
        digest = server.ask("cardio").json()["adapter"]["digest"]
        write_adapter(adapters / "cardio", 77)
        assert server.text("cardio", messages=long) == old  # not before it is asked to load
        assert server.admin("adapters/load", name="cardio").json()["digest"] != digest
        new = server.text("cardio", messages=long)
        assert server.service.engine.prefixes.hits > 0
    with running(adapters) as cold:
        assert cold.text("cardio", messages=long) == new != old


def test_case_27_the_base_on_a_loaded_server_is_the_base_without_adapters(made_adapters):
    settings = {"logprobs": True, "top_logprobs": 5}
    with running(None) as bare:
        want = bare.ask("tiny", **settings).json()["choices"]
    with running(made_adapters) as server:
        for name in ("cardio", "derma"):
            server.text(name)
        got, threads = [], []
        for _ in range(3):  # among adapters' rows, too
            threads += [
                threading.Thread(target=server.text, args=(n,), kwargs={"max_tokens": 40}) for n in ("cardio", "derma")
            ]
            threads.append(
                threading.Thread(target=lambda: got.append(server.ask("tiny", **settings).json()["choices"]))
            )
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    assert got == [want] * 3


def swaps(made_adapters, count, streams, checked):
    """Streams of an alias while it is moved `count` times; every answer is compared with a cold run of its digest."""
    with running(made_adapters) as server:
        names = ["cardio", "derma", "儿科"]
        cold = {server.ask(n, max_tokens=24).json()["adapter"]["digest"]: server.text(n, max_tokens=24) for n in names}
        assert len(set(cold.values())) == 3
        server.admin("aliases", alias="prod", name="cardio")
        ended, seen, failed = threading.Event(), [], []

        def ask():
            while not ended.is_set():
                told = server.stream("prod", max_tokens=24)
                if "error" in told[-1]:
                    failed.append(told[-1])
                    continue
                text = "".join(e["choices"][0]["delta"].get("content") or "" for e in told)
                seen.append((told[0]["adapter"]["digest"], text, {e["adapter"]["digest"] for e in told}))

        threads = [threading.Thread(target=ask) for _ in range(streams)]
        for t in threads:
            t.start()
        moved = 0
        while moved < count or len(seen) < checked or len({s[0] for s in seen}) < 3:
            assert server.admin("aliases", alias="prod", name=names[moved % 3]).status_code == 200
            moved += 1
            threads[0].join(0.005)
        ended.set()
        for t in threads:
            t.join()
        assert failed == []
        assert [s for s in seen if s[1] != cold[s[0]] or s[2] != {s[0]}] == []
        return len(seen)


def test_case_33_an_alias_is_moved_under_running_streams(made_adapters):
    swaps(made_adapters, 40, 8, 16)


@pytest.mark.slow
def test_case_33_a_thousand_swaps_under_32_streams(made_adapters):
    assert swaps(made_adapters, 1000, 32, 200) >= 200


def test_case_34_unload_gives_its_bytes_back(adapters):
    with running(adapters) as server:
        engine = server.service.engine
        server.text("cardio")
        held = engine.adapters.nbytes
        gone = server.admin("adapters/unload", name="cardio").json()
        assert gone["freed_bytes"] > 0
        assert engine.adapters.nbytes < held
        assert server.ask("cardio").status_code == 404
        assert server.admin("adapters/load", name="cardio").status_code == 200
        assert server.ask("cardio").status_code == 200


def test_case_34_an_unloaded_adapter_ends_what_it_began(adapters):
    with running(adapters) as server:
        want = server.text("cardio", max_tokens=60)
        with server.http.stream(
            "POST", "/v1/chat/completions", json={"model": "cardio", **ASK, "max_tokens": 60, "stream": True}
        ) as response:
            lines = response.iter_lines()
            next(lines)
            unloaded = server.admin("adapters/unload", name="cardio").json()
            told = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        assert unloaded["freed_bytes"] == 0 or not unloaded["running"]
        assert "".join(e["choices"][0]["delta"].get("content") or "" for e in told) == want
        assert server.service.engine.adapters.users(told[-1]["adapter"]["digest"]) == 0


@pytest.mark.slow
def test_case_34_two_hundred_load_and_unload_cycles_keep_memory(adapters):
    with running(adapters) as server:
        for i in range(200):
            server.admin("adapters/load", name="cardio")
            server.text("cardio")
            server.admin("adapters/unload", name="cardio")
            if i == 20:
                before = memory()
        assert memory() <= 1.05 * before
        assert server.service.engine.prefixes.nbytes == 0


def test_aliases_follow_and_fall_with_their_adapter(registry):
    registry.alias("prod", "cardio")
    assert registry.open("prod") == registry.open("cardio")
    with pytest.raises(AdapterError, match="own name"):
        registry.alias("derma", "cardio")
    registry.unload("cardio")
    with pytest.raises(UnknownModel):
        registry.open("prod")
    with pytest.raises(UnknownModel):
        registry.unalias("prod")


def test_a_version_whose_files_changed_is_not_served_from_the_new_ones(registry, adapters):
    _, version = registry.open("cardio")
    registry.engine.forget(version.digest)
    registry._fresh = None
    write_adapter(adapters / "cardio", 55)
    with pytest.raises(AdapterError, match="have changed"):
        registry.low_rank(version.digest)
