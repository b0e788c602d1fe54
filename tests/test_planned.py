"""``moeify plan``: what a person sees, and what programs read."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from pipelines import accelerators
from pipelines.cli import main
from pipelines.planned import doubts, short

JSONL = """
name: mine
data: {kind: text, source: {kind: jsonl, path: none.jsonl, category: label}, vocabulary: 300, length: 16}
model: {kind: llama, hidden: 16, layers: 1, heads: 2, ffn: 32}
training: {steps: 10, rows: 4}
attribution: {rows: 4, rows_at_once: 4}
rounds: [{train: 2, recover: 2, separation: 0.3}]
evaluation: {validation_rows: 2, test_rows: 2, rows_at_once: 2}
"""


def asked(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(main, ["plan", *arguments])
    return result.exit_code, result.output


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    path = tmp_path / "mine.yaml"
    path.write_text(JSONL)
    return str(path)


def test_a_plan_needs_no_data_and_its_parts_add_up(recipe: str) -> None:
    code, text = asked(recipe, "--categories", "3", "--gpus", "2xL4", "--utilization", "0.5", "--json")
    assert code == 0
    plan = json.loads(text)
    assert plan["categories"] == 3
    assert sum(row["flops"] for row in plan["work"]) == pytest.approx(plan["flops"])
    assert sum(row["share"] for row in plan["work"]) == pytest.approx(1.0)
    assert plan["flops_per_second"] == 2 * 0.5 * accelerators.GPUS["L4"].single
    assert plan["seconds"] == pytest.approx(plan["flops"] / plan["flops_per_second"])
    memory = plan["memory"]
    held = memory["parameters"] + memory["optimizer"]
    assert memory["peak"] == held + max(memory["gradients"] + memory["training"], memory["attribution"])
    assert plan["work"][0]["what"] == "train the dense twin"


def test_a_plan_for_people_fits_80_columns_and_says_whether_a_device_does(
    recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    code, text = asked(recipe, "--categories", "2", "--gpus", "H100")
    assert code == 0
    assert "1 x H100, 26.8 TFLOP/s in all" in text
    assert "Fits: " in text
    monkeypatch.setitem(accelerators.GPUS, "H100", accelerators.Gpu(1000.0, 1e12, 1e12))
    code, tight = asked(recipe, "--categories", "2", "--gpus", "H100")
    assert code == 0
    assert "one H100 has 1 kB" in tight
    assert max(map(len, (text + tight).splitlines())) <= 80


@pytest.mark.parametrize("shared", [False, True])
def test_an_arm_is_as_large_as_a_worker_holds_it(recipe: str, monkeypatch: pytest.MonkeyPatch, shared: bool) -> None:
    monkeypatch.setitem(accelerators.GPUS, "H100", accelerators.Gpu(1000.0, 1e12, 1e12))
    if shared:
        Path(recipe).write_text(JSONL + "cluster: {workers: 2, parallel: {kind: fsdp}}\n")
    asks = (recipe, "--categories", "2", "--gpus", "2xH100")
    plan = json.loads(asked(*asks, "--json")[1])
    part = -(-plan["parameters"] // (2 if shared else 1))
    text = asked(*asks)[1]
    assert f"An arm takes {short(3 * 4 * part)}B of a worker with its optimizer." in text
    assert ("Workers share it out: more of them hold less each." in text) == shared
    assert ("Where cluster.parallel is fsdp, workers share it out." in text) != shared


LEAST = "training: {steps: 10, rows: 4, accumulate: 4, checkpoint_activations: true, autocast: bfloat16}"


@pytest.mark.parametrize(
    ("changes", "savers", "told"),
    [
        (
            {"attribution: {rows: 4, rows_at_once: 4}": "attribution: {rows: 4, rows_at_once: 1}"},
            ["controls", "training.accumulate", "training.checkpoint_activations", "training.autocast"],
            "less with\ntraining.accumulate, training.checkpoint_activations, training.autocast.\n",
        ),
        (
            {"training: {steps: 10, rows: 4}": LEAST, "rounds:": "controls: []\nrounds:"},
            ["attribution.rows_at_once", "attribution.columns"],
            "less with\nattribution.rows_at_once, attribution.columns.\n",
        ),
        (
            {
                "training: {steps: 10, rows: 4}": LEAST,
                "rounds:": "controls: []\nrounds:",
                "{rows: 4, rows_at_once: 4}": "{rows: 4, rows_at_once: 1, columns: 1}",
            },
            [],
            "no setting makes that less.\nWhat is left is a smaller model, or a device with more memory.\n",
        ),
    ],
    ids=["nothing set", "attribution alone", "all set"],
)
def test_what_would_make_it_fit_is_what_is_not_set_yet(
    recipe: str, monkeypatch: pytest.MonkeyPatch, changes: dict[str, str], savers: list[str], told: str
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setitem(accelerators.GPUS, "H100", accelerators.Gpu(1000.0, 1e12, 1e12))
    text = JSONL
    for before, after in changes.items():
        assert before in text
        text = text.replace(before, after)
    Path(recipe).write_text(text)
    asks = (recipe, "--categories", "2", "--gpus", "1xH100")
    assert json.loads(asked(*asks, "--json")[1])["memory"]["savers"] == savers
    code, text = asked(*asks)
    assert code == 0
    assert told in text
    assert ("Fewer controls" in text) == ("controls" in savers)
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize(
    ("hidden", "layers", "heads", "ffn", "billions"), [(2048, 22, 32, 5632, 1.26), (4096, 32, 32, 11_008, 6.74)]
)
def test_what_a_model_of_billions_takes_on_eight_gpus_is_said_at_once(
    recipe: str, hidden: int, layers: int, heads: int, ffn: int, billions: float
) -> None:
    large = {
        "vocabulary: 300, length: 16": "vocabulary: 32000, length: 2048",
        "hidden: 16, layers: 1, heads: 2": f"hidden: {hidden}, layers: {layers}, heads: {heads}",
        "ffn: 32": f"ffn: {ffn}, tie_embeddings: false",
        "test_rows: 2, rows_at_once: 2": "test_rows: 2, rows_at_once: 8",
        "{steps: 10, rows: 4}": "{steps: 1000, rows: 512, accumulate: 32, autocast: bfloat16}",
        "{rows: 4, rows_at_once: 4}": "{rows: 64, rows_at_once: 8}",
        "{train: 2, recover: 2, separation: 0.3}": "{train: 400, recover: 200, separation: 0.3}",
        "rounds:": "controls: []\ncluster: {workers: 8, gpus: 1, parallel: {kind: fsdp}}\nrounds:",
    }
    text = JSONL
    for before, after in large.items():
        assert before in text
        text = text.replace(before, after)
    Path(recipe).write_text(text)
    code, said = asked(recipe, "--categories", "4", "--gpus", "8xH100", "--json")
    assert code == 0, said
    plan = json.loads(said)
    assert plan["parameters"] / 1e9 == pytest.approx(billions, rel=0.01)
    tokens, embedded = 1000 * 512 * 2048, 32_000 * hidden
    each = 6 * (plan["parameters"] - embedded) + 12 * layers * hidden * 2048 // 2  # Kaplan et al. 2020, causal
    train = {row["what"]: row for row in plan["work"]}["train the dense twin"]
    assert train["flops"] == pytest.approx(tokens * each, rel=0.02)
    assert train["seconds"] == pytest.approx(train["flops"] / plan["flops_per_second"])
    memory = plan["memory"]
    shared = 4 * plan["parameters"] / 8
    assert 2 * shared < memory["parameters"] < 3 * shared  # two arms, and the whole of one layer
    assert memory["optimizer"] == pytest.approx(4 * shared)


def test_this_machine_is_measured_when_asked(recipe: str) -> None:
    code, text = asked(recipe, "--categories", "2", "--here", "--json")
    assert code == 0
    plan = json.loads(text)
    assert 0 < plan["seconds"] < 3600
    besides = plan["step_seconds"]["besides"]
    assert min(besides.values()) > 0
    counted = plan["flops"] / plan["flops_per_second"] + 10 * besides["whole"] + 16 * besides["routed"]
    assert plan["seconds"] == pytest.approx(counted)  # two arms fork after two steps
    assert sum(row["seconds"] for row in plan["work"]) == pytest.approx(plan["seconds"])


def test_steps_that_are_too_short_to_be_foreseen_are_told(recipe: str) -> None:
    code, text = asked(recipe, "--categories", "2", "--gpus", "H100")
    assert code == 0
    assert "take longer on any machine and are left out: it will take many times that." in text
    measured = {"operations": 0.001, "besides": {"whole": 0.1, "routed": 0.2}}
    for step in (None, measured, {"operations": 1.0, "besides": None}):
        assert doubts({"step_seconds": step}) == ""


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((), "say how many with --categories"),
        (("--gpus", "8xB1"), "--gpus: got '8xB1', wanted a number and a GPU such as 8xH100; known: A10"),
        (("--gpus", "0xH100"), "--gpus: got '0xH100'"),
        (("--categories", "2", "--gpus", "3xH100"), "training.rows: got 4, which 3 workers cannot share equally"),
        (("--gpus", "H100", "--here"), "wanted one of the two"),
        (("--utilization", "0.5"), "--utilization: got it without --gpus"),
    ],
)
def test_what_cannot_be_planned_is_told_in_a_line(recipe: str, arguments: tuple[str, ...], told: str) -> None:
    code, text = asked(recipe, *arguments)
    assert code == 2
    assert told in text
    assert len(text.splitlines()) == 1


def test_a_recipe_for_gpus_is_planned_for_gpus(recipe: str) -> None:
    path = Path(recipe)
    path.write_text(JSONL + "cluster: {workers: 2, gpus: 1}\n")
    code, text = asked(recipe, "--categories", "2")
    assert (code, "2 x GPU" in text) == (0, True)
    code, text = asked(recipe, "--categories", "2", "--here")
    assert (code, "asks for GPUs; name them with --gpus" in text) == (2, True)


def test_large_numbers_have_three_digits_and_a_prefix() -> None:
    assert [short(n) for n in (0, 7, 999, 1000, 999_600, 6.738e9, 5.13e18)] == [
        *("0 ", "7 ", "999 ", "1 k", "1 M", "6.74 G", "5.13 E")
    ]
