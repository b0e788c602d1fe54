"""A comparison in MLflow: what ``pipelines.job_tracking`` is told of its jobs."""

from collections.abc import Iterator

from moeify.comparison import Job, losses
from moeify.jobs import Ended
from moeify.recipe.config import RunConfig
from pipelines.compare import Comparison
from pipelines.compare_report import figures, markdown
from pipelines.job_tracking import EndedJob, JobTracker, Whole
from pipelines.kept_jobs import RECIPE, JobsFolder
from pipelines.mlflow_terms import final_points, flat, loss_points
from pipelines.pool import Broken


class ComparisonTracker:
    """Delivers one comparison; no method but ``finish`` raises."""

    def __init__(self, folder: JobsFolder, config: RunConfig) -> None:
        self._folder = folder
        self._tracker = JobTracker(
            Whole(
                kind="comparison",
                id=folder.id,
                where=folder.address,
                home=folder.home,
                experiment=f"{config.tracking.experiment}/compare/{folder.id}",
                command=f"moeify compare {config.name}",
                way_out="change tracking.experiment in the recipe",
                tags={"moeify.recipe": config.name},
                params=flat(config.model_dump(mode="json")),
            )
        )

    def tell(self, comparison: Comparison) -> None:
        """Have a thread deliver what has ended, unless it is still busy, or MLflow was away before."""
        self._tracker.tell(_ended(comparison), markdown(comparison))

    def finish(self, comparison: Comparison) -> None:
        """Deliver what is missing, the table and the picture; raises ``DeliveryError`` where MLflow takes it not."""
        files = [self._folder.path / RECIPE, self._folder.summary, self._folder.picture]
        self._tracker.finish(_ended(comparison), markdown(comparison), files)

    def stop(self) -> None:
        """Say that the comparison was interrupted, where MLflow has heard of it."""
        self._tracker.stop()

    @property
    def where_to_look(self) -> str:
        """The command line that shows the comparison, or its address on the server."""
        return self._tracker.where_to_look


def _ended(comparison: Comparison) -> Iterator[EndedJob]:
    told = losses(comparison.results, "told")
    for job, ended in comparison.ended.items():
        known = {"method": job.method, "seed": str(job.seed), "separation": f"{job.separation:g}"}
        name = f"{job.method}, seed {job.seed}, {job.separation:.3g}"
        match ended:
            case Ended():
                yield _with_result(job, name, known, ended, told.get(job.seed))
            case Broken():
                yield EndedJob(str(job), name, known, problem=ended.reason)


def _with_result(job: Job, name: str, params: dict[str, str], done: Ended, told: float | None) -> EndedJob:
    result = done.result
    own = {key: value for key, value in figures(result, told).items() if isinstance(value, float)}
    points = {**own, "reached_separation": 1.0 - own["active"]}
    points |= {key: value for key, value, _ in (*loss_points(result), *final_points(result))}
    return EndedJob(str(job), name, params, points, result.steps, done.path, result.seconds)
