"""`shoal chat`: talk to a running server from a terminal."""

from __future__ import annotations

import contextlib
import sys
from typing import Any

from shoal.cluster.commands.client import ServerError, get_json, stream_events


def chat(
    url: str,
    *,
    model: str | None = None,
    message: str | None = None,
    system: str | None = None,
    temperature: float | None = None,
    max_tokens: int | None = None,
) -> int:
    """One answer to `message`, or a conversation until /exit. Answers the exit code."""
    try:
        conversation = Conversation(url, model, system, temperature=temperature, max_tokens=max_tokens)
        if message is not None:
            conversation.ask(message)
        else:
            _converse(conversation)
    except ServerError as error:
        print(f"shoal: error: {error}", file=sys.stderr)
        return 1
    return 0


class Conversation:
    """Messages so far, and the server that continues them. Raises ServerError where the server does not."""

    def __init__(
        self,
        url: str,
        model: str | None,
        system: str | None,
        *,
        temperature: float | None,
        max_tokens: int | None,
    ) -> None:
        self._url = url.rstrip("/").removesuffix("/v1")
        self.model = model or str(get_json(f"{self._url}/v1/models")["data"][0]["id"])
        self._system = system
        settings = {"temperature": temperature, "max_tokens": max_tokens}
        self._settings = {name: value for name, value in settings.items() if value is not None}
        self.reset()

    def reset(self) -> None:
        """Forget everything but the system message."""
        self._messages: list[dict[str, str]] = []
        if self._system is not None:
            self._messages.append({"role": "system", "content": self._system})

    def ask(self, message: str) -> None:
        """Print the answer as it comes and remember both. Ctrl-C ends the answer and keeps what has come."""
        question = {"role": "user", "content": message}
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [*self._messages, question],
            "stream": True,
            **self._settings,
        }
        answer = ""
        with (
            contextlib.suppress(KeyboardInterrupt),
            contextlib.closing(stream_events(f"{self._url}/v1/chat/completions", body)) as events,
        ):
            for event in events:
                for choice in event["choices"]:
                    text = choice["delta"].get("content") or ""
                    answer += text
                    print(text, end="", flush=True)
        print(flush=True)
        self._messages += [question, {"role": "assistant", "content": answer}]


def _converse(conversation: Conversation) -> None:
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (gives input() editing and history)
    print(f"{conversation.model}: /reset forgets the conversation, /exit leaves")
    while True:
        try:
            message = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        match message:
            case "":
                continue
            case "/exit" | "/quit":
                return
            case "/reset":
                conversation.reset()
            case _ if message.startswith("/"):
                print(f"unknown command {message}: there are /reset and /exit")
            case _:
                _ask_and_go_on(conversation, message)


def _ask_and_go_on(conversation: Conversation, message: str) -> None:
    try:
        conversation.ask(message)
    except ServerError as error:
        print(f"error: {error}")
