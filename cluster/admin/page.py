"""The status page: one file, which loads nothing and may run nothing but itself."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path
from typing import Final

_FILE: Final = Path(__file__).with_name("page.html")


def read_page() -> tuple[bytes, dict[str, str]]:
    """The page and its headers. The policy names the page's own style and script by their hashes."""
    text = _FILE.read_text(encoding="utf-8")
    policy = "; ".join(
        (
            "default-src 'none'",
            f"script-src {_hashes(text, 'script')}",
            f"style-src {_hashes(text, 'style')}",
            "connect-src 'self'",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        )
    )
    headers = {"content-security-policy": policy, "cache-control": "no-cache", "content-language": "en"}
    return text.encode(), headers


def _hashes(text: str, tag: str) -> str:
    bodies = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
    assert bodies, tag
    digests = (base64.b64encode(hashlib.sha256(body.encode()).digest()).decode() for body in bodies)
    return " ".join(f"'sha256-{digest}'" for digest in digests)
