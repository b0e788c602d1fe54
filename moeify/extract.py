"""What text to take out of a file: code without its prose, prose without its code, large files cut into pieces.

Every function takes a file's suffix and text and yields documents.
"""

import ast
import inspect
import io
import re
import tokenize
import warnings
from collections.abc import Iterator, Sequence
from itertools import pairwise

PIECE_CHARACTERS = 32_000
"""About how long a piece of a large file is."""

# --- Python -------------------------------------------------------------------------------------------


def python(suffix: str, content: str) -> Iterator[str]:
    """Yield the whole file without its commentary; nothing where it is not valid Python."""
    try:
        yield without_commentary(content)
    except (SyntaxError, ValueError, tokenize.TokenError, RecursionError):
        return


def without_commentary(source: str) -> str:
    """Return Python source without comments, docstrings and other strings that stand as statements.

    Everything else keeps its layout. The result parses to the same program; ``pass`` stands where such strings were
    all that a block held. Raises what ``ast.parse`` and ``tokenize`` raise.
    """
    lines = source.split("\n")
    emptied: set[int] = set()
    edits = [*_bare_strings(_parse(source), lines), *_comments(source)]
    for (first, start), (last, stop), replacement in sorted(edits, reverse=True):
        before, after = lines[first][:start], lines[last][stop:]
        if (before + after).strip():
            replacement = replacement or ("pass" if after.strip() or before.rstrip().endswith((":", ";")) else "")
        line = f"{before}{replacement}{after}".rstrip()
        lines[first : last + 1] = [line, *[""] * (last - first)]
        if not line:
            emptied.update(range(first, last + 1))
    return _close_gaps(lines, emptied)


Edit = tuple[tuple[int, int], tuple[int, int], str]
"""Start, end and replacement; places are (line, character), both from 0."""


def _bare_strings(tree: ast.Module, lines: Sequence[str]) -> Iterator[Edit]:
    for node in ast.walk(tree):
        for field in ("body", "orelse", "finalbody"):
            block = getattr(node, field, None)
            if not isinstance(block, list):  # a lambda's body is an expression
                continue
            strings = [s for s in block if _is_bare_string(s)]
            needs_pass = len(strings) == len(block) and not isinstance(node, ast.Module)
            for string in strings:
                replacement = "pass" if needs_pass and string is strings[0] else ""
                yield (
                    _place(lines, string.lineno, string.col_offset),
                    _place(lines, string.end_lineno or 0, string.end_col_offset or 0),
                    replacement,
                )


