import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeify.data.documents import SPLITS, Document, distinct, divide


def lines(*numbers: int) -> str:
    return "".join(f"line number {number} of this text\n" for number in numbers)


def texts(documents: list[Document]) -> list[str]:
    return [document.text for document in documents]


def test_equal_documents_stay_once_whatever_their_white_space() -> None:
    kept = distinct({"a": [Document("x = 1", "1"), Document("x  =\n1", "2")], "b": [Document("x = 1\n", "3")]})
    assert sum(map(len, kept.values())) == 1


def test_a_document_goes_when_more_than_half_of_it_is_in_larger_ones() -> None:
    large = Document(lines(*range(10)), "large")
    inside, half, fresh = (Document(lines(*n), "small") for n in ((3, 4, 5, 20, 21), (3, 4, 20, 21), (1, 30, 31)))
    for small, stays in ((inside, False), (half, True), (fresh, True)):
        for first, second in itertools.permutations((large, small)):
            kept = distinct({"a": [first], "b": [second]})
            assert (small in kept["a"] + kept["b"]) == stays
            assert large in kept["a"] + kept["b"]


def test_trivial_lines_make_no_duplicate() -> None:
    trivial = "return x\n    }\n" * 20
    one, other = Document(trivial + lines(1), "1"), Document(trivial + lines(2), "2")
    assert distinct({"a": [one, other]}) == {"a": [one, other]}


def test_statements_count_where_lines_are_long() -> None:
    one = Document("function first(a,b){return a+b+first};var second=first(1,2);", "1")
    other = Document("function first(a,b){return a+b+first};let c=3;", "2")
    assert distinct({"a": [one, other]}) == {"a": [one]}


def test_the_order_of_categories_does_not_matter_to_what_is_kept() -> None:
    draw = random.Random(0)
    found = {
        name: [Document(lines(*draw.sample(range(40), draw.randint(1, 8))), f"{name}/{i}") for i in range(20)]
        for name in "abc"
    }
    kept = distinct(found)
    assert distinct(dict(reversed(found.items()))) == kept
    assert 0 < sum(map(len, kept.values())) < 60
    for name in found:
        assert kept[name] == [document for document in found[name] if document in kept[name]]


def groups(sizes: list[int]) -> list[Document]:
    return [Document("x" * size, f"group {number}") for number, size in enumerate(sizes)]


@given(st.lists(st.integers(1, 1000), min_size=3, max_size=40), st.floats(0.01, 0.49), st.floats(0.01, 0.49))
def test_every_group_lies_in_one_split_and_no_split_is_empty(sizes: list[int], validation: float, test: float) -> None:
    documents = [piece for document in groups(sizes) for piece in (document, Document("y", document.group))]
    parts = divide(documents, validation=validation, test=test)
    assert sorted(map(str, itertools.chain(*parts.values()))) == sorted(map(str, documents))
    of_split = [{document.group for document in parts[split]} for split in SPLITS]
    assert all(of_split)
    assert sum(map(len, of_split)) == len(sizes)


def test_splits_get_their_share_of_the_bytes() -> None:
    parts = divide(groups([10] * 1000), validation=0.05, test=0.1)
    assert {split: len(parts[split]) for split in SPLITS} == {"train": 850, "validation": 50, "test": 100}


def test_a_document_stays_in_its_split_when_others_come_before_it() -> None:
    documents = groups([10] * 100)
    one, other = (divide(each, validation=0.1, test=0.2) for each in (documents, documents[::-1]))
    assert {split: set(texts(one[split])) for split in SPLITS} == {split: set(texts(other[split])) for split in SPLITS}
    assert [d.group for d in one["test"]] == [d.group for d in other["test"]]


def test_two_documents_are_too_few() -> None:
    with pytest.raises(ValueError, match="got 2 distinct documents, wanted at least 3"):
        divide(groups([10, 10]), validation=0.1, test=0.1)
