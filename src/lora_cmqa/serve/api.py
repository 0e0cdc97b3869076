"""The HTTP face: OpenAI's routes over service.py. The only file that knows FastAPI.

    request -> Gate: host, key, size of the body -> route: what may stand in it -> Service -> JSON or events
                401 403 413 415 421               400 404 429 503 504

Every answer says that a machine wrote it, which adapter of which content answered, and carries the notice; a question
that sounds urgent gets whom to call, before the answer and in the language asked in.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from prometheus_client import generate_latest
from starlette.exceptions import HTTPException

from ..errors import AdapterError, CmqaError, ConfigError, ResourceError, TemplateError
from ..messages import say
from .notice import emergency_notice, language_of, urgency
from .registry import UnknownModel
from .schema import AliasBody, ChatBody, CompareBody, CompletionBody, ErrorBody, LoadBody, first_problem
from .service import Answer, Draining, Service
from .worker import QueueFull, Stopped

STATIC = Path(__file__).parent / "static"
PAGES = {"/": "index.html", "/static/app.js": "app.js", "/static/style.css": "style.css"}
OPEN = {"/livez", "/readyz", *PAGES}  # the page holds no data: it asks the routes behind the key
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; connect-src 'self'; img-src 'self' data:"
)
_BODY_SECONDS = 30.0
Scope = dict[str, Any]
Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]
T = TypeVar("T")


class TimedOut(CmqaError):
    """A request took longer than one may."""


_STATUS: tuple[tuple[type[BaseException], int, str, str], ...] = (
    (UnknownModel, 404, "invalid_request_error", "model_not_found"),
    (AdapterError, 409, "invalid_request_error", "adapter_refused"),
    (ConfigError, 400, "invalid_request_error", "invalid_value"),
    (TemplateError, 400, "invalid_request_error", "invalid_messages"),
    (QueueFull, 429, "rate_limit_error", "queue_full"),
    (Draining, 503, "server_error", "stopping"),
    (Stopped, 503, "server_error", "stopping"),
    (TimedOut, 504, "server_error", "timeout"),
    (ResourceError, 503, "server_error", "out_of_resources"),
    (MemoryError, 503, "server_error", "out_of_memory"),
)


def error_body(message: str, kind: str, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """OpenAI's form."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error_of(error: BaseException) -> tuple[int, dict[str, Any]]:
    """(status, body). What nobody foresaw is named by its type only: its text may hold a patient's words."""
    for kind, status, name, code in _STATUS:
        if isinstance(error, kind):
            text = error.message if isinstance(error, CmqaError) else type(error).__name__
            hint = f" {error.hint}" if isinstance(error, CmqaError) and error.hint else ""
            param = error.field if isinstance(error, CmqaError) else None
            return status, error_body(text + hint, name, code, param)
    return 500, error_body(f"internal error ({type(error).__name__})", "server_error", "internal_error")


def create_app(service: Service) -> FastAPI:
    """The application; `service.worker` must run while it is used."""
    refused: dict[int | str, dict[str, Any]] = {"4XX": {"model": ErrorBody}, "5XX": {"model": ErrorBody}}
    app = FastAPI(title="lora-cmqa", docs_url=None, redoc_url=None, openapi_url="/openapi.json", responses=refused)
    app.add_middleware(Gate, service=service)
    _add_errors(app, service)
    _add_status(app, service)
    _add_answers(app, service)
    _add_admin(app, service)
    return app


# ---- before any route ------------------------------------------------------------------------------------------------


