"""Models from a Hugging Face hub: `hf://organization/name[@revision][/file.gguf]`, fetched into the hub's own cache.

HF_TOKEN, HF_HOME, HF_ENDPOINT and HF_HUB_OFFLINE mean what they mean to huggingface_hub. Nodes fetch for themselves,
unless HF_HOME is a folder that they share.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias

from shoal.engine.config import ConfigError

PREFIX: Final = "hf://"
MAX_TRIES: Final = 4
FIRST_PAUSE_S: Final = 1.0  # doubled from try to try
_TOKENIZER: Final = ("*.json", "*.txt", "*.model", "*.jinja")
_WEIGHTS: Final = ("*.safetensors",)
_NOT: Final = ("*/*", "consolidated*")  # folders hold the same model in other formats
_PATTERN: Final = re.compile(r"hf://([\w.-]+/[\w.-]+)(?:@([\w./-]+?))?(?:/([^@]+\.gguf))?")

Progress: TypeAlias = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Reference:
    """A model on the hub. `file`: the .gguf file that it is, if it is one."""

    repo: str
    revision: str | None = None
    file: str | None = None

    @classmethod
    def parse(cls, text: str) -> Reference:
        """Raises ConfigError."""
        match = _PATTERN.fullmatch(text)
        if match is None:
            raise ConfigError(
                f"{text} names no model of a hub: write hf://organization/name, hf://organization/name@revision or "
                f"hf://organization/name/file.gguf",
                field="model",
            )
        return cls(match[1], match[2], match[3])

    @property
    def name(self) -> str:
        """What the model is called."""
        return Path(self.file).stem if self.file is not None else self.repo.partition("/")[2]


def fetch(text: str, *, has_weights: bool = True, on_progress: Progress | None = None) -> str:
    """Path of the checkpoint, or of its tokenizer and configuration only; what is there already is not fetched again.

    Raises ConfigError that says why it cannot be had. A connection that breaks is tried again, MAX_TRIES times.
    """
    from huggingface_hub import snapshot_download

    reference = Reference.parse(text)
    if reference.file is not None:  # it holds its tokenizer
        patterns: tuple[str, ...] = (reference.file,)
    else:
        patterns = _TOKENIZER + (_WEIGHTS if has_weights else ())
    folder = _patiently(
        text,
        lambda: snapshot_download(
            reference.repo,
            revision=reference.revision,
            allow_patterns=list(patterns),
            ignore_patterns=list(_NOT) if reference.file is None else None,
            tqdm_class=_bar(on_progress) if on_progress is not None else None,
        ),
    )
    path = Path(folder) / (reference.file or "")
    _check_files(text, path, has_weights=has_weights)
    return str(path)


def check(text: str) -> None:
    """Raise ConfigError for a model that the hub does not have or does not give us. Fetches nothing large."""
    fetch(text, has_weights=False) if Reference.parse(text).file is None else _check_gguf(text)


def pinned(text: str, path: str) -> str:
    """The reference with the revision that was fetched to `path`, so that others fetch the same."""
    reference = Reference.parse(text)
    parts = Path(path).parts
    revision = parts[parts.index("snapshots") + 1]
    return f"{PREFIX}{reference.repo}@{revision}" + (f"/{reference.file}" if reference.file is not None else "")


def _check_gguf(text: str) -> None:
    from huggingface_hub import HfApi

    reference = Reference.parse(text)
    files = _patiently(text, lambda: HfApi().list_repo_files(reference.repo, revision=reference.revision))
    if reference.file not in files:
        raise _no_file(text, [file for file in files if file.endswith(".gguf")])


def _check_files(text: str, path: Path, *, has_weights: bool) -> None:
    if path.suffix == ".gguf":
        if not path.exists():
            raise _no_file(text, [])
        return
    if not (path / "config.json").exists():
        raise ConfigError(f"{text} has no config.json: it is no model that Shoal can serve", field="model")
    if has_weights and not list(path.glob("*.safetensors")):
        raise ConfigError(
            f"{text} has no .safetensors files; of a repository of GGUF files name one: {text}/FILE.gguf", field="model"
        )


def _no_file(text: str, known: list[str]) -> ConfigError:
    return ConfigError(f"{text} is not there" + (f"; there are {', '.join(known)}" if known else ""), field="model")


def _patiently(text: str, get: Callable[[], Any]) -> Any:
    """What `get` answers; connections that break and servers that fail are tried again."""
    pause_s = FIRST_PAUSE_S
    for number in range(1, MAX_TRIES + 1):
        try:
            return get()
        except Exception as error:  # of the HTTP library that huggingface_hub has chosen, too
            if number == MAX_TRIES or not _is_passing(error):
                raise _explained(text, error) from error
            time.sleep(pause_s)
            pause_s *= 2
    raise AssertionError("the last try answers or raises")


def _is_passing(error: Exception) -> bool:
    """Whether trying again may help."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is not None:
        return bool(status == 429 or status >= 500)
    return not isinstance(error, ValueError) and not _is_offline()


def _is_offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def _explained(text: str, error: Exception) -> ConfigError:
    from huggingface_hub import errors, get_token

    reference = Reference.parse(text)
    match error:
        case errors.GatedRepoError():
            why = f"{text} is gated: accept its terms on its page, and set HF_TOKEN to a token of that account"
        case errors.RevisionNotFoundError():
            why = f"{reference.repo} has no revision {reference.revision}"
        case errors.RepositoryNotFoundError():
            hint = "" if get_token() else "; for a private one set HF_TOKEN"
            why = f"the hub has no model {reference.repo}{hint}"
        case _:
            state = "it is offline (HF_HUB_OFFLINE)" if _is_offline() else f"{type(error).__name__}: {error}"
            why = f"cannot get {text}, and it is not in the cache (HF_HOME): {state}"
    return ConfigError(why, field="model")


def _bar(on_progress: Progress) -> type:
    """A progress bar for huggingface_hub that tells of bytes instead of drawing."""
    from tqdm import tqdm

    class Told(tqdm):  # type: ignore[type-arg]
        def __init__(self, *args: Any, **options: Any) -> None:
            options.pop("name", None)  # huggingface_hub's own
            super().__init__(*args, **{**options, "disable": True})
            self.total = options.get("total")
            self._is_bytes = options.get("unit") == "B"
            self._done = 0

        def update(self, n: float | None = 1) -> None:
            self._done += int(n or 0)
            if self._is_bytes:
                on_progress("downloading", self._done, max(int(self.total or 0), self._done))

    return Told
