"""A study in MLflow: what ``pipelines.job_tracking`` is told of its jobs."""

from collections.abc import Iterator

from pipelines.job_tracking import EndedJob, JobTracker, Whole
from pipelines.kept_jobs import JobsFolder
from pipelines.pool import Broken
from pipelines.studies.catalogue import QUESTIONS
from pipelines.study import EndedArm, Progress
from pipelines.study_report import markdown


class StudyTracker:
    """Delivers one study; no method but ``finish`` raises."""

    def __init__(self, folder: JobsFolder, name: str) -> None:
        self._folder = folder
        self._tracker = JobTracker(
            Whole(
                kind="study",
                id=folder.id,
                where=folder.address,
                home=folder.home,
                experiment=f"moeify/study/{folder.id}",
                command=f"moeify study {name}",
                way_out="delete it for good",
                params={"question": QUESTIONS[name]},
            )
        )

    def tell(self, progress: Progress) -> None:
        """Have a thread deliver what has ended, unless it is still busy, or MLflow was away before."""
        self._tracker.tell(_ended(progress), markdown(progress))

    def finish(self, progress: Progress) -> None:
        """Deliver what is missing, the table and the picture; raises ``DeliveryError`` where MLflow takes it not."""
        self._tracker.finish(_ended(progress), markdown(progress), [self._folder.summary, self._folder.picture])

    def stop(self) -> None:
        """Say that the study was interrupted, where MLflow has heard of it."""
        self._tracker.stop()

    @property
    def where_to_look(self) -> str:
        """The command line that shows the study, or its address on the server."""
        return self._tracker.where_to_look


def _ended(progress: Progress) -> Iterator[EndedJob]:
    for job, ended in progress.ended.items():
        name, params = f"{job.arm}, seed {job.seed}", {"arm": job.arm, "seed": str(job.seed)}
        match ended:
            case EndedArm(done=done):
                points = {key.replace("+", "."): value for key, value in done.measures.items()}  # MLflow takes no +
                yield EndedJob(str(job), name, params, points, 0, ended.path, done.seconds)
            case Broken():
                yield EndedJob(str(job), name, params, problem=ended.reason)
