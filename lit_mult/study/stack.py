"""Several cells in a worker: trained as one stack, or one after the other if that fails."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from functools import partial

from lit_mult.config import RunConfig
from lit_mult.errors import Interrupted, UserError
from lit_mult.schema import CellInfo, RunRecord
from lit_mult.study.attempts import Attempts
from lit_mult.study.job import (
    ActiveAttempt,
    AlreadyClaimed,
    Evaluated,
    Job,
    LogMessage,
    Message,
    Progress,
    reason_of,
    run_attempt,
    run_job,
)

Post = Callable[[str, Message], bool]
"""Takes the id of a cell and a message about it; for `Evaluated` it returns whether to prune the cell."""

_SUSPECT_AFTER = 2
"""Deaths in a row without progress after which a cell runs alone: a single death may be due to others in its stack."""


def run_jobs(jobs: Sequence[Job], post: Post, stop: Callable[[], bool] = lambda: False) -> None:
    """Run cells in this process. The only exception that escapes is a stop on request (`Interrupted`).

    Several cells train as one stack, without those that another process runs or that have a record. A stack that runs
    out of memory is retried as two halves, one after the other. A stack that fails otherwise is retried cell by cell,
    so that a bad cell does not fail the others. A cell suspected of killing its process runs alone, after the others.

    Args:
        jobs: the cells; several have configs of one `stack_key`.
        post: takes the messages; the last one about each cell is its outcome.
        stop: called after every step; True writes checkpoints and stops.
    """
    alone = [job for job in jobs if len(jobs) == 1 or _is_suspect(job)]
    if together := [job for job in jobs if job not in alone]:
        _run_stack(together, post, stop)
    for job in alone:
        post(job.id, run_job(job, partial(post, job.id), stop))


def _is_suspect(job: Job) -> bool:
    return Attempts(job.attempts).deaths(job.id) >= _SUSPECT_AFTER


def _run_stack(jobs: Sequence[Job], post: Post, stop: Callable[[], bool]) -> None:
    import torch

    begun = {job.id: ActiveAttempt.begin(job) for job in jobs}
    stack = {cell: attempt for cell, attempt in begun.items() if isinstance(attempt, ActiveAttempt)}
    retries: list[list[Job]] = []
    try:
        for cell, outcome in begun.items():
            if not isinstance(outcome, ActiveAttempt):
                post(cell, outcome)
        _train(stack, post, stop)
    except (Interrupted, KeyboardInterrupt, BrokenPipeError, EOFError) as error:
        lost = [cell for cell, attempt in stack.items() if attempt.lease.lost]
        _stop_all(stack)
        if not (isinstance(error, Interrupted) and lost and not stop()):
            raise
        for cell in lost:
            post(cell, AlreadyClaimed())
            del stack[cell]
        retries = [_jobs(stack)]
    except torch.OutOfMemoryError as error:
        _stop_all(stack, reason_of(error))
        halves = _jobs(stack)
        retries = [halves[: len(halves) // 2], halves[len(halves) // 2 :]]
        _log(stack, f"{len(stack)} cells together do not fit into memory; in two halves, one after the other", post)
    except UserError as error:
        for cell, attempt in stack.items():
            post(cell, attempt.failed(error))
    except Exception as error:
        _stop_all(stack, reason_of(error))
        retries = [[job] for job in _jobs(stack)]
        _log(stack, f"{len(stack)} cells together failed ({reason_of(error)}); one by one", post)
    # Free the memory for the next stack, outside the except blocks: a traceback keeps this stack's tensors alive, and
    # Trainer and module are a reference cycle.
    gc.collect()
    torch.cuda.empty_cache()
    for part in filter(None, retries):
        run_jobs(part, post, stop)


def _train(stack: dict[str, ActiveAttempt], post: Post, stop: Callable[[], bool]) -> None:
    """Train the cells of a stack, and remove each from it when it has its record."""
    if len(stack) < 2:
        for cell in list(stack):
            post(cell, run_attempt(stack.pop(cell), partial(post, cell), stop))
        return

    from lit_mult.stacked.run import Member, run_stack

    cells, jobs = list(stack), _jobs(stack)
    members = [
        Member(
            config=RunConfig.from_dict(job.config),
            out=job.work,
            cell=CellInfo.model_validate(job.cell),
            record_path=job.record,
            keep_checkpoint=job.keep_checkpoint,
        )
        for job in jobs
    ]

    def progress(index: int, step: int, loss: float) -> None:
        post(cells[index], Progress(step, loss))

    def prune(index: int, curve: list[tuple[int, float]]) -> bool:
        return jobs[index].prune and post(cells[index], Evaluated(curve))

    def finish(index: int, record: RunRecord) -> None:
        if cells[index] in stack:
            post(cells[index], stack.pop(cells[index]).finished(record))

    records = run_stack(
        members,
        on_progress=progress,
        prune=prune if any(job.prune for job in jobs) else None,
        on_record=finish,
        should_stop=lambda: any(attempt.lease.lost for attempt in stack.values()) or stop(),
    )
    for index, record in enumerate(records):
        finish(index, record)


def _jobs(stack: dict[str, ActiveAttempt]) -> list[Job]:
    return [attempt.job for attempt in stack.values()]


def _stop_all(stack: dict[str, ActiveAttempt], reason: str = "") -> None:
    for attempt in stack.values():
        attempt.stopped(reason)


def _log(stack: dict[str, ActiveAttempt], line: str, post: Post) -> None:
    if stack:
        post(next(iter(stack)), LogMessage(line))
