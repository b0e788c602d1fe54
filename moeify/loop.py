"""Iterative MoE-ification: train -> attribute -> partition -> prune -> recover -> evaluate, deeper each round.

Every worker runs this one function. It knows no Ray, no MLflow, no file format and no kind of model: a ``Task`` gives
data, loss and network, a ``World`` the other workers, a ``Store`` keeps checkpoints, a ``Tracker`` takes events.

Arms run side by side on the same data in the same order: the dense twin, the split model, and the recipe's controls:
``random``, split at random into the same tree and widths, and ``told``, a dense twin that is given the category. Up to
the first cut, arms that are cut are one and the same as the dense twin, so that only the twins are trained; but where
the recipe routes gradients before that, the split model trains beside them, and its control forks from it.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

from attribution.measure import Moments, Uncounted, measure
from attribution.stability import Stability, strongest_category
from attribution.table import AttributionTable
from moeify.clean_modules import module_tests
from moeify.control import (
    Depth,
    NoStepLeftError,
    Standing,
    budget_error,
    budget_used,
    check_step,
    deepest,
    expected_tax,
    expected_use,
    why_stopped,
)
from moeify.device import OnDevice
from moeify.distillation import Teacher, teaching
from moeify.divergence import AtHand, DivergedError, memory
from moeify.evaluation import RowLosses, losses_without, row_losses, summarize, tax, tax_errors
from moeify.events import MemoryTracker, Tracker
from moeify.following import cut
from moeify.learned_owners import learn_owners
from moeify.mishaps import get_over
from moeify.recipe.arms import Arm
from moeify.recipe.config import RunConfig
from moeify.recipe.given_tree import foreseen
from moeify.recipe.partition import LearnedOwners
from moeify.recipe.plan import PlannedPhase, check_categories, plan
from moeify.recipe.rounds import Round
from moeify.report import Reporter
from moeify.result import ModuleTest, Result
from moeify.routed.split_model import SplitModel
from moeify.splitting.grouping import NothingToSplitError, divisible_leaves
from moeify.splitting.null_test import Relabel, null_test
from moeify.splitting.partition import Partition
from moeify.splitting.propose import Proposal, check_handed_over, menu, shuffled
from moeify.splitting.terms import costs, terms_in_reach
from moeify.state import Cut, State
from moeify.stopping import Asked, Stoppable, StoppedError, never
from moeify.store import MemoryStore, Store
from moeify.task import Batch, HeldOut, Task, tokens_read
from moeify.task_subject import subject_of
from moeify.training import Contestant, Report, train
from moeify.twin_cache import TwinCache
from moeify.world import Solo, World, shares_models

Moment = Literal["before_cut", "after_cut", "recovered", "test"]


def run(
    config: RunConfig,
    task: Task,
    *,
    world: World | None = None,
    store: Store | None = None,
    tracker: Tracker | None = None,
    twins: Path | None = None,
    twins_url: str | None = None,
    stop: Asked = never,
) -> Result:
    """Run the recipe, from the store's newest checkpoint where there is one, and return what came out.

    ``twins``: a folder of twins that runs which differ in their cuts share (``moeify.twin_cache``);
    ``twins_url``: where machines share theirs; not of models that workers share out. ``stop``: asked often, on rank 0;
    where it says so, the run leaves a checkpoint and raises StoppedError (``moeify.stopping``). Raises ValueError,
    before any training, for categories that the data lacks and separations out of reach.

    >>> from moeify.tasks.build import build_task
    >>> config = RunConfig.model_validate(
    ...     {
    ...         "name": "brief",
    ...         "data": {"kind": "digits"},
    ...         "model": {"kind": "autoencoder", "hidden": 24, "code": 4},
    ...         "training": {"steps": 4, "rows": 20},
    ...         "partition": {"multiple": 2, "min_units": 2},
    ...         "rounds": [{"train": 2, "recover": 1, "separation": 0.3}],
    ...         "evaluation": {"validation_rows": 2, "test_rows": 2},
    ...     }
    ... )
    >>> result = run(config, build_task(config, cache=Path("cache"), base=Path(".")))
    >>> result.categories[:3], [each.outcome for each in result.rounds], sorted(result.test_loss)
    (('0', '1', '2'), ['kept'], ['dense', 'random', 'split'])
    """
    world = world or Solo()
    known = TwinCache(twins, config, task, world, twins_url) if twins and not shares_models(world) else None
    return _Loop(config, task, world, store or MemoryStore(), tracker or MemoryTracker(), known, stop).run()


class _Loop:
    """One worker's view of a run."""

    def __init__(
        self,
        config: RunConfig,
        task: Task,
        group: World,
        store: Store,
        tracker: Tracker,
        twins: TwinCache | None,
        stop: Asked,
    ) -> None:
        check_categories(config, task.categories)
        self.config = config
        self.task = OnDevice.of(task, group)
        self.group = group  # for training and checkpoints: what stops, stops with a checkpoint
        self.world = Stoppable(group, stop)
        self.store, self.twins = store, twins
        self.teacher = Teacher.of(config, self.task, group.device)
        self.say = Reporter(config, store, tracker, speaks=group.rank == 0)
        self.state = self._begin()
        self._check_handed_over()
        self.began = time.time() - self.state.seconds

    def run(self) -> Result:
        """Go down the plan from where the state stands."""
        for phase in plan(self.config)[self.state.done :]:
            match phase.kind:
                case "train" | "recover" | "finish":
                    self._train(phase, phase.kind)
                case "cut":
                    self._cut(phase)
                case "judge":
                    self._judge(phase)
            self.state.done += 1
            self._checkpoint()
        return self._test()

    def _begin(self) -> State:
        """Return the newest checkpoint's state, the same one on every rank, or a fresh one."""
        found = self.world.share(self.store.newest() if self.world.rank == 0 else None)
        if found:
            state = State.load(self.store, found.name, self.config, self.group)
        else:
            state = State.fresh(self.config, self.task, self.group)
        if self.teacher:
            self.teacher.check(state.began)
        model = state.arms["dense"].model
        self.terms = terms_in_reach(
            self.config, self.task.categories, model.network, model.space, tokens_read(self.task)
        )
        self.say.started(self.task, model)
        if found:
            self.say.resumed(found.name, found.damaged)
        return state

    def _train(self, phase: PlannedPhase, kind: Literal["train", "recover", "finish"]) -> None:
        """Train every arm up to the phase's step, with a checkpoint every so many steps."""
        self.say.phase(kind, phase.round)
        every = self.config.checkpoints.every
        for arm, contestant in self.state.arms.items():
            report: Report = partial(self.say.step, arm, phase.round, self.state)
            twins = self.twins if arm in self.config.twins else None
            if twins:
                report = twins.recording(arm, contestant, report)
                if contestant.step < phase.until and twins.take(arm, contestant, phase.until, report):
                    continue
            while contestant.step < phase.until:
                stop = min(phase.until, contestant.step - contestant.step % every + every)
                while contestant.step < stop:
                    contestant = self._train_until(phase, arm, stop, report)
                if contestant.step < phase.until:
                    self._checkpoint()
            if twins:
                twins.keep(arm, contestant)

    def _train_until(self, phase: PlannedPhase, arm: Arm, stop: int, report: Report) -> Contestant:
        """Train an arm up to a step, or to where its numbers went wrong; return it as it goes on."""
        contestant, settings, every = self.state.arms[arm], self.config.training, self.config.tracking.every
        try:
            where = memory(lambda: f"{arm}, step {contestant.step + 1}, worker {self.world.rank}")
            with where, teaching(self.teacher, contestant.model) as taught:
                known = contestant, self.task, self.group, settings, stop, every, report, taught
                stopped = train(*known, self.world.asked)
        except DivergedError as trouble:
            done = get_over(trouble, arm, self.state, self.config, self.task, self.group, self.store)
            self.say.mishap(arm, phase.round, self.state.arms[arm], trouble.what, done)
            return self.state.arms[arm]
        if stopped:
            self._checkpoint()
            raise StoppedError(f"asked to stop at step {contestant.step} of {arm}; the run goes on from there")
        return contestant

    def _cut(self, phase: PlannedPhase) -> None:
        """Attribute, partition, prune and compensate: the split arm the recipe's way, its control at random."""
        before, self.state.uncut = self.state.name, None
        self.state.fork(self.config, self.task)
        rows = self._evaluate(phase, "before_cut", ("dense", *self.config.cut_arms))
        try:
            proposal, asked, tables = self._propose(phase, rows)
        except (NothingToSplitError, NoStepLeftError) as reason:
            self.state.uncut = "no step left" if isinstance(reason, NoStepLeftError) else "nothing to split"
            return self.say.phase("partition", phase.round, str(reason))
        models = {arm: self.state.arms[arm].model for arm in self.config.cut_arms}
        cuts, blind = {"split": proposal}, None
        if (random := models.get("random")) is not None:
            split, seed = models["split"], self.config.seed
            blind = shuffled(split.partition, proposal, tables["split"], split.output_weights, seed).predicted
            cuts["random"] = shuffled(random.partition, proposal, tables["random"], random.output_weights, seed)
        for arm in models:
            contestant, compensation = self.state.arms[arm], self.config.partition.compensation
            known = contestant.model, cuts[arm], tables[arm], compensation, contestant.optimizer
            cut(*known, self.task, lambda: map(self._mine, self.world.heeding(self._probes(phase.round))), self.world)
            contestant.health.fresh = True
        self.say.cut(phase.round, proposal, tables["split"])
        cut_rows = self._evaluate(phase, "after_cut", self.config.cut_arms)
        now, then = (self._standing(each["split"], rows["dense"]) for each in (rows, cut_rows))
        expected = expected_tax(now, then, self.state.rounds)
        self.state.undo = before
        self.state.cut = Cut(asked, proposal.predicted, blind, now, then, expected, proposal.gap)
        return None

    def _propose(
        self, phase: PlannedPhase, rows: Mapping[Arm, RowLosses]
    ) -> tuple[Proposal, float, dict[Arm, AttributionTable]]:
        """Return the split arm's cut, as deep as the round asks or the budget is expected to allow, and its tables.

        Between them: the separation that the cut is judged by.
        """
        models = {arm: self.state.arms[arm].model for arm in self.config.cut_arms}
        split, rounds, partition = models["split"], self._to_come(phase.round), self.config.partition
        reached, asked = self._separation(split.partition), rounds[0].separation
        if not divisible_leaves(split.partition, partition):
            raise NothingToSplitError("every leaf serves one category; nothing is left to split")
        now = self._standing(rows["split"], rows["dense"])
        if budget := self.config.budget:
            check_step(budget, asked - reached, now)
        tables = self._attribute(models, phase.round)
        passed = self._null_test(split, tables["split"], phase.round, rounds[0])
        self.say.phase("partition", phase.round)
        score, tree, seed = self.config.attribution.score, self.config.tree, self.config.seed
        known = split.partition, tables["split"], split.output_weights
        given, terms = self.state.handed_over(self.config), self.terms
        choices = menu(*known, partition, rounds, score, tree, passed, split.input_weight, seed, terms, given)

        def fits(tried: Proposal) -> bool:
            then = self._standing(self._tried(tried, tables["split"]), rows["dense"])
            return expected_use(now, then, self.state.rounds) <= 1.0

        proposal, why = choices.cut(asked), "widths leave no more room"
        if budget and not fits(proposal):
            proposal, why = deepest(choices.cut, reached + budget.least_step, asked, fits), "the budget allows no more"
        proposal = choices.refined(proposal)
        got, multiple = self._separation(proposal.partition), choices.rounding
        depth = Depth(reached, asked, got, multiple, slack=budget.least_step if budget else multiple)
        depth.check_gain()
        if isinstance(owners := partition.owners, LearnedOwners):
            pupil, mine = self.state.arms["split"], self._mine
            proposal = learn_owners(proposal, pupil, tables["split"], owners, self.task, self.world, mine)
        if note := depth.note(why, handed=bool(given)):
            self.say.phase("partition", phase.round, note)
        return proposal, depth.judged, tables

    def _check_handed_over(self) -> None:
        if given := self.state.handed_over(self.config):
            split, first = self.state.arms["split"].model, self.config.rounds[0]
            parts = foreseen(self.config.tree, self.task.categories, first.branching)
            check_handed_over(split.partition, given, self.config.partition, self.terms, parts)

    def _tried(self, proposal: Proposal, table: AttributionTable) -> RowLosses:
        """Return the losses right after a cut that is undone again, with neither exchanges nor weights that follow."""
        split = self.state.arms["split"]
        tensors = {name: tensor.clone() for name, tensor in split.tensors().items()}
        partition = split.model.partition
        split.model.cut(proposal, table, self.config.partition.compensation, split.optimizer)
        rows = row_losses(split.model, self.task, self.world, self.config.evaluation, "validation")
        split.load(tensors)
        split.model.repartition(partition)
        return rows

    def _standing(self, mine: RowLosses, twin: RowLosses) -> Standing:
        """Hold the split model's losses against the dense twin's."""
        loss = twin.by_category(self.task)
        taxes = tax(mine.by_category(self.task), loss)
        return Standing(taxes["mean"], budget_used(self.config.budget, taxes, loss))

    def _attribute(self, models: Mapping[Arm, SplitModel], number: int) -> dict[Arm, AttributionTable]:
        """Measure the arms that are about to be cut."""
        self.say.phase("attribute", number)
        tables = {arm: self._measure(model, number) for arm, model in models.items()}
        if self.config.attribution.settled:
            total = len(self.task.categories) * self.config.attribution.rows
            told = ", ".join(f"{int(table.rows.sum()):,} for {arm}" for arm, table in tables.items())
            self.say.phase("attribute", number, f"rows measured of {total:,} at most: {told}")
        return tables

    def _separation(self, partition: Partition) -> float:
        """Return the separation by what the recipe counts (``partition.cost``)."""
        return partition.separation_of(costs(self.terms))

    def _to_come(self, number: int) -> list[Round]:
        """Return this round and those after it; this one goes as far as roll-backs have left of its step."""
        rounds = list(self.config.rounds[number - 1 :])
        reached = self._separation(self.state.arms["split"].model.partition)
        separation = reached + self.state.step_scale * (rounds[0].separation - reached)
        rounds[0] = rounds[0].model_copy(update={"separation": separation})
        return rounds

    def _null_test(self, model: SplitModel, table: AttributionTable, number: int, round_: Round) -> set[int] | None:
        """Return the leaves whose split beats those of permuted labels; None where the recipe does not ask."""
        if not (asked := self.config.partition.null_test):
            return None
        measure = partial(self._measure, model, number)
        known = model.partition, table, model.output_weights, self.config, round_
        found = null_test(*known, asked.permutations, measure, number, self.terms)
        self.say.phase("attribute", number, "; ".join(map(str, found.values())))
        return {leaf for leaf, verdict in found.items() if verdict.p <= asked.level}

    def _judge(self, phase: PlannedPhase) -> None:
        """Hold the round against the dense twin: keep it while the tax is within the budget, else roll back."""
        rows = self._evaluate(phase, "recovered", tuple(self.state.arms))
        losses = {arm: each.by_category(self.task) for arm, each in rows.items()}
        taxes: dict[Arm, dict[str, float]] = {
            arm: tax(losses[arm], losses["dense"]) for arm in self.config.arms if arm != "dense"
        }
        used = budget_used(self.config.budget, taxes["split"], losses["dense"])
        errors = tax_errors(rows["split"], rows["dense"], self.task)
        accepted = self.state.cut is None or used is None or used <= 1.0
        unsure = budget_error(self.config.budget, taxes["split"], losses["dense"], errors)
        record = self.say.judged(phase, self.state, taxes, errors, (used, unsure), accepted)
        self.state.rounds.append(record)
        if not accepted:
            self.state.roll_back(self.store, self.config)
            self.state.step_scale /= 2
        elif self.state.cut:
            self.state.step_scale = 1.0
        self.state.undo = self.state.cut = None

    def _test(self) -> Result:
        """Read the test split, once, when all training is over."""
        self.say.phase("test", len(self.config.rounds))
        last = plan(self.config)[-1]
        rows = self._evaluate(last, "test", tuple(self.state.arms))
        split = self.state.arms["split"].model
        removed = losses_without(split, self.task, self.world, self.config.evaluation)
        modules: tuple[ModuleTest, ...] = ()
        if self.config.evaluation.null_draws:
            modules = module_tests(split, self.task, self.world, self.config, rows["split"], removed)
        stopped, seconds = why_stopped(self.state.rounds, self.config.rounds[-1].separation), time.time() - self.began
        rounds, steps = self.state.rounds, self.config.training.steps
        return summarize(self.task, split, rounds, rows, removed, modules, stopped, steps, seconds)

    def _measure(self, model: SplitModel, round_: int, relabel: Relabel = iter) -> AttributionTable:
        """Return the attribution of every unit to every category, of all workers' rows together."""
        asked, at, seed = self.config.attribution, AtHand(self.task), self.config.seed
        # In the model's own order, so that it moves no row: what is seen inside belongs to the row of the same place.
        batches = self.world.heeding(relabel(self._probes(round_)))
        mine = at.of(self._mine(batch.take(model.order(batch.categories))) for batch in batches)
        subject = subject_of(self.task, model.network, model.space.readers, model)
        settled = Stability(strongest_category, asked.settled, reduce=self.world.sum) if asked.settled else None
        with model.masked(), memory(lambda: f"attribution of round {round_}, worker {self.world.rank}, {at}"):
            table = measure(subject, mine, seed=seed, moments=Moments(asked.columns), stability=settled)
        self.world.sum(table.tensors())
        return table

    def _probes(self, number: int) -> Iterator[Batch]:
        """Yield the rows that a round's cut is decided on, all workers'."""
        return self.task.probe_batches(number, self.config.attribution.rows, self.config.attribution.rows_at_once)

    def _mine(self, batch: Batch) -> Batch | Uncounted:
        """Return this worker's rows of a batch; where it has none and passes take every worker, another's."""
        mine = batch.shard(self.world.rank, self.world.size)
        if len(mine.categories) or not shares_models(self.world):
            return mine
        return Uncounted(batch.shard(0, self.world.size))

    def _evaluate(self, phase: PlannedPhase, moment: Moment, arms: Sequence[Arm]) -> dict[Arm, RowLosses]:
        self.say.phase("evaluate", phase.round)
        split: HeldOut = "test" if moment == "test" else "validation"
        losses: dict[Arm, RowLosses] = {}
        for arm in arms:
            known = self.state.arms[arm].model, self.task, self.world, self.config.evaluation
            with memory(partial("evaluation of {}, worker {}".format, arm, self.world.rank)):
                losses[arm] = row_losses(*known, split)
            self.say.evaluated(arm, phase, moment, losses[arm].by_category(self.task))
        return losses

    def _checkpoint(self) -> None:
        """Publish the state; no worker goes on before it is safe."""
        self.state.seconds = time.time() - self.began
        if self.world.rank == 0 or shares_models(self.world):
            self.state.save(self.store)
        self.world.share(None)
