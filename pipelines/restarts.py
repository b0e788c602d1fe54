"""Groups of Ray Train workers that ended before their work did, started again."""

from collections.abc import Callable, Mapping
from typing import Any


def fit_again(trainer: Callable[[], Any], retries: int, settled: Callable[[Mapping[int, Exception]], bool]) -> None:
    """Fit a trainer, and another one where a worker died or raised, ``retries`` times; not once that is ``settled``.

    ``settled`` is given what each worker raised, by rank, and may raise itself.

    Trainers must not retry themselves: Ray Train would, whatever a worker raised. And it takes a death while the group
    is being set up for a failure of its own (``ControllerError``), gives up, and loses sight of what the group holds.
    Raises what the last one raised; returns where that is settled.
    """
    from ray.exceptions import RayActorError
    from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

    for left in reversed(range(retries + 1)):
        try:
            trainer().fit()
            return
        except WorkerGroupError as error:
            if settled(error.worker_failures):
                return
            if not left:
                raise
        except ControllerError as error:
            if not left or not isinstance(error.controller_failure, RayActorError):
                raise
            release()


def release() -> None:
    """Give back all that groups of this driver's workers hold: else the next one waits for it forever."""
    import ray
    from ray.util import placement_group_table, remove_placement_group
    from ray.util.placement_group import PlacementGroup

    job = ray.get_runtime_context().get_job_id()  # with which its groups' ids end
    for number, known in placement_group_table().items():
        if number.endswith(job) and known["state"] != "REMOVED":
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(bytes.fromhex(number))))
