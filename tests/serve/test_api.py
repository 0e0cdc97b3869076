"""OpenAI's routes as OpenAI's own client uses them, and what stands beside every answer."""

import json

import openai
import pytest

from lora_cmqa.evaluate.safety import red_flags
from lora_cmqa.serve.notice import emergency_notice, urgency

from .conftest import ASK, USER, running

QUESTION = ASK["messages"]


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=USER, max_retries=0) as one:
        yield one


def test_the_models_name_their_parent_digest_and_check(client):
    models = {m.id: m.model_dump() for m in client.models.list()}
    assert set(models) == {"tiny", "cardio", "derma", "儿科"}
    assert models["cardio"]["parent"] == "tiny"
    assert len(models["cardio"]["digest"]) == 64
    assert models["cardio"]["base_check"] == "fingerprint"
    assert models["cardio"]["adapter"]["r"] == 4


def test_a_chat_completion_streams_what_it_gives_at_once(client):
    settings = {"model": "cardio", "messages": QUESTION, "max_tokens": 12}
    whole = client.chat.completions.create(**settings)
    stream = client.chat.completions.create(**settings, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage
    assert whole.usage.completion_tokens == 12
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + 12
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == whole.choices[0].finish_reason == "length"


def test_a_text_completion_streams_what_it_gives_at_once(client):
    settings = {"model": "derma", "prompt": "头痛", "max_tokens": 9}
    whole = client.completions.create(**settings)
    pieces = [c.choices[0].text for c in client.completions.create(**settings, stream=True)]
    assert "".join(pieces) == whole.choices[0].text
    two = client.completions.create(**settings | {"prompt": ["头痛", "发烧"]})
    assert [c.index for c in two.choices] == [0, 1]
    assert two.choices[0].text == whole.choices[0].text


def test_n_answers_a_seed_and_their_logprobs(client):
    settings = {"model": "tiny", "messages": QUESTION, "max_tokens": 8, "temperature": 1.0, "n": 3, "seed": 7}
    one, other = (client.chat.completions.create(**settings, logprobs=True, top_logprobs=2) for _ in range(2))
    texts = [c.message.content for c in one.choices]
    assert texts == [c.message.content for c in other.choices]
    assert len(set(texts)) == 3
    first = one.choices[0].logprobs.content
    assert len(first) == 8
    assert len(first[0].top_logprobs) == 2
    assert all(x.logprob <= 0 for x in first)
    plain = client.completions.create(model="tiny", prompt="头", max_tokens=4, logprobs=2)
    assert len(plain.choices[0].logprobs.token_logprobs) == 4


def test_stop_strings_end_an_answer(client):
    settings = {"model": "tiny", "messages": QUESTION, "max_tokens": 20}
    text = client.chat.completions.create(**settings).choices[0].message.content
    ended = client.chat.completions.create(**settings, stop=[text[4:6]]).choices[0]
    assert ended.message.content == text[: text.index(text[4:6])]
    assert ended.finish_reason == "stop"


def test_an_unknown_model_is_404_with_the_near_one(client):
    with pytest.raises(openai.NotFoundError, match="cardio"):
        client.chat.completions.create(model="cardoi", messages=QUESTION)


def test_compare_answers_base_and_adapters_from_one_batch(server):
    models = ["tiny", "cardio", "derma"]
    body = {"models": models, **ASK}
    answer = server.http.post("/v1/compare", json=body).json()
    assert [a["content"] for a in answer["answers"]] == [server.text(m) for m in models]
    assert answer["answers"][0]["adapter"] == {"name": "base", "digest": None}
    with server.http.stream("POST", "/v1/compare", json={**body, "stream": True}) as response:
        told = [json.loads(line[6:]) for line in response.iter_lines() if line.startswith("data: {")]
    for i in range(3):
        assert "".join(e["delta"] for e in told if e.get("index") == i) == answer["answers"][i]["content"]


def test_metrics_count_by_adapter_and_digest(server):
    server.ask("cardio")
    text = server.http.get("/metrics").text
    digest = next(m for m in server.http.get("/v1/models").json()["data"] if m["id"] == "cardio")["digest"][:12]
    assert f'cmqa_completion_tokens_total{{adapter="cardio",digest="{digest}"}}' in text
    for name in ("time_to_first_token", "time_per_token", "requests_waiting", "errors"):
        assert f"cmqa_{name}" in text


# ---- beside every answer -------------------------------------------------------------------------------------------


def test_case_44_every_answer_says_that_a_machine_wrote_it(server):
    for path, body in (
        ("/v1/chat/completions", {"model": "cardio", **ASK}),
        ("/v1/completions", {"model": "cardio", "prompt": "头痛", "max_tokens": 3}),
        ("/v1/compare", {"models": ["cardio"], **ASK}),
    ):
        answer = server.http.post(path, json=body).json()
        assert answer["ai_generated"] is True
        assert "人工智能" in answer["notice"]
    assert all(e["ai_generated"] for e in server.stream("cardio") if "choices" in e)
    english = server.ask("cardio", messages=[{"role": "user", "content": "I sleep badly"}]).json()
    assert "no medical advice" in english["notice"]
    with running(None, notice="本院提示") as own:
        assert own.ask("tiny").json()["notice"] == "本院提示"


def test_case_44_doses_are_flagged_and_counted(server, monkeypatch):
    text_of = server.service.engine.tokenizer.decode
    monkeypatch.setattr(server.service.engine.tokenizer, "decode", lambda ids, **k: text_of(ids, **k) and "每次两片")
    assert server.ask("derma", max_tokens=1).json()["choices"][0]["flags"] == ["dosage"]
    monkeypatch.undo()
    assert 'cmqa_flagged_answers_total{adapter="derma"' in server.http.get("/metrics").text


def test_a_red_flag_gets_the_emergency_notice_in_its_language(server):
    for question, says in (("胸痛半小时了，怎么办？", "120"), ("I have chest pain", "112"), ("我想自杀", "12356")):
        answer = server.ask("tiny", messages=[{"role": "user", "content": question}]).json()
        assert says in answer["emergency_notice"]
        assert answer["choices"][0]["message"]["content"].startswith(answer["emergency_notice"])
        told = server.stream("tiny", messages=[{"role": "user", "content": question}])
        assert told[0]["choices"][0]["delta"]["content"].startswith(answer["emergency_notice"])
    assert server.ask("tiny").json()["emergency_notice"] is None


def test_the_patterns_know_the_red_flags_they_were_written_beside():
    """Not a measure of what they miss elsewhere: the set was at hand when they were written."""
    urgent = [r for r in red_flags() if r.must in ("emergency", "crisis")]
    assert [r.prompt for r in urgent if not urgency(r.prompt)] == []
    assert all(("crisis" if r.must == "crisis" else "emergency") == urgency(r.prompt) for r in urgent)
    assert emergency_notice("感冒了要不要吃药？") is None
