"""Recipes, and the strict YAML below them: everything that is wrong, at once, in the user's own keys."""

import copy
import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from moeify.recipe.config import RunConfig
from moeify.recipe.load import RecipeError, json_schema, load_recipe, parse_recipe, strict_yaml, to_yaml

SHIPPED = sorted(path.name for path in files("pipelines.recipes").iterdir() if path.name.endswith(".yaml"))

GOOD = """
name: mine
data: {kind: digits}
model: {kind: autoencoder}
training: {steps: 100}
rounds: [{train: 10, recover: 20, separation: 0.4}]
"""


def shipped(name: str) -> str:
    return (files("pipelines.recipes") / name).read_text(encoding="utf-8")


def problems(text: str) -> tuple[str, ...]:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, where="my.yaml")
    assert all("\n" not in line for line in caught.value.problems)
    assert str(caught.value).split("\n")[1:] == list(caught.value.problems)
    return caught.value.problems


def changed(**changes: Any) -> str:
    return yaml.safe_dump({**yaml.safe_load(GOOD), **changes})


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_recipe_is_valid_and_survives_its_resolved_form(name: str) -> None:
    config = parse_recipe(shipped(name), where=name)
    resolved = to_yaml(config)
    assert parse_recipe(resolved, where="resolved") == config
    assert "learning_rate" in resolved
    assert "retries" in resolved


def test_every_problem_is_told_at_once_each_on_one_line_with_path_value_wish_and_nearest_key() -> None:
    found = problems("""
name: my run
seeds: 3
data: {kind: text, source: {kind: installed, sources: [python, pythn], megabyte: 2}}
model: {kind: lama}
training: {stepz: 100, rows: "16", learning_rate: -1, warmup: true}
partition: {budget: knapsak, compensation: {ridge: 0}}
rounds: [{train: 1.5, recover: 3, separation: 1.0}, 7]
""")
    training = (
        "steps, rows, accumulate, autocast, checkpoint_activations, learning_rate, final_learning_rate, warmup, "
        "weight_decay, clip, explosion, on_divergence"
    )
    for line in (
        "name: got 'my run', wanted a name that matches ^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$",
        "data.source.sources[1]: got 'pythn', wanted one of 'python', 'prose', 'c', 'web'; nearest: 'python'",
        "data.source.megabyte: got 2 for an unknown key, wanted one of kind, sources, megabytes; "
        "nearest key: data.source.megabytes",
        "model.kind: got 'lama', wanted one of 'autoencoder', 'llama', 'pretrained', 'resnet'; nearest: 'llama'",
        "training.steps: got nothing, wanted a whole number > 0",
        "training.rows: got '16', wanted a whole number > 0",
        "training.learning_rate: got -1, wanted a number > 0",
        "training.warmup: got true, wanted a number >= 0 and < 1",
        f"training.stepz: got 100 for an unknown key, wanted one of {training}; nearest key: training.steps",
        "partition.budget: got 'knapsak', wanted one of 'knapsack', 'equal'; nearest: 'knapsack'",
        "partition.compensation.ridge: got 0, wanted a number > 0",
        "rounds[0].train: got 1.5, wanted a whole number >= 0",
        "rounds[0].separation: got 1.0, wanted a number > 0 and < 1",
        "rounds[1]: got 7, wanted a mapping with the keys train, recover, branching, separation",
    ):
        assert line in found
    assert any(line.startswith("seeds: got 3 for") and line.endswith("nearest key: seed") for line in found)
    assert len(found) == 15


def test_a_list_is_not_called_short_because_of_items_that_are_told_of_already() -> None:
    found = problems(
        """
data: {kind: text, source: {kind: installed, sources: [python, pythn]}}
"""
    )
    assert not any(line.startswith("data.source.sources:") for line in found)
    assert "data.source.sources: got [], wanted a list of at least 2, each one of 'python', 'prose', 'c', 'web'" in (
        problems("data: {kind: text, source: {kind: installed, sources: []}}")
    )


def test_a_key_of_another_kind_is_found_and_so_is_one_that_stands_elsewhere() -> None:
    found = problems(changed(data={"kind": "text", "source": {"kind": "installed", "categories": {}}}, steps=5))
    assert any(line.endswith("nearest key: data.source.categories of kind 'folders'") for line in found)
    assert any(line.startswith("steps: ") and line.endswith("nearest key: training.steps") for line in found)


