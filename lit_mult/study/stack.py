"""Several cells as a worker sees them: trained together as one stack, or one after the other where that fails."""

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
    run_begun,
    run_job,
)

Post = Callable[[str, Message], bool]
"""Takes the id of a cell and a message about it; its answer to `Evaluated` is whether the cell is to be pruned."""

_SUSPECT_AFTER = 2
"""Deaths in a row without progress. One has many causes; several at once, which share a stack, have one more."""


def run_jobs(jobs: Sequence[Job], post: Post, stop: Callable[[], bool] = lambda: False) -> None:
    """Run cells in this process; only a stop on request (`Interrupted`) escapes as an exception.

    Several cells are one stack. Those that somebody else is at work on, or that have a record, drop out of it. What
    does not fit into memory is run in two halves, one after the other; what fails otherwise is run cell by cell, so
    that a bad one does not fail the others. A cell that may be what kills its process is run by itself, and last.

    Args:
        jobs: the cells; those of a stack have configs of one `stack_key`.
        post: takes the messages on the way, and as the last one about each cell its outcome.
        stop: asked after every step whether to write checkpoints and leave.
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
    stack = {cell: one for cell, one in begun.items() if isinstance(one, ActiveAttempt)}
    left: list[list[Job]] = []
    try:
        for cell, outcome in begun.items():
            if not isinstance(outcome, ActiveAttempt):
                post(cell, outcome)
        _train(stack, post, stop)
    except (Interrupted, KeyboardInterrupt, BrokenPipeError, EOFError) as error:
        lost = [cell for cell, one in stack.items() if one.lease.lost]
        _stop_all(stack)
        if not (isinstance(error, Interrupted) and lost and not stop()):
            raise
        for cell in lost:
            post(cell, AlreadyClaimed())
            del stack[cell]
        left = [_jobs(stack)]
    except torch.OutOfMemoryError as error:
        _stop_all(stack, reason_of(error))
        both = _jobs(stack)
        left = [both[: len(both) // 2], both[len(both) // 2 :]]
        _say(stack, f"{len(stack)} cells together do not fit into memory; in two halves, one after the other", post)
    except UserError as error:
        for cell, one in stack.items():
            post(cell, one.failed(error))
    except Exception as error:
        _stop_all(stack, reason_of(error))
        left = [[job] for job in _jobs(stack)]
        _say(stack, f"{len(stack)} cells together failed ({reason_of(error)}); one by one", post)
    # For the next stack, and out of reach of the exception, whose traceback holds the tensors of this one. Without one,
    # Trainer and module hold each other, and so the optimizer's tensors.
    gc.collect()
    torch.cuda.empty_cache()
    for part in filter(None, left):
        run_jobs(part, post, stop)


def _train(stack: dict[str, ActiveAttempt], post: Post, stop: Callable[[], bool]) -> None:
    """Train the cells of a stack, and take each out of it that has its record."""
    if len(stack) < 2:
        for cell in list(stack):
            post(cell, run_begun(stack.pop(cell), partial(post, cell), stop))
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
        return post(cells[index], Evaluated(curve))

    def finish(index: int, record: RunRecord) -> None:
        if cells[index] in stack:
            post(cells[index], stack.pop(cells[index]).finished(record))

    records = run_stack(
        members,
        on_progress=progress,
        prune=prune if any(job.prune for job in jobs) else None,
        on_record=finish,
        should_stop=lambda: any(one.lease.lost for one in stack.values()) or stop(),
    )
    for index, record in enumerate(records):
        finish(index, record)


def _jobs(stack: dict[str, ActiveAttempt]) -> list[Job]:
    return [one.job for one in stack.values()]


def _stop_all(stack: dict[str, ActiveAttempt], reason: str = "") -> None:
    for one in stack.values():
        one.stopped(reason)


def _say(stack: dict[str, ActiveAttempt], line: str, post: Post) -> None:
    if stack:
        post(next(iter(stack)), LogMessage(line))
