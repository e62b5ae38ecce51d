"""Edits of values in a YAML file that keep every other character, such as comments."""

from __future__ import annotations

import json
import re
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.nodes import MappingNode, Node


def with_values(text: str, values: dict[str, Any]) -> str:
    """Return ``text`` with new values of dotted keys; a list or mapping over several lines becomes one line."""
    root = YAML(typ="rt", pure=True).compose(text)
    edits = []
    for key, value in values.items():
        section, _, name = key.partition(".")
        node = child_node(child_node(root, section), name)
        start, end = node.start_mark.index, node.end_mark.index
        old = text[start:end]
        tail = old[len(old.rstrip()) :]  # of a block: up to the next key
        edits.append((start, end, ("" if old else " ") + to_yaml(value) + tail))
    for start, end, new in sorted(edits, reverse=True):
        text = text[:start] + new + text[end:]
    return text


def value_in(tree: dict[str, Any], key: str) -> Any:
    """Return the value of a dotted key; None if the section does not have it."""
    section, _, name = key.partition(".")
    return tree[section].get(name)


def to_yaml(value: Any) -> str:
    """Return the YAML of a value; a word without quotes."""
    plain = isinstance(value, str) and re.fullmatch(r"[A-Za-z][\w./-]*", value)
    return value if plain and YAML(typ="safe", pure=True).load(value) == value else to_flow_yaml(value)


def to_flow_yaml(value: Any) -> str:
    """Return one line of YAML: JSON with escapes for characters that YAML reads as line ends or rejects."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in text)


def child_node(node: Node, name: str) -> Node:
    assert isinstance(node, MappingNode)
    return next(value for key, value in node.value if key.value == name)
