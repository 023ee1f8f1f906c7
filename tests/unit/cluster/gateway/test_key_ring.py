"""Keys change while the gateway runs: a right file within moments, a wrong one never."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from shoal.cluster.gateway.key_ring import KeyRing
from shoal.cluster.keys import KEY_PREFIX, NewKey, new_key
from shoal.engine.config import ConfigError


def write(path: Path, *made: NewKey) -> None:
    path.write_text("keys:\n" + "".join(one.yaml for one in made))


def until(condition: Callable[[], bool], timeout_s: float = 2.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def one() -> NewKey:
    return new_key("acme")


@pytest.fixture
def two() -> NewKey:
    return new_key("umbrella")


@pytest.fixture
def path(tmp_path: Path, one: NewKey) -> Path:
    write(tmp_path / "keys.yaml", one)
    return tmp_path / "keys.yaml"


def test_only_whole_keys_are_found(path: Path, one: NewKey, two: NewKey) -> None:
    ring = KeyRing(path)
    assert ring.find(one.key) == one.entry
    for wrong in (two.key, "", one.key[:-1], one.key + "a", one.key.upper(), one.entry.sha256, "x" * 10**6, "\udcff"):
        assert ring.find(wrong) is None


def test_a_file_that_is_wrong_at_the_start_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        KeyRing(tmp_path / "none.yaml")
    (tmp_path / "keys.yaml").write_text("keys: 3")
    with pytest.raises(ConfigError):
        KeyRing(tmp_path / "keys.yaml")


def test_a_change_is_seen_within_two_seconds(path: Path, one: NewKey, two: NewKey) -> None:
    ring = KeyRing(path)
    ring.start()
    try:
        write(path, two)
        until(lambda: ring.find(two.key) is not None and ring.find(one.key) is None)
    finally:
        ring.close()


def test_two_changes_within_one_tick_of_the_files_clock_are_both_seen(path: Path, one: NewKey, two: NewKey) -> None:
    """The second one leaves size, inode and times as they were."""
    other = NewKey(two.entry.model_copy(update={"id": "a" * len(one.entry.id), "tenant": one.entry.tenant}), two.key)
    ring = KeyRing(path)
    before = path.stat()
    write(path, other)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    ring._signature = (before.st_dev, before.st_ino, before.st_mtime_ns, path.stat().st_ctime_ns, before.st_size)
    assert ring.refresh()
    assert ring.find(two.key) is not None


def test_a_mounted_secret_that_kubernetes_swaps_is_read_anew(tmp_path: Path, one: NewKey, two: NewKey) -> None:
    """The file is a link into ..data, which is a link to a folder, and that one is replaced."""
    for name, made in (("..1", one), ("..2", two)):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "keys.yaml", made)
    (tmp_path / "..data").symlink_to("..1")
    (tmp_path / "keys.yaml").symlink_to("..data/keys.yaml")
    ring = KeyRing(tmp_path / "keys.yaml")
    assert ring.find(one.key) is not None
    (tmp_path / "..data_tmp").symlink_to("..2")
    (tmp_path / "..data_tmp").rename(tmp_path / "..data")
    assert ring.refresh()
    assert ring.find(one.key) is None
    assert ring.find(two.key) is not None


@pytest.mark.parametrize("content", ["keys: [", "keys: 3", "", "keys:\n- id: a\n", None])
def test_a_broken_file_keeps_the_old_keys_and_says_so_once(
    path: Path, one: NewKey, two: NewKey, content: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    ring = KeyRing(path)
    if content is None:
        path.unlink()
    else:
        path.write_text(content + f"\n# {one.key}")
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            assert not ring.refresh()
    assert ring.is_broken
    assert ring.find(one.key) == one.entry
    assert ring.find(two.key) is None
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    assert KEY_PREFIX not in caplog.text
    write(path, two)
    assert ring.refresh()
    assert not ring.is_broken
    assert ring.find(one.key) is None


def test_no_keys_let_nobody_in(path: Path, one: NewKey) -> None:
    ring = KeyRing(path)
    path.write_text("keys: []")
    assert ring.refresh()
    assert ring.find(one.key) is None
