"""Every field of a recipe as a page of Markdown, from the JSON schema: nothing here knows a field by name."""

import json
import re
from collections.abc import Iterator
from typing import Any

from moeify.recipe.load import Schema, joined, json_schema, named, resolved, wanted

_HEAD = """\
# Every field of a recipe

Written by `moeify schema --markdown` from the recipe's JSON schema; do not edit it by hand. `moeify schema` prints the
schema itself, for editors. A recipe is one complete YAML file. An unknown key, a number out of range, a mapping that
has kinds and names none, and parts that do not fit each other are refused in a line each. A start for your own data:
`moeify init` ([quickstart](quickstart.md)). How a run's figures are to be read: [report](report.md).
"""


def undocumented() -> list[str]:
    """Return the paths of fields that say nothing about themselves; ``kind`` is told by the part that it chooses."""
    root = json_schema()
    return [
        joined(path, key)
        for path, _, node in _parts(root, root, "")
        for key, child in node["properties"].items()
        if key != "kind" and not _meaning(root, child)
    ]


def markdown() -> str:
    """Return the page."""
    root = json_schema()
    lines = [_HEAD]
    for path, kind, node in _parts(root, root, ""):
        level = "##" if "." not in path and not kind else "###"
        lines += [f"{level} {_title(path, kind)}", "", _words(node.get("description", "")), ""]
        rows = [
            f"| `{joined(path, key)}` | {_allowed(root, child, joined(path, key))} | "
            f"{_default(key, node)} | {_meaning(root, child)} |"
            for key, child in node["properties"].items()
            if key != "kind"
        ]
        if rows:
            lines += ["| key | wanted | default | what it is |", "|---|---|---|---|", *rows, ""]
        else:
            lines += ["No further keys.", ""]
    return "\n".join(lines)


def _parts(root: Schema, node: Schema, path: str, kind: str = "") -> Iterator[tuple[str, str, Schema]]:
    """Yield path, kind and schema of every mapping with keys of its own, those that hold others first."""
    node = resolved(root, node)
    if "discriminator" in node:
        for name, ref in node["discriminator"]["mapping"].items():
            yield from _parts(root, {"$ref": ref}, path, name)
    elif "properties" in node:
        kind = kind or node["properties"].get("kind", {}).get("const", "")
        yield path, kind, node
        for key, child in node["properties"].items():
            yield from _parts(root, child, joined(path, key))
    elif "items" in node:
        yield from _parts(root, node["items"], f"{path}[]")
    for value in named(node):
        yield from _parts(root, value, f"{path}.NAME")
    for branch in node.get("anyOf", ()):
        yield from _parts(root, branch, path)


def _title(path: str, kind: str) -> str:
    return (f"`{path}`" if path else "The whole") + (f", kind `{kind}`" if kind else "")


def _link(path: str, kind: str = "") -> str:
    """Return a link to a section, as GitHub makes anchors of titles."""
    anchor = re.sub(r"[^\w -]", "", _title(path, kind)).lower().replace(" ", "-")
    return f"[{f'`{kind}`' if kind else 'its section'}](#{anchor})"


def _allowed(root: Schema, node: Schema, path: str) -> str:
    """Return what may stand there; a mapping with keys of its own has a section of its own."""
    node = resolved(root, node)
    if "anyOf" in node:
        return " or ".join(_allowed(root, branch, path) for branch in node["anyOf"])
    if "discriminator" in node:
        return "a mapping of kind " + ", ".join(_link(path, kind) for kind in node["discriminator"]["mapping"])
    if "properties" in node:
        kind = node["properties"].get("kind", {}).get("const")
        return f"a mapping of kind {_link(path, kind)}" if kind else f"a mapping, see {_link(path)}"
    if "items" in node and "properties" in resolved(root, node["items"]):
        return f"a list of mappings, see {_link(f'{path}[]')}"
    for value in named(node):
        if "discriminator" in value or "properties" in resolved(root, value):
            return f"{_words(wanted(root, node))}, each {_allowed(root, value, f'{path}.NAME')}"
    if "pattern" in node:
        return f"text that matches `{_words(node['pattern'])}`"
    return re.sub(r"matches (\S+)", r"matches `\1`", _words(wanted(root, node)))


def _default(key: str, parent: Schema) -> str:
    node = parent["properties"][key]
    if "default" not in node:
        return "**required**" if key in parent.get("required", ()) else ""
    value = node["default"]
    if isinstance(value, dict) and value:
        return f"`kind: {value['kind']}`" if "kind" in value else "see its section"
    return f"`{_yaml(value)}`"


def _yaml(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_yaml, value))}]"
    return value if isinstance(value, str) else json.dumps(value)


def _meaning(root: Schema, node: Schema) -> str:
    """Return a field's own words, or those of the mapping that it holds."""
    if said := node.get("description"):
        return _words(said)
    for branch in (node, *node.get("anyOf", ()), *([node["items"]] if "items" in node else ())):
        target = resolved(root, branch)
        if "properties" in target and (said := target.get("description")):
            return _words(said)
    return ""


def _words(text: str) -> str:
    """Return text as one line of a table's cell."""
    return " ".join(text.split()).replace("``", "`").replace("|", "\\|")
