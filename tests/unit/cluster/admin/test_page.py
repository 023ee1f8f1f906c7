"""What somebody sees in a browser: the page with the real admin application behind it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest


@pytest.fixture
def page(tab: Any, admin: Any) -> Iterator[Any]:
    """The status page over a cluster that has been busy; it may complain of nothing."""
    admin.live(40)
    tab.size(1280, 900)
    tab.open(f"{admin.url}/?{time.monotonic()}")
    tab.wait_for("document.querySelectorAll('.group').length > 0 && document.querySelector('.plot .line')")
    yield tab
    assert tab.errors == []


def text(page: Any, selector: str) -> str:
    return str(page.run(f"document.querySelector({selector!r}).innerText"))


def test_plots_are_drawn_with_their_values(page: Any) -> None:
    drawn = page.run(
        "[...document.querySelectorAll('.plot')].map((plot) => plot.querySelector('.line').getAttribute('d'))"
    )
    assert len(drawn) == 8
    assert sum(path.count("L") > 20 for path in drawn) >= 6
    assert "tokens/s" in text(page, "#tiles")
    first = text(page, ".plot")
    assert "Tokens per second" in first
    assert "output" in first
    assert "now" in first


def test_a_plot_is_read_with_the_keyboard(page: Any) -> None:
    page.run("document.querySelector('.plot svg').focus()")
    assert text(page, ".plot .when") == ""
    page.press("ArrowLeft")
    assert text(page, ".plot .when").count(":") == 2


def test_every_group_and_rank_is_listed(page: Any) -> None:
    shown = text(page, "#cluster")
    for expected in ("Group 0", "Group 1", "starting", "AMD EPYC", "15–29", "10.0.0.2", "128 MiB", "Gateways"):
        assert expected in shown
    assert "3 of 4 groups are running" in text(page, "#state")
    assert page.run("document.querySelectorAll('#cluster .group tbody tr').length") == 5


def test_decisions_are_shown_with_the_cost_of_every_group(page: Any) -> None:
    page.wait_for("document.querySelectorAll('#decisions tbody tr').length === 3")
    row = text(page, "#decisions tbody tr")
    assert "cmpl-1" in row
    assert row.count("30 ms") == 2


def test_the_slowest_requests_are_shown_with_their_spans_once_there_are_some(page: Any, admin: Any) -> None:
    assert page.run("document.querySelector('#requests-part').hidden")
    spans = [{"kind": "queue", "start_s": 5.0, "end_s": 6.0}, {"kind": "decode", "start_s": 6.0, "end_s": 9.0}]
    admin.cluster.requests = [{"request_id": "slow-1", "model": "smollm2", "replica": "0", "spans": spans}]
    page.wait_for("document.querySelectorAll('#requests .spans i').length === 2")
    assert "slow-1" in text(page, "#requests")


def test_names_from_outside_stay_text(page: Any) -> None:
    evil = "<img src=x onerror=window.hacked=1>"
    page.wait_for("document.querySelectorAll('#decisions tbody tr').length === 3")
    assert evil in text(page, "#cluster")
    assert evil in text(page, "#decisions")
    page.run("location.hash = '#playground'")
    page.run(f"document.querySelector('#chat-model').value = {evil!r}")
    assert page.run("document.querySelectorAll('img').length") == 0
    assert page.run("window.hacked") is None


def test_the_playground_streams_an_answer(page: Any, admin: Any) -> None:
    page.run("location.hash = '#playground'")
    page.run(
        "document.querySelector('#chat-key').value = 'sk-1'; document.querySelector('#chat-system').value = 'Be kind.'"
    )
    page.run("document.querySelector('#chat-input').focus()")
    page.type("Who are you?")
    page.press("Enter")
    page.wait_for("document.querySelector('.message.assistant .facts')")
    assert text(page, ".message.assistant .body") == "Hello, you."
    facts = text(page, ".message.assistant .facts")
    for expected in ("tokens/s", "first token", "3 tokens", "16 of 20 prompt tokens cached", "group 1"):
        assert expected in facts
    (body,) = admin.gateway.bodies
    assert [message["role"] for message in body["messages"]] == ["system", "user"]
    assert admin.gateway.headers[-1]["authorization"] == "Bearer sk-1"


def test_an_answer_can_be_stopped_and_the_gateway_hears_of_it(page: Any, admin: Any) -> None:
    admin.gateway.pieces = ["word "] * 1000
    page.run("location.hash = '#playground'")
    page.run("document.querySelector('#chat-input').focus()")
    page.type("Go on.")
    page.press("Enter")
    page.wait_for("document.querySelector('.message.assistant .body').innerText.includes('word word')")
    page.run("document.querySelector('#chat-stop').click()")
    page.wait_for("document.querySelector('.message.assistant .facts')?.innerText.includes('stopped')")
    deadline = time.monotonic() + 10
    while admin.gateway.num_open:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_refusal_is_shown_in_the_servers_words(tab: Any, admin: Any) -> None:
    admin.gateway.key = "sk-2"
    tab.open(f"{admin.url}/?refusal#playground")
    tab.wait_for("document.querySelector('#chat-model').value !== ''")
    tab.run("document.querySelector('#chat-input').focus()")
    tab.type("Hello?")
    tab.press("Enter")
    tab.wait_for("document.querySelector('.message.failed')")
    assert "401: this server wants an API key" in text(tab, ".message.failed")


@pytest.mark.parametrize("fragment", ["", "#playground"])
@pytest.mark.parametrize("is_dark", [False, True])
def test_a_phone_needs_no_horizontal_scrolling(page: Any, admin: Any, fragment: str, is_dark: bool) -> None:
    page.size(360, 740, is_mobile=True, is_dark=is_dark)
    page.open(f"{admin.url}/?phone{is_dark}{fragment}")
    page.wait_for("document.querySelectorAll('.group').length > 0")
    assert page.run("document.documentElement.scrollWidth") <= 360
    assert page.run("document.documentElement.clientWidth") == 360


def test_a_server_that_goes_is_missed_and_found_again(tab: Any, admin: Any) -> None:
    admin.live(3)
    tab.open(f"{admin.url}/?gone")
    tab.wait_for("document.querySelectorAll('.group').length > 0")
    admin.cluster.is_gone = True
    tab.wait_for("!document.querySelector('#trouble').hidden")
    assert "no gateway answers" in text(tab, "#trouble")
    admin.cluster.is_gone = False
    tab.wait_for("document.querySelector('#trouble').hidden")
