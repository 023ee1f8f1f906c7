"""Log lines that programs read: which request, replica and node they are about."""

from __future__ import annotations

import asyncio
import io
import json
import logging
from collections.abc import Iterator

import pytest
from ray.serve._private.logging_utils import configure_component_logger
from ray.serve.schema import LoggingConfig

from shoal.cluster.logs import about_request, log_as_environment_says, log_environment, log_to, log_to_serve

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in ("shoal", "ray.serve")]
    before = [(one.handlers[:], one.propagate, one.level) for one in loggers]
    yield
    for one, (handlers, propagate, level) in zip(loggers, before, strict=True):
        one.handlers[:], one.propagate = handlers, propagate
        one.setLevel(level)


def test_a_json_line_holds_what_the_record_says_and_where_it_was_said() -> None:
    stream = io.StringIO()
    log_to(stream, "json", "INFO", replica="3", node="n1")
    log = logging.getLogger("shoal.cluster.replica.calls")
    log.debug("not shown")
    with about_request("r1", PARENT):
        log.info("call %s", "c1", extra={"num_tokens": 7})
    try:
        raise ValueError("two\nlines")
    except ValueError:
        log.exception("failed")
    first, second = map(json.loads, stream.getvalue().splitlines())
    assert first.pop("timestamp").endswith("+00:00")
    assert first == {
        "level": "INFO", "logger": "shoal.cluster.replica.calls", "replica": "3", "node": "n1", "request_id": "r1",
        "trace_id": "0af7651916cd43dd8448eb211c80319c", "message": "call c1", "num_tokens": 7,
    }  # fmt: skip
    assert "request_id" not in second
    assert "ValueError: two\nlines" in second["exception"]


async def test_requests_at_once_do_not_mix() -> None:
    stream = io.StringIO()
    log_to(stream, "json", "INFO")

    async def serve(name: str) -> None:
        with about_request(name):
            await asyncio.sleep(0)
            logging.getLogger("shoal.x").info("of %s", name)

    await asyncio.gather(*(serve(f"r{i}") for i in range(5)))
    for line in map(json.loads, stream.getvalue().splitlines()):
        assert line["message"] == f"of {line['request_id']}"


def test_a_ranks_process_learns_format_and_level_from_its_environment(capsys: pytest.CaptureFixture[str]) -> None:
    log_as_environment_says(log_environment("json", "WARNING"), replica="2")
    log = logging.getLogger("shoal.engine.group.rank")
    log.info("not shown")
    log.error("rank 1 failed")
    line = json.loads(capsys.readouterr().err)
    assert (line["replica"], line["level"], line["message"]) == ("2", "ERROR", "rank 1 failed")


def test_serves_own_file_has_our_fields_on_its_lines_and_ours_and_at_once(tmp_path) -> None:
    config = LoggingConfig(encoding="JSON", logs_dir=str(tmp_path), enable_access_log=False)
    configure_component_logger(
        component_name="gateway", component_id="g1", logging_config=config, max_bytes=0, backup_count=0,
        buffer_size=1000,
    )  # fmt: skip
    log_to_serve("json", "INFO", node="n1")
    with about_request("r1"):
        logging.getLogger("shoal.cluster.gateway.recording").info("POST", extra={"status": 200})
    logging.getLogger("ray.serve").info("of Serve itself")
    (file,) = tmp_path.glob("*.log")
    ours, serves = map(json.loads, file.read_text().splitlines())
    assert (ours["request_id"], ours["status"], ours["node"]) == ("r1", 200, "n1")
    for line in (ours, serves):
        assert {"timestamp", "level", "logger", "message", "node"} <= line.keys()
    assert serves["logger"] == "ray.serve"
