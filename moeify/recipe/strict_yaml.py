"""YAML without its traps: what a recipe may hold is what JSON may hold.

Keys are text and stand once; ``no`` and ``on`` are words, ``1e-3`` is a number; no tags, no aliases, no depth
without end. The YAML 1.2 core schema rather than the 1.1 one that PyYAML goes by.
"""

import re
from typing import Any

import yaml

_DEPTH = 32
"""Deepest nesting that is read."""

_BOOL = re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$")
_INT = re.compile(r"^[-+]?[0-9]{1,30}$")
_FLOAT = re.compile(r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$")
_NULL = re.compile(r"^(?:~|null|Null|NULL|)$")


class YamlError(ValueError):
    """Text that is not such YAML; the message starts with line and column."""


def _refuse(mark: Any, what: str) -> YamlError:
    where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
    return YamlError(f"{where}{what}")


class _Loader(yaml.SafeLoader):
    """Composes nodes; ``_plain`` turns them into data, so no constructor of PyYAML ever runs."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012
    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event: yaml.Event = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent):
            raise _refuse(event.start_mark, f"aliases (*{event.anchor}) are not allowed; write the value out")
        if (tag := getattr(event, "tag", None)) is not None:
            raise _refuse(event.start_mark, f"tags ({tag}) are not allowed; quote the value or leave the tag out")
        if self.depth >= _DEPTH:
            raise _refuse(event.start_mark, f"nested deeper than {_DEPTH} levels")
        self.depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1


class _Dumper(yaml.SafeDumper):
    """Quotes whatever either version of YAML would take for something other than text."""


for _tag, _pattern, _first in (
    ("tag:yaml.org,2002:bool", _BOOL, list("tTfF")),
    ("tag:yaml.org,2002:int", _INT, list("-+0123456789")),
    ("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789")),
    ("tag:yaml.org,2002:null", _NULL, ["~", "n", "N", ""]),
):
    _Loader.add_implicit_resolver(_tag, _pattern, _first)
    _Dumper.add_implicit_resolver(_tag, _pattern, _first)


def read(text: str) -> Any:
    """Return the document as dicts, lists, text, numbers, booleans and None; raise ``YamlError``."""
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        raise _refuse(error.problem_mark or error.context_mark, error.problem or str(error)) from None
    except yaml.YAMLError as error:
        raise YamlError(" ".join(str(error).split())) from None
    return None if node is None else _plain(node)


def _plain(node: yaml.Node) -> Any:
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item) for item in node.value]
    if isinstance(node, yaml.MappingNode):
        mapping: dict[str, Any] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _refuse(key.start_mark, "a key must be text")
            name = _text(key)
            if name in mapping:
                raise _refuse(key.start_mark, f"key {name!r} stands twice; keep one of them")
            mapping[name] = _plain(value)
        return mapping
    match node.tag.rpartition(":")[2]:
        case "bool":
            return node.value.lower() == "true"
        case "int":
            return int(node.value)
        case "float":
            return float(node.value)
        case "null":
            return None
        case _:
            return _text(node)


def _text(node: yaml.Node) -> str:
    """Return a scalar's text, pairs of escaped halves, as JSON writes rare characters, made whole."""
    try:
        return node.value.encode("utf-16", "surrogatepass").decode("utf-16")
    except UnicodeDecodeError:
        raise _refuse(node.start_mark, "half a surrogate pair is no Unicode text; write the character itself") from None


def write(data: Any) -> str:
    """Return plain data as YAML that ``read`` turns into equal data, short collections on one line."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100, default_flow_style=None)


def write_flow(data: Any) -> str:
    """Return plain data as YAML on one line."""
    written: str = yaml.dump(
        data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10_000, default_flow_style=True
    )
    return written.rstrip("\n")
