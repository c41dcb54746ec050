"""Cells in this very process, one after the other."""

from __future__ import annotations

import time

from lit_mult.study.executors.base import Handler
from lit_mult.study.job import Job, run_job


class HereExecutor:
    """Runs a job when it is polled; signals reach the run itself, which raises `Interrupted`."""

    def __init__(self) -> None:
        self._job: Job | None = None

    @property
    def free(self) -> int:
        return 0 if self._job else 1

    def submit(self, job: Job) -> None:
        self._job = job

    def poll(self, timeout: float, handle: Handler) -> None:
        job, self._job = self._job, None
        if job is None:
            time.sleep(timeout)
        else:
            handle(job.id, run_job(job, lambda message: handle(job.id, message)))

    def close(self) -> None:
        self._job = None
