"""Screenshots of the status page and of the playground, for the README.

    python bench/screenshots.py

Starts `shoal serve` with two groups of two stages, keeps some clients talking to it for a while, and looks at its admin
port with a headless Chromium. Writes docs/status_page.png and docs/playground.png.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import chromium
from serving import STOP_TIMEOUT_S, free_port, wait_until_ready

from shoal.cluster.config import EMBEDDED_MODEL

DOCS: Final = Path(__file__).parents[1] / "docs"
SHAPE: Final = (
    "--replicas", "2", "--pipeline-parallel", "2", "--num-threads", "1", "--kv-memory", "64MiB",
    "--max-model-len", "1024", "--speculative", "suffix",
)  # fmt: skip
NUM_CLIENTS: Final = 6
LOAD_S: Final = 150.0
ANSWER_TIMEOUT_S: Final = 120.0
MAX_BYTES: Final = 200_000
THEMES: Final = ("a harbour at night", "the history of bread", "how a clock works", "a walk in the mountains")
QUESTION: Final = "What is the capital of France?"


@contextlib.contextmanager
def server() -> Iterator[tuple[str, str]]:
    """`shoal serve`: the URLs of its public and its admin port."""
    port, admin_port = free_port(), free_port()
    ports = ("--port", str(port), "--admin-port", str(admin_port))
    with tempfile.TemporaryFile("w+") as log:
        command = [sys.executable, "-m", "shoal.cluster.cli", "serve", *ports, *SHAPE]
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            wait_until_ready(port, process, log.fileno())
            yield f"http://127.0.0.1:{port}", f"http://127.0.0.1:{admin_port}"
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(STOP_TIMEOUT_S)


@contextlib.contextmanager
def load(url: str) -> Iterator[None]:
    """Clients that ask one thing after the other. Those with the same theme share a long beginning."""
    is_over = threading.Event()
    threads = [threading.Thread(target=_client, args=(url, number, is_over)) for number in range(NUM_CLIENTS)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        is_over.set()
        for thread in threads:
            thread.join(ANSWER_TIMEOUT_S)


def _client(url: str, number: int, is_over: threading.Event) -> None:
    theme = THEMES[number % len(THEMES)]
    for turn in itertools.count():
        is_over.wait(1.5 * ((turn + number) % 3))
        if is_over.is_set():
            return
        body = {
            "model": EMBEDDED_MODEL,
            "messages": [
                {"role": "system", "content": f"You write short texts about {theme}. " * 12},
                {"role": "user", "content": f"Write paragraph {turn} about {theme}."},
            ],
            "max_tokens": 40 + 20 * ((turn + number) % 4),
            "temperature": 0.7,
            "seed": 100 * number + turn,
        }
        request = urllib.request.Request(
            f"{url}/v1/chat/completions", json.dumps(body).encode(), {"content-type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=ANSWER_TIMEOUT_S) as answer:
            answer.read()


def look(url: str, tab: chromium.Tab) -> None:
    """Both pictures."""
    tab.size(1280, 1290)
    tab.open(f"{url}/")
    tab.wait_for("document.querySelectorAll('.group').length === 2 && document.querySelector('#decisions tbody tr')")
    time.sleep(4.0)  # a group's KV use comes with the history
    _save(tab, DOCS / "status_page.png")
    tab.size(1280, 620)
    tab.run("location.hash = '#playground'")
    tab.run("document.querySelector('#chat-temperature').value = '0'")
    for question in (QUESTION, "And which river flows through it?"):
        tab.run("document.querySelector('#chat-input').focus()")
        number = tab.run("document.querySelectorAll('.message.assistant .facts').length")
        tab.type(question)
        tab.press("Enter")
        tab.wait_for(f"document.querySelectorAll('.message.assistant .facts').length > {number}", ANSWER_TIMEOUT_S)
    _save(tab, DOCS / "playground.png")


def _save(tab: chromium.Tab, path: Path) -> None:
    tab.screenshot(path)
    size = path.stat().st_size
    print(f"{path.relative_to(DOCS.parent)}: {size / 1000:.0f} kB")
    if size > MAX_BYTES:
        raise SystemExit(f"{path} has more than {MAX_BYTES} bytes")


def main() -> None:
    executable = chromium.find()
    if executable is None:
        raise SystemExit("there is no Chromium: install one, such as Debian's package chromium")
    with server() as (url, admin_url):
        print(f"serving at {url}, status page at {admin_url}")
        with load(url):
            time.sleep(LOAD_S)
            with chromium.browser(executable) as tab:
                look(admin_url, tab)
                for error in tab.errors:
                    print(f"the page complains: {error}", file=sys.stderr)


if __name__ == "__main__":
    main()
