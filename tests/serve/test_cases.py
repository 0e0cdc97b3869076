"""What a stranger may send, and what must not happen then. Named after the cases of the project's reference list."""

import ast
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest

from lora_cmqa.cli import main
from lora_cmqa.errors import ConfigError
from lora_cmqa.serve.api import OPEN, create_app
from lora_cmqa.serve.keys import Keys
from lora_cmqa.serve.schema import ChatBody
from lora_cmqa.serve.service import Limits

from .conftest import ADMIN, ASK, USER, bearer, running

SERVE = Path(__file__).resolve().parents[2] / "src" / "lora_cmqa" / "serve"


def is_error(response, *statuses) -> bool:
    error = response.json()["error"]
    return response.status_code in statuses and set(error) == {"message", "type", "param", "code"}


# ---- who may ask -----------------------------------------------------------------------------------------------------


def test_case_12_every_route_but_health_and_the_page_needs_a_key(server):
    routes = {(m, r.path) for r in create_app(server.service).routes for m in r.methods - {"HEAD"}}
    assert len(routes) > 10
    assert {p for _, p in routes} >= {"/v1/models", "/metrics", "/openapi.json", "/admin/aliases"}
    with httpx.Client(base_url=server.url) as stranger:
        for method, path in [*routes, ("GET", "/docs"), ("GET", "/redoc"), ("POST", "/tokenize"), ("GET", "/info")]:
            for key in ({}, bearer("wrong-key-0123456789"), {"authorization": USER}):
                answer = stranger.request(method, path, headers=key)
                assert (answer.status_code == 200) if path in OPEN else is_error(answer, 401), (method, path)


def test_case_11_changing_what_is_served_needs_the_other_key_and_takes_no_path(server, adapters):
    for path, body in (("adapters/load", {"name": "cardio"}), ("aliases", {"alias": "x", "name": "cardio"})):
        assert is_error(server.http.post(f"/admin/{path}", json=body), 403)
        assert server.admin(path, **body).status_code == 200
    assert is_error(server.admin("adapters/load", name=str(adapters / "cardio")), 404)
    assert is_error(server.admin("adapters/load", name="cardio", lora_path="/etc"), 400)
    with running(adapters, keys=False) as open_server:  # without any key nobody is an admin
        assert is_error(open_server.http.post("/admin/adapters/load", json={"name": "cardio"}), 403)


def test_case_13_keys_are_compared_as_hashes_in_constant_time():
    tree = ast.parse((SERVE / "keys.py").read_text(encoding="utf-8"))
    scope = next(n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == "scope")
    assert [n for n in ast.walk(scope) if isinstance(n, ast.Compare)] == []
    assert "hmac.compare_digest(given, stored)" in ast.unparse(scope)
    assert not any(isinstance(n, (ast.Break, ast.Return)) for loop in scope.body for n in ast.walk(loop)
                   if isinstance(loop, ast.For))  # fmt: skip  # every stored key is looked at
    keys = Keys([("user", USER), ("admin", ADMIN)])
    assert [keys.scope(k) for k in (USER, ADMIN, USER + "x", "", None)] == ["user", "admin", None, None, None]
    assert USER not in repr(vars(keys))


@pytest.mark.parametrize(
    ("text", "says"),
    [("user short", "16"), ("root 0123456789abcdef", "line 1"), ("admin 0123456789abcdef", "nobody"), ("", "nobody")],
)
def test_case_13_a_keys_file_that_protects_nothing_is_refused(tmp_path, text, says):
    file = tmp_path / "keys.txt"
    file.write_text(text)
    with pytest.raises(ConfigError, match=says) as error:
        Keys.from_file(file)
    assert "0123456789abcdef" not in str(error.value)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org"])
def test_case_14_a_bind_beyond_loopback_without_a_key_is_exit_2(host, capsys):
    assert main(["serve", "--model", "tiny", "--host", host]) == 2
    assert "--api-keys" in capsys.readouterr().err


