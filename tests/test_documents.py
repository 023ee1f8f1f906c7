"""What the documents name is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from shoal.cluster.gateway.schema import ChatCompletionRequest, CompletionRequest
from shoal.cluster.metrics import METRICS

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md")


def text(document: str) -> str:
    return (ROOT / document).read_text()


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_to_files(document: str) -> None:
    links = re.findall(r"\]\(([^)#]+)\)", text(document))
    assert not [link for link in links if "://" not in link and not (ROOT / link).exists()]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_files_named_in_passing_exist(document: str) -> None:
    names = re.findall(
        r"\b(?:engine|cluster|kernels|tests|bench|examples)/[\w/.-]*\.(?:py|yaml|json)\b", text(document)
    )
    assert not [name for name in names if not (ROOT / name).exists()]


def test_the_readme_names_fields_and_metrics_that_there_are() -> None:
    table = text("README.md").partition("| Field | |")[2].partition("\n\n")[0]
    fields = {
        field for cell in re.findall(r"^\| (.*?) \|", table, re.MULTILINE) for field in re.findall(r"`([\w.]+)`", cell)
    }
    known = {*ChatCompletionRequest.model_fields, *CompletionRequest.model_fields, "stream_options.include_usage"}
    assert len(fields) > 25
    assert fields <= known
    named = {name.removesuffix("_total") for name in re.findall(r"`((?:vllm|shoal):\w+)`", text("README.md"))}
    assert named
    assert named <= METRICS.keys()


def test_the_documents_name_targets_that_make_has() -> None:
    (line,) = re.findall(r"^\.PHONY: (.*)$", text("Makefile"), re.MULTILINE)
    named = {word for document in DOCUMENTS for word in re.findall(r"(?:^|`)make (\w+)", text(document), re.MULTILINE)}
    assert {"serve", "test"} <= named <= set(line.split())
