import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeify.recipe.given_tree import Nested, foreseen, given_groups, names, read_tree, strangers

TREE = read_tree([["a", "b"], [["c", "d"], "e", ["f", "g", "h"]]])


def test_each_expert_finds_the_groups_its_categories_were_given_in() -> None:
    assert given_groups(TREE, "abcdefgh") == [("a", "b"), ("c", "d", "e", "f", "g", "h")]
    assert given_groups(TREE, "cdefgh") == [("c", "d"), ("e",), ("f", "g", "h")]
    for flat in ("ab", "fgh", "e", "xy", ""):
        assert given_groups(TREE, flat) == []
    assert given_groups(None, "ab") == []


def test_a_given_group_is_held_together_while_its_expert_serves_anything_else() -> None:
    assert given_groups(TREE, "abx") == [("a", "b")]
    assert given_groups(TREE, "cdefghx") == [("c", "d", "e", "f", "g", "h")]
    assert given_groups(read_tree([["a", "b"]]), "abxy") == [("a", "b")]
    assert given_groups(read_tree([["a", "b"]]), "ab") == []


def test_given_groups_win_over_branching_and_free_categories_fill_up() -> None:
    assert foreseen(None, "abcde", 2) == [("a", "c", "e"), ("b", "d")]
    assert foreseen(TREE, "cdefgh", 2) == [("c", "d"), ("e",), ("f", "g", "h")]
    assert foreseen(TREE, "cdefgh", 8) == [("c", "d"), ("e",), ("f", "g", "h")]
    assert foreseen(read_tree([["a", "b"]]), "abcd", 3) == [("a", "b"), ("c",), ("d",)]
    assert foreseen(read_tree([["a", "b"], "c"]), "abcd", 2) == [("a", "b"), ("c", "d")]


@pytest.mark.parametrize(
    ("tree", "told"),
    [
        (7, ": got 7, wanted a list of groups"),
        ("ab", ": got 'ab', wanted a list of groups"),
        ([], ": got an empty group, wanted at least two members"),
        ([["a", "b"], ["c"]], r"\[1\]: got a group of one, wanted at least two members; a category that is alone"),
        ([[["a", "b"]]], r"\[0\]: got a group of one"),
        ([["a", "b"], ["c", ["d", "a"]]], r"\[1\]\[1\]\[1\]: got 'a' again, wanted every category once"),
        ([[0, 1], ["a", None]], r"\[0\]\[0\]: got 0, wanted the name of a category, in quotes if it is a number"),
        (["a", "b"], ": got one flat list, which divides nothing"),
    ],
)
def test_a_tree_that_is_none_is_told_with_its_place(tree: object, told: str) -> None:
    with pytest.raises(ValueError, match=f"(?m)^{told}"):
        read_tree(tree)


def test_strangers_are_told_with_the_nearest_category() -> None:
    told = list(strangers("tree", names(read_tree([["pythn", "c"], "web"])), ("python", "c", "prose")))
    assert told[0] == (
        "tree: got 'pythn', which is no category of the data, wanted some of ['python', 'c', 'prose']; "
        "nearest: 'python'"
    )
    assert told[1].startswith("tree: got 'web', ")
    assert len(told) == 2


def trees(members: list[str]) -> st.SearchStrategy[Nested]:
    leaves = st.sampled_from(members)
    return st.recursive(leaves, lambda inner: st.lists(inner, min_size=2, max_size=3).map(tuple), max_leaves=6)


@given(trees(list("abcdef")), st.integers(2, 4))
def test_every_given_list_is_an_expert_of_its_own_on_the_way_down(tree: Nested, branching: int) -> None:
    """With all categories named, the experts are the tree's lists; with some free, each list's names stay together."""
    try:
        tree = read_tree(tree)
    except ValueError:
        return
    levels = [[tuple("abcdef")]]
    for _ in range(6):
        levels.append([part for group in levels[-1] for part in foreseen(tree, group, branching)])
        assert sorted("".join("".join(group) for group in levels[-1])) == list("abcdef")
    assert all(len(group) == 1 for group in levels[-1])
    experts = {frozenset(group) for level in levels for group in level}
    free = set("abcdef") - set(names(tree))

    def check(item: str | Nested) -> None:
        assert any(set(names(item)) <= expert <= {*names(item), *free} for expert in experts)
        for each in () if isinstance(item, str) else item:
            check(each)

    check(tree)