def _is_bare_string(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _place(lines: Sequence[str], line: int, offset: int) -> tuple[int, int]:
    """Turn a line from 1 and an offset in UTF-8 bytes into a line and a character, both from 0."""
    return line - 1, len(lines[line - 1].encode()[:offset].decode())


def _comments(source: str) -> Iterator[Edit]:
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            line, start = token.start[0] - 1, token.start[1]
            yield (line, start), (line, token.end[1]), ""


def _close_gaps(lines: Sequence[str], emptied: set[int]) -> str:
    """Join the lines; the emptied ones go, and with them the blank lines that they leave at a block's begin or double."""
    kept: list[str] = []
    gap = False
    for number, line in enumerate(lines):
        gap = number in emptied or (gap and not line.strip())
        opens = not kept or not kept[-1].strip() or kept[-1].endswith(":")
        if number not in emptied and not (gap and opens):
            kept.append(line)
    return "\n".join(kept).strip("\n") + "\n"


def _parse(source: str) -> ast.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # files of others: invalid escapes and the like
        return ast.parse(source)


# --- prose --------------------------------------------------------------------------------------------

_MARKUP = re.compile(r"^\s*(>>>|\.\.\.?\s|\.\. |[-=~^*#`|+]{3,}|[|+]|:\w[^:]*:|\$ )", re.MULTILINE)
_WORD = re.compile(r"[A-Za-z]+(?:['-][A-Za-z]+)*")
_FUNCTION_WORDS = frozenset(
    "the a an of to in is are be and or for with that this it as by on from if not which can will at when".split()
)
_FEWEST_WORDS = 8
_LEAST_LETTERS = 0.9
"""Fraction of a paragraph's characters that are letters, spaces or the punctuation of sentences."""
_LEAST_FUNCTION_WORDS = 0.2
"""Fraction of a paragraph's words; running English has about 0.4."""


def prose(suffix: str, content: str) -> Iterator[str]:
    """Yield the English of a file: of a Python file's docstrings, or of a documentation file.

    A paragraph is English when no line of it is indented (as code and parameter lists are), it has eight words or
    more, a fifth of them function words, hardly a character but letters and punctuation, and the end of a sentence.
    """
    texts = _docstrings(content) if suffix == ".py" else [content]
    paragraphs = dict.fromkeys(p for text in texts for p in re.split(r"\n\s*\n", text) if _is_english(p))
    yield from pieces("\n\n".join(paragraphs), "\n\n")


def _docstrings(content: str) -> Iterator[str]:
    try:
        tree = _parse(content)
    except (SyntaxError, ValueError, RecursionError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node, clean=False)
            if docstring:
                yield inspect.cleandoc(docstring)


def _is_english(paragraph: str) -> bool:
    lines = paragraph.strip("\n").split("\n")
    if any(line[:1].isspace() for line in lines) or _MARKUP.search(paragraph):
        return False
    words = _WORD.findall(paragraph)
    if len(words) < _FEWEST_WORDS or not paragraph.rstrip().endswith((".", "!", "?", ":", ".)", '."')):
        return False
    plain = sum(c.isalpha() or c in " \n.,;:'\"()-!?`" for c in paragraph)
    function_words = sum(word.lower() in _FUNCTION_WORDS for word in words)
    return plain >= _LEAST_LETTERS * len(paragraph) and function_words >= _LEAST_FUNCTION_WORDS * len(words)


# --- C and the web ------------------------------------------------------------------------------------

_LEADING_COMMENT = re.compile(r"\s*(/\*.*?\*/|(?://[^\n]*\n\s*)+)", re.DOTALL)
_LICENCE = re.compile(r"copyright|licen[sc]e|all rights reserved|@generated", re.IGNORECASE)
_LICENCE_COMMENT = re.compile(r"/\*[!*].{0,4000}?\*/", re.DOTALL)
_SOURCE_MAP = re.compile(r"^//# sourceMappingURL=.*$", re.MULTILINE)
_ENCODED = re.compile(r"data:[\w/+.-]+;base64,[A-Za-z0-9+/=]{64,}")


def c(suffix: str, content: str) -> Iterator[str]:
    """Yield C or C++ without the licences at its head, a large file in pieces."""
    while (comment := _LEADING_COMMENT.match(content)) and _LICENCE.search(comment[0]):
        content = content[comment.end() :]
    yield from pieces(content.lstrip("\n"), "\n")


def web(suffix: str, content: str) -> Iterator[str]:
    """Yield JavaScript, CSS or HTML without licences and embedded binaries, a large file (a bundle) in pieces."""
    content = _LICENCE_COMMENT.sub(lambda found: "" if _LICENCE.search(found[0]) else found[0], content)
    content = _ENCODED.sub("data:", _SOURCE_MAP.sub("", content))
    yield from pieces(content.strip("\n"), "\n", ";", "}", ",")


# --- pieces -------------------------------------------------------------------------------------------


def pieces(text: str, *separators: str) -> Iterator[str]:
    """Yield the text, one that is long in pieces of about equal length.

    A cut follows a separator, the one named first that occurs in the half piece before; where none does, it is
    made between any two characters.
    """
    count = max(1, round(len(text) / PIECE_CHARACTERS))
    length = len(text) / count
    cuts = [0]
    for number in range(1, count):
        stop = int(number * length)
        low = max(cuts[-1], stop - int(length / 2))
        ends = (found + len(s) for s in separators if (found := text.rfind(s, low, stop)) >= 0)
        cuts.append(next(ends, stop))
    for start, stop in pairwise([*cuts, len(text)]):
        yield text[start:stop]
