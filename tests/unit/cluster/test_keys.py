"""The keys file: what is accepted, that every refusal names the place and never a key, and the commands for it."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from shoal.cluster.cli import EXIT_BAD_INPUT, EXIT_OK, main
from shoal.cluster.config import load_config, parse_config
from shoal.cluster.keys import KEY_PREFIX, hash_key, new_key, parse_keys, read_keys
from shoal.engine.config import ConfigError

HASH = "ab" * 32
KEY = "sk-shoal-Zm9vYmFyMTIzNDU2Nzg5MDEyMzQ1Njc4OTAxMjM0"


def refused(text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_keys(text.encode(), "keys.yaml")
    return str(caught.value)


def entry(**fields: object) -> str:
    return yaml.safe_dump({"keys": [{"id": "a", "tenant": "acme", "sha256": HASH} | fields]}, sort_keys=False)


def test_every_field_is_read() -> None:
    (found,) = parse_keys(
        entry(
            models=["m"],
            limits={"requests_per_minute": 5, "tokens_per_minute": 6, "max_concurrent_requests": 7,
                    "max_tokens_per_request": 8},
            expires="2027-01-01", revoked=True, shared_cache=True,
        ).encode(),
        "keys.yaml",
    ).keys  # fmt: skip
    assert (found.id, found.tenant, found.sha256, found.models) == ("a", "acme", HASH, ("m",))
    assert found.limits.model_dump() == {
        "requests_per_minute": 5, "tokens_per_minute": 6, "max_concurrent_requests": 7, "max_tokens_per_request": 8,
    }  # fmt: skip
    assert found.revoked
    assert found.shared_cache
    assert found.may_ask("m")
    assert not found.may_ask("n")


@pytest.mark.parametrize("written", ["2027-01-01", "2027-01-01T00:00:00", "2027-01-01 00:00:00Z", '"2027-01-01"',
                                     "2027-01-01T02:00:00+02:00"])  # fmt: skip
def test_a_day_ends_a_key_at_its_first_moment_in_utc(written: str) -> None:
    (found,) = parse_keys((entry() + f"  expires: {written}\n").encode(), "keys.yaml").keys
    assert not found.is_expired(1798761600 - 1)
    assert found.is_expired(1798761600)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "keys.yaml: expected a mapping with the list 'keys', got nothing"),
        ("- id: a", "keys.yaml: expected a mapping with the list 'keys', got list"),
        ("keys:\n\t- id: a", "keys.yaml:2:1: not valid YAML"),
        ("kees: []", "keys.yaml:1: kees: unknown field; did you mean 'keys'? known here: keys"),
        (entry(model=["m"]), "keys.yaml:5: keys[0].model: unknown field; did you mean 'models'? known here:"),
        (entry(limits={"rpm": 1}), "keys.yaml:6: keys[0].limits.rpm: unknown field; known here: max_concurrent"),
        (entry(limits={"requests_per_minute": 0}), "keys.yaml:6: keys[0].limits.requests_per_minute: input should be"),
        (entry(tenant="a:b"), "keys.yaml:3: keys[0].tenant: a name has 1 to 64 letters"),
        (entry(tenant=""), "keys.yaml:3: keys[0].tenant: a name has"),
        (entry(sha256="abc"), "keys.yaml:4: keys[0].sha256: not a SHA-256 in 64 hexadecimal digits"),
        (entry(expires="soon"), "keys.yaml:5: keys[0].expires: not a day or time"),
        ("keys:\n- id: a\n  sha256: " + HASH, "keys.yaml:2: keys[0].tenant: field required"),
        (entry() + entry()[6:], "two keys have the id 'a'"),
        (entry() + entry(id="b")[6:], "'a' and 'b' are the same key"),
    ],
)
def test_a_refusal_names_line_and_field(text: str, message: str) -> None:
    assert message in refused(text)


@pytest.mark.parametrize(
    "text",
    [
        entry(sha256=KEY), entry(id=KEY), entry(tenant=KEY), entry(expires=KEY), entry(revoked=KEY), entry(models=KEY),
        entry(limits=KEY), entry(limits={KEY: 1}), entry(limits={"requests_per_minute": KEY}), entry(**{KEY: "acme"}),
        f"keys: {KEY}", f"{KEY}: acme", KEY, f"keys: [{KEY}]", f"keys:\n- *{KEY}", f"keys:\n- !{KEY} x",
        f"keys:\n- {{{KEY}", f"keys:\n - id: a\n{KEY}", f"? [{KEY}]\n: 1", f"{{1: {KEY}}}",
    ],
)  # fmt: skip
def test_no_refusal_shows_a_key_that_was_put_in_the_wrong_place(text: str) -> None:
    assert KEY not in refused(text)


@given(st.text(max_size=60) | st.text("keys:-[]{}&*!|>'\"% \n\tidnat01", max_size=60))
def test_any_text_is_read_or_refused(text: str) -> None:
    with contextlib.suppress(ConfigError):
        parse_keys(text.encode("utf-8", "surrogatepass"), "keys.yaml")


def test_a_file_that_is_not_there_or_not_text_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no .*shoal keys new --append"):
        read_keys(tmp_path / "none.yaml")
    (tmp_path / "keys.yaml").write_bytes(b"keys: \xff")
    with pytest.raises(ConfigError, match="not UTF-8 at byte 6"):
        read_keys(tmp_path / "keys.yaml")


def test_new_keys_are_random_and_shown_by_nothing_but_themselves() -> None:
    made = [new_key("acme") for _ in range(50)]
    assert len({one.key for one in made}) == 50
    for one in made:
        assert len(one.key) == len(KEY_PREFIX) + 43  # 256 bits in base 64
        assert one.entry.sha256 == hash_key(one.key)
        assert one.key not in repr(one) + one.yaml + repr(one.entry)


def test_a_made_entry_reads_as_what_was_asked_for() -> None:
    made = new_key("acme", models=["m"], limits={"requests_per_minute": 3}, expires="2027-01-01", shared_cache=True)
    assert parse_keys(b"keys:\n" + made.yaml.encode(), "keys.yaml").keys == (made.entry,)


def test_the_command_prints_the_key_once_and_keeps_its_hash(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "keys.yaml"
    keys = []
    for tenant in ("acme", "umbrella", "acme"):
        assert main(["keys", "new", "--tenant", tenant, "--rpm", "5", "--append", str(path)]) == EXIT_OK
        printed = capsys.readouterr()
        keys.append(printed.out.strip())
        assert (printed.out + printed.err).count(keys[-1]) == 1
    file = read_keys(path)
    assert [one.sha256 for one in file.keys] == [hash_key(key) for key in keys]
    assert not any(key in path.read_text() for key in keys)
    assert path.stat().st_mode & 0o777 == 0o600
    assert main(["keys", "check", str(path)]) == EXIT_OK
    assert "3 keys of 2 tenants" in capsys.readouterr().out


def test_a_file_that_cannot_be_added_to_stays_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text("keys: []\n")
    assert main(["keys", "new", "--tenant", "acme", "--append", str(path)]) == EXIT_BAD_INPUT
    assert path.read_text() == "keys: []\n"
    printed = capsys.readouterr()
    assert KEY_PREFIX not in printed.out + printed.err


def test_check_answers_each_problem_on_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text(entry(tenant="", sha256="x"))
    assert main(["keys", "check", str(path)]) == EXIT_BAD_INPUT
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_the_path_of_the_file_is_relative_to_the_configuration(tmp_path: Path) -> None:
    (tmp_path / "shoal.yaml").write_text("auth: {keys_file: secrets/keys.yaml}")
    assert load_config(str(tmp_path / "shoal.yaml")).auth.keys_file == str(tmp_path / "secrets/keys.yaml")
    assert parse_config({"auth": {"keys_file": "/etc/keys.yaml"}}, folder=tmp_path).auth.keys_file == "/etc/keys.yaml"
