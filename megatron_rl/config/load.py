"""From a YAML file and its overrides to a checked `Config`."""

import contextlib
import difflib
import typing
from collections.abc import Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any

import yaml
from pydantic import ValidationError

from megatron_rl.algorithms.methods import loss_class
from megatron_rl.algorithms.section import Section
from megatron_rl.config.checks import check_consistency
from megatron_rl.config.environment import UnsetVariable, expand
from megatron_rl.config.sections import Config
from megatron_rl.config.yaml_text import DuplicateKey, read_yaml
from megatron_rl.errors import ConfigError


def load_config(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Read YAML, apply `a.b=c` overrides, replace ${MEGATRON_RL_NAME}, validate types, ranges and consistency.

    An override of an option that holds a text is that text as it is typed (null: none, where the option may be null);
    of any other option it is YAML.
    Raises: ConfigError, with one line per fault: where, what was got, what was expected.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"{path}: no such config file")
    try:
        raw = read_yaml(path.read_text(encoding="utf-8"))
    except DuplicateKey as error:
        raise ConfigError(f"{path}: {error}; keep one of them") from error
    except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected a mapping of options at the top, got {type(raw).__name__}")
    for override in overrides:
        _apply_override(raw, override)
    try:
        raw = expand(raw)
    except UnsetVariable as error:
        raise ConfigError(f"{path}: {error}") from error
    return parse_config(raw)


def parse_config(raw: dict[str, Any]) -> Config:
    """Return the config that a nested dict describes. Raises: ConfigError."""
    try:
        config = Config.model_validate(raw)
    except ValidationError as error:
        lines = [_explain(item, raw) for item in error.errors(include_url=False)]
        raise ConfigError("the config is not valid:\n" + "\n".join(f"  - {line}" for line in lines)) from error
    check_consistency(config)
    return config


def dump_config(config: Config) -> str:
    """Return the resolved config as YAML that `load_config` reads back to an equal object."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _apply_override(raw: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not all(key.split(".")):
        raise ConfigError(f"override {override!r}: expected a.b=c, for example loss.select_fraction=0.1")
    *parents, last = key.split(".")
    node = raw
    for parent in parents:
        if node.get(parent) is None:
            node[parent] = {}
        node = node[parent]
        if not isinstance(node, dict):
            raise ConfigError(f"override {override!r}: {parent!r} holds a value, not a section")
    is_text, may_be_null = _text_kind(_types_at(key.split("."), raw))
    if is_text:
        node[last] = None if may_be_null and text == "null" else text
        return
    try:
        node[last] = read_yaml(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: the value is not valid YAML: {error}") from error


def _text_kind(types: list[Any]) -> tuple[bool, bool]:
    """Return whether an option of these types holds a text, and whether it may be null."""
    members = set(types)
    texts = {member for member in members if member is str or isinstance(member, str)}  # of a Literal its values
    return bool(texts) and texts == members - {NoneType}, NoneType in members


def _types_at(location: Sequence[Any], raw: dict[str, Any]) -> list[Any]:
    """Return the types that the option at a location may have: the members of its union, for each of those above it.

    pydantic puts a member's tag into the location of an error, which leaves that member alone. The options of `loss`
    are those of the loss that `raw` names, if it does.
    """
    types: list[Any] = [Config]
    for part in location:
        sections = _sections(types)
        below = [section.model_fields[part].annotation for section in sections if part in section.model_fields]
        below += [
            typing.get_args(t)[origin is dict] for t in types if (origin := typing.get_origin(t)) in (dict, tuple)
        ]
        tagged = [s for s in sections if "type" in s.model_fields and s.model_fields["type"].default == part]
        types = [member for annotation in below or tagged or types for member in _members(annotation)]
        if part == "loss" and Config in sections:
            with contextlib.suppress(KeyError, TypeError, ValueError):
                types = [loss_class(raw["loss"]["type"])]
    return types


def _sections(types: list[Any]) -> list[type[Section]]:
    return [each for each in types if isinstance(each, type) and issubclass(each, Section)]


def _members(annotation: Any) -> list[Any]:
    """Return the members of a union, the values of a Literal, or the type itself, without pydantic's annotations."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _members(arguments[0])
    if origin in (typing.Union, UnionType):
        return [member for argument in arguments for member in _members(argument)]
    return list(arguments) if origin is typing.Literal else [annotation]


def _explain(item: Any, raw: dict[str, Any]) -> str:
    where = ".".join(str(part) for part in item["loc"]) or "config"
    if item["type"] != "extra_forbidden":
        got = "" if item["type"] in ("missing", "value_error") else f" (got {item['input']!r})"
        quote = "; in the file, write it in quotes" if item["type"] == "string_type" else ""
        return f"{where}: {item['msg']}{got}{quote}"
    known = {name for section in _sections(_types_at(item["loc"][:-1], raw)) for name in section.model_fields}
    near = difflib.get_close_matches(str(item["loc"][-1]), known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(sorted(known))}"
    return f"{where}: unknown option; {hint}"
