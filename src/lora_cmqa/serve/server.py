"""`cmqa serve`: open the base, find the adapters, listen; on SIGTERM stop taking, finish what runs, leave.

serve(adapters="runs/", model="embedded") -> Service -> uvicorn on 127.0.0.1:8000
SIGTERM -> /readyz 503, new requests 503 -> what runs ends (or is told after `drain_seconds`) -> exit 0
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import uvicorn

from ..data.template import ChatTemplate
from ..engine.embedded import EmbeddedEngine
from ..engine.run import check_kernels_of, stored_stop_ids
from ..errors import ConfigError, ModelError
from ..lora.adapter import CONFIG, read_adapter_config
from ..messages import say
from ..models.depth import check_layers
from ..models.fingerprint import differences, fingerprint
from ..models.load import BUILT_IN, layers_of, load_model, resolve
from .api import create_app, log
from .keys import Keys
from .registry import Registry, read_fingerprint
from .service import Limits, Service

_HEADER_BYTES = 64 << 10  # of a request's line and headers; more is refused by the parser
_OPENED_AT_START = 64  # adapters checked before the first request; any others when first asked for


def serve(
    adapters: str | Path | None = None,
    *,
    model: str | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_keys: str | Path | None = None,
    device: str = "auto",
    dtype: str = "auto",
    num_hidden_layers: int | None = None,
    max_batch: int = 32,
    adapter_memory: int = 1 << 30,
    prefix_memory: int = 256 << 20,
    limits: Limits | None = None,
    notice: str | None = None,
    allow_other_base: bool = False,
    drain_seconds: float = 30.0,
) -> dict[str, Any]:
    """Serve until SIGTERM or SIGINT; returns {"served", "seconds"} then.

    adapters        folder whose sub-folders are adapters, each served under its name
    model           base; None: the one that the adapters name where it is on this machine, else "embedded"
    api_keys        file of `user KEY` and `admin KEY` lines; needed for any host but loopback
    num_hidden_layers  depth that the base is cut to; None: what the adapters' fingerprints say
    adapter_memory, prefix_memory  bytes

    Raises ConfigError for a host beyond loopback without keys, ModelError for the base, AdapterError for the folder.
    """
    limits = limits or Limits()
    for name, value, low, high in (
        ("port", port, 0, 65535),
        ("max-batch", max_batch, 1, 1024),
        ("max-waiting", limits.waiting, 0, 1_000_000),
        ("max-prompt-tokens", limits.prompt_tokens, 1, 10_000_000),
        ("max-new-tokens", limits.new_tokens, 1, 1_000_000),
        ("request-seconds", limits.seconds, 0.1, 1e9),
        ("drain-seconds", drain_seconds, 0, 1e9),
    ):
        if not low <= value <= high:
            raise ConfigError(f"--{name} is {value}; it must lie in {low:g} .. {high:g}")
    keys = Keys.from_file(api_keys)
    if not _is_loopback(host) and not keys.needed:
        raise ConfigError(
            f"--host {host} can be reached from elsewhere, and no key is asked for",
            field="host",
            hint="Add --api-keys FILE (lines `user KEY`, `admin KEY`), or keep --host 127.0.0.1.",
        )
    service = open_service(
        adapters,
        model=model,
        keys=keys,
        device=device,
        dtype=dtype,
        num_hidden_layers=num_hidden_layers,
        max_batch=max_batch,
        adapter_memory=adapter_memory,
        prefix_memory=prefix_memory,
        limits=limits,
        notice=notice,
        allow_other_base=allow_other_base,
        hosts=["127.0.0.1", "localhost", "[::1]", host] if _is_loopback(host) else None,
    )
    began = time.perf_counter()
    print(
        say("serve.ready", base=service.base, adapters=len(service.registry.names()), host=host, port=port), flush=True
    )
    asyncio.run(_listen(service, host, port, drain_seconds))
    return {"served": _served(service), "seconds": round(time.perf_counter() - began, 1)}


def open_service(
    adapters: str | Path | None,
    *,
    model: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    num_hidden_layers: int | None = None,
    max_batch: int = 32,
    adapter_memory: int = 1 << 30,
    prefix_memory: int = 256 << 20,
    allow_other_base: bool = False,
    **settings: Any,
) -> Service:
    """Base, engine, registry and service, without a socket; `settings` are those of Service."""
    root = Path(adapters) if adapters is not None else None
    if root is not None and not root.is_dir():
        raise ConfigError("there is no such folder", file=root, hint="--adapters DIR, whose sub-folders are adapters.")
    name = model or _base_of(root)
    folder = resolve(name)
    base = fingerprint(folder)
    there = layers_of(folder)
    layers = check_layers(num_hidden_layers or _depth_of(root, base), there)
    loaded, tokenizer = load_model(name, dtype=dtype, device=device, num_hidden_layers=layers)
    check_kernels_of(loaded)
    template = ChatTemplate.from_tokenizer(tokenizer)
    engine = EmbeddedEngine(
        loaded,
        tokenizer,
        sorted({*template.stop_ids, *stored_stop_ids(folder)}),
        max_batch=max_batch,
        load_adapter=lambda digest: registry.low_rank(digest),
        adapter_memory=adapter_memory,
        prefix_memory=prefix_memory,
    )
    if engine.why_plain:
        print(say("serve.plain", reason=engine.why_plain), file=sys.stderr)
    if engine.why_stacked:
        print(say("serve.stacked", reason=engine.why_stacked), file=sys.stderr)
    shown = name if name in BUILT_IN else Path(name).name
    registry = Registry(
        root,
        engine,
        template,
        base=shown,
        fingerprint=base | ({"num_hidden_layers": layers} if layers < there else {}),
        allow_other_base=allow_other_base,
    )
    if shown in registry.names():
        raise ConfigError(f"an adapter is called {shown!r} as the base is", file=root, hint="Rename its folder.")
    _open_some(registry)
    return Service(engine, registry, template, base=shown, **settings)


def _open_some(registry: Registry) -> None:
    for name in registry.names()[:_OPENED_AT_START]:
        try:
            registry.open(name)
        except Exception as e:  # the others are served; this one is listed with its reason
            log(refused=name, because=str(e))


def _base_of(root: Path | None) -> str:
    """What the adapters call their base, where they agree and it lies on this machine. Nothing is fetched because an
    adapter says so."""
    names = set()
    for folder in sorted(root.iterdir()) if root is not None else []:
        if (folder / CONFIG).is_file() and not folder.is_symlink():
            with contextlib.suppress(Exception):  # a broken adapter names nothing; the registry says what is wrong
                names.add(str(read_adapter_config(folder).get("base_model_name_or_path") or ""))
    names.discard("")
    if not names:
        return "embedded"
    if len(names) > 1:
        raise ConfigError(
            f"the adapters name {len(names)} bases: {', '.join(sorted(names)[:3])}",
            field="model",
            hint="Add --model M.",
        )
    name = names.pop()
    if name not in BUILT_IN and not Path(name).is_dir():
        raise ModelError(f"the adapters name the base {name!r}, which is not on this machine", hint=f"--model {name}")
    return name


def _depth_of(root: Path | None, base: dict[str, Any]) -> int | None:
    """The depth that this base's adapters were trained on, where their fingerprints say one that is not all of it."""
    depths: dict[int | None, str] = {}
    for folder in sorted(root.iterdir()) if root is not None else []:
        if (folder / CONFIG).is_file() and not folder.is_symlink():
            with contextlib.suppress(Exception):  # as above
                found = read_fingerprint(folder)
                if found is not None and not differences(found, base):
                    depths.setdefault(found.get("num_hidden_layers"), folder.name)
    if len(depths) > 1:
        said = ", ".join(f"{name}: {'all' if n is None else n}" for n, name in depths.items())
        raise ConfigError(
            f"the adapters were trained on {len(depths)} depths of one base ({said} layers); one is served",
            field="num_hidden_layers",
            hint="Add --num-hidden-layers N; those of another depth are listed as refused.",
        )
    return next(iter(depths), None)


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _served(service: Service) -> int:
    return int(sum(s.value for m in service.metrics.answers.collect() for s in m.samples if s.name.endswith("_total")))


