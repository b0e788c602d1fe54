"""Groups of Ray Train workers that die before they have begun, which Ray Train does not start again."""

from collections.abc import Callable
from typing import Any


def fit_again(trainer: Callable[[], Any], retries: int) -> None:
    """Fit a trainer, and another one where a worker dies while its group is being set up, ``retries`` times.

    Ray Train takes such a death for a failure of its own (``ControllerError``), gives up, and loses sight of what the
    group holds. Raises what the last one raised.
    """
    from ray.exceptions import RayActorError
    from ray.train.v2.api.exceptions import ControllerError

    for left in reversed(range(retries + 1)):
        try:
            trainer().fit()
            return
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
