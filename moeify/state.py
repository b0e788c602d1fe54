"""Everything a run is in the middle of: saved at every phase boundary, taken back bit for bit.

Nothing else carries over from phase to phase: data, rates and random draws are functions of the recipe and the step.
"""

from collections import ChainMap
from collections.abc import Container, Mapping, MutableMapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from operator import index
from typing import Any, Literal, Self, cast

from torch import Tensor

from moeify.control import Standing
from moeify.distillation import network_hash
from moeify.divergence import Health, check_kept
from moeify.events import RoundEnded
from moeify.models.families import describe
from moeify.models.resizing import shaped, widened
from moeify.recipe.arms import Arm
from moeify.recipe.config import RunConfig
from moeify.recipe.partition import AttributionOwners
from moeify.routed.gradients import GradientRouter
from moeify.routed.shard import shard
from moeify.routed.split_model import SplitModel
from moeify.splitting.owners import Given
from moeify.splitting.partition import Partition
from moeify.store import Store, understood
from moeify.task import Task
from moeify.training import Contestant
from moeify.world import Solo, World, built_on, shares_models


@dataclass(frozen=True)
class Cut:
    """What is known of a round's cut before it is judged."""

    asked: float
    """The separation that it went for; see ``moeify.events.RoundEnded``."""
    predicted: float
    """J, in nats."""
    predicted_random: float | None
    """J of a random cut of equal sizes, where that is a control."""
    before: Standing
    """What the split model cost right before it."""
    after: Standing
    """And right after it."""
    expected: float
    """The mean tax in nats that is foreseen after recovery."""
    gap: float | None = None
    """What the dual bound of the assignment leaves open; None where it is not known."""


@dataclass
class State:
    """A run between two moments of its plan."""

    arms: dict[Arm, Contestant]
    """Twins alone until the first cut, when the arms that are cut fork from the dense one; or with them the split
    model, where it trains by itself from the first step on."""
    began: str
    """Hash of the network before the first step (``network_hash``)."""
    world: World = field(default_factory=Solo)
    """Whose workers share the arms out, where its ``parallel`` says so."""
    done: int = 0
    """Phases of the plan that are behind us."""
    rounds: list[RoundEnded] = field(default_factory=list)
    step_scale: float = 1.0
    """What is left of a round's step in separation after roll-backs, 0..1."""
    undo: str | None = None
    """The checkpoint from before the open round's cut; None where no round is open."""
    cut: Cut | None = None
    """What the open round's cut was expected to do; None where no round is open."""
    uncut: Literal["nothing to split", "no step left"] | None = None
    """Why the round that is going on cut nothing; None where it did, or has not come to that."""
    seconds: float = 0.0
    """Wall time up to the last checkpoint, all attempts together."""

    @classmethod
    def fresh(cls, config: RunConfig, task: Task, world: World | None = None) -> Self:
        """Return the state before the first step."""
        world = world or Solo()
        arms = {arm: _untrained(task, arm, config, world) for arm in config.early_arms}
        dense = _model(task, "dense", config) if shares_models(world) else arms["dense"].model
        return cls(arms, network_hash(dense.network), world)

    def fork(self, config: RunConfig, task: Task) -> None:
        """Let the arms that will be cut go on from where their trunk stands, if they have not forked yet."""
        trunk = self.arms[_trunk(self.arms)]
        for arm in config.cut_arms:
            if arm not in self.arms:
                twin = _untrained(task, arm, config, self.world)
                twin.load({**twin.tensors(), **trunk.tensors()})  # biases of categories begin at zero
                twin.step, twin.health = trunk.step, replace(trunk.health)
                self.arms[arm] = twin

    def handed_over(self, config: RunConfig) -> Mapping[str, Sequence[Given]]:
        """Return the units of each site that the cut to come gives to the categories that had them."""
        split, owners = self.arms.get("split"), config.partition.owners
        if not (split and split.router and isinstance(owners, AttributionOwners) and owners.hand_over):
            return {}
        return split.router.handed_over(split.model.partition)

    @property
    def name(self) -> str:
        """A checkpoint name that sorts in order of time."""
        return f"{self.done:04d}-{sum(contestant.step for contestant in self.arms.values()):09d}"

    def save(self, store: Store) -> None:
        """Publish a checkpoint; raise DivergedError rather than keep a number that is not finite.

        Rank 0 calls it; where workers share the arms out, every rank.
        """
        dense = self.arms["dense"].model
        facts = {
            "began": self.began,
            "done": self.done,
            "arms": {
                arm: {"step": c.step, "health": asdict(c.health), "partition": c.model.partition.as_json()}
                for arm, c in self.arms.items()
            },
            "rounds": [record.model_dump(mode="json") for record in self.rounds],
            "step_scale": self.step_scale,
            "undo": self.undo,
            "cut": asdict(self.cut) if self.cut else None,
            "uncut": self.uncut,
            "seconds": self.seconds,
            "network": describe(dense.network),
            "categories": list(dense.categories),
        }
        tensors: dict[str, dict[str, Tensor]] = {arm: contestant.tensors() for arm, contestant in self.arms.items()}
        check_kept(tensors)
        shared_by = self.world if shares_models(self.world) else None
        store.save(self.name, facts, tensors, [self.undo] if self.undo else [], shared_by)

    @classmethod
    def load(cls, store: Store, name: str, config: RunConfig, world: World | None = None) -> Self:
        """Take back the checkpoint of that name."""
        facts, world = store.facts(name), world or Solo()
        with understood(f"checkpoint {name}"):
            return cls(
                arms={arm: _contestant(store, name, arm, facts, config, world) for arm in facts["arms"]},
                began=str(facts.get("began", "")),
                world=world,
                done=index(facts["done"]),
                rounds=[RoundEnded.model_validate(record) for record in facts["rounds"]],
                step_scale=float(facts["step_scale"]),
                undo=facts["undo"],
                cut=_cut(facts["cut"]) if facts["cut"] else None,
                uncut=facts["uncut"],
                seconds=float(facts["seconds"]),
            )

    def roll_back(self, store: Store, config: RunConfig) -> None:
        """Return every arm that was cut to the checkpoint before the open round's cut; steps spent since stay spent.

        An arm's step is its place in the data and the schedule, so it moves on: the twin's tokens stay equal.
        """
        assert self.undo is not None
        facts = store.facts(self.undo)
        for arm in config.cut_arms:
            step, health = self.arms[arm].step, self.arms[arm].health
            source: Arm = arm if arm in facts["arms"] else _trunk(facts["arms"])
            self.arms[arm] = _contestant(store, self.undo, source, facts, config, self.world, becomes=arm)
            self.arms[arm].step, self.arms[arm].health = step, health

    def give_back(self, arm: Arm, store: Store, name: str | None, config: RunConfig, task: Task) -> None:
        """Return one arm, its step too, to a checkpoint of this phase; None: to before the first step.

        What it has been through stays: the rate that was lowered, and how often.
        """
        health = self.arms[arm].health
        if name is None:
            self.arms[arm] = _untrained(task, arm, config, self.world)
        else:
            self.arms[arm] = _contestant(store, name, arm, store.facts(name), config, self.world)
        self.arms[arm].health = health


