import ast
import inspect
import io
import sysconfig
import tokenize
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeify import extract
from moeify.extract import english, pieces, without_commentary


def dedent(text: str) -> str:
    return inspect.cleandoc(text) + "\n"


def bare(tree: ast.AST) -> str:
    """Dump a program with its bare strings taken out by the parser's own tree: the slow oracle."""
    for node in ast.walk(tree):
        for field in ("body", "orelse", "finalbody"):
            block = getattr(node, field, None)
            if isinstance(block, list):
                left = [s for s in block if not (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant)
                                                 and isinstance(s.value.value, str))]  # fmt: skip
                emptied = bool(block) and not left and not isinstance(node, ast.Module)
                setattr(node, field, [ast.Pass()] if emptied else left)
    return ast.dump(tree)


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
    left = without_commentary(source)
    assert ast.dump(ast.parse(left)) == bare(ast.parse(source))
    assert not [t for t in tokenize.generate_tokens(io.StringIO(left).readline) if t.type == tokenize.COMMENT]


def test_files_of_the_standard_library_keep_their_meaning() -> None:
    for name in ("ast", "dataclasses", "inspect", "typing", "argparse"):
        source = Path(sysconfig.get_path("stdlib"), f"{name}.py").read_text(encoding="utf-8")
        left = without_commentary(source)
        assert ast.dump(ast.parse(left)) == bare(ast.parse(source))
        assert "#" not in "".join(
            t.string for t in tokenize.generate_tokens(io.StringIO(left).readline) if t.type == tokenize.COMMENT
        )
        assert len(left) < 0.9 * len(source)


@pytest.mark.parametrize("source", ["def f(:\n", "x = '\n", "\0", "if x:\n"])
def test_a_file_that_is_not_python_gives_nothing(source: str) -> None:
    assert list(extract.python(".py", source)) == []


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
    assert list(extract.prose(".py", source)) == [
        "The module is for those who want to read a text and not the code of it.\n\n"
        "The function gives what it was given, and to the one that gave it.\n"
    ]
    assert list(extract.prose(".py", "x = 1\n")) == []


def test_licences_go_from_the_head_of_c_and_from_all_of_a_bundle() -> None:
    licence, plain = "/* Copyright of\n * someone */\n", "/* What the\n file is for */\nint x;\n"
    assert list(extract.c(".h", licence + "// Licensed so\n// and so\n\n" + plain)) == [plain]
    assert list(extract.c(".h", plain + licence)) == [plain + licence]
    assert list(extract.web(".js", "/*! license X */a();/*! keep */b();/*! Copyright */\nc()")) == [
        "a();/*! keep */b();\nc()"
    ]


def test_packed_data_is_no_text_of_the_web() -> None:
    code = "function f(a, b) { return a + b; }\n"
    assert list(extract.web(".js", 'x="' + "QUJD" * 200 + '";' + code)) == []
    assert list(extract.web(".js", code + 'x="' + "漢字" * 200 + '"')) == []
    assert list(extract.web(".css", "a{b:url(data:font/woff2;base64," + "QUJD" * 200 + ")}")) == ["a{b:url(data:)}"]


@given(st.text("ab \n;}", min_size=1), st.integers(1, 40_000))
def test_pieces_are_the_text_cut_up(text: str, repeated: int) -> None:
    long = text * (repeated // len(text) + 1)
    cut = list(pieces(long))
    assert "".join(cut) == long
    assert all(0 < len(piece) <= extract.PIECE_CHARACTERS for piece in cut)


def test_pieces_end_with_a_line_or_a_statement() -> None:
    lines = list(pieces("int x; int y;\n" * 10_000))
    assert len(lines) == 5
    assert all(piece.endswith("\n") for piece in lines)
    assert all(piece.endswith(";") for piece in pieces("f(a,b);" * 10_000))
