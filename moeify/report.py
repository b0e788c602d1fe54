"""What the loop says, put into events: ids that a repeated run repeats, times, and only on rank 0."""

import json
import time
from collections.abc import Mapping
from typing import Literal

from attribution.table import AttributionTable
from moeify.evaluation import mean_error
from moeify.events import Artifact, Evaluated, Mishap, Phase, RoundEnded, Started, Step, Tracker
from moeify.models.units import unit_parameters
from moeify.recipe.arms import Arm
from moeify.recipe.config import RunConfig
from moeify.recipe.plan import PlannedPhase, training_work
from moeify.routed.split_model import SplitModel
from moeify.splitting.propose import Proposal
from moeify.state import State
from moeify.store import Store
from moeify.task import Counted, Task, data_hash
from moeify.training import Contestant, Progress


class Reporter:
    """Turns what happened into events and files."""

    def __init__(self, config: RunConfig, store: Store, tracker: Tracker, *, speaks: bool) -> None:
        self.config = config
        self.store = store
        self.tracker = tracker
        self.speaks = speaks
        """Whether this worker is the one that reports; the others stay silent."""
        self._round_began = time.time()

    def started(self, task: Task, model: SplitModel) -> None:
        """Say what is going to happen, and keep what an export needs besides the network."""
        if not self.speaks:
            return
        self.tracker.emit(
            Started(
                id="started",
                time=time.time(),
                categories=task.categories,
                unit=task.unit,
                steps=self.config.training.steps,
                parameters=sum(p.numel() for p in model.parameters()),
                sites={site.name: site.units for site in model.space.sites},
                rounds=len(self.config.rounds),
                arms=self.config.arms,
                unit_parameters={site.name: unit_parameters(model.network, site) for site in model.space.sites},
                data_hash=data_hash(task, self.config),
                data_sizes=task.sizes() if isinstance(task, Counted) else {},
            )
        )
        for name, content in task.assets().items():
            self.store.put(f"assets/{name}", content)

    def resumed(self, name: str, damaged: tuple[str, ...]) -> None:
        """Say where an interrupted run goes on; this event alone is new each time."""
        if self.speaks:
            now = time.time()
            note = "; ".join([*damaged, f"going on from checkpoint {name}"])
            self.tracker.emit(Phase(id=f"resumed/{name}/{now}", time=now, phase="prepare", round=0, note=note))

    def phase(
        self,
        phase: Literal["train", "attribute", "partition", "recover", "evaluate", "finish", "test"],
        round_: int,
        note: str = "",
    ) -> None:
        """Say that a phase begins, or what became of it."""
        if phase == "train":
            self._round_began = time.time()
        if self.speaks:
            mark = f"phase/{round_}/{phase}" + ("/note" if note else "")
            self.tracker.emit(Phase(id=mark, time=time.time(), phase=phase, round=round_, note=note))

    def step(self, arm: Arm, round_: int, state: State, contestant: Contestant, progress: Progress) -> None:
        """Say how far an arm's training has come."""
        if not self.speaks:
            return
        trunk = self.config.rounds[0].train
        health = contestant.health
        spent = sum(c.step - (0 if a in self.config.early_arms else trunk) for a, c in state.arms.items())
        self.tracker.emit(
            Step(
                id=f"step/{arm}/{contestant.step}" + (f"/again/{health.mishaps}" if health.rate < 1.0 else ""),
                time=time.time(),
                arm=arm,
                round=round_,
                step=contestant.step,
                work=spent / training_work(self.config),
                loss=progress.loss,
                learning_rate=progress.learning_rate,
                units_per_second=progress.units_per_second,
            )
        )

    def mishap(self, arm: Arm, round_: int, contestant: Contestant, what: str, done: str) -> None:
        """Say that an arm's numbers went wrong, and how the run goes on; ``contestant`` is as it goes on."""
        if self.speaks:
            number = contestant.health.mishaps
            self.tracker.emit(
                Mishap(
                    id=f"mishap/{arm}/{number}",
                    time=time.time(),
                    arm=arm,
                    round=round_,
                    step=contestant.step,
                    what=what,
                    done=done,
                )
            )

    def evaluated(
        self,
        arm: Arm,
        phase: PlannedPhase,
        moment: Literal["before_cut", "after_cut", "recovered", "test"],
        loss: dict[str, float],
    ) -> None:
        """Say an arm's losses on held-out data."""
        if self.speaks:
            split: Literal["validation", "test"] = "test" if moment == "test" else "validation"
            self.tracker.emit(
                Evaluated(
                    id=f"evaluated/{arm}/{phase.round}/{moment}",
                    time=time.time(),
                    arm=arm,
                    round=phase.round,
                    step=phase.until,
                    moment=moment,
                    split=split,
                    loss=loss,
                )
            )

    def cut(self, round_: int, proposal: Proposal, table: AttributionTable) -> None:
        """Keep the round's partition and attribution, units in their new order."""
        if not self.speaks:
            return
        score = self.config.attribution.score
        content = json.dumps({**proposal.partition.as_json(), "tree": proposal.partition.nested()}, indent=1)
        scores = {site: table.score(site, score)[order].float() for site, order in proposal.order.items()}
        metadata = {"categories": json.dumps(table.categories), "score": score, "unit": "nats"}
        self.store.put(f"rounds/{round_}/partition.json", content.encode())
        self.store.put_tensors(f"rounds/{round_}/attribution.safetensors", scores, metadata)
        for name in ("partition.json", "attribution.safetensors"):
            path = f"rounds/{round_}/{name}"
            self.tracker.emit(Artifact(id=f"artifact/{path}", time=time.time(), path=path, round=round_))

    def judged(
        self,
        phase: PlannedPhase,
        state: State,
        taxes: Mapping[Arm, Mapping[str, float]],
        errors: Mapping[str, float],
        used: tuple[float | None, float | None],
        accepted: bool,
    ) -> RoundEnded:
        """Say how a round ended, and return its record.

        ``taxes`` are above the dense twin; the split arm's are ``errors`` (category -> standard error) and ``used``:
        the part of the budget, and its standard error.
        """
        partition, cut = state.arms["split"].model.partition, state.cut
        by_category = {c: nats for c, nats in taxes["split"].items() if c != "mean"}
        record = RoundEnded(
            id=f"round/{phase.round}",
            time=time.time(),
            round=phase.round,
            step=phase.until,
            separation=partition.separation,
            asked=cut.asked if cut else self.config.rounds[phase.round - 1].separation,
            uncut=state.uncut,
            tax=taxes["split"]["mean"],
            tax_error=mean_error(errors, by_category),
            tax_error_by_category=dict(errors),
            tax_by_category=by_category,
            tax_before=cut.before.tax if cut else None,
            tax_cut=cut.after.tax if cut else None,
            expected=cut.expected if cut else None,
            budget_used=used[0],
            budget_error=used[1],
            budget_used_before=cut.before.used if cut else None,
            budget_used_cut=cut.after.used if cut else None,
            tax_random=taxes["random"]["mean"] if "random" in taxes else None,
            tax_told=taxes["split"]["mean"] - taxes["told"]["mean"] if "told" in taxes else None,
            predicted=cut.predicted if cut else 0.0,
            predicted_random=cut.predicted_random if cut else None,
            gap=cut.gap if cut else None,
            accepted=accepted,
            seconds=time.time() - self._round_began,
            tree=partition.nested(),
        )
        if self.speaks:
            self.tracker.emit(record)
        return record
