"""Errors on one line, without passwords."""

import pytest

from pipelines.one_line import one_line, public


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("http://user:s3cr3tpw@host:1/api", "http://host:1/api"),
        (
            "see https://me:a@b@host, or postgresql+psycopg2://u:p@db:5/x",
            "see https://host, or postgresql+psycopg2://db:5/x",
        ),
        ("http://u:p#a/s?s@host:1/", "http://host:1/"),
        ("http://host:5000/models/name@split", "http://host:5000/models/name@split"),
        ("http://host/a?mail=a@b", "http://host/a?mail=a@b"),
        ("models:/name@split and a@b", "models:/name@split and a@b"),
        ("sqlite:////tmp/mlflow.db", "sqlite:////tmp/mlflow.db"),
    ],
)
def test_addresses_are_told_without_user_and_password(text: str, told: str) -> None:
    assert public(text) == told


def test_an_error_is_one_line_cut_after_its_password_is_gone() -> None:
    error = ValueError("one\n two http://user:password@host:1/")
    assert one_line(error) == "one two http://host:1/"
    assert one_line(error, 19) == "one two http://host"
    assert one_line(error, None, kind=True) == "ValueError: one two http://host:1/"
    assert one_line(KeyError()) == "KeyError"
    assert one_line("a\nb") == "a b"
