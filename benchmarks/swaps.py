"""Aliases moved under running streams: is an answer ever lost, or mixed of two adapters?

    python benchmarks/swaps.py     1,000 moves under 32 streams, embedded base, bfloat16; a line in results/swaps.jsonl

`cmqa serve` runs as its own process, with adapters of random numbers. Before any stream each adapter answers alone;
then every stream's text must be, to the letter, what the digest that it names in each of its events answered alone.
"""

from __future__ import annotations

import argparse
import json
import platform
import secrets
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import torch
from result_line import keep, result_line, versions

from lora_cmqa.lora.adapter import save_adapter
from lora_cmqa.lora.inject import inject_lora
from lora_cmqa.models.load import load_model

NAMES = ("a", "b", "c")
RANK = 16
QUESTION = [{"role": "user", "content": "孩子发烧怎么办？"}]
USER, ADMIN = secrets.token_hex(8), secrets.token_hex(8)


def write_adapters(root: Path, model: str) -> None:
    peft = inject_lora(load_model(model, dtype="float32")[0], r=RANK)
    for seed, name in enumerate(NAMES):
        draw = torch.Generator().manual_seed(seed)
        for path, parameter in peft.named_parameters():
            if "lora_B" in path:
                parameter.data.normal_(0, 0.02, generator=draw)
        save_adapter(peft, root / name, base_model_name_or_path=model)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


class Server:
    def __init__(self, root: Path, args: argparse.Namespace) -> None:
        keys, port = root.parent / "keys.txt", free_port()
        keys.write_text(f"user {USER}\nadmin {ADMIN}\n")
        flags = ["--model", args.model, "--dtype", args.dtype, "--adapters", str(root), "--port", str(port)]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "lora_cmqa.cli", "serve", *flags, "--api-keys", str(keys)],
            stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        self.http = httpx.Client(
            base_url=f"http://127.0.0.1:{port}", timeout=600, limits=httpx.Limits(max_connections=args.streams + 4)
        )
        while not self._is_ready():
            if self.process.poll() is not None:
                raise SystemExit(f"cmqa serve ended with code {self.process.returncode}")
            time.sleep(0.2)

    def _is_ready(self) -> bool:
        try:
            return self.http.get("/readyz").status_code == 200
        except httpx.TransportError:
            return False

    def stream(self, name: str, tokens: int) -> tuple[set[str], str, bool]:
        """Digests named in its events, its text, whether it came to its end."""
        body = {"model": name, "messages": QUESTION, "max_tokens": tokens, "stream": True}
        headers, digests, text, last = {"authorization": f"Bearer {USER}"}, set[str](), "", ""
        with self.http.stream("POST", "/v1/chat/completions", json=body, headers=headers) as response:
            if response.status_code != 200:
                return digests, response.read().decode(), False
            for line in response.iter_lines():
                last = line or last
                if line.startswith("data: {"):
                    event = json.loads(line[6:])
                    if "error" in event:
                        return digests, str(event["error"]), False
                    digests.add(event["adapter"]["digest"])
                    text += event["choices"][0]["delta"].get("content") or "" if event["choices"] else ""
        return digests, text, last == "data: [DONE]"

    def move(self, name: str) -> bool:
        told = self.http.post(
            "/admin/aliases", json={"alias": "prod", "name": name}, headers={"authorization": f"Bearer {ADMIN}"}
        )
        return told.status_code == 200

    def close(self) -> int:
        """The exit code after SIGTERM."""
        self.process.terminate()
        return self.process.wait(60)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="cmqa-swaps-") as folder:
        root = Path(folder) / "adapters"
        root.mkdir()
        write_adapters(root, args.model)
        server = Server(root, args)
        try:
            return under_load(server, args) | {"exit_code": server.close()}
        finally:
            server.process.kill()


def under_load(server: Server, args: argparse.Namespace) -> dict[str, Any]:
    cold = {}
    for name in NAMES:
        digests, text, whole = server.stream(name, args.tokens)
        if not whole:
            raise SystemExit(f"{name} alone: {text}")
        cold[digests.pop()] = text
    if len(set(cold.values())) < len(NAMES):
        raise SystemExit("the adapters answer alike: a mixed answer would not be seen")
    server.move(NAMES[0])
    seen, ended = [], threading.Event()

    def ask() -> None:
        while not ended.is_set():
            try:
                seen.append(server.stream("prod", args.tokens))
            except httpx.HTTPError as e:
                seen.append((set(), repr(e), False))

    threads = [threading.Thread(target=ask) for _ in range(args.streams)]
    for t in threads:
        t.start()
    began, waits, refused = time.monotonic(), [], 0
    for i in range(args.moves):
        asked = time.monotonic()
        refused += not server.move(NAMES[i % len(NAMES)])
        waits.append(time.monotonic() - asked)
        time.sleep(args.pause)
    ended.set()
    for t in threads:
        t.join()
    failed = [text for _, text, whole in seen if not whole]
    mixed = [s for s in seen if s[2] and (len(s[0]) != 1 or cold.get(next(iter(s[0]))) != s[1])]
    for text in failed[:3]:
        print(f"failed: {text}", file=sys.stderr)
    return {
        "moves": args.moves,
        "moves_refused": refused,
        "move_milliseconds": {"p50": 1e3 * statistics.median(waits), "most": 1e3 * max(waits)},
        "streams": args.streams,
        "answers": len(seen),
        "answers_by_adapter": sorted(sum(d in s[0] for s in seen) for d in cold),
        "failed": len(failed),
        "mixed": len(mixed),
        "seconds": time.monotonic() - began,
    }


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--moves", type=int, default=1000)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--pause", type=float, default=0.05, help="seconds between two moves")
    parser.add_argument("--dry", action="store_true", help="print the line and do not keep it")
    return parser.parse_args(argv)


def main() -> None:
    args = arguments()
    line = result_line(
        "swaps",
        measure(args),
        device={"processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads()},
        versions=versions("torch", "transformers", "peft", "fastapi", "uvicorn"),
        data=f"one question, {len(NAMES)} random adapters of rank {RANK} on all linear layers",
        settings={k: v for k, v in vars(args).items() if k != "dry"},
        seed=0,
    )
    print(json.dumps(line, ensure_ascii=False))
    if not args.dry:
        keep(line, "swaps")


if __name__ == "__main__":
    main()
