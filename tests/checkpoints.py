"""Tiny random checkpoints with a tokenizer, as ``save_pretrained`` writes them."""

from pathlib import Path

from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from moeify.data.documents import Document
from moeify.data.tokens import END, train_tokenizer
from moeify.models.fused import closed
from tests.networks import tiny_decoder
from tests.texts import WORDS

SIZES = {"vocab_size": 300, "max_position_embeddings": 16, "bos_token_id": 0, "eos_token_id": 0}


def save_checkpoint(folder: Path, family: str, *, begin: bool = False, masks: bool = False, **changes: object) -> Path:
    """Write a network and its tokenizer; ``begin``: one that puts its own token before every text, as Llama's does;
    ``masks``: one that has a token for hidden ones, as BERT's does."""
    closed(tiny_decoder(family, **{**SIZES, **changes})).save_pretrained(folder)
    save_words(folder, begin=begin, masks=masks)
    return folder


def save_words(folder: Path, *, begin: bool = False, masks: bool = False, vocabulary: int = 290) -> None:
    """Write a byte-level BPE."""
    tokenizer = train_tokenizer([[Document(" ".join(WORDS) + " def return are here", "x")]], vocabulary)
    tokenizer.encode_special_tokens = False
    if begin:
        tokenizer.add_special_tokens(["<s>"])
        special = [("<s>", tokenizer.token_to_id("<s>"))]
        tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=special)
    names = {"bos_token": "<s>" if begin else END, "eos_token": END}
    if masks:
        tokenizer.add_special_tokens(["<mask>"])
        names["mask_token"] = "<mask>"
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
