"""Writes helm/shoal/values.schema.json: helm/values.schema.yaml, with the keys of shoal's configuration put in.

Run it after a change of either: `python helm/make_schema.py`. A test compares the file with what this makes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_origin

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from shoal.cluster import config

SOURCE = Path(__file__).parent / "values.schema.yaml"
TARGET = Path(__file__).parent / "shoal" / "values.schema.json"

BYTES = r"^\s*\d+(\.\d+)?\s*([KMGTkmgt]?[Ii]?)[Bb]?\s*$"

Schema = dict[str, Any]


def make_schema() -> Schema:
    """The schema of the chart's values, JSON Schema draft 7: what every Helm from 3.0 on reads."""
    written = yaml.safe_load(SOURCE.read_text(encoding="utf-8"))
    definitions = written["definitions"]
    for block in _blocks(config.ClusterConfig):
        if block.__name__ not in definitions:
            definitions[block.__name__] = {"type": "object", "description": _summary(block), "x-config": block.__name__}
    made = _finished(written, {name: one["description"] for name, one in definitions.items()})
    named = set(re.findall(r'"#/definitions/(\w+)"', json.dumps(made)))
    made["definitions"] = {name: one for name, one in sorted(made["definitions"].items()) if name in named}
    return {"$schema": "http://json-schema.org/draft-07/schema#", **made}


def camel(name: str) -> str:
    """max_model_len as the chart writes it: maxModelLen."""
    return re.sub(r"_(\w)", lambda match: match[1].upper(), name)


def _finished(schema: Schema, texts: Mapping[str, str]) -> Schema:
    """With the configuration's keys, and closed. `texts` describe definitions."""
    own = {key: _finished(value, texts) for key, value in schema.get("properties", {}).items()}
    rest = {key: value for key, value in schema.items() if key not in ("properties", "x-config", "x-without")}
    if "$ref" in rest:  # draft 7 checks nothing beside a reference; editors show what it says
        return {"description": texts[rest["$ref"].rpartition("/")[2]], **rest}
    if "x-config" in schema:
        block = getattr(config, schema["x-config"])
        own = {**dict(_properties(block, set(schema.get("x-without", ())))), **own}
        required = [camel(name) for name, field in block.model_fields.items() if field.is_required()]
        if required:
            rest["required"] = sorted({*rest.get("required", ()), *required})
    if own:
        rest["properties"] = own
        rest.setdefault("additionalProperties", False)
    for key in ("items", "additionalProperties"):
        if isinstance(rest.get(key), dict):
            rest[key] = _finished(rest[key], texts)
    if "anyOf" in rest:
        rest["anyOf"] = [_finished(one, texts) for one in rest["anyOf"]]
    if "definitions" in rest:
        rest["definitions"] = {name: _finished(one, texts) for name, one in rest["definitions"].items()}
    return rest


def _properties(block: type[BaseModel], without: set[str]) -> Iterator[tuple[str, Schema]]:
    """The keys of a block, as pydantic sees them."""
    given = block.model_json_schema(ref_template="#/definitions/{model}")
    required = set(given.get("required", ()))
    for name, schema in given["properties"].items():
        if name in without:
            continue
        annotation = block.model_fields[name].annotation
        inner = config.block_in(annotation)
        if inner is not None and get_origin(annotation) is not tuple:
            text = schema.get("description") or _summary(inner)
            yield camel(name), {"description": text, "$ref": f"#/definitions/{inner.__name__}"}
            continue
        kept = {key: value for key, value in schema.items() if key not in ("title", "default")}
        if _is_bytes(block.model_fields[name]):
            kept = {"type": ["integer", "string"], "pattern": BYTES, **_only(kept, "description")}
        elif len(kinds := kept.get("anyOf", ())) == 2 and kinds[1] == {"type": "null"}:
            kind = kinds[0].get("type")
            kept |= {**kinds[0], "type": [kind, "null"]} if isinstance(kind, str) and "enum" not in kinds[0] else {}
            if "type" in kept:
                del kept["anyOf"]
        text = [kept.get("description") or _explained(block, name)]
        if name not in required and schema.get("default") not in (None, {}, ""):
            text.append(f"default {json.dumps(schema['default'])}")
        yield camel(name), {**kept, "description": "; ".join(part for part in text if part)}


def _only(schema: Schema, *keys: str) -> Schema:
    return {key: schema[key] for key in keys if key in schema}


def _is_bytes(field: FieldInfo) -> bool:
    """Whether 2GiB may stand there for a number."""
    return "parse_bytes" in repr((field.annotation, field.metadata))


def _explained(block: type[BaseModel], name: str) -> str:
    """Of the line `name: ...` in the docstring; else the name in words."""
    found = re.search(rf"^\s*{name}: (.+)$", block.__doc__ or "", re.MULTILINE)
    return found[1].rstrip(".") if found else name.replace("_", " ")


def _summary(block: type[BaseModel]) -> str:
    return (block.__doc__ or "").strip().splitlines()[0].rstrip(".")


def _blocks(block: type[BaseModel]) -> Iterator[type[BaseModel]]:
    """Those in it, however deep."""
    for field in block.model_fields.values():
        inner = config.block_in(field.annotation)
        if inner is not None:
            yield inner
            yield from _blocks(inner)


def read_schema() -> Mapping[str, Any]:
    """As it is shipped."""
    return json.loads(TARGET.read_text(encoding="utf-8"))  # type: ignore[no-any-return]


if __name__ == "__main__":
    TARGET.write_text(json.dumps(make_schema(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