def _untrained(task: Task, arm: Arm, config: RunConfig, world: World) -> Contestant:
    return _in_training(_model(task, arm, config), arm, config, world)


def _in_training(model: SplitModel, arm: Arm, config: RunConfig, world: World) -> Contestant:
    if shares_models(world):
        shard(model, world.device)
    return Contestant(model, config.training, _router(model, arm, config))


def _model(task: Task, arm: Arm, config: RunConfig) -> SplitModel:
    told = arm in config.told_arms
    network = task.build()
    if arm in config.cut_arms:
        network = widened(network, config.routing.added, config.seed)
    return SplitModel(network, task.categories, told=told, kinds=config.partition.units)


def _router(model: SplitModel, arm: Arm, config: RunConfig) -> GradientRouter | None:
    if arm not in config.cut_arms or config.routing.gradients == "none":
        return None
    return GradientRouter(config.routing, model.categories, model.space.readers, config.seed)


def _trunk(arms: Container[str]) -> Arm:
    """Return the arm that others fork from: the split model, where it trains by itself before there is a cut."""
    return "split" if "split" in arms else "dense"


def _cut(facts: dict[str, Any]) -> Cut:
    return Cut(**{**facts, "before": Standing(**facts["before"]), "after": Standing(**facts["after"])})


def _contestant(
    store: Store,
    name: str,
    arm: Arm,
    facts: dict[str, Any],
    config: RunConfig,
    world: World,
    *,
    becomes: Arm | None = None,
) -> Contestant:
    """Return an arm of a checkpoint, or, where it ``becomes`` another one, that arm's fork."""
    becomes = becomes or arm
    partition, told = Partition.from_json(facts["arms"][arm]["partition"]), becomes in config.told_arms
    network = shaped(facts["network"], {site: partition.units(site) for site in partition.widths}).to(built_on(world))
    model = SplitModel(network, facts["categories"], partition, told=told)
    contestant = _in_training(model, becomes, config, world)
    begun = {} if becomes == arm else contestant.tensors()  # biases of categories, which the dense twin has none of
    contestant.load(ChainMap(cast(MutableMapping[str, Tensor], store.tensors(name, arm)), begun))
    contestant.step = index(facts["arms"][arm]["step"])
    contestant.health = Health(**facts["arms"][arm].get("health", {}))
    return contestant