def test_controls_are_a_closed_list_of_names_each_once() -> None:
    assert parse_recipe(GOOD, where="x").arms == ("dense", "split", "random")
    assert parse_recipe(changed(controls=["random", "told"]), where="x").arms == ("dense", "told", "split", "random")
    assert parse_recipe(changed(controls=[]), where="x").arms == ("dense", "split")
    for controls, told in (
        (["random", "tolt"], "controls[1]: got 'tolt', wanted one of 'random', 'told'; nearest: 'told'"),
        (["dense"], "controls[0]: got 'dense', wanted one of 'random', 'told'"),
        (["told", "told"], "controls: got ['told', 'told'], wanted each control once"),
        ("told", "controls: got 'told', wanted a list, each one of 'random', 'told'"),
    ):
        assert problems(changed(controls=controls)) == (told,)


def test_what_python_has_at_hand_is_unknown_to_a_recipe() -> None:
    assert problems(changed(data={"kind": "given"})) == (
        "data.kind: got 'given', wanted one of 'digits', 'images', 'text'",
    )
    assert problems(changed(model={"kind": "given", "traits": {}})) == (
        "model.kind: got 'given', wanted one of 'autoencoder', 'llama', 'pretrained', 'resnet'",
    )
    assert "given" not in json_schema()["properties"]["model"]["discriminator"]["mapping"]


def test_a_missing_kind_lists_the_kinds() -> None:
    assert "data.kind: got nothing, wanted one of 'digits', 'images', 'text'" in problems(changed(data={"test": 0.2}))


def test_keys_of_a_mapping_are_held_to_be_names() -> None:
    source = {"kind": "folders", "categories": {"a b": "x", "c": 3}}
    found = problems(changed(data={"kind": "text", "source": source}, model={"kind": "llama"}))
    assert found[0].startswith("data.source.categories.'a b': got a key that is no name, wanted a name that matches ^")
    assert found[1] == "data.source.categories.c: got 3, wanted a path"


def test_keys_of_a_mapping_of_kinds_are_held_to_be_names_too() -> None:
    parts = {"": {"kind": "folder", "path": "x"}, "b": {"kind": "foldr"}}
    source = {"kind": "mixed", "categories": parts}
    found = problems(changed(data={"kind": "text", "source": source}))
    assert found[0].startswith("data.source.categories.'': got a key that is no name, wanted a name that matches ^")
    assert found[1].startswith("data.source.categories.b.kind: got 'foldr', wanted one of 'folder', 'installed'")


def test_parts_that_do_not_fit_each_other_are_all_told_even_beside_an_unknown_key() -> None:
    found = problems("""
name: a
data: {kind: digits, validation: 0.5, test: .6}
model: {kind: llama, heads: 4}
training: {steps: 10}
clusters: {}
rounds: [{train: 3, recover: 100, separation: .5}, {train: 0, recover: 0, separation: .5}]
cluster: {workers: 3}
""")
    starts = ["clusters", "data", "model.kind", "rounds", "rounds", "training.rows"]
    starts += ["attribution.rows_at_once", "evaluation.rows_at_once"]
    assert [line.split(":")[0] for line in found] == starts
    assert all(": got " in line and ", wanted " in line for line in found)


def test_what_a_model_demands_of_itself_is_told_under_its_key() -> None:
    data = {"kind": "text", "source": {"kind": "installed"}}
    assert problems(changed(data=data, model={"kind": "llama", "heads": 5})) == (
        "model.heads: got 5, wanted a divisor of hidden, 96, that leaves an even number of dimensions a head",
    )


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "got nothing, wanted a mapping with the keys name, "),
        ("- a", "got ['a'], wanted a mapping"),
        ("just words", "got 'just words', wanted a mapping"),
        ("a: 1\nb: {c: 1,\n  c: 2}", "line 3, column 3: key 'c' stands twice"),
        ("a: [", "line 1, column 5: expected the node content"),
        ("a: b: c", "line 1, column 5: mapping values are not allowed here"),
        ("a: &x [1]\nb: *x", "line 2, column 4: aliases (*x) are not allowed"),
        ("a: !!python/object/apply:os.system [true]", "line 1, column 4: tags (tag:yaml.org,2002:python/object/apply"),
        ("[" * 5000, "line 1, column 33: nested deeper than 32 levels"),
        ("? [1]\n: 2", "line 1, column 3: a key must be text"),
        ("a: 1\n---\nb: 2", "line 2, column 1: but found another document"),
        ("a: \x00", "unacceptable character #x0000"),
    ],
)
def test_text_that_is_no_recipe_at_all_is_told_in_one_line(text: str, told: str) -> None:
    (line,) = problems(text)
    assert line.startswith(told)