def test_case_14_no_other_origin_is_let_in(server, made_adapters):
    preflight = {"origin": "http://elsewhere.example", "access-control-request-method": "POST"}
    answer = server.http.options("/v1/chat/completions", headers=preflight)
    assert answer.status_code == 405
    assert not [h for h in answer.headers if h.startswith("access-control")]
    form = server.http.post("/v1/chat/completions", content=b"{}", headers={"content-type": "text/plain"})
    assert is_error(form, 415)  # what a page elsewhere could send without asking first
    with running(made_adapters, keys=False, hosts=["127.0.0.1"]) as local:
        assert local.ask("tiny").status_code == 200
        assert is_error(local.http.get("/v1/models", headers={"host": "rebound.example"}), 421)


# ---- what may be sent ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "field",
    [
        *({"chat_template": "{{ 1 }}"}, {"chat_template_kwargs": {"tokenize": True}}, {"add_generation_prompt": False}),
        *({"guided_regex": "("}, {"response_format": {"type": "json_object"}}, {"tools": []}, {"logit_bias": {"1": 5}}),
        *({"n_discard": -1}, {"use_beam_search": True}, {"frequency_penalty": 1}, {"lora_path": "/etc"}),
    ],
    ids=lambda f: next(iter(f)),
)
def test_case_08_templates_and_unknown_settings_are_refused(server, field):
    assert is_error(server.ask("tiny", **field), 400)


@pytest.mark.parametrize("field", ["prompt_embeds", "prompt_token_ids", "input_ids", "multi_modal_data"])
def test_case_18_no_tensor_and_no_token_comes_in(server, field):
    assert is_error(server.ask("tiny", **{field: [1, 2]}), 400)
    assert is_error(server.http.post("/v1/completions", json={"model": "tiny", "prompt": [[1, 2], [3]]}), 400)


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": "http://127.0.0.1:9/x"}},
        {"type": "image_url", "image_url": {"url": "file:///etc/passwd"}},
        {"type": "input_audio", "input_audio": {"data": "AA", "format": "wav"}},
        {"type": "text", "text": "x", "url": "/etc/passwd"},
    ],
)
def test_case_20_parts_that_are_no_text_are_refused_without_a_fetch(server, part, monkeypatch):
    with httpx.Client(base_url=server.url, headers=bearer(USER)) as client:
        client.get("/livez")
        connect = []
        monkeypatch.setattr(socket.socket, "connect", lambda *a: connect.append(a))
        body = {"model": "tiny", "messages": [{"role": "user", "content": [part]}]}
        assert is_error(client.post("/v1/chat/completions", json=body), 400)
        assert connect == []


def test_case_20_text_parts_are_text(server):
    parts = [{"type": "text", "text": "睡不好"}, {"type": "text", "text": "怎么办"}]
    assert server.text("tiny", messages=[{"role": "user", "content": parts}]) == server.text("tiny")


def test_case_15_a_megabyte_of_headers_is_refused_and_forgotten(server):
    before = resident()
    for _ in range(10):
        with socket.create_connection(server.url.removeprefix("http://").split(":"), timeout=10) as s:
            try:
                s.sendall(b"GET /livez HTTP/1.1\r\nhost: x\r\n" + b"x-bomb: " + b"a" * (1 << 20) + b"\r\n\r\n")
                answer = s.recv(100)
            except ConnectionError:  # closed while we still sent: refused as well
                answer = b"HTTP/1.1 400"
        assert answer[9:12] in (b"400", b"431")
    assert resident() - before < 20 << 20
    assert server.http.get("/livez").status_code == 200


def resident() -> int:
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


OVER = {
    "body": {"messages": [{"role": "user", "content": "头" * 300_000}]},
    "n": {"n": 10**9},
    "max_tokens": {"max_tokens": 10**9},
    "turns": {"messages": [{"role": "user", "content": "a"}] * 1000},
    "stops": {"stop": ["x"] * 1000},
}


