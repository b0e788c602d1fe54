"""Which studies there are, and what each asks. Imports nothing heavy: a study's own module says how it is answered."""

import difflib
from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipelines.studies.study import Study

QUESTIONS: Mapping[str, str] = {
    "access_control": "Does one run replace a model trained for every set of permitted categories?",
    "cifar_split": "Do routed features, or split channels, keep two halves of CIFAR-10 apart, and at what cost?",
    "class_imbalance": "Where few classes are routed and the rest train as ever, is regularisation still needed?",
    "edge_choices": "Which gradients must be kept from other units for a category to be removable, and at what tax?",
    "fine_tuning": "After pre-training, do routing, adapters or the loop still put a category where it can be removed?",
    "hard_neighbours": "Can a small category with a near neighbour be removed, where only some of it is labelled?",
    "mnist_split": "What does a half of a code hold that was routed, by hand or by attribution, regularised or not?",
    "spurious_cue": "Does separating categories in training help where a cue that was learned turns round?",
    "spurious_word": "And in text, where a word that foretold the genre in training misleads?",
    "unlearning": "Does expand, route, ablate unlearn a category better than other ways, robustly, and at what tax?",
    "when_to_cut": "Does it pay to wait with the first cut until attribution knows the units?",
    "whole_blocks": "Do whole layers for categories, by hand, do as well as a split of every layer?",
    "worth_separating": "Does the affinity of two categories foresee what separating them costs?",
}
"""Name, of its module too, to what is asked."""


def find_study(name: str) -> "Study":
    """Return a study. ValueError for one that there is not."""
    if name not in QUESTIONS:
        close = difflib.get_close_matches(name, QUESTIONS, 1)
        nearest = f"; nearest: {close[0]}" if close else ""
        raise ValueError(f"study: got {name!r}, wanted one of {', '.join(QUESTIONS)}{nearest}")
    found: Study = import_module(f"pipelines.studies.{name}").STUDY
    return found