def test_long_values_and_many_problems_are_cut() -> None:
    found = problems(changed(**{f"key{i}": "x" * 10_000 for i in range(200)}))
    assert len(found) == 51
    assert found[-1] == "... and 150 more"
    assert all(len(line) < 300 for line in found)


def test_a_file_that_is_too_large_or_not_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "big.yaml"
    path.write_bytes(b"#" * 1_000_001)
    with pytest.raises(RecipeError, match="got more than 1,000,000 bytes"):
        load_recipe(path)
    path.write_bytes(b"name: \xff\xfe")
    with pytest.raises(RecipeError, match="byte 6 is not UTF-8"):
        load_recipe(path)


def test_a_recipe_saved_by_a_windows_editor_is_read(tmp_path: Path) -> None:
    path = tmp_path / "windows.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD.replace("\n", "\r\n").encode())
    assert load_recipe(path) == parse_recipe(GOOD, where="x")


def test_words_that_older_yaml_takes_for_something_else_stay_words() -> None:
    assert strict_yaml.read("{no: on, 1: yes, a: 2024-01-01, b: 1:30, c: 1e-3, d: 010, e: ~, f: True}") == {
        "no": "on",
        "1": "yes",
        "a": "2024-01-01",
        "b": "1:30",
        "c": 0.001,
        "d": 10,
        "e": None,
        "f": True,
    }


def test_the_schema_knows_every_key_and_says_what_it_is() -> None:
    schema = json_schema()
    assert schema["additionalProperties"] is False
    assert set(schema["properties"]) == set(RunConfig.model_fields)
    assert "nats" in schema["$defs"]["Budget"]["properties"]["tax"]["description"]
    json.dumps(schema)


def test_a_tree_is_read_told_about_and_written_back() -> None:
    config = parse_recipe(changed(tree=[["0", "1"], [["2", "3"], "4"]]), where="my.yaml")
    assert config.tree == (("0", "1"), (("2", "3"), "4"))
    assert parse_recipe(to_yaml(config), where="again") == config
    found = problems(changed(tree=[[0, "1"], ["2"], ["3", "1"]], colour=1))
    assert "tree[0][0]: got 0, wanted the name of a category, in quotes if it is a number, or a list" in found
    assert any(line.startswith("tree[1]: got a group of one") for line in found)
    assert "tree[2][1]: got '1' again, wanted every category once" in found
    assert len(found) == 4
    assert problems(changed(tree=3)) == ("tree: got 3, wanted a list of groups, each the name of a category or a list",)
    (line,) = problems(changed(tree=[["0", "on"], "2"]))
    assert line.startswith("tree: got 'on', which is no category of the data")


def test_unrouted_categories_must_fit_the_rest() -> None:
    partition = {"unrouted": ["0", "0", "1"], "min_core": 0.0}
    assert problems(changed(partition=partition, tree=[["1", "2"], "3"])) == (
        "partition.unrouted: got ['0', '0', '1'], wanted each category once",
        "partition.unrouted: got '1', which tree gives an expert; name it in one of the two",
        "partition.min_core: got 0, wanted more, since partition.unrouted categories have the core alone",
    )
    (line,) = problems(changed(partition={"unrouted": ["ten"]}))
    assert line.startswith("partition.unrouted: got 'ten', which is no category of the data")


def test_units_that_are_split_must_be_there() -> None:
    wanted = "wanted [ffn] or [ffn, heads]; to split heads alone, freeze the rest: partition.frozen: ['*.ffn']"
    assert problems(changed(partition={"units": ["ffn", "ffn"]})) == (f"partition.units: got ['ffn', 'ffn'], {wanted}",)
    assert problems(changed(partition={"units": ["heads"]})) == (
        f"partition.units: got ['heads'], {wanted}",
        "partition.units: got 'heads', which model.kind 'autoencoder' has none of, wanted [ffn]",
    )
    assert problems(changed(partition={"floors": {"encoder.*": 2}, "frozen": ["a b"]})) == (
        "partition.floors.'encoder.*': got 2, wanted a number > 0 and < 1",
        "partition.frozen[0]: got 'a b', wanted a name that matches ^[A-Za-z0-9_.*?-]{1,100}$",
    )
    config = parse_recipe(changed(partition={"floors": {"encoder.*": 0.5}, "frozen": ["*.hidden"]}), where="my.yaml")
    assert parse_recipe(to_yaml(config), where="again") == config