class Gate:
    """Host, key and size, before anything of the body is looked at; one log line for each response, with no text."""

    def __init__(self, app: Any, service: Service) -> None:
        self.app, self.service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        began, status = time.perf_counter(), 0

        async def noted(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-content-type-options", b"nosniff")]
            await send(message)

        refused = self._refuse(scope)
        body = b""
        if refused is None:
            body, refused = await self._read(scope, receive)
        if refused is not None:
            await JSONResponse(refused[1], refused[0], headers={"connection": "close"})(scope, receive, noted)
        else:
            try:
                await self.app(scope, _replay(body, receive), noted)
            except Exception as error:  # here, where no server prints its text with a traceback
                log(error=type(error).__name__)
                if not status:
                    code, content = error_of(error)
                    await JSONResponse(content, code)(scope, receive, noted)
        if status >= 400:
            self.service.metrics.errors.labels(str(status)).inc()
        route = scope.get("route")
        path = getattr(route, "path", None) or ("-" if scope["path"] not in OPEN else scope["path"])
        if path not in OPEN:
            milliseconds = round(1000 * (time.perf_counter() - began))
            log(method=scope["method"][:10], route=path, status=status, milliseconds=milliseconds)

    def _refuse(self, scope: Scope) -> tuple[int, dict[str, Any]] | None:
        headers, path = dict(scope["headers"]), scope["path"]
        host = headers.get(b"host", b"").decode("latin-1").rsplit(":", 1)[0]
        if self.service.hosts is not None and host not in self.service.hosts:
            # a page elsewhere whose name was pointed at this machine (DNS rebinding) brings its own name
            return 421, error_body("this server does not answer under that host name", "invalid_request_error")
        if path in OPEN:
            return None
        kind, _, key = headers.get(b"authorization", b"").decode("latin-1").partition(" ")
        found = self.service.keys.scope(key.strip() if kind.lower() == "bearer" else None)
        if found is None:
            return 401, error_body(
                "a key is needed: Authorization: Bearer KEY", "invalid_request_error", "invalid_api_key"
            )
        if path.startswith("/admin") and found != "admin":
            return 403, error_body("an admin key is needed", "invalid_request_error", "admin_key_needed")
        if scope["method"] == "POST":
            if headers.get(b"content-type", b"").split(b";")[0].strip().lower() != b"application/json":
                return 415, error_body("Content-Type must be application/json", "invalid_request_error")
            length = headers.get(b"content-length", b"0")
            if length.isdigit() and int(length[:20]) > self.service.limits.body_bytes:
                return self._too_large()
        return None

    def _too_large(self) -> tuple[int, dict[str, Any]]:
        most = self.service.limits.body_bytes
        return 413, error_body(f"the body is larger than {most} bytes", "invalid_request_error", "body_too_large")

    async def _read(self, scope: Scope, receive: Receive) -> tuple[bytes, tuple[int, dict[str, Any]] | None]:
        """The whole body, or why not. (Whoever vanished has sent none; the route finds out.)"""
        parts, size = [], 0
        if scope["path"] in OPEN:
            return b"", None
        try:
            async with asyncio.timeout(_BODY_SECONDS):
                while True:
                    message = await receive()
                    if message["type"] != "http.request":
                        break
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > self.service.limits.body_bytes:
                        return b"", self._too_large()
                    if not message.get("more_body"):
                        break
        except TimeoutError:
            return b"", (408, error_body("the body did not come in time", "invalid_request_error"))
        return b"".join(parts), None


def _replay(body: bytes, receive: Receive) -> Receive:
    sent = False

    async def replayed() -> Any:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replayed


def log(**fields: Any) -> None:
    """One JSON line on stderr. Names, numbers and digests; never text of a question, an answer or a key."""
    print(json.dumps({"time": time.strftime("%Y-%m-%dT%H:%M:%S"), **fields}, ensure_ascii=False), file=sys.stderr)


def _add_errors(app: FastAPI, service: Service) -> None:
    @app.exception_handler(CmqaError)
    async def known(_: Request, error: CmqaError) -> JSONResponse:
        status, body = error_of(error)
        return JSONResponse(body, status, headers={"retry-after": "1"} if status in (429, 503) else None)

    @app.exception_handler(RequestValidationError)
    async def unfit(_: Request, error: RequestValidationError) -> JSONResponse:
        message, param = first_problem(list(error.errors()))
        return JSONResponse(error_body(message, "invalid_request_error", "invalid_body", param), 400)

    @app.exception_handler(HTTPException)
    async def plain(_: Request, error: HTTPException) -> JSONResponse:
        return JSONResponse(error_body(str(error.detail), "invalid_request_error"), error.status_code)


# ---- how it stands ---------------------------------------------------------------------------------------------------


def _add_status(app: FastAPI, service: Service) -> None:
    @app.get("/livez", responses={500: {"description": "The engine's thread has ended"}})
    async def livez() -> JSONResponse:
        return JSONResponse({"alive": service.worker.alive}, 200 if service.worker.alive else 500)

    @app.get("/readyz", responses={503: {"description": "Draining, or the engine's thread has ended"}})
    async def readyz() -> JSONResponse:
        ready = service.worker.alive and not service.draining
        return JSONResponse({"ready": ready}, 200 if ready else 503)

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        return Response(generate_latest(service.metrics.registry), media_type="text/plain; version=0.0.4")

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": service.models()}

    for path, name in PAGES.items():
        _add_page(app, path, name)


def _add_page(app: FastAPI, path: str, name: str) -> None:
    @app.get(path, include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(STATIC / name, headers={"content-security-policy": POLICY, "cache-control": "no-cache"})


# ---- answers ---------------------------------------------------------------------------------------------------------


def _add_answers(app: FastAPI, service: Service) -> None:
    streams: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}

    @app.post("/v1/chat/completions", responses=streams)
    async def chat(body: ChatBody, request: Request) -> Any:
        more = {
            "max_new_tokens": body.max_completion_tokens,
            "logprobs": (body.top_logprobs or 0) if body.logprobs else None,
        }
        answers = await asyncio.to_thread(service.chat, body.model, body.messages, body, **more)
        head = _Head(service, "chat.completion", body.model, answers, body.messages[-1].text)
        if body.stream:
            usage = bool(body.stream_options and body.stream_options.include_usage)
            return _events(_chat_chunks(service, head, answers, usage))
        await _finish(service, answers, request)
        return head.whole([_chat_choice(service, head, i, a) for i, a in enumerate(answers)])

    @app.post("/v1/completions", responses=streams)
    async def completions(body: CompletionBody, request: Request) -> Any:
        prompts = [body.prompt] if isinstance(body.prompt, str) else body.prompt
        if len(prompts) * body.n > service.limits.answers:
            raise ConfigError(f"prompts x n is {len(prompts) * body.n}, at most {service.limits.answers}", field="n")

        def prepare() -> list[Answer]:
            return [a for p in prompts for a in service.completion(body.model, p, body, logprobs=body.logprobs)]

        answers = await asyncio.to_thread(prepare)
        head = _Head(service, "text_completion", body.model, answers, prompts[0])
        if body.stream:
            usage = bool(body.stream_options and body.stream_options.include_usage)
            return _events(_text_chunks(service, head, answers, usage))
        await _finish(service, answers, request)
        return head.whole([_text_choice(service, i, a) for i, a in enumerate(answers)])

    @app.post("/v1/compare", responses=streams)
    async def compare(body: CompareBody, request: Request) -> Any:
        """Base and adapters on one question, in one batch. As events: {"index", "delta"} ... until [DONE]."""
        if body.n != 1:
            raise ConfigError("n is 1 in a comparison", field="n")
        if len(body.models) > service.limits.answers:
            raise ConfigError(f"at most {service.limits.answers} models are compared", field="models")

        def prepare() -> list[Answer]:
            seeded = body if body.seed is not None else body.model_copy(update={"seed": secrets.randbelow(2**62)})
            return [a for m in body.models for a in service.chat(m, body.messages, seeded)]

        answers = await asyncio.to_thread(prepare)
        head = _Head(service, "comparison", None, answers, body.messages[-1].text)
        if body.stream:
            return _events(_compare_events(service, head, answers))
        await _finish(service, answers, request)
        return {**head.common, "answers": [_compared(i, a) for i, a in enumerate(answers)], "usage": _usage(answers)}


async def _finish(service: Service, answers: Sequence[Answer], request: Request) -> None:
    """Run to the end, or stop as soon as the client is gone."""

    async def run() -> None:
        async with _within(service):
            async for _ in service.run(answers):
                pass

    work, gone = asyncio.ensure_future(run()), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            work.result()
        else:
            raise HTTPException(499, "the client is gone")
    finally:
        for task in (work, gone):
            task.cancel()
        await asyncio.gather(work, gone, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class _within:
    """The time limit of one request."""

    def __init__(self, service: Service) -> None:
        self._seconds = service.limits.seconds
        self._timeout = asyncio.timeout(self._seconds)

    async def __aenter__(self) -> None:
        await self._timeout.__aenter__()

    async def __aexit__(self, *error: Any) -> None:
        try:
            await self._timeout.__aexit__(*error)
        except TimeoutError:
            raise TimedOut(f"the answer took longer than {self._seconds:g} s", hint="Ask for fewer tokens.") from None


def _events(source: AsyncIterator[Any]) -> StreamingResponse:
    async def lines() -> AsyncIterator[str]:
        try:
            async for one in source:
                yield f"data: {json.dumps(one, ensure_ascii=False)}\n\n"
        except Exception as error:  # the status is sent already: the error is an event, never a silent end
            yield f"data: {json.dumps(error_of(error)[1], ensure_ascii=False)}\n\n"
            return
        yield "data: [DONE]\n\n"

    return StreamingResponse(lines(), media_type="text/event-stream", headers={"cache-control": "no-store"})


class _Head:
    """What every response and every chunk of one request has in common."""

    def __init__(
        self, service: Service, kind: str, model: str | None, answers: Sequence[Answer], question: str
    ) -> None:
        lang = language_of(question)
        self.kind, self.answers, self.emergency = kind, answers, emergency_notice(question)
        if self.emergency:
            service.metrics.urgent.labels(urgency(question)).inc()
        self.common: dict[str, Any] = {
            "id": f"{'chatcmpl' if kind.startswith('chat') else 'cmpl'}-{secrets.token_hex(12)}",
            "object": kind,
            "created": int(time.time()),
            "ai_generated": True,
            "notice": service.notice or say("serve.notice", lang),
            "emergency_notice": self.emergency,
        }
        if model is not None:
            self.common |= {"model": model, "adapter": answers[0].served_by}

    def whole(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self.common, "choices": choices, "usage": _usage(self.answers)}

    def chunk(self, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self.kind.startswith("chat") else self.kind
        return {**self.common, "object": kind, "choices": choices, **more}

    @property
    def opening(self) -> str:
        """What is shown before the answer itself, where clients show nothing but the text."""
        return f"{self.emergency}\n\n" if self.emergency else ""


def _usage(answers: Sequence[Answer]) -> dict[str, int]:
    """A prompt asked n times is read once."""
    prompts = sum(len(ids) for _, ids in {(a.name, a.request.prompt_ids) for a in answers})
    written = sum(a.tokens for a in answers)
    return {"prompt_tokens": prompts, "completion_tokens": written, "total_tokens": prompts + written}


def _chat_choice(service: Service, head: _Head, index: int, answer: Answer) -> dict[str, Any]:
    return {
        "index": index,
        "message": {"role": "assistant", "content": head.opening + answer.text},
        "finish_reason": answer.finish_reason,
        "logprobs": _chat_logprobs(service, answer.logprobs) if answer.request.sampling.logprobs is not None else None,
        "flags": answer.flags,
    }


async def _chat_chunks(
    service: Service, head: _Head, answers: Sequence[Answer], usage: bool
) -> AsyncIterator[dict[str, Any]]:
    wanted = answers[0].request.sampling.logprobs is not None

    def choice(index: int, delta: dict[str, Any], reason: str | None = None, **more: Any) -> list[dict[str, Any]]:
        return [{"index": index, "delta": delta, "finish_reason": reason, "logprobs": None, **more}]

    for i in range(len(answers)):
        yield head.chunk(choice(i, {"role": "assistant", "content": head.opening}))
    async with _within(service):
        async for i, event in service.run(answers):
            if event.text or event.logprob:
                logprobs = _chat_logprobs(service, [event.logprob]) if wanted and event.logprob else None
                yield head.chunk(choice(i, {"content": event.text}, logprobs=logprobs))
            if event.finish_reason:
                yield head.chunk(choice(i, {}, event.finish_reason, flags=answers[i].flags))
    if usage:
        yield head.chunk([], usage=_usage(answers))


def _text_choice(service: Service, index: int, answer: Answer) -> dict[str, Any]:
    return {
        "index": index,
        "text": answer.text,
        "finish_reason": answer.finish_reason,
        "logprobs": _text_logprobs(service, answer) if answer.request.sampling.logprobs is not None else None,
        "flags": answer.flags,
    }


async def _text_chunks(
    service: Service, head: _Head, answers: Sequence[Answer], usage: bool
) -> AsyncIterator[dict[str, Any]]:
    async with _within(service):
        async for i, event in service.run(answers):
            if event.text or event.finish_reason:
                one = {"index": i, "text": event.text, "finish_reason": event.finish_reason, "logprobs": None}
                yield head.chunk([one])
    if usage:
        yield head.chunk([], usage=_usage(answers))


def _compared(index: int, answer: Answer) -> dict[str, Any]:
    return {
        "index": index,
        "model": answer.who.asked,
        "adapter": answer.served_by,
        "content": answer.text,
        "finish_reason": answer.finish_reason,
        "flags": answer.flags,
    }


async def _compare_events(service: Service, head: _Head, answers: Sequence[Answer]) -> AsyncIterator[dict[str, Any]]:
    yield {**head.common, "answers": [_compared(i, a) for i, a in enumerate(answers)]}
    async with _within(service):
        async for i, event in service.run(answers):
            if event.text or event.finish_reason:
                flags = {"flags": answers[i].flags} if event.finish_reason else {}
                yield {"index": i, "delta": event.text, "finish_reason": event.finish_reason, **flags}
    yield {"usage": _usage(answers)}


def _token(service: Service, token: int) -> tuple[str, list[int] | None]:
    text = service.engine.tokenizer.decode([token], clean_up_tokenization_spaces=False)
    return text, None if "\ufffd" in text else list(text.encode())


def _chat_logprobs(service: Service, logprobs: Sequence[Any]) -> dict[str, Any]:
    def one(token: int, logprob: float) -> dict[str, Any]:
        text, raw = _token(service, token)
        return {"token": text, "logprob": logprob, "bytes": raw}

    return {
        "content": [{**one(x.token, x.logprob), "top_logprobs": [one(t, p) for t, p in x.top]} for x in logprobs],
        "refusal": None,
    }


def _text_logprobs(service: Service, answer: Answer) -> dict[str, Any]:
    texts = [_token(service, x.token)[0] for x in answer.logprobs]
    return {
        "tokens": texts,
        "token_logprobs": [x.logprob for x in answer.logprobs],
        "top_logprobs": [{_token(service, t)[0]: p for t, p in x.top} for x in answer.logprobs],
        "text_offset": [sum(map(len, texts[:i])) for i in range(len(texts))],
    }


# ---- what is served --------------------------------------------------------------------------------------------------


def _add_admin(app: FastAPI, service: Service) -> None:
    registry = service.registry

    @app.post("/admin/adapters/load")
    async def load(body: LoadBody) -> dict[str, Any]:
        """A sub-folder of --adapters, by its name: new, or looked at again."""
        version = await asyncio.to_thread(registry.load, body.name)
        log(loaded=body.name, digest=version.digest, base_check=version.base_check)
        return {"name": body.name, "digest": version.digest, "base_check": version.base_check, "effect": version.effect}

    @app.post("/admin/adapters/unload")
    async def unload(body: LoadBody) -> dict[str, Any]:
        done = await asyncio.to_thread(registry.unload, body.name)
        log(unloaded=body.name, **done)
        return {"name": body.name, **done}

    @app.post("/admin/aliases")
    async def alias(body: AliasBody) -> dict[str, Any]:
        version = await asyncio.to_thread(registry.alias, body.alias, body.name)
        log(alias=body.alias, name=body.name, digest=version.digest)
        return {"alias": body.alias, "name": body.name, "digest": version.digest}

    @app.delete("/admin/aliases/{alias}")
    async def unalias(alias: str) -> dict[str, Any]:
        registry.unalias(alias)
        return {"alias": alias, "deleted": True}
