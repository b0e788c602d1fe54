"""What is worth separating: whether what is known before a cut foresees what separating two categories costs.

One network learns all categories. For each pair it goes on with the pair alone, whole and split into an expert for each
of the two beside a shared core; the tax is the split model's test loss above the whole one's. What foresees it: the
affinity of the two profiles, measured on the network of all categories; the cut's J; and the rise of the loss right
after the cut, compensated. Each pair goes on twice from the same cut, on other rows: how far the two taxes agree says
how much of a tax is chance.
"""

from collections.abc import Mapping
from itertools import combinations
from statistics import fmean

from scipy.stats import spearmanr

from attribution.affinity import profile_affinity
from moeify.attributing import table_of
from moeify.loop import run
from moeify.recipe.config import RunConfig
from moeify.routed.split_model import SplitModel
from pipelines.studies.study import Arm, Bench, Column, Measures, Scatter, Size, Study, changed, shipped_recipe
from pipelines.studies.subsets import Subset
from pipelines.studies.training import trained

_TEXTS = {
    "python": {"kind": "installed", "source": "python"},
    "c": {"kind": "installed", "source": "c"},
    "web": {"kind": "installed", "source": "web"},
    "prose": {"kind": "installed", "source": "prose"},
}
_DOMAINS = ("fiction", "medicine", "mathematics")
"""Of the recipe ``domains``: they lie in the folder that MOEIFY_DATA names."""
_ROUND = {"train": 0, "recover": 0, "separation": 0.4}
"""A pair's one cut: a fifth of the units stays shared."""


def arms(size: Size) -> tuple[Arm, ...]:
    """Return ten digits, and seven kinds of text."""
    return Arm("digits", _digits(size), pairs), Arm("text", _text(size), pairs)


def _digits(size: Size) -> RunConfig:
    base = {"quick": 20, "full": 700, "large": 4000}[size]
    return shipped_recipe("digits", training={"steps": base}, rounds=[_ROUND], controls=())


def _text(size: Size) -> RunConfig:
    if size == "quick":  # nothing that the package does not have
        network, steps, categories = {"hidden": 16, "layers": 1, "heads": 2, "ffn": 64}, 10, _TEXTS
    else:
        domains = shipped_recipe("domains").model_dump(mode="json")["data"]["source"]["categories"]
        categories = _TEXTS | {name: domains[name] for name in _DOMAINS}
        network, steps = ({}, 640) if size == "large" else ({"hidden": 32, "layers": 2, "ffn": 128}, 300)
    source = {"kind": "mixed", "categories": categories, "megabytes": 3.0}
    few = {"test_rows": 8, "validation_rows": 8} if size == "quick" else {"test_rows": 128, "validation_rows": 64}
    return shipped_recipe(
        "text",
        data={"source": source} | ({} if size == "large" else {"length": 64}),
        model=network,
        training={"steps": steps, "rows": 4 * len(categories)},
        rounds=[_ROUND],
        evaluation=few,
        controls=(),
    )


def pairs(bench: Bench) -> Measures:
    """Train the network of all categories, then take every pair twice."""
    whole = trained(bench.config, bench.task)
    known: dict[str, dict[str, float]] = {"affinity": _affinity(bench, whole), "J": {}, "cut": {}}
    taxes: tuple[dict[str, float], dict[str, float]] = ({}, {})
    for pair in combinations(bench.task.categories, 2):
        label = "-".join(pair)
        for repeat, tax in enumerate(taxes):
            cut, tax[label] = _pair(bench, whole, pair, repeat)
            for name, value in cut.items():  # the same in both
                known[name][label] = value
    measures = {f"{name}/{label}": value for name, each in known.items() for label, value in each.items()}
    measures |= {f"tax/{label}": fmean(tax[label] for tax in taxes) for label in taxes[0]}
    ranks = {name: fmean(_rank(each, tax) for tax in taxes) for name, each in known.items()}
    ranks["again"] = _rank(*taxes)
    measures |= {f"rank_{name}": value for name, value in ranks.items()}
    return measures | {"tax": fmean(value for tax in taxes for value in tax.values())}


def _affinity(bench: Bench, model: SplitModel) -> dict[str, float]:
    task, asked = bench.task, bench.config.attribution
    table = table_of(model, task, asked.rows, asked.rows_at_once, bench.config.seed, round_=1)
    affinity = profile_affinity(table, asked.score)
    places = range(len(task.categories))
    return {f"{task.categories[i]}-{task.categories[j]}": affinity[i, j].item() for i, j in combinations(places, 2)}


def _pair(bench: Bench, whole: SplitModel, pair: tuple[str, str], repeat: int) -> tuple[dict[str, float], float]:
    """Split the network for a pair; return J and the rise of the loss at the cut, on validation data, and the tax."""
    steps = max(4, bench.config.training.steps // 7)
    config = changed(
        bench.config,
        training={"steps": steps, "learning_rate": bench.config.training.learning_rate / 3},
        rounds=[{**_ROUND, "recover": steps}],
    )
    network = SplitModel(bench.task.build(), bench.task.categories).network
    network.load_state_dict(whole.network.state_dict())
    task = Subset(bench.task, pair, network, skipped=bench.config.training.steps * (1 + repeat))
    result = run(config, task)
    (cut,) = result.rounds
    assert cut.tax_cut is not None
    assert cut.tax_before is not None
    return {"J": cut.predicted, "cut": cut.tax_cut - cut.tax_before}, result.tax["mean"]


def _rank(one: Mapping[str, float], other: Mapping[str, float]) -> float:
    """Return Spearman's rank correlation over the labels of both."""
    return float(spearmanr([one[label] for label in other], list(other.values())).statistic)


STUDY = Study(
    arms,
    columns=(
        Column("rank_affinity", "affinity"),
        Column("rank_J", "J"),
        Column("rank_cut", "loss at the cut"),
        Column("rank_again", "tax, again"),
        Column("tax", "mean tax, nats"),
    ),
    scatter=Scatter("affinity", "tax", "affinity, before", "tax of separating the two, nats"),
    note=(
        "All but the last column: rank correlation (Spearman) over the pairs of what is known before with the tax "
        "after, 45 pairs of digits, 21 of kinds of text; if affinity says what to keep together, it is above 0. 'tax, "
        "again': of the tax with that of the same cut trained on other rows; a perfect predictor reaches about its "
        "square root. Text needs the data of the recipe domains (MOEIFY_DATA)."
    ),
)
