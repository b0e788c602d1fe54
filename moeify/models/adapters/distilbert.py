"""DistilBERT: BERT with half of the layers, each block a module of its own."""

from dataclasses import replace

from moeify.models.transformer import Heads, Transformer

ADAPTER = Transformer(
    "distilbert",
    "DistilBertForMaskedLM",
    "DistilBertConfig",
    learns="masked token",
    layer="distilbert.transformer.layer.{}",
    mlp="ffn",
    gate=None,
    up="lin1",
    down="lin2",
    after="dropout",
    width="hidden_dim",
    biases=True,
    activation="activation",
    norm=None,
    heads=Heads("attention", "q_lin", "k_lin", "v_lin", "out_lin", sized=False),
)
CLASSIFIER = replace(
    ADAPTER, family="distilbert_classifier", network="DistilBertForSequenceClassification", learns="class of a text"
)