# ---- listening and leaving -------------------------------------------------------------------------------------------


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield  # ours are set in _listen: uvicorn's would close the door before what runs has ended


async def _listen(service: Service, host: str, port: int, drain_seconds: float) -> None:
    config = uvicorn.Config(
        create_app(service),
        host=host,
        port=port,
        http="h11",
        ws="none",
        h11_max_incomplete_event_size=_HEADER_BYTES,
        log_level="error",
        access_log=False,
        server_header=False,
        timeout_keep_alive=5,
        timeout_graceful_shutdown=5,
    )
    server, leaving = _Server(config), asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, leaving.set)
    service.worker.start()
    try:
        drain = asyncio.ensure_future(_drain(service, server, leaving, drain_seconds))
        await server.serve()
        drain.cancel()
    finally:
        service.worker.stop()


async def _drain(service: Service, server: uvicorn.Server, leaving: asyncio.Event, seconds: float) -> None:
    await leaving.wait()
    service.draining = True
    log(draining=service.open_responses)
    deadline = time.monotonic() + seconds
    while service.open_responses and time.monotonic() < deadline:
        await asyncio.sleep(0.02)
    if service.open_responses:
        await asyncio.to_thread(
            service.worker.fail_all
        )  # each stream ends with an error event, none in the middle of a line
        await asyncio.sleep(0.2)
    server.should_exit = True
