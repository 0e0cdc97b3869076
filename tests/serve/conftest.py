"""A folder of tiny adapters, and a server on them in a thread of the test's own process, on a free loopback port."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from pathlib import Path

import httpx
import pytest
import torch
import uvicorn

from lora_cmqa.lora.adapter import save_adapter
from lora_cmqa.lora.fingerprint import write_fingerprint
from lora_cmqa.lora.inject import inject_lora, remove_lora
from lora_cmqa.models.load import load_model
from lora_cmqa.serve.api import create_app
from lora_cmqa.serve.keys import Keys
from lora_cmqa.serve.server import _Server, open_service
from lora_cmqa.serve.service import Limits

USER, ADMIN = "user-key-0123456789", "admin-key-0123456789"
ASK = {"messages": [{"role": "user", "content": "睡不好怎么办"}], "max_tokens": 6}


def write_adapter(folder: Path, seed: int, *, r: int = 4, fingerprint: bool = True, layers: int | None = None) -> Path:
    """A random adapter of the tiny model, or of its first `layers`; one seed, one content."""
    model = inject_lora(load_model("tiny", num_hidden_layers=layers)[0], r=r, lora_alpha=r)
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if "lora_" in name:
            weight.data.copy_(torch.randn(weight.shape, generator=generator) * 0.3)
    save_adapter(model, folder, base_model_name_or_path="tiny")
    remove_lora(model)
    if fingerprint:
        write_fingerprint(folder, "tiny", num_hidden_layers=layers)
    return folder


@pytest.fixture(scope="session")
def made_adapters(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("adapters")
    for i, name in enumerate(("cardio", "derma", "儿科")):
        write_adapter(root / name, i)
    return root


@pytest.fixture
def adapters(made_adapters, tmp_path) -> Path:
    """A copy to change."""
    import shutil

    return Path(shutil.copytree(made_adapters, tmp_path / "adapters"))


class Running:
    """A server in a thread; `service` is what it serves, `http` a client that carries the user's key."""

    def __init__(self, service, *, keys: bool) -> None:
        self.service = service
        config = uvicorn.Config(
            create_app(service), port=0, http="h11", ws="none", log_level="error", h11_max_incomplete_event_size=1 << 16
        )
        self.server = _Server(config)
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)
        service.worker.start()
        self._thread.start()
        while not self.server.started:
            self._thread.join(0.01)
        port = self.server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.http = httpx.Client(base_url=self.url, headers=bearer(USER) if keys else {}, timeout=60)

    async def _serve(self) -> None:
        await self.server.serve()

    def ask(self, model: str, path: str = "/v1/chat/completions", **body) -> httpx.Response:
        return self.http.post(path, json={"model": model, **ASK, **body})

    def text(self, model: str, **body) -> str:
        answer = self.ask(model, **body)
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"][0]["message"]["content"]

    def stream(self, model: str, **body) -> list[dict]:
        with self.http.stream(
            "POST", "/v1/chat/completions", json={"model": model, **ASK, "stream": True, **body}
        ) as response:
            return events(response)

    def admin(self, path: str, **body) -> httpx.Response:
        return self.http.post(f"/admin/{path}", json=body, headers=bearer(ADMIN))

    def close(self) -> None:
        self.http.close()
        self.server.should_exit = True
        self._thread.join(20)
        self.service.worker.stop()


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def events(response: httpx.Response) -> list[dict]:
    lines = [line[6:] for line in response.iter_lines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]" or "error" in lines[-1]
    return [json.loads(line) for line in lines if line != "[DONE]"]


@contextlib.contextmanager
def running(adapters: Path | None, *, keys: bool = True, limits: Limits | None = None, **settings):
    held = Keys([("user", USER), ("admin", ADMIN)]) if keys else Keys([])
    settings.setdefault("dtype", "float32")
    settings.setdefault("device", "cpu")
    server = Running(open_service(adapters, model="tiny", keys=held, limits=limits, **settings), keys=keys)
    try:
        yield server
    finally:
        server.close()


@pytest.fixture(scope="module")
def server(made_adapters):
    """One for the tests of a file that change nothing."""
    with running(made_adapters) as one:
        yield one
