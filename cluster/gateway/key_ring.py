"""The keys that a gateway knows now: read from the keys file, and again when it changes."""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path
from typing import Final

from shoal.cluster.keys import MAX_KEY_CHARS, KeyEntry, KeyFile, hash_key, read_keys
from shoal.engine.config import ConfigError

log = logging.getLogger(__name__)

CHECK_PERIOD_S: Final = 0.5
# A file may be written twice within one tick of its clock. What was read so soon after a change is read once more.
_SETTLE_S: Final = 2.0
_CLOSE_TIMEOUT_S: Final = 5.0

_Signature = tuple[int, int, int, int, int]


class KeyRing:
    """`find` may be called from any thread; a thread of its own looks at the file.

    A file that cannot be used changes nothing: the keys that were in use stay so, and the log tells what is wrong.
    """

    def __init__(self, path: str | Path) -> None:
        """Raises ConfigError where the file is not there or wrong."""
        self._path = Path(path)
        self._signature = _signature(self._path)
        self._read_s = time.time()
        self._file = read_keys(self._path)
        self._problem = ""
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="keys", daemon=True)

    def start(self) -> None:
        """Begin to look for changes."""
        self._thread.start()

    def close(self) -> None:
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join(_CLOSE_TIMEOUT_S)

    @property
    def file(self) -> KeyFile:
        return self._file

    @property
    def is_broken(self) -> bool:
        """Whether the file as it is now cannot be used."""
        return bool(self._problem)

    def find(self, key: str) -> KeyEntry | None:
        """The entry of a presented key; None for one that is not in the file.

        How long it takes tells nothing of use: what is looked up is the hash, and whoever could choose hashes that
        begin as a known one does would have broken SHA-256.
        """
        return None if len(key) > MAX_KEY_CHARS else self._file.by_hash.get(hash_key(key))

    def entry(self, key_id: str) -> KeyEntry | None:
        return self._file.by_id.get(key_id)

    def refresh(self) -> bool:
        """Read the file if it has changed; whether other keys are in use now."""
        signature = _signature(self._path)
        is_settled = self._signature is not None and self._read_s - self._signature[2] / 1e9 > _SETTLE_S
        if signature == self._signature and is_settled:
            return False
        self._signature, self._read_s = signature, time.time()
        try:
            file = read_keys(self._path)
        except ConfigError as error:
            self._complain(str(error))
            return False
        if self._problem:
            self._problem = ""
            log.info("the keys file %s is right again", self._path)
        if file == self._file:
            return False
        self._file = file
        log.info("read %d API keys from %s", len(file.keys), self._path)
        return True

    def _complain(self, problem: str) -> None:
        if problem != self._problem:
            self._problem = problem
            log.error("the keys file cannot be used, and the keys read before stay in use: %s", problem)

    def _watch(self) -> None:
        while not self._closing.wait(CHECK_PERIOD_S):
            try:
                self.refresh()
            except Exception:  # whatever it is, the next change must be seen
                log.exception("could not look at the keys file")


def _signature(path: Path) -> _Signature | None:
    """Changes when the file is written, replaced, or linked to another one, as Kubernetes does with a Secret."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_mtime_ns, found.st_ctime_ns, found.st_size