def test_gradient_routing_must_fit_the_rest() -> None:
    routing = {"gradients": "both", "experts": [{"categories": ["1", "2"], "units": 0.5}], "strength": {"1": 0.5}}
    assert parse_recipe(changed(routing=routing), where="x").early_arms == ("dense", "split")
    assert parse_recipe(changed(routing={"gradients": "none"}), where="x").early_arms == ("dense",)
    twice = {**routing, "experts": [*routing["experts"], {"categories": ["2"], "units": 0.6}], "hard": ["1"]}
    assert problems(changed(routing=twice)) == (
        "routing.experts: got '2' more than once, wanted every category once at most",
        "routing.experts: got units 1.1 in all, wanted at most 1, of which the core is what is left",
        "routing.strength: got '1', whose routes are hard: nothing reaches units off them, wanted categories with soft "
        "routes",
    )
    apart = changed(routing={**routing, "gradients": "activations", "apart": ["1"]})
    assert problems(apart) == (
        "routing.apart: got ['1'] beside gradients 'activations', with which other units learn from their rows, wanted "
        "gradients 'parameters' or 'both'",
        "routing.apart: got '1', whose strength is 0.5, wanted strength 1",
        "partition.compensation: got a mapping beside routing.apart, wanted null: what is shared would be fitted to "
        "the rows of 1 too",
    )
    owners = {"owners": {"kind": "attribution", "hand_over": True}}
    parse_recipe(changed(routing=routing, partition=owners), where="x")
    late = {**routing, "experts": [], "routes_after_cut": "soft"}
    (line,) = problems(changed(routing=late, partition=owners))
    assert line.startswith("partition.owners.hand_over: got true, wanted false where routing.experts are not given")
    (line,) = problems(changed(routing={**routing, "hard": ["ten"]}))
    assert line.startswith("routing.hard: got 'ten', which is no category of the data")
    heads = {"data": {"kind": "text", "source": {"kind": "installed"}}, "model": {"kind": "llama"}}
    frozen = {"gradients": "both", "core": "frozen"}
    (line,) = problems(changed(**heads, routing=frozen, partition={"units": ["ffn", "heads"]}))
    assert line.startswith("routing.gradients: got 'both' beside partition.units ['ffn', 'heads'], wanted units [ffn]")
    images = {"kind": "images", "source": "cifar10", "objective": "classify"}
    images["categories"] = {"low": [0, 1, 2, 3, 4], "high": [5, 6, 7, 8, 9]}
    (line,) = problems(changed(data=images, model={"kind": "resnet"}, routing=frozen))
    assert line.startswith("routing.gradients: got 'both' beside model.kind 'resnet', wanted 'none'")


@pytest.mark.parametrize(
    "said",
    [
        {"experts": [{"categories": ["1"], "fresh": 8}]},
        {"core": "frozen"},
        {"labelled": 0.5},
        {"hard": ["1"]},
        {"strength": {"1": 0.1}},
        {"routes": "hard"},
        {"routes_after_cut": "soft"},
        {"apart": ["1"]},
    ],
)
def test_what_does_nothing_without_routed_gradients_is_refused(said: dict[str, object]) -> None:
    (line,) = problems(changed(routing=said, partition={"compensation": None}))
    assert line == (
        f"routing: got {next(iter(said))} beside gradients 'none', with which no gradient is routed, wanted gradients "
        f"'parameters', 'activations' or 'both', or none of them"
    )


@pytest.mark.parametrize("more", [{}, {"strength": {"1": 0.1}}, {"routes": "hard"}, {"hard": ["1"]}])
@pytest.mark.parametrize("gradients", ["parameters", "activations", "both"])
def test_gradients_that_would_be_routed_nowhere_are_refused(gradients: str, more: dict[str, object]) -> None:
    (line,) = problems(changed(routing={"gradients": gradients, **more}))
    assert line.startswith(f"routing.gradients: got '{gradients}', which acts on nothing: after a cut units off")
    for acting in ({"core": "frozen"}, {"routes_after_cut": "soft"}, {"labelled": 0.5}):
        parse_recipe(changed(routing={"gradients": gradients, **acting}), where="x")


def test_strength_off_routes_that_are_always_hard_is_refused() -> None:
    known = {"gradients": "both", "labelled": 0.5, "strength": {"1": 0.1}}
    (line,) = problems(changed(routing=known))
    assert line.startswith("routing.strength: got '1', whose routes are hard")
    for soft in ({"experts": [{"categories": ["1"], "units": 0.1}]}, {"core": "frozen"}):
        parse_recipe(changed(routing={**known, **soft}), where="x")


