"""Compiling the C++ kernels: once, safely, and without a compiler not at all."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from shoal.kernels import dispatch
from shoal.kernels.cpu_ops import library


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SHOAL_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def forgotten_tables() -> Iterator[None]:
    dispatch.operations.cache_clear()
    library.library.cache_clear()
    yield
    dispatch.operations.cache_clear()
    library.library.cache_clear()


def slow_compiler(folder: Path) -> Path:
    """Stands for c++: writes its process id twice, a while apart, to the file after -o, and a line to `calls`."""
    script = folder / "compiler"
    script.write_text(
        "#!/bin/sh\n"
        'if [ "$1" = --version ]; then echo 1; exit; fi\n'
        f"echo called >> {folder}/calls\n"
        "for last; do :; done\n"
        'printf %s "$$" > "$last"; sleep 0.2; printf %s "-$$" >> "$last"\n'
    )
    script.chmod(0o755)
    return script


def test_processes_that_build_at_once_all_get_a_complete_library(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", str(slow_compiler(tmp_path)))
    with ThreadPoolExecutor(4) as pool:
        paths = {future.result() for future in [pool.submit(library.build) for _ in range(4)]}
    (path,) = paths
    first, second = path.read_text().split("-")
    assert first == second
    assert list(cache.iterdir()) == [path]
    calls = (tmp_path / "calls").read_text()
    assert library.build() == path
    assert (tmp_path / "calls").read_text() == calls


def test_another_compiler_or_flag_gets_its_own_library(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = slow_compiler(tmp_path)
    monkeypatch.setenv("CXX", str(compiler))
    plain = library.build()
    monkeypatch.setenv("CXX", f"{compiler} -O1")
    assert library.build() != plain


def test_without_a_compiler_the_twins_serve_and_say_so_once(
    cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, forgotten_tables: None
) -> None:
    monkeypatch.setenv("CXX", "/nonexistent/c++")
    with caplog.at_level(logging.WARNING):
        table = dispatch.operations("cpu")
        dispatch.operations("cpu")
    assert table.attention is dispatch.reference().attention
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "/nonexistent/c++" in caplog.text
    assert list(cache.glob("*.part")) == []


def test_a_failing_compiler_reports_its_own_words(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "broken"
    script.write_text("#!/bin/sh\n[ $1 = --version ] && exit\necho no such instruction >&2; exit 1\n")
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    with pytest.raises(library.CompilerError, match="no such instruction"):
        library.build()


def test_kernels_run_on_the_openmp_that_torch_loaded() -> None:
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("needs /proc")
    library.library()
    loaded = {line.split()[-1] for line in maps.read_text().splitlines() if "libgomp" in line}
    assert len(loaded) == 1
