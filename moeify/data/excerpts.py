"""What text to take out of a file: code without its prose, prose without its code, large files cut into pieces."""

import ast
import inspect
import io
import re
import tokenize
import warnings
from collections.abc import Iterator

PIECE_CHARACTERS = 32_000
"""Longest piece of a file of C or of the web."""


def python(suffix: str, content: str) -> Iterator[str]:
    """Yield Python source without its commentary; nothing where it is not valid Python."""
    try:
        yield without_commentary(content).strip("\n") + "\n"
    except (SyntaxError, ValueError, tokenize.TokenError, RecursionError):
        return


def prose(suffix: str, content: str) -> Iterator[str]:
    """Yield the English paragraphs of a Python file's docstrings, or of a page of documentation, as one text."""
    texts = _docstrings(content) if suffix == ".py" else [content]
    if paragraphs := dict.fromkeys(paragraph for text in texts for paragraph in english(text)):
        yield "\n\n".join(paragraphs) + "\n"


def c(suffix: str, content: str) -> Iterator[str]:
    """Yield pieces of C or C++ source without the licences at its head."""
    while (comment := _COMMENT_AT_HEAD.match(content)) and _LICENCE.search(comment[0]):
        content = content[comment.end() :]
    yield from pieces(content.lstrip("\n"))


def web(suffix: str, content: str) -> Iterator[str]:
    """Yield pieces of JavaScript, CSS or HTML without licences and embedded files.

    Pieces that are mostly packed data or another alphabet are left out.
    """
    content = _PRESERVED_COMMENT.sub(lambda found: "" if _LICENCE.search(found[0]) else found[0], content)
    content = _EMBEDDED.sub("data:", _SOURCE_MAP.sub("", content))
    for piece in pieces(content.strip("\n")):
        packed = sum(len(run) for run in _PACKED.findall(piece))
        foreign = len(piece.encode()) - len(piece)
        if packed <= len(piece) / 10 and foreign <= len(piece) / 10:
            yield piece


# --- Python -------------------------------------------------------------------------------------------

_Edit = tuple[int, int, int, int, str]
"""First line, column in it, last line, column after it (from 0, in characters), and what takes their place."""


def without_commentary(source: str) -> str:
    """Return Python source without comments, docstrings and other strings that stand as statements.

    The rest keeps its layout and its meaning; ``pass`` stands where strings were all that a block had. Raises what
    ``ast.parse`` and ``tokenize`` raise.
    """
    lines = source.split("\n")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Invalid escapes and the like, in files of others.
        tree = ast.parse(source)
    strings = sorted(_bare_strings(tree, lines))
    inside = {line for first, _, last, _, _ in strings if last > first for line in range(first, last)}
    comments = [edit for edit in _comments(source) if edit[0] not in inside]
    dropped: set[int] = set()
    for first, start, last, stop, replacement in sorted([*strings, *comments], reverse=True):
        line = (lines[first][:start] + replacement + lines[last][stop:]).rstrip()
        lines[first : last + 1] = [line, *[""] * (last - first)]
        dropped.update(range(first + bool(line), last + 1))
    kept: list[str] = []
    gap = False
    for number, line in enumerate(lines):
        gap = number in dropped or (gap and not line.strip())
        opens = not kept or not kept[-1].strip() or kept[-1].endswith(":")
        if number not in dropped and not (gap and opens):
            kept.append(line)
    return "\n".join(kept)


def _bare_strings(tree: ast.Module, lines: list[str]) -> Iterator[_Edit]:
    for parent, block in _blocks(tree):
        strings = [statement for statement in block if _is_bare_string(statement)]
        alone = len(strings) == len(block) and parent is not tree
        for number, string in enumerate(strings):
            assert string.end_lineno is not None
            assert string.end_col_offset is not None
            first, last = string.lineno - 1, string.end_lineno - 1
            start, stop = _characters(lines[first], string.col_offset), _characters(lines[last], string.end_col_offset)
            needed = (alone and number == 0) or lines[last][stop:].lstrip().startswith(";")
            yield first, start, last, stop, "pass" if needed else ""


