"""nginx with the committed configuration, in front of two gateway processes whose replicas are played."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import signal
import ssl
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from shoal.cluster.commands.serve import free_ports

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "deploy" / "nginx" / "shoal.conf"
TEXT = "The capital of France is Paris."
START_TIMEOUT_S = 60.0
pytestmark = pytest.mark.skipif(
    shutil.which("nginx") is None or shutil.which("openssl") is None, reason="needs nginx and openssl"
)


def serve_gateway(port: int) -> None:
    """A gateway at `port`, whose replica takes a second for an answer and names the gateway in its placement. SIGUSR1
    makes it drain.
    """
    import uvicorn

    from shoal.cluster.config import EMBEDDED_MODEL, locate_model
    from shoal.cluster.gateway.backend import GenerateCall, Placement, Prediction, ServedModel
    from shoal.cluster.gateway.readiness import DrainableApp
    from shoal.cluster.gateway.routes import build_app
    from shoal.engine.request import FinishReason, RequestOutput
    from shoal.engine.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(locate_model(EMBEDDED_MODEL))
    tokens = tokenizer.encode(TEXT)

    class Played:
        async def predict(self, call: GenerateCall) -> Prediction | None:
            return None

        def placement(self, call: GenerateCall) -> Placement | None:
            return Placement(str(port), 0, None)

        async def check_health(self) -> None:
            pass

        async def generate(self, call: GenerateCall) -> AsyncGenerator[list[RequestOutput], None]:
            for number, token in enumerate(tokens):
                await asyncio.sleep(1.0 / len(tokens))
                reason = FinishReason.LENGTH if number == len(tokens) - 1 else None
                yield [RequestOutput(name, (token,), finish_reason=reason) for name in call.sample_ids]

    served = ServedModel("m", tokenizer, 512, tokenizer.vocab_size, 0, Played())  # type: ignore[arg-type]
    app = DrainableApp(build_app({"m": served}))
    signal.signal(signal.SIGUSR1, lambda number, frame: setattr(app, "is_draining", True))
    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning")


class Gateway:
    """In a process of its own."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen([sys.executable, __file__, str(self.port)])

    def wait(self) -> None:
        wait_for(f"http://127.0.0.1:{self.port}/health")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


def wait_for(url: str) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(url).status_code == 200:
                return
        assert time.monotonic() < deadline, f"{url} does not answer"
        time.sleep(0.05)


