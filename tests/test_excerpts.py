import ast
import inspect
import io
import sysconfig
import tokenize
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeify.data import excerpts
from moeify.data.excerpts import english, pieces, without_commentary


def dedent(text: str) -> str:
    return inspect.cleandoc(text) + "\n"


def is_string(statement: ast.stmt) -> bool:
    value = statement.value if isinstance(statement, ast.Expr) else None
    return isinstance(value, ast.Constant) and isinstance(value.value, str)


def program(source: str) -> str:
    """Say what a program does: its tree without strings and ``pass`` as statements, but for empty blocks."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        for field in ("body", "orelse", "finalbody"):
            block = getattr(node, field, None)
            if isinstance(block, list) and block:
                left = [s for s in block if not isinstance(s, ast.Pass) and not is_string(s)]
                setattr(node, field, left if left or node is tree else [ast.Pass()])
    return ast.dump(tree)


def check_only_commentary_went(source: str, left: str) -> None:
    assert program(left) == program(source)
    assert not [node for node in ast.walk(ast.parse(left)) if isinstance(node, ast.stmt) and is_string(node)]
    assert not [t for t in tokenize.generate_tokens(io.StringIO(left).readline) if t.type == tokenize.COMMENT]


def test_commentary_goes_and_the_layout_stays() -> None:
    source = dedent('''
        """Module."""

        # A comment.
        import os  # why


        class A:
            """Class."""

            size = "a # no comment"
            """Under a field."""

            def f(self, x: "int"):
                "Doc."
                # first

                return x  # last
    ''')
    assert without_commentary(source) == dedent("""
        import os


        class A:
            size = "a # no comment"

            def f(self, x: "int"):
                return x
    """)


@pytest.mark.parametrize(
    "source",
    [
        'def f(): "doc"\n',
        'def f(): "doc"; return 1\n',
        'def f():\n    """a\n    b"""; x = 1\n',
        'class A:\n    """only"""\n    """twice"""\n',
        'class A:\n    """only"""  # and this\n',
        'if x:\n    "one"\nelif y:\n    "two"\nelse:\n    "three"\n',
        'try:\n    "a"\nexcept E:\n    "b"\nelse:\n    "c"\nfinally:\n    "d"\n',
        'match x:\n    case 1:\n        "a"\n    case _:\n        y\n',
        '("a"  # inside\n "b")\nx = 1\n',
        '(\n    # before\n    "b"\n    # after\n)\nx = 1\n',
        'x = ("a"  # inside\n     "b")\n',
        'x = 1; "b"\n',
        "x = '''\n# no comment\n\n\n'''\n",
        '"é" "漢"; x = "é"  # é\n',
        "def f(\n    a,  # one\n    # two\n    b,\n): ...\n",
        "f = lambda: 'x'\n",
        "x = 1\\\n  + 2  # c\n",
        "#!/usr/bin/env python\n# -*- coding: utf-8 -*-\n",
        "",
    ],
)
def test_what_is_left_is_the_same_program_without_bare_strings_and_comments(source: str) -> None:
    check_only_commentary_went(source, without_commentary(source))


def test_files_of_the_standard_library_keep_their_meaning() -> None:
    for name in ("ast", "dataclasses", "inspect", "typing", "argparse"):
        source = Path(sysconfig.get_path("stdlib"), f"{name}.py").read_text(encoding="utf-8")
        left = without_commentary(source)
        check_only_commentary_went(source, left)
        assert len(left) < 0.9 * len(source)


@pytest.mark.parametrize("source", ["def f(:\n", "x = '\n", "\0", "if x:\n"])
def test_a_file_that_is_not_python_gives_nothing(source: str) -> None:
    assert list(excerpts.python(".py", source)) == []


def test_only_sentences_are_english() -> None:
    text = dedent("""
        The first paragraph is English, as a reader of it would say.

        Parameters
        ----------
        x : int
            The number of the things that are to be counted in this place.

        >>> f(x) == 1 and this is not a sentence of English at all

        - A list is not a paragraph, though it may well end in a full stop.

            An indented paragraph is English where all of its lines are indented
            alike, as this one is::

            for x in y: print(x)

        Too short to count.

        X_1 + Y_2 * (Z_3 - 4) / 5 == 6 and 7 <= 8 of the a_b, c_d and e_f.
    """)
    assert list(english(text)) == [
        "The first paragraph is English, as a reader of it would say.",
        "An indented paragraph is English where all of its lines are indented\nalike, as this one is:",
    ]


def test_prose_of_a_module_is_the_english_of_its_docstrings() -> None:
    source = dedent('''
        """The module is for those who want to read a text and not the code of it."""

        TEXT = """
        The value of a name is not prose, whatever the words in it look like.
        """

        def f():
            r"""The function gives what it was given, and to the one that gave it.

            The module is for those who want to read a text and not the code of it.
            """
            # The comment is not a part of the prose, though it is English.
            return "The string is not a part of the prose, and it is in quotes."
    ''')
    assert list(excerpts.prose(".py", source)) == [
        "The module is for those who want to read a text and not the code of it.\n\n"
        "The function gives what it was given, and to the one that gave it.\n"
    ]
    assert list(excerpts.prose(".py", "x = 1\n")) == []


def test_licences_go_from_the_head_of_c_and_from_all_of_a_bundle() -> None:
    licence, plain = "/* Copyright of\n * someone */\n", "/* What the\n file is for */\nint x;\n"
    assert list(excerpts.c(".h", licence + "// Licensed so\n// and so\n\n" + plain)) == [plain]
    assert list(excerpts.c(".h", plain + licence)) == [plain + licence]
    assert list(excerpts.web(".js", "/*! license X */a();/*! keep */b();/*! Copyright */\nc()")) == [
        "a();/*! keep */b();\nc()"
    ]


def test_packed_data_is_no_text_of_the_web() -> None:
    code = "function f(a, b) { return a + b; }\n"
    assert list(excerpts.web(".js", 'x="' + "QUJD" * 200 + '";' + code)) == []
    assert list(excerpts.web(".js", code + 'x="' + "漢字" * 200 + '"')) == []
    assert list(excerpts.web(".css", "a{b:url(data:font/woff2;base64," + "QUJD" * 200 + ")}")) == ["a{b:url(data:)}"]


@given(st.text("ab \n;}", min_size=1), st.integers(1, 40_000))
def test_pieces_are_the_text_cut_up(text: str, repeated: int) -> None:
    long = text * (repeated // len(text) + 1)
    cut = list(pieces(long))
    assert "".join(cut) == long
    assert all(0 < len(piece) <= excerpts.PIECE_CHARACTERS for piece in cut)


def test_pieces_end_with_a_line_or_a_statement() -> None:
    lines = list(pieces("int x; int y;\n" * 10_000))
    assert len(lines) == 5
    assert all(piece.endswith("\n") for piece in lines)
    assert all(piece.endswith(";") for piece in pieces("f(a,b);" * 10_000))
