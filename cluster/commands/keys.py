"""`shoal keys`: make API keys, and check the file that holds their hashes."""

from __future__ import annotations

import os
import sys
import tempfile
from collections import Counter
from pathlib import Path

from shoal.cluster.keys import NewKey, parse_keys, read_keys
from shoal.engine.config import ConfigError

_HEADER = (
    "# API keys by their SHA-256; `shoal keys new --append` adds one. Gateways read this file again when it changes.\n"
)


def show_new_key(made: NewKey, *, append: str | None) -> int:
    """Print the key, once, and its entry, or add the entry to a file. Raises ConfigError, with no key printed."""
    if append is None:
        print(made.key)
        print("\n# the key is shown only now; this goes into the keys file, under `keys:`", file=sys.stderr)
        print(made.yaml, end="", file=sys.stderr)
        return 0
    append_entry(Path(append), made)
    print(made.key)
    print(f"\n# the key is shown only now; {append} has its hash, as {made.entry.id}", file=sys.stderr)
    return 0


def append_entry(path: Path, made: NewKey) -> None:
    """Add an entry to a keys file, in one step for whoever reads it, or make the file. Raises ConfigError."""
    try:
        before = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        before = _HEADER + "keys:\n"
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    else:
        read_keys(path)
    after = before.rstrip("\n") + "\n" + made.yaml
    try:
        parse_keys(after.encode(), str(path))
    except ConfigError as error:
        raise ConfigError(
            f"{path} cannot be added to as it is written: its last part must be the list `keys` with `- id:` at the "
            f"beginning of a line ({str(error).splitlines()[0]})"
        ) from None
    try:
        _replace(path.resolve(), after)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from None


def check_keys(path: str) -> int:
    """Say what a keys file holds. Raises ConfigError with each problem on a line."""
    file = read_keys(Path(path))
    tenants = Counter(entry.tenant for entry in file.keys)
    print(f"{path} is right: {len(file.keys)} keys of {len(tenants)} tenants")
    for tenant, count in sorted(tenants.items()):
        names = ", ".join(entry.id for entry in file.keys if entry.tenant == tenant)
        print(f"  {tenant}: {count} ({names})")
    return 0


def _replace(path: Path, text: str) -> None:
    mode = path.stat().st_mode & 0o777 if path.exists() else 0o600
    handle, unfinished = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        Path(unfinished).chmod(mode)
        Path(unfinished).rename(path)
    except OSError:
        Path(unfinished).unlink(missing_ok=True)
        raise
