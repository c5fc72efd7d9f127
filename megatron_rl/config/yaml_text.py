"""YAML as configs use it: a key that stands twice in one mapping is an error instead of a silent replacement."""

from typing import Any

import yaml


class DuplicateKey(yaml.YAMLError):
    """One mapping has the same key twice."""


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Build a mapping whose keys, as they are written, differ; what `<<` merges in may be overridden."""
        lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            line, name = key.start_mark.line + 1, (key.tag, key.value)
            if name in lines:
                raise DuplicateKey(f"the key {key.value!r} stands on line {lines[name]} and again on line {line}")
            lines[name] = line
        return super().construct_mapping(node, deep)


def read_yaml(text: str) -> Any:
    """Return the value that a YAML text holds. Raises: yaml.YAMLError, DuplicateKey among it."""
    return yaml.load(text, _Loader)
