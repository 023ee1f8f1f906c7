"""What pipeline stages pass to each other. With one stage nothing is passed."""

from __future__ import annotations

import time
from typing import Protocol

from torch import Tensor


class StageLinks(Protocol):
    """Messages between the ranks of one tensor rank and different stages.

    Sends may return before the message has arrived; the caller must not change the tensor afterwards. Messages of one
    kind arrive in the order in which they were sent.
    """

    def expect_hidden(self, num_tokens: int) -> None:
        """One more step is coming, with so many tokens: its hidden states may arrive while others are computed."""
        ...

    def receive_hidden(self) -> Tensor | None:
        """Hidden states [tokens, hidden] of the stage before, for the oldest step that was expected; None on the first
        stage.
        """
        ...

    def send_hidden(self, hidden: Tensor) -> None:
        """Hidden states [tokens, hidden] to the next stage; nothing happens on the last one."""
        ...

    def send_tokens(self, tokens: Tensor) -> None:
        """Sampled tokens [samples] int64 from the last stage to the first; nothing happens on any other."""
        ...

    def receive_tokens(self, num_samples: int) -> Tensor:
        """The oldest tokens [num_samples] int64 that the first stage has not received yet. First of several stages
        only.
        """
        ...


class SingleStage:
    """Links of a stage that is alone."""

    def expect_hidden(self, num_tokens: int) -> None:
        pass

    def receive_hidden(self) -> Tensor | None:
        return None

    def send_hidden(self, hidden: Tensor) -> None:
        pass

    def send_tokens(self, tokens: Tensor) -> None:
        pass

    def receive_tokens(self, num_samples: int) -> Tensor:
        raise AssertionError("a single stage keeps its own tokens")


class TimedLinks:
    """Stage links that count the seconds for which they hold up their rank. Where the device waits by itself, as on
    CUDA, there are none.
    """

    def __init__(self, links: StageLinks) -> None:
        self._links = links
        self.waited_s = 0.0
        self.expect_hidden = links.expect_hidden
        self.send_hidden = links.send_hidden
        self.send_tokens = links.send_tokens

    def receive_hidden(self) -> Tensor | None:
        start = time.perf_counter()
        hidden = self._links.receive_hidden()
        self.waited_s += time.perf_counter() - start
        return hidden

    def receive_tokens(self, num_samples: int) -> Tensor:
        start = time.perf_counter()
        tokens = self._links.receive_tokens(num_samples)
        self.waited_s += time.perf_counter() - start
        return tokens
