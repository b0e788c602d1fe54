"""BERT: tokens see both ways and hidden ones are predicted. Norms stand behind the blocks, so edges between sites
cannot be followed; a head has the size that the width and the number of heads imply."""

from dataclasses import replace

from moeify.models.transformer import Heads, Transformer

ADAPTER = Transformer(
    "bert",
    "BertForMaskedLM",
    "BertConfig",
    learns="masked token",
    layer="bert.encoder.layer.{}",
    mlp="",
    gate=None,
    up="intermediate.dense",
    down="output.dense",
    inline="intermediate.intermediate_act_fn",
    biases=True,
    norm=None,
    heads=Heads("attention", "self.query", "self.key", "self.value", "output.dense", inline="self", sized=False),
)
CLASSIFIER = replace(
    ADAPTER, family="bert_classifier", network="BertForSequenceClassification", learns="class of a text"
)
