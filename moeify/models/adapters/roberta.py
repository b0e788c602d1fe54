"""RoBERTa: BERT with positions that are counted from behind the padding token's number."""

from dataclasses import replace

from moeify.models.adapters import bert

ADAPTER = replace(
    bert.ADAPTER,
    family="roberta",
    network="RobertaForMaskedLM",
    config="RobertaConfig",
    layer="roberta.encoder.layer.{}",
    padded=True,
)
CLASSIFIER = replace(
    ADAPTER, family="roberta_classifier", network="RobertaForSequenceClassification", learns="class of a text"
)
