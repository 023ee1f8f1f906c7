"""Compiles the C++ kernels of this folder once, with the host's compiler, and loads them.

No torch header is included, so a build takes seconds and fits every version of torch; tensors cross as addresses.
The result is cached under $SHOAL_CACHE_DIR (~/.cache/shoal by default), keyed by sources, compiler and CPU. libgomp is
the one that torch has loaded already, so kernels and torch share one pool of threads.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import subprocess
import tempfile
import time
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

DTYPE_CODES: dict[torch.dtype, int] = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

_FLAGS = ("-O3", "-std=c++17", "-fPIC", "-shared", "-fopenmp", "-ffp-contract=fast", "-fvisibility=hidden", "-w")
_BUILD_TIMEOUT_S = 300


class CompilerError(RuntimeError):
    """The host's C++ compiler is missing or cannot build the kernels; the message holds its output."""


@functools.cache
def library() -> ctypes.CDLL:
    """The kernels, compiled on first use on this machine. Raises CompilerError."""
    loaded = ctypes.CDLL(str(build()))
    loaded.shoal_run.argtypes = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int)
    loaded.shoal_run_one.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int)
    loaded.shoal_run.restype = loaded.shoal_run_one.restype = None
    return loaded


def build() -> Path:
    """The compiled kernels' path, compiling where the cache has none. Several processes may do so at once."""
    # $CXX as make understands it: the compiler and perhaps options, which come last and so prevail.
    program, *options = shlex.split(os.environ.get("CXX") or "c++")
    compiler = [program, *_FLAGS, *_cpu_flags(), *options]
    here = Path(__file__).parent
    sources = sorted(here.glob("*.cpp"))
    if not sources:
        raise CompilerError(f"no C++ sources in {here}: install shoal with its package data")
    key = hashlib.sha256(repr((compiler, _run([program, "--version"]), _cpu())).encode())
    for path in [*sources, *sorted(here.glob("*.h"))]:
        key.update(path.read_bytes())
    folder = Path(os.environ.get("SHOAL_CACHE_DIR") or Path.home() / ".cache" / "shoal")
    target = folder / f"cpu_ops-{key.hexdigest()[:20]}.so"
    if target.exists():
        return target
    started = time.perf_counter()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle, unfinished = tempfile.mkstemp(dir=folder, suffix=".so.part")
        os.close(handle)
    except OSError as error:
        raise CompilerError(f"cannot write compiled kernels to {folder}: set SHOAL_CACHE_DIR ({error})") from error
    try:
        _run([*compiler, *map(str, sources), "-o", unfinished])
        Path(unfinished).replace(target)  # atomic: others see all of it or nothing
    finally:
        Path(unfinished).unlink(missing_ok=True)
    logger.info("compiled the C++ kernels in %.1f s: %s", time.perf_counter() - started, target)
    return target


def _cpu_flags() -> list[str]:
    if platform.machine() in ("x86_64", "AMD64"):
        # GCC prefers 256-bit vectors even where it may use 512.
        return ["-march=native", "-mprefer-vector-width=512"]
    return ["-mcpu=native"] if platform.machine() in ("aarch64", "arm64") else []


def _cpu() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    named = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(named)}))


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_BUILD_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CompilerError(f"{shlex.join(command)}: {error}") from error
    if done.returncode != 0:
        raise CompilerError(f"{shlex.join(command)} failed:\n{done.stderr[-2000:]}")
    return done.stdout