class Front:
    """nginx and two gateways behind it."""

    def __init__(self, folder: Path) -> None:
        *ports, http, https = free_ports(4)
        self.gateways = [Gateway(port) for port in ports]
        self.url, self.tls_url = f"http://127.0.0.1:{http}", f"https://localhost:{https}"
        self.certificate = folder / "shoal.crt"
        key = folder / "shoal.key"
        subprocess.run(
            ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
             "-days", "2", "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost",
             "-keyout", str(key), "-out", str(self.certificate)],
            check=True, capture_output=True,
        )  # fmt: skip
        site = CONFIG.read_text()
        for old, new in (
            ("127.0.0.1:8000", f"127.0.0.1:{ports[0]}"), ("127.0.0.1:8001", f"127.0.0.1:{ports[1]}"),
            ("listen 8080", f"listen {http}"), ("listen 8443", f"listen {https}"),
            ("/etc/nginx/shoal.crt", str(self.certificate)), ("/etc/nginx/shoal.key", str(key)),
        ):  # fmt: skip
            assert site.count(old) == 1, old
            site = site.replace(old, new)
        kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        temporary = "".join(f"{kind}_temp_path {folder / kind};\n" for kind in kinds)
        config = folder / "nginx.conf"
        config.write_text(
            f"daemon off;\npid {folder / 'pid'};\nerror_log {folder / 'error.log'};\nevents {{}}\n"
            f"http {{\naccess_log off;\n{temporary}{site}}}\n"
        )
        self._command = ["nginx", "-p", str(folder), "-c", str(config), "-e", str(folder / "error.log")]
        done = subprocess.run([*self._command, "-t"], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        for gateway in self.gateways:
            gateway.wait()
        self.process = subprocess.Popen(self._command)
        wait_for(f"{self.url}/health")

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(10)
        for gateway in self.gateways:
            gateway.kill()


@pytest.fixture(scope="module")
def front(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Front]:
    front = Front(tmp_path_factory.mktemp("nginx"))
    yield front
    front.close()


BODY: dict[str, Any] = {"model": "m", "prompt": "Where?", "max_tokens": 64}


async def plain(client: httpx.AsyncClient, url: str) -> tuple[str, str]:
    """Text of an answer, and the gateway that it is from."""
    answer = await client.post(f"{url}/v1/completions", json=BODY)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["text"], answer.headers["x-shoal-replica"]


async def streamed(client: httpx.AsyncClient, url: str, pieces: list[float] | None = None) -> tuple[str, str]:
    """The same, of a stream; the times of its events go to `pieces`."""
    text = ""
    async with client.stream("POST", f"{url}/v1/completions", json={**BODY, "stream": True}) as answer:
        assert answer.status_code == 200, await answer.aread()
        async for line in answer.aiter_lines():
            if line == "data: [DONE]":
                return text, answer.headers["x-shoal-replica"]
            if line:
                text += json.loads(line.removeprefix("data: "))["choices"][0]["text"]
                if pieces is not None:
                    pieces.append(time.monotonic())
    raise AssertionError("the stream was cut off")


async def test_both_gateways_get_requests_and_streams_are_not_held_back(front: Front) -> None:
    pieces: list[float] = []
    async with httpx.AsyncClient(timeout=30) as client:
        answers = await asyncio.gather(
            *(plain(client, front.url) for _ in range(8)), *(streamed(client, front.url) for _ in range(8))
        )
        assert (await streamed(client, front.url, pieces))[0] == TEXT
    assert {text for text, _ in answers} == {TEXT}
    assert min(Counter(gateway for _, gateway in answers).values()) >= 4
    assert len(answers) == 16
    assert pieces[-1] - pieces[0] > 0.3


async def test_tls_ends_at_nginx(front: Front) -> None:
    context = ssl.create_default_context(cafile=str(front.certificate))
    async with httpx.AsyncClient(timeout=30, verify=context) as client:
        assert (await streamed(client, front.tls_url))[0] == TEXT


async def test_a_killed_gateway_loses_no_new_request_and_comes_back(front: Front) -> None:
    first, second = front.gateways
    async with httpx.AsyncClient(timeout=30, limits=httpx.Limits(max_connections=50)) as client:
        begun = [asyncio.create_task(streamed(client, front.url)) for _ in range(8)]
        await asyncio.sleep(0.5)
        first.kill()
        new = [asyncio.create_task((plain, streamed)[n % 2](client, front.url)) for n in range(12)]
        ends = await asyncio.gather(*begun, return_exceptions=True)
        answers = await asyncio.gather(*new)
        assert answers == [(TEXT, str(second.port))] * 12
        # What had begun on the other one ends as it would have, and the rest is cut off: it does not look whole.
        whole = [end for end in ends if not isinstance(end, BaseException)]
        assert 0 < len(whole) < 8
        assert set(whole) == {(TEXT, str(second.port))}
        first.start()
        first.wait()
        deadline = time.monotonic() + 15
        answering: set[str] = set()
        while str(first.port) not in answering:
            assert time.monotonic() < deadline, "the gateway that is back gets nothing"
            answering = {one for _, one in await asyncio.gather(plain(client, front.url), plain(client, front.url))}


async def test_a_gateway_that_drains_finishes_and_gets_nothing_new(front: Front) -> None:
    first, second = front.gateways
    async with httpx.AsyncClient(timeout=30) as client:
        begun = [asyncio.create_task(streamed(client, front.url)) for _ in range(8)]
        await asyncio.sleep(0.3)
        first.process.send_signal(signal.SIGUSR1)
        await asyncio.sleep(0.1)
        answers = await asyncio.gather(*((plain, streamed)[n % 2](client, front.url) for n in range(8)))
        assert answers == [(TEXT, str(second.port))] * 8
        assert {text for text, _ in await asyncio.gather(*begun)} == {TEXT}


if __name__ == "__main__":
    serve_gateway(int(sys.argv[1]))
