"""How busy the machine is that drives a run: MLflow's own system metrics, on the page of the run.

MLflow's monitor samples processor, memory, disk, network and GPUs of this machine every ten seconds in a thread of its
own (``MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL`` seconds). They are no part of the journal: what is sampled while MLflow
is away is lost, and the run takes no notice. ``MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING=false`` leaves them out.
"""

import os
import threading
from contextlib import suppress
from typing import Any

_OFF = ("false", "0")
_PATIENCE = 5.0
"""Seconds that the last samples may take to be delivered."""


class SystemMetrics:
    """The monitor of one run, started anew where it has given up on a server that was away."""

    def __init__(self, uri: str, run: str) -> None:
        self._uri = uri
        self._run = run
        self._monitor: Any = None

    def start(self) -> None:
        """Sample from now on, if asked to and not doing so already."""
        if os.environ.get("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "").lower() in _OFF or self._alive():
            return
        with suppress(Exception):  # a machine that cannot be sampled is no reason to deliver nothing
            from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

            self._monitor = SystemMetricsMonitor(self._run, resume_logging=True, tracking_uri=self._uri)
            self._monitor.start()

    def stop(self) -> None:
        """Deliver the last samples; a server that does not answer is not waited for."""
        if self._monitor is None:
            return
        closing = threading.Thread(target=self._monitor.finish, name="close-system-metrics", daemon=True)
        closing.start()
        closing.join(_PATIENCE)
        self._monitor = None

    def _alive(self) -> bool:
        thread = getattr(self._monitor, "_process", None)
        return thread is not None and thread.is_alive()