def _blocks(parent: ast.AST) -> Iterator[tuple[ast.AST, list[ast.stmt]]]:
    """Yield every block of statements below a node, with the node that it belongs to."""
    for name in ("body", "orelse", "finalbody"):
        if block := getattr(parent, name, []):
            yield parent, block
    for name in ("body", "orelse", "finalbody", "handlers", "cases"):
        for child in getattr(parent, name, []):
            yield from _blocks(child)


def _is_bare_string(statement: ast.stmt) -> bool:
    value = statement.value if isinstance(statement, ast.Expr) else None
    return isinstance(value, ast.Constant) and isinstance(value.value, str)


def _characters(line: str, column: int) -> int:
    """Return a column in characters from one in bytes of UTF-8."""
    return column if line.isascii() else len(line.encode()[:column].decode())


def _comments(source: str) -> Iterator[_Edit]:
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            line = token.start[0] - 1
            yield line, token.start[1], line, token.end[1], ""


# --- English ------------------------------------------------------------------------------------------

_COMMON = re.compile(
    r"\b(?:a|an|and|are|as|at|be|by|can|for|from|if|in|is|it|not|of|on|or|that|the|this|to|which|with)\b"
)
_TRIPLE_QUOTED = re.compile(r'("""|\'\'\')(.*?)(?<!\\)\1', re.DOTALL)


def _docstrings(content: str) -> Iterator[str]:
    """Yield the triple-quoted strings that start a line, without their indentation.

    Takes a tenth of a parser's time; the code that it misreads as a string is no English and drops out for that.
    """
    for string in _TRIPLE_QUOTED.finditer(content):
        if not content[content.rfind("\n", 0, string.start()) + 1 : string.start()].strip(" \trR"):
            yield inspect.cleandoc(string[2])


def english(text: str) -> Iterator[str]:
    """Yield the paragraphs that read as English sentences, each without its indentation.

    A paragraph counts when its lines are indented alike, it starts with a capital and ends a sentence, it has at
    least eight words of which one in six is a common one, and nine tenths of it are letters and white space. So code,
    headings, parameter tables and lists do not count.
    """
    for block in re.split(r"\n[ \t]*\n", text):
        lines = block.strip("\n").split("\n")
        paragraph = "\n".join(line.strip() for line in lines)
        if not re.match(r"[A-Z]", paragraph) or not re.search(r"[.!?:][)\"']?\Z", paragraph):
            continue
        alike = len({len(line) - len(line.lstrip()) for line in lines}) == 1
        words = len(re.findall(r"[A-Za-z]+", paragraph))
        common = len(_COMMON.findall(paragraph))
        plain = sum(map(len, re.findall(r"[^\W\d_]+|\s+", paragraph)))
        if alike and words >= 8 and common * 6 >= words and plain * 10 >= len(paragraph) * 9:
            yield re.sub(r"::\Z", ":", paragraph)


# --- C and the web ------------------------------------------------------------------------------------

_LICENCE = re.compile(r"copyright|licen[cs]e|all rights reserved", re.IGNORECASE)
_COMMENT_AT_HEAD = re.compile(r"\s*(?:/\*.*?\*/|(?://[^\n]*\n\s*)+)", re.DOTALL)
_PRESERVED_COMMENT = re.compile(r"/\*[!*].{0,4000}?\*/", re.DOTALL)
"""What minifiers leave, mostly because it is a licence."""
_SOURCE_MAP = re.compile(r"^//# sourceMappingURL=.*$", re.MULTILINE)
_EMBEDDED = re.compile(r"data:[\w/+.-]+;base64,[A-Za-z0-9+/=]{64,}")
_PACKED = re.compile(r"[A-Za-z0-9+/=_]{120,}")


def pieces(text: str) -> Iterator[str]:
    """Cut a text into about equal pieces, each after the end of a line, or of a statement where lines are long."""
    start = 0
    while start < len(text):
        left = len(text) - start
        stop = start + -(-left // -(-left // PIECE_CHARACTERS))
        if stop < len(text):
            ends = (text.rfind(mark, (start + stop) // 2, stop) + 1 for mark in ("\n", ";", "}", ","))
            stop = next((end for end in ends if end), stop)
        yield text[start:stop]
        start = stop
