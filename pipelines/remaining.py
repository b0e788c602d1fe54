"""How long a run still takes: training of every arm, cuts, judgements and the closing test, at this attempt's pace.

A recipe says how many rows every part of a run reads, so that one rate, seconds a row, foretells a part. Rates are
measured as the run goes on. Until a kind of work has been seen, its rate is guessed from training's; so there is a
figure once training has a pace, before the first cut.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from moeify.events import Evaluated, Event, Phase, RoundEnded, Started, Step
from moeify.recipe.arms import Arm
from moeify.recipe.config import RunConfig

Kind = Literal["train", "evaluate", "attribute", "partition"]

_GUESSES: dict[Kind, float] = {"evaluate": 0.4, "attribute": 2.5}
"""Seconds a row over those of a training row, as runs of the shipped recipes have it."""
_PARTITION = 0.3
"""Of a cut's attribution, what finding its partition takes, until one was found."""
_EXAMPLES = 2.0
"""Passes over the examples' rows, for every expert, by what a pass of held-out rows takes."""


@dataclass
class _Rate:
    """What a kind of work takes; the last part seen counts as much as all before it."""

    seconds: float = 0.0
    rows: float = 0.0

    def add(self, seconds: float, rows: float) -> None:
        if rows > 0 and seconds >= 0:
            weight = min(1.0, rows / self.rows) if self.rows else 0.0
            self.seconds, self.rows = weight * self.seconds + seconds, weight * self.rows + rows

    @property
    def known(self) -> float | None:
        return self.seconds / self.rows if self.rows else None


class Remaining:
    """Follows a run's events and says what is left of it."""

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self._categories = 0
        self._steps: dict[Arm, int] = {}
        self._cut = self._judged = 0
        """The last round that was cut, or judged."""
        self._tested: set[Arm] = set()
        self._experts = 0
        """Below the core, as of the last round kept."""
        self.attempt_begins()

    def attempt_begins(self) -> None:
        """Forget the pace of earlier attempts."""
        self._last: Event | None = None
        self._began: float | None = None
        """When the cut that is under way did."""
        self._train: dict[Arm, _Rate] = {}
        self._first = True
        self._rates: dict[Kind, _Rate] = {kind: _Rate() for kind in ("evaluate", "attribute", "partition")}

    def take(self, event: Event) -> None:
        """Take one event."""
        match event:
            case Started():
                self._categories = len(event.categories)
            case Step():
                self._step(event)
            case Evaluated():
                self._evaluated(event)
            case Phase(phase="prepare"):
                self.attempt_begins()
            case Phase() if not event.note:
                self._phase(event)
            case RoundEnded():
                self._judged = max(self._judged, event.round)
                if event.outcome == "kept":
                    self._experts = _below(event.tree)
            case _:
                pass
        if not (isinstance(event, Phase) and event.note):
            self._last = event

    def seconds(self, now: float) -> float | None:
        """Return the seconds that are left; None before training has a pace."""
        train = self._of_training()
        if train is None or self._last is None:
            return None
        left = sum(
            (self._config.training.steps - self._done(arm)) * self._config.training.rows * self._of_arm(arm, train)
            for arm in self._config.arms
        )
        cuts = len(self._config.rounds) - self._cut
        if cuts and self._began is not None:  # one is under way
            cuts -= 1
            left += max(0.0, self._of_cut(train) - (self._last.time - self._began))
        left += cuts * self._of_cut(train)
        held_out = self._config.evaluation.validation_rows * self._categories
        left += (len(self._config.rounds) - self._judged) * len(self._config.arms) * held_out * self._of_row(train)
        left += self._of_test(train)
        return max(0.0, left - max(0.0, now - self._last.time))

    # --- what was seen ----------------------------------------------------------------------------------

    def _step(self, event: Step) -> None:
        before, last = self._done(event.arm), self._last
        self._steps[event.arm] = max(event.step, before)
        if last is None or event.step <= before:
            return
        follows = isinstance(last, Step) or (isinstance(last, Phase) and last.phase in ("train", "recover", "finish"))
        if not follows:
            return
        rate = self._train.setdefault(event.arm, _Rate())
        if self._first and rate.rows:  # what came first warmed up
            rate.seconds = rate.rows = 0.0
            self._first = False
        rate.add(event.time - last.time, (event.step - before) * self._config.training.rows)

    def _evaluated(self, event: Evaluated) -> None:
        evaluation = self._config.evaluation
        rows = evaluation.test_rows if event.moment == "test" else evaluation.validation_rows
        if isinstance(self._last, Evaluated | Step) or (
            isinstance(self._last, Phase) and self._last.phase in ("evaluate", "test")
        ):
            self._rates["evaluate"].add(event.time - self._last.time, rows * self._categories)
        elif isinstance(self._last, Phase) and self._last.phase == "partition":
            self._rates["partition"].add(event.time - self._last.time, 1)
        if event.moment == "test":
            self._tested.add(event.arm)

    def _phase(self, event: Phase) -> None:
        last = self._last
        if event.phase == "partition" and isinstance(last, Phase) and last.phase == "attribute":
            self._rates["attribute"].add(event.time - last.time, self._attributed())
        if event.phase == "evaluate":
            self._began = event.time
        if event.phase == "recover":
            self._cut, self._began = max(self._cut, event.round), None

    # --- what is to come --------------------------------------------------------------------------------

    def _done(self, arm: Arm) -> int:
        trunk = 0 if arm in self._config.early_arms else self._config.rounds[0].train
        return self._steps.get(arm, trunk)

    def _of_training(self) -> float | None:
        """Return the seconds of a training row, over the arms that were seen."""
        seconds, rows = sum(each.seconds for each in self._train.values()), sum(e.rows for e in self._train.values())
        return seconds / rows if rows else None

    def _of_arm(self, arm: Arm, train: float) -> float:
        known = self._train[arm].known if arm in self._train else None
        return train if known is None else known

    def _of_row(self, train: float) -> float:
        known = self._rates["evaluate"].known
        return _GUESSES["evaluate"] * train if known is None else known

    def _attributed(self) -> int:
        null = self._config.partition.null_test
        passes = len(self._config.cut_arms) + (null.permutations if null else 0)
        return passes * self._config.attribution.rows * self._categories

    def _of_cut(self, train: float) -> float:
        held_out, cut = self._config.evaluation.validation_rows * self._categories, len(self._config.cut_arms)
        each = self._rates["attribute"].known
        attribute = self._attributed() * (_GUESSES["attribute"] * train if each is None else each)
        found = self._rates["partition"].known
        partition = _PARTITION * attribute if found is None else found
        return attribute + partition + (1 + 2 * cut) * held_out * self._of_row(train)

    def _of_test(self, train: float) -> float:
        evaluation = self._config.evaluation
        experts = self._experts or sum(_planned(self._config, self._categories))
        passes = len(self._config.arms) - len(self._tested) + experts * (1 + evaluation.null_draws)
        rows = passes * evaluation.test_rows + _EXAMPLES * experts * evaluation.example_rows
        return rows * self._categories * self._of_row(train)


def _below(tree: dict[str, object]) -> int:
    """Return how many experts a nested tree has below its root."""
    children = tree["children"]
    assert isinstance(children, list | tuple)
    return len(children) + sum(_below(child) for child in children)


def _planned(config: RunConfig, categories: int) -> Iterator[int]:
    """Yield how many experts each round adds below the core, at most."""
    leaves = 1
    for round_ in config.rounds:
        before, leaves = leaves, min(categories, leaves * round_.branching)
        yield leaves if leaves > before else 0
