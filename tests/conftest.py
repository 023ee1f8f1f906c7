"""Which tests want the machine for themselves: `make test` runs the others side by side first."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import pytest

# Whole servers, ranks that are killed, and models that compute with as many threads as there are cores.
ALONE: Final = (
    "distributed/test_failures.py",
    "distributed/test_memory.py",
    "e2e",
    "gpu",
    "deploy/test_helm_start.py",
    "test_examples.py",
    "unit/engine/test_beam_search.py",
    "unit/engine/test_equality.py",
    "unit/engine/test_llm.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    root = Path(__file__).parent
    for item in items:
        path = item.path.relative_to(root).as_posix()
        if path.startswith(ALONE):
            item.add_marker(pytest.mark.alone)
