"""What a run does where an arm's numbers went wrong, as its recipe says: stop, skip the batch, or go back."""

from moeify.divergence import DivergedError
from moeify.recipe.arms import Arm
from moeify.recipe.config import RunConfig
from moeify.recipe.divergence import LowerRate, SkipBatch, StopRun
from moeify.state import State
from moeify.store import Store
from moeify.task import Task
from moeify.world import World


def get_over(
    trouble: DivergedError, arm: Arm, state: State, config: RunConfig, task: Task, world: World, store: Store
) -> str:
    """Do what ``training.on_divergence`` says, in place, and return what was done; every rank calls it.

    Raises DivergedError, with the arm's name, where the recipe says to stop or what it allows is used up.
    """
    policy, health = config.training.on_divergence, state.arms[arm].health
    if isinstance(policy, StopRun) or health.mishaps >= policy.most:
        used_up = "" if isinstance(policy, StopRun) else f", after {policy.most} that were got over"
        raise DivergedError(f"{arm}, {trouble.what}{used_up}") from trouble
    health.mishaps += 1

    def give_back() -> str:
        """Return the arm to its last good checkpoint; say which that is."""
        found = world.share(store.newest() if world.rank == 0 else None)
        state.give_back(arm, store, found.name if found else None, config, task)
        return f"checkpoint {found.name}" if found else "the beginning"

    match policy:
        case SkipBatch():
            step, done = state.arms[arm].step, "the batch is skipped"
            if trouble.exploded:
                done = f"{done}, weights are those of {give_back()}"
            state.arms[arm].step = step + 1
            return done
        case LowerRate():
            health.rate *= policy.factor
            return f"from {give_back()} on with {health.rate:g} of the learning rate"
