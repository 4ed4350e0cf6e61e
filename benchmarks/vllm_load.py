"""What smoothing costs a server of vLLM: requests a second, bare and smoothed, of the same load.

    python benchmarks/vllm_load.py               # two servers, one after the other: some minutes on a CPU
    python benchmarks/vllm_load.py --requests 40

The demo's LLaVA behind vLLM's own HTTP server, 8 clients, a picture and a question each; of each picture a request, so
that no cache answers. Needs an environment that has vLLM (``make vllm`` makes one).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
from PIL import Image

from fs_plugins.demo import assets, world
from fs_plugins.pictures import address, png

MINUTES = 10 * 60
CLIENTS = 8


def environment(**more: str) -> dict[str, str]:
    """What a process of vLLM gets here: nothing of ours but what is given."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("FS_PLUGINS")}
    small = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "NO_PROXY": "127.0.0.1"}
    return {**kept, **small, **more}


class Server:
    """vLLM's own server of the demo's model."""

    def __init__(self, log: Path, settings: dict[str, Any] | None) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.url, self.log = f"http://127.0.0.1:{port}", log
        typed = [
            "--model",
            str(assets.LLAVA),
            "--served-model-name",
            "demo",
            "--port",
            str(port),
            "--host",
            "127.0.0.1",
        ]
        typed += ["--enforce-eager", "--max-model-len", "512", "--dtype", "float32", "--max-num-seqs", "8"]
        typed += ["--kv-cache-memory-bytes", str(64 << 20), "--limit-mm-per-prompt", '{"image": 1}']
        typed += ["--trust-request-mm-kwargs"]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *typed],
            stdout=log.open("w", encoding="utf-8"),
            stderr=subprocess.STDOUT,
            env=environment() if settings is None else environment(FS_PLUGINS=json.dumps(settings)),
        )

    def wait(self) -> None:
        until = time.monotonic() + MINUTES
        while time.monotonic() < until and self.process.poll() is None:
            try:
                urllib.request.urlopen(f"{self.url}/health", timeout=5)
                return
            except (urllib.error.URLError, OSError):
                time.sleep(1)
        raise RuntimeError(self.log.read_text("utf-8")[-6000:])

    def ask(self, picture: Image.Image, prompt: str, **more: Any) -> tuple[int, str]:
        parts = [{"type": "image_url", "image_url": {"url": address(png(picture))}}, {"type": "text", "text": prompt}]
        body = {
            "model": "demo",
            "messages": [{"role": "user", "content": parts}],
            "temperature": 0,
            "max_tokens": 8,
            **more,
        }
        request = urllib.request.Request(
            f"{self.url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return 200, json.load(answer)["choices"][0]["message"]["content"]
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def metrics(self) -> dict[str, float]:
        text = urllib.request.urlopen(f"{self.url}/metrics", timeout=60).read().decode()
        return {name: float(value) for name, value in re.findall(r"^fs_plugins_(\w+)_total (\S+)$", text, re.MULTILINE)}

    def memory(self) -> int:
        """Bytes that the server and all it has started hold."""
        root = psutil.Process(self.process.pid)
        return sum(one.memory_info().rss for one in [root, *root.children(recursive=True)])

    def stop(self) -> None:
        self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()


def load(server: Server, asked: Sequence[tuple[Image.Image, str]]) -> list[tuple[int, str]]:
    """All answers, asked by ``CLIENTS`` at once."""
    with ThreadPoolExecutor(CLIENTS) as clients:
        return list(clients.map(lambda one: server.ask(*one), asked))


def measured(settings: dict[str, Any] | None, asked: Sequence[tuple[Image.Image, str]]) -> float:
    """Requests a second, of a server of its own, after a few that warm it up."""
    with tempfile.TemporaryDirectory() as folder:
        server = Server(Path(folder) / "log", settings)
        try:
            server.wait()
            load(server, asked[:CLIENTS])
            begun = time.perf_counter()
            answers = load(server, asked[CLIENTS:])
            took = time.perf_counter() - begun
        finally:
            server.stop()
    failed = [said for status, said in answers if status != 200]
    if failed:
        raise RuntimeError(failed[0])
    return len(answers) / took


def main() -> None:
    """Print both, and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--settings", type=json.loads, default={}, help="FS_PLUGINS of the smoothed one")
    options = parser.parse_args()
    scenes = [world.scene("heldout", i) for i in range(options.requests + CLIENTS)]
    asked = [(scene.draw(), scene.question("shape").prompt) for scene in scenes]
    bare, smoothed = measured(None, asked), measured(options.settings, asked)
    print(f"bare {bare:.1f} requests a second, smoothed {smoothed:.1f}: {smoothed / bare:.2f} of it")


if __name__ == "__main__":
    main()
