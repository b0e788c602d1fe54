"""Recipes: YAML text in, a ``RunConfig`` or every problem at once out.

A problem is one line, ``path.to.key: got <value>, wanted <what is allowed>; nearest key: <known key>``. What is allowed
is read from the recipe's JSON schema, so a new field of ``moeify.recipe.config`` explains itself here too.
"""

import difflib
import functools
import json
import re
import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from moeify.recipe import strict_yaml
from moeify.recipe.config import RunConfig
from moeify.recipe.plan import check_categories

_LARGEST = 1_000_000
"""Bytes of a recipe."""
_MOST = 50
"""Problems that are told of one recipe."""
_WIDEST = 60
"""Characters of a value in a problem."""

Schema = dict[str, Any]


class RecipeError(ValueError):
    """A recipe that cannot be run, with everything that is wrong with it."""

    def __init__(self, where: str, problems: Sequence[str]) -> None:
        self.where = where
        self.problems = tuple(problems)
        """One line each."""
        super().__init__("\n".join([f"{where} is not a recipe that can be run:", *self.problems]))


def load_recipe(path: Path) -> RunConfig:
    """Read a recipe from a file.

    >>> load_recipe(recipes / "digits.yaml").training.steps
    1000
    """
    return parse_recipe(read_text(path), where=str(path))


def read_text(path: Path) -> str:
    """Return a recipe's text as it stands in the file."""
    with path.open("rb") as file:
        data = file.read(_LARGEST + 1)
    if len(data) > _LARGEST:
        raise RecipeError(str(path), [f"got more than {_LARGEST:,} bytes, wanted a recipe; is this the right file?"])
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecipeError(str(path), [f"byte {error.start} is not UTF-8; save the recipe as UTF-8"]) from None


def parse_recipe(text: str, *, where: str) -> RunConfig:
    """Return the recipe that YAML text describes; ``where`` names the text in errors."""
    try:
        data = strict_yaml.read(text)
    except strict_yaml.YamlError as error:
        raise RecipeError(where, [str(error)]) from None
    if not isinstance(data, dict):
        got = "nothing" if data is None else _shown(data)
        raise RecipeError(where, [f"got {got}, wanted {wanted(_schema(), _schema())}"])
    try:
        config = _validate(data)
    except ValidationError as error:
        raise RecipeError(where, _problems(data, error, _validate)) from None
    try:
        check_categories(config, config.category_names)
    except ValueError as error:
        raise RecipeError(where, str(error).split("\n")) from None
    return config


def read_values(values: Mapping[str, Any]) -> RunConfig:
    """Return the recipe that Python values make; ValueError with a line for each problem.

    >>> read_values({"training": 3})
    Traceback (most recent call last):
    ...
    ValueError: name: got nothing, wanted a name that matches ^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$
    data: got nothing, wanted a mapping whose kind is one of 'digits', 'images', 'text'
    model: got nothing, wanted a mapping whose kind is one of 'autoencoder', 'llama', 'pretrained', 'resnet'
    training: got 3, wanted a mapping ...
    rounds: got nothing, wanted a list of at least 1, ...
    """
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise ValueError("\n".join(_problems(_plain(values), error, RunConfig.model_validate))) from None


def to_yaml(config: RunConfig) -> str:
    """Return the recipe with every default filled in; parsing it gives an equal one."""
    return strict_yaml.write(config.model_dump(mode="json"))