@pytest.mark.parametrize("kind", OVER)
def test_case_16_too_much_is_refused_before_the_tokenizer_sees_it(server, kind, monkeypatch):
    def never(*_, **__):
        raise AssertionError("the tokenizer was asked")

    if kind in ("body", "turns", "stops"):
        monkeypatch.setattr(type(server.service.template), "encode_prompt", never)
    assert is_error(server.ask("tiny", **OVER[kind]), 400, 413)


def test_case_16_a_long_prompt_is_counted_and_refused(made_adapters):
    with running(made_adapters, limits=Limits(prompt_tokens=50, new_tokens=20, answers=2)) as server:
        long = server.ask("tiny", messages=[{"role": "user", "content": "头" * 60}])
        assert is_error(long, 400)
        assert "at most 50" in long.json()["error"]["message"]
        assert is_error(server.ask("tiny", n=3), 400)
        assert is_error(server.http.post("/v1/compare", json={"models": ["tiny"] * 3, **ASK}), 400)


def test_case_16_a_full_queue_is_429_and_a_slow_answer_504(made_adapters):
    limits = Limits(waiting=0, seconds=0.5)
    with running(None, limits=limits, max_batch=1) as server:
        slow = threading.Thread(target=lambda: codes.append(server.ask("tiny", max_tokens=2000).status_code))
        codes = []
        slow.start()
        while not server.service.engine.load[0]:
            time.sleep(0.005)
        full = server.ask("tiny")
        assert is_error(full, 429)
        assert full.headers["retry-after"]
        slow.join()
        assert codes == [504]
        told = server.stream("tiny", max_tokens=2000)
        assert told[-1]["error"]["code"] == "timeout"
        assert server.text("tiny")


@pytest.mark.slow
def test_case_16_health_answers_while_a_hundred_attack(made_adapters):
    """Refusals and health stay quick. The bound is wide: the attackers share this process's one interpreter."""
    with running(made_adapters, limits=Limits(waiting=8)) as server:
        seen, ended = [], threading.Event()

        def attack(i):
            kind = list(OVER)[i % len(OVER)]
            with httpx.Client(base_url=server.url, headers=bearer(USER), timeout=None) as client:
                while not ended.is_set():
                    answer = client.post("/v1/chat/completions", json={"model": "tiny", **ASK, **OVER[kind]})
                    seen.append(answer.status_code)

        threads = [threading.Thread(target=attack, args=(i,)) for i in range(100)]
        for t in threads:
            t.start()
        probe = subprocess.run([sys.executable, "-c", PROBE, server.url], capture_output=True, text=True, timeout=300)
        ended.set()
        for t in threads:
            t.join()
        assert probe.returncode == 0, probe.stderr
        assert sorted(json.loads(probe.stdout))[48] < 5.0
        assert set(seen) <= {400, 413}
        assert len(seen) >= 100


PROBE = """
import json, sys, time, httpx
client, times = httpx.Client(base_url=sys.argv[1], timeout=60), []
for _ in range(50):
    began = time.perf_counter()
    assert client.get("/livez").status_code == 200
    times.append(time.perf_counter() - began)
    time.sleep(0.02)
print(json.dumps(times))
"""


def fuzzed(seed: int) -> bytes:
    """A body that is nearly right, or not at all."""
    draw = random.Random(seed)
    odd = [
        None,
        True,
        -1,
        0,
        1e308,
        2**70,
        "",
        "x" * 3000,
        [],
        {},
        [[]],
        {"a": {}},
        "\ud83d",
        "\x00",
        float("nan"),
        [None],
    ]
    body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
    for _ in range(draw.randint(1, 3)):
        key = draw.choice([*ChatBody.model_fields, "extra"])
        body[key] = draw.choice(odd)
    if draw.random() < 0.3:
        body["messages"] = [draw.choice(odd), {"role": draw.choice(odd), "content": draw.choice(odd)}]
    raw = json.dumps(body).encode()
    kind = draw.randint(0, 5)
    if kind == 0:
        raw = raw[: draw.randint(0, len(raw))]
    elif kind == 1:
        raw = bytes(draw.randrange(256) for _ in range(draw.randint(0, 60)))
    elif kind == 2:
        raw = draw.choice([b"[" * 50_000, b'{"a":' * 20_000, b"9" * 10_000, b"null", b"[]", b'"x"', b"\xff\xfe", b""])
    return raw


