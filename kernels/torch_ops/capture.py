"""Capturing a step: what it launches is noted once and launched again as a whole, as CUDA graphs do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

Tensors = tuple[Tensor, ...]


class NotCapturableError(Exception):
    """What was to be captured does something that cannot be launched again; the message says what."""


class Capture(Protocol):
    """Makes captures that share memory: what one of them returns is good until another one runs."""

    def __call__(self, run: Callable[[], Tensors]) -> tuple[Tensors, Callable[[], None]]:
        """Do `run`; answers what it returned and a function that does the same again, into the same tensors.

        Tensors that `run` reads and did not make have to stay where they are; their contents may be others by then.
        Raises NotCapturableError, perhaps after part of the work.
        """
        ...


def new_capture() -> Capture:
    """Of plain torch: none."""

    def capture(run: Callable[[], Tensors]) -> tuple[Tensors, Callable[[], None]]:
        raise NotCapturableError("operations of torch")

    return capture