def json_schema() -> Schema:
    """Return the JSON schema of recipes, for editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **RunConfig.model_json_schema()}


@functools.cache
def _schema() -> Schema:
    return json_schema()


def _validate(data: Any) -> RunConfig:
    """Validate as strict JSON: lists are tuples and whole numbers are fractions, but '3' is text and true no number."""
    return RunConfig.model_validate_json(json.dumps(data), strict=True)


_Validate = Callable[[Any], RunConfig]


def _problems(data: dict[str, Any], error: ValidationError, validate: _Validate) -> list[str]:
    return list(dict.fromkeys(_told(data, error, validate)))


def _told(data: dict[str, Any], error: ValidationError, validate: _Validate) -> Iterator[str]:
    details = error.errors(include_url=False)
    for detail in details[:_MOST]:
        yield from _lines(data, detail)
    if len(details) > _MOST:
        yield f"... and {len(details) - _MOST} more"
    elif unknown := [detail for detail in details if detail["type"] == "extra_forbidden"]:
        yield from _problems_without(data, unknown, validate)


def _problems_without(data: dict[str, Any], unknown: Sequence[ErrorDetails], validate: _Validate) -> Iterator[str]:
    """Yield what unknown keys hide: pydantic checks how the parts fit only where each part is valid."""
    cleaned = _plain(data)
    for detail in unknown:
        keys = _locate(_schema(), detail["loc"]).keys
        del _look_up(cleaned, keys[:-1])[keys[-1]]
    try:
        validate(cleaned)
    except ValidationError as error:
        for detail in error.errors(include_url=False):
            if detail["type"] == "value_error":
                yield from _lines(cleaned, detail)


def _plain(value: Any) -> Any:
    """Return a copy whose mappings are dicts and whose sequences are lists; all else as it is."""
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, list | tuple) else value


# --- one problem, one line ------------------------------------------------------------------------------


def _lines(data: dict[str, Any], detail: ErrorDetails) -> Iterator[str]:
    root = _schema()
    place = _locate(root, detail["loc"])
    match detail["type"]:
        case "value_error":  # our own validators, which know best; one line for each thing they found
            for message in str(detail["ctx"]["error"]).split("\n"):
                dot = "." if place.path and message[0] not in ":[" else ""
                yield f"{place.path}{dot}{message}"
        case "union_tag_invalid" | "union_tag_not_found":
            kinds = list(place.node["discriminator"]["mapping"])
            given = _look_up(data, [*place.keys, "kind"])
            yield f"{joined(place.path, 'kind')}: got {_shown(given)}, wanted {_one_of(kinds)}{_near(given, kinds)}"
        case "extra_forbidden":
            key = str(place.keys[-1])
            here = list(place.siblings)
            given = _look_up(data, place.keys)
            line = f"{place.path}: got {_shown(given)} for an unknown key, wanted one of {', '.join(here)}"
            nearest = _nearest_key(root, place.parent, key, here, place.variants)
            yield f"{line}; nearest key: {nearest}" if nearest else line
        case "string_pattern_mismatch" if detail["loc"][-1] == "[key]":
            yield f"{place.path}: got a key that is no name, wanted {wanted(root, place.node)}"
        case "too_short" if len(_look_up(data, place.keys)) >= detail["ctx"]["min_length"]:
            pass  # pydantic did not count the items that it refused for reasons of their own
        case _:
            given = _look_up(data, place.keys)
            choices = [c for c in place.node.get("enum", ()) if isinstance(c, str)]
            yield f"{place.path}: got {_shown(given)}, wanted {wanted(root, place.node)}{_near(given, choices)}"


def _shown(value: Any) -> str:
    if value is _NOTHING:
        return "nothing"
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = _WIDEST - 4
    text = short.repr(value).replace("\n", " ")
    return text if len(text) <= _WIDEST else text[: _WIDEST - 3] + "..."


def _one_of(choices: Sequence[Any]) -> str:
    return f"one of {', '.join(repr(choice) for choice in choices)}" if len(choices) > 1 else repr(choices[0])


def _near(value: Any, choices: Sequence[str]) -> str:
    close = difflib.get_close_matches(value, choices, 1) if isinstance(value, str) else []
    return f"; nearest: {close[0]!r}" if close else ""


def _nearest_key(root: Schema, parent: str, key: str, here: Sequence[str], variants: dict[str, Schema]) -> str | None:
    """Return the known key that was meant: at this place, in another kind of it, or anywhere."""
    if close := difflib.get_close_matches(key, here, 1):
        return joined(parent, close[0])
    for kind, variant in variants.items():
        if close := difflib.get_close_matches(key, list(variant["properties"]), 1):
            return f"{joined(parent, close[0])} of kind {kind!r}"
    everywhere = dict(_known_keys(root, root, ""))
    close = difflib.get_close_matches(key, list(everywhere.values()), 1, cutoff=0.8)
    return next((path for path, name in everywhere.items() if name == close[0]), None) if close else None


# --- places in the schema -------------------------------------------------------------------------------

_NOTHING = object()


@dataclass
class _Place:
    """Where a problem is, in the user's keys (pydantic's locations name union variants too)."""

    node: Schema
    keys: list[str | int] = field(default_factory=list)
    path: str = ""
    parent: str = ""
    siblings: dict[str, Schema] = field(default_factory=dict)
    """The keys that are known where the last key stands."""
    variants: dict[str, Schema] = field(default_factory=dict)
    """The kinds of the union that the last key stands in."""


def _locate(root: Schema, location: Sequence[str | int]) -> _Place:
    place = _Place(root)
    variants: dict[str, Schema] = {}
    pattern = ""
    for item in location:
        node = place.node
        if item == "[key]":
            place.node = {"type": "string", "pattern": pattern}
            continue
        if "discriminator" in node:
            variants = {kind: resolved(root, {"$ref": ref}) for kind, ref in node["discriminator"]["mapping"].items()}
            if item not in variants:  # a kind that the schema does not tell of
                break
            place.node = variants[str(item)]
            continue
        if "anyOf" in node:  # a value or null
            node = resolved(root, next(branch for branch in node["anyOf"] if branch.get("type") != "null"))
        place.parent, place.path, place.variants = place.path, joined(place.path, item), variants
        place.siblings = node.get("properties", {})
        place.keys.append(item)
        pattern = next(iter(node.get("patternProperties", ())), "")
        value = next(iter(named(node)), {})
        child = node["items"] if isinstance(item, int) else place.siblings.get(item, value)
        place.node, variants = resolved(root, child), {}
    return place


def resolved(root: Schema, node: Schema) -> Schema:
    """Return what a node of the schema ``root`` refers to, or the node itself."""
    while "$ref" in node:
        node = root["$defs"][node["$ref"].rpartition("/")[2]]
    return node


def named(node: Schema) -> tuple[Schema, ...]:
    """Return what a mapping from names holds; nothing for any other node."""
    more = node.get("additionalProperties")
    return (*node.get("patternProperties", {}).values(), *([more] if isinstance(more, dict) else ()))


def _known_keys(root: Schema, node: Schema, path: str) -> Iterator[tuple[str, str]]:
    """Yield the path and the last part of every known key."""
    node = resolved(root, node)
    for branch in (*node.get("oneOf", ()), *node.get("anyOf", ())):
        yield from _known_keys(root, branch, path)
    if "items" in node:
        yield from _known_keys(root, node["items"], f"{path}[0]")
    for value in named(node):
        yield from _known_keys(root, value, f"{path}.NAME")
    for key, child in node.get("properties", {}).items():
        yield joined(path, key), key
        yield from _known_keys(root, child, joined(path, key))


def joined(path: str, item: str | int) -> str:
    """Return the path of what lies one key below."""
    if isinstance(item, int):
        return f"{path}[{item}]"
    key = item if re.fullmatch(r"[\w-]{1,60}", item) else _shown(item)
    return f"{path}.{key}" if path else key


def _look_up(data: Any, keys: Sequence[str | int]) -> Any:
    for key in keys:
        try:
            data = data[key]
        except (KeyError, IndexError, TypeError):
            return _NOTHING
    return data


# --- what is allowed, in words --------------------------------------------------------------------------


def wanted(root: Schema, node: Schema) -> str:
    """Return what a node of the schema ``root`` allows, in words."""
    node = resolved(root, node)
    if "enum" in node:
        return _one_of(node["enum"])
    if "const" in node:
        return repr(node["const"])
    if "discriminator" in node:
        return f"a mapping whose kind is {_one_of(list(node['discriminator']['mapping']))}"
    if "anyOf" in node:
        return " or ".join(wanted(root, branch) for branch in node["anyOf"])
    match node.get("type"):
        case "integer":
            return f"a whole number{_bounds(node)}"
        case "number":
            return f"a number{_bounds(node)}"
        case "boolean":
            return "true or false"
        case "null":
            return "null"
        case "array":
            each = f", each {wanted(root, node['items'])}" if "items" in node else ""
            return f"a list{_at_least(node.get('minItems'))}{each}"
        case "object" if "properties" in node:
            return f"a mapping with the keys {', '.join(node['properties'])}"
        case "object":
            return f"a mapping{_at_least(node.get('minProperties'))} from names"
        case "string" if "pattern" in node:
            return f"a name that matches {node['pattern']}"
        case "string":
            return "a path" if node.get("format") == "path" else "text"
        case _:
            return "something else"


def _at_least(count: int | None) -> str:
    return f" of at least {count}" if count else ""


def _bounds(node: Schema) -> str:
    signs = {"exclusiveMinimum": ">", "minimum": ">=", "exclusiveMaximum": "<", "maximum": "<="}
    bounds = [f"{sign} {node[key]:.10g}" for key, sign in signs.items() if key in node]
    return f" {' and '.join(bounds)}" if bounds else ""