def test_a_mapping_with_too_few_keys_is_told_in_a_line() -> None:
    mixed = {"kind": "mixed", "categories": {}}
    (line,) = problems(changed(data={"kind": "text", "source": mixed}, model={"kind": "llama"}))
    assert line == "data.source.categories: got {}, wanted a mapping of at least 2 from names"


def test_a_null_test_wants_all_rows_measured() -> None:
    partition = {"null_test": {"permutations": 8}}
    assert problems(changed(partition=partition, attribution={"settled": 0.9})) == (
        "attribution.settled: got 0.9, wanted null beside partition.null_test, whose passes must all measure the same "
        "rows",
    )
    assert parse_recipe(changed(partition=partition), where="my.yaml").partition.null_test is not None
    (line,) = problems(changed(partition={"null_test": {"permutations": 2}}))
    assert line == "partition.null_test.permutations: got 2, wanted a whole number >= 3"


# --- whatever is thrown at it ---------------------------------------------------------------------------

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)
FINITE = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**20), 10**20)
    | st.floats(allow_nan=False, allow_infinity=False)
    # YAML has no way to write lone surrogates, nor keeps every line break apart
    | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x85\u2028\u2029\r")),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(st.characters(min_codepoint=32, max_codepoint=126)), inner, max_size=4)
    ),
    max_leaves=10,
)


@given(FINITE)
def test_what_is_written_is_read_back_equal(data: Any) -> None:
    again = strict_yaml.read(strict_yaml.write(data))
    assert again == data
    assert repr(again) == repr(data)


def test_rare_characters_are_read_as_json_writes_them_and_halves_of_them_are_refused() -> None:
    rare = {"\U00010000": ["\U0001f600 a"]}
    assert strict_yaml.read(json.dumps(rare)) == rare
    for text in (r'{"a": "\ud800"}', r'{"\udc00": 1}'):
        with pytest.raises(
            strict_yaml.YamlError, match=r"^line 1, column \d+: half a surrogate pair is no Unicode text"
        ):
            strict_yaml.read(text)
    categories = {"\U00010000": [], "b": [1]}
    odd = {**yaml.safe_load(GOOD), "data": {"kind": "images", "source": "mnist", "categories": categories}}
    with pytest.raises(RecipeError, match="got a key that is no name"):
        parse_recipe(json.dumps(odd), where="odd")


def _paths(data: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return [path, *(found for key, value in inner for found in _paths(value, (*path, key)))]


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(SHIPPED), st.data())
def test_a_mutated_recipe_gives_a_run_or_a_recipe_error_and_nothing_else(name: str, draw: st.DataObject) -> None:
    data = copy.deepcopy(strict_yaml.read(shipped(name)))
    for _ in range(draw.draw(st.integers(1, 3))):
        path = draw.draw(st.sampled_from([path for path in _paths(data) if path]))
        parent = data
        for key in path[:-1]:
            parent = parent[key]
        match draw.draw(st.sampled_from(["drop", "replace", "add", "rename"])):
            case "drop":
                del parent[path[-1]]
            case "replace":
                parent[path[-1]] = draw.draw(PLAIN)
            case "add" if isinstance(parent, dict):
                parent[draw.draw(st.text())] = draw.draw(PLAIN)
            case "rename" if isinstance(parent, dict):
                parent[path[-1] + "x"] = parent.pop(path[-1])
        if not data:
            break
    try:
        config = parse_recipe(json.dumps(data), where="mutant")
    except RecipeError:
        return
    assert parse_recipe(to_yaml(config), where="again") == config


@given(st.text())
def test_any_text_gives_a_run_or_a_recipe_error(text: str) -> None:
    with pytest.raises(RecipeError):
        parse_recipe(text, where="noise")


@pytest.mark.parametrize(("good", "limit"), [("0.02", 0.02), ("1 %", 0.04), ("1%", 0.04), ("'2.5 %'", 0.1)])
def test_a_budget_is_nats_or_a_share_of_the_twins_loss(good: str, limit: float) -> None:
    config = parse_recipe(f"{GOOD}budget: {{tax: {good}}}\n", where="mine")
    assert config.budget is not None
    assert config.budget.limit(4.0) == pytest.approx(limit)
    assert parse_recipe(to_yaml(config), where="again") == config


@pytest.mark.parametrize("bad", ["0", "-1", "0 %", "one", "1 percent", "true", "[1]", "null"])
def test_a_budget_that_is_neither_is_told_in_a_line(bad: str) -> None:
    (line,) = problems(f"{GOOD}budget: {{tax: {bad}}}\n")
    assert line.startswith("budget.tax: got ")
    assert line.endswith("such as '1 %'")