def test_case_17_two_hundred_malformed_bodies_give_no_500_and_no_exit(server):
    seen = {}
    for seed in range(200):
        path = ("/v1/chat/completions", "/v1/completions", "/v1/compare")[seed % 3]
        answer = server.http.post(path, content=fuzzed(seed), headers={"content-type": "application/json"})
        assert answer.status_code < 500, (seed, answer.text)
        assert answer.status_code == 200 or is_error(answer, 400, 404), (seed, answer.text)
        seen[answer.status_code] = seen.get(answer.status_code, 0) + 1
    assert seen[400] > 100
    assert server.service.worker.alive
    assert server.text("tiny")


# ---- what must not come out ------------------------------------------------------------------------------------------

PATIENT = "张三丰患有罕见病XYZZY"


def test_case_22_no_key_and_no_patients_text_in_logs_metrics_or_errors(server, capfd, monkeypatch):
    body = {"model": "cardio", "messages": [{"role": "user", "content": PATIENT}], "max_tokens": 2}
    said = [server.http.post("/v1/chat/completions", json=body).json()["notice"]]
    for wrong in ({"temperature": PATIENT}, {PATIENT: 1}, {"messages": PATIENT}, {"stop": [PATIENT, 1]}):
        said.append(server.http.post("/v1/chat/completions", json=body | wrong).text)

    def broken(*_):
        raise RuntimeError(f"cannot encode {PATIENT}")

    monkeypatch.setattr(server.service, "chat", broken)
    crashed = server.http.post("/v1/chat/completions", json=body)
    assert is_error(crashed, 500)
    monkeypatch.undo()
    monkeypatch.setattr(server.service.engine.forward, "prefill", broken)
    crashed_inside = server.http.post("/v1/chat/completions", json=body)
    assert is_error(crashed_inside, 500)
    monkeypatch.undo()
    said += [crashed.text, crashed_inside.text, server.http.get("/metrics").text, server.http.get("/v1/models").text]
    out, err = capfd.readouterr()
    assert '"status": 500' in err
    for text in (*said, out, err):
        for secret in (PATIENT, "XYZZY", USER, ADMIN):
            assert secret not in text
    assert server.text("cardio")


def test_case_23_no_gradio_and_a_page_that_runs_only_its_own_script(server):
    for file in SERVE.rglob("*.py"):
        assert "gradio" not in file.read_text(encoding="utf-8").lower()
    page = httpx.get(server.url)
    assert page.status_code == 200
    policy = page.headers["content-security-policy"]
    assert "script-src 'self';" in policy
    assert "default-src 'none'" in policy
    assert "style-src 'self' 'unsafe-inline'" in policy
    assert page.headers["x-content-type-options"] == "nosniff"


def test_case_47_no_request_makes_the_server_fetch_anything(server, monkeypatch):
    from lora_cmqa import hub

    def never(*_, **__):
        raise AssertionError("something was fetched")

    monkeypatch.setattr(hub, "fetch", never)
    monkeypatch.setattr(hub, "_fetch", never)
    for name in ("Qwen/Qwen3-0.6B", "hf:someone/adapter", "s3://bucket/adapter", "https://example.org/a", "local:/etc"):
        assert is_error(server.ask(name), 404)
        assert is_error(server.admin("adapters/load", name=name), 404)
        assert is_error(server.admin("aliases", alias="mine", name=name), 404)


