"""Tokens as the text that they add, one after the other."""

from collections.abc import Iterable, Iterator, Mapping

import tokenizers
from tokenizers.decoders import DecodeStream


def tokenizer_in(assets: Mapping[str, bytes]) -> tokenizers.Tokenizer | None:
    """Return the tokenizer among a task's files; None where there is none, as for images."""
    if "tokenizer.json" not in assets:
        return None
    return tokenizers.Tokenizer.from_str(assets["tokenizer.json"].decode("utf-8"))


def pieces(tokenizer: tokenizers.Tokenizer, tokens: Iterable[int]) -> Iterator[str]:
    """Yield the text that each token adds: none while a character is not whole, which the last token of it adds."""
    stream = DecodeStream(skip_special_tokens=False)
    for token in tokens:
        yield stream.step(tokenizer, token) or ""