def test_case_47_an_adapter_that_names_a_distant_base_fetches_nothing(adapters, capsys):
    file = adapters / "cardio" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": "evil/base"}))
    for name in ("derma", "儿科"):
        (adapters / name / "adapter_config.json").unlink()
    assert main(["serve", "--adapters", str(adapters)]) == 2
    assert "not on this machine" in capsys.readouterr().err


# ---- leaving ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [30, pytest.param(500, marks=pytest.mark.slow)])
def test_case_36_clients_that_vanish_leave_nothing(made_adapters, count):
    with running(made_adapters, max_batch=4) as server:
        server.text("cardio")
        for i in range(count):
            body = {"model": "cardio", **ASK, "max_tokens": 1500, "stream": i % 2 == 0}
            raw = json.dumps(body).encode()
            with socket.create_connection(server.url.removeprefix("http://").split(":"), timeout=10) as s:
                s.sendall(
                    b"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
                    + f"authorization: Bearer {USER}\r\ncontent-length: {len(raw)}\r\n\r\n".encode()
                    + raw
                )
                if i % 3 == 0:
                    time.sleep(0.02)
        deadline = time.monotonic() + 20
        engine = server.service.engine
        # All at once: a connection that is only now accepted is served for a moment.
        while len(engine._free_slots) < 4 or server.service.open_responses or engine.adapters._users:
            assert time.monotonic() < deadline, (engine.load, engine.adapters._users)
            time.sleep(0.02)
        assert sorted(engine._free_slots) == [0, 1, 2, 3]
        assert server.text("cardio")


@pytest.fixture
def process(made_adapters):
    """`cmqa serve` as a person starts it: (process, url)."""
    started = []

    def start(*flags):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        words = [
            "serve",
            "--model",
            "tiny",
            "--dtype",
            "float32",
            "--adapters",
            str(made_adapters),
            "--port",
            str(port),
        ]
        p = subprocess.Popen(
            [sys.executable, "-m", "lora_cmqa.cli", *words, *flags], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        started.append(p)
        url = f"http://127.0.0.1:{port}"
        for _ in range(600):
            try:
                if httpx.get(f"{url}/readyz").status_code == 200:
                    return p, url
            except httpx.TransportError:
                assert p.poll() is None, p.stderr.read()
                time.sleep(0.1)
        raise AssertionError("it did not start")

    yield start
    for p in started:
        p.kill()
        p.wait()


@pytest.mark.slow
def test_case_35_sigterm_finishes_what_runs_and_exits_0(process):
    p, url = process()
    body = {"model": "cardio", **ASK, "max_tokens": 400, "stream": True}
    with (
        httpx.Client(base_url=url, timeout=60) as client,
        client.stream("POST", "/v1/chat/completions", json=body) as r,
    ):
        lines = r.iter_lines()
        next(lines)
        p.send_signal(signal.SIGTERM)
        time.sleep(0.05)
        assert httpx.get(f"{url}/readyz").status_code == 503
        assert is_error(httpx.post(f"{url}/v1/chat/completions", json={"model": "tiny", **ASK}), 503)
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]"
    assert len(rest) > 50
    assert p.wait(20) == 0


@pytest.mark.slow
def test_case_35_what_takes_too_long_is_told_before_the_end(process):
    p, url = process("--drain-seconds", "0")  # the whole answer takes about a second
    body = {"model": "cardio", **ASK, "max_tokens": 2000, "stream": True}
    with (
        httpx.Client(base_url=url, timeout=60) as client,
        client.stream("POST", "/v1/chat/completions", json=body) as r,
    ):
        lines = r.iter_lines()
        next(lines)
        p.send_signal(signal.SIGTERM)
        rest = [line for line in lines if line]
    assert json.loads(rest[-1].removeprefix("data: "))["error"]["code"] == "stopping"
    assert p.wait(20) == 0
