"""Cells that are trained together: which may be, how many, and that a study has the same records for it."""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from serial_stacks import MODULE, SerialCells, SerialStacks, serve_and_die_once
from study_data import assert_undisturbed, job_of, outcomes, queues, states
from test_ray import ray  # noqa: F401 - a fixture
from tiny_runs import MakeStudy, Tiny

from lit_mult.config import RunConfig
from lit_mult.errors import Interrupted, UserError
from lit_mult.layout import find_records
from lit_mult.schema import RunRecord
from lit_mult.stacked.key import stack_key
from lit_mult.stacked.size import asked_members
from lit_mult.study import lease as leases
from lit_mult.study import machine
from lit_mult.study import sweep as sweeping
from lit_mult.study.attempts import Attempts
from lit_mult.study.executors import in_process, local
from lit_mult.study.executors import ray as ray_executor
from lit_mult.study.folder import StudyFolder
from lit_mult.study.job import AlreadyClaimed, Failed, Finished, Job, LogMessage, Message
from lit_mult.study.machine import Slot
from lit_mult.study.queue import CellQueue
from lit_mult.study.search import Ticket
from lit_mult.study.spec import StudySpec
from lit_mult.study.stack import run_jobs
from lit_mult.study.sweep import sweep
from lit_mult.training import run


@pytest.fixture
def stacks(monkeypatch: pytest.MonkeyPatch) -> SerialStacks:
    made = SerialStacks()
    monkeypatch.setitem(sys.modules, MODULE, made.module())
    return made


@pytest.fixture
def study_dict(small_study_dict: MakeStudy) -> MakeStudy:
    """A study of 3 arms x 2 rates x 2 seeds: 8 cells without learnable multipliers, 4 with."""
    arms = {"muP": {}, "fixed": {"multipliers": "fixed"}, "vectors": {"multipliers": "vector"}}
    return partial(small_study_dict, arms=arms, seeds=[0, 1])


# How many


def test_what_vectorize_takes(study_dict: MakeStudy, tmp_path: Path, refused: Callable[..., str]) -> None:
    assert [asked_members(value) for value in ("auto", "off", "1", 8)] == [None, 1, 1, 8]
    study = tmp_path / "study.yaml"
    study.write_text(json.dumps(study_dict()))
    for value in ("0", "-1", "many", "1.5", ""):
        assert refused("sweep", str(study), "--out", str(tmp_path / "out"), f"--vectorize={value}") == (
            f"lit-mult sweep: --vectorize {value}: must be auto, off, or the most runs to train together, 1 or more\n"
        )
    assert not (tmp_path / "out").exists()


def test_the_memory_of_a_worker(monkeypatch: pytest.MonkeyPatch, tiny: Tiny) -> None:
    class Worker:
        def __init__(self, slot: Slot) -> None:
            self.slot = slot

    monkeypatch.setattr(local, "_Worker", Worker)
    free = iter([100, 10, 100, 10])  # bytes; less while stacks are under way
    monkeypatch.setattr(machine, "free_gpu_memory", lambda: next(free))
    shared = local.ProcessExecutor([Slot(1, "0"), Slot(1, "1"), Slot(1, "0")])
    assert [shared.gpu_memory(), shared.gpu_memory()] == [50, 50]
    next(free)
    assert local.ProcessExecutor([Slot(1), Slot(1)]).gpu_memory() is None
    assert in_process.InProcessExecutor(tiny().trainer).gpu_memory() is None  # accelerator: cpu
    monkeypatch.setattr(machine, "_gpus", lambda: ["0"])
    executor = in_process.InProcessExecutor(tiny({"trainer.accelerator": "auto"}).trainer)
    assert [executor.gpu_memory(), executor.gpu_memory()] == [100, 100]


# A study of stacks


def sizes(stacks: SerialStacks) -> list[int]:
    return [len(cells) for cells in stacks.stacks]


def test_stacks_are_filled_across_arms_and_give_what_single_cells_give(
    stacks: SerialStacks, spec: StudySpec, tmp_path: Path
) -> None:
    for name, vectorize in (("off", "off"), ("one", 1), ("auto", "auto")):
        assert sweep(spec, tmp_path / name, workers=0, vectorize=vectorize).ran == 12
    assert stacks.stacks == []  # nor by default, on a CPU
    result = sweep(spec, tmp_path / "out", workers=0, vectorize="99")

    assert (result.ran, result.failures) == (12, {})
    assert [{cell.partition("-")[0] for cell in cells} for cells in stacks.stacks] == [{"muP", "fixed"}, {"vectors"}]
    assert sizes(stacks) == [8, 4]
    assert outcomes(tmp_path / "out") == outcomes(tmp_path / "off")
    assert states(tmp_path / "out" / "optuna.journal") == {"COMPLETE": 12}
    for left in ("attempts", "cells", "sweeps"):
        assert not list((tmp_path / "out" / left).iterdir())
    assert sweep(spec, tmp_path / "out", workers=0, vectorize=2).ran == 0  # the value is not of the study


def test_a_stack_has_as_many_members_as_asked_for_or_as_fit(
    stacks: SerialStacks, spec: StudySpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep(spec, tmp_path / "asked", workers=0, vectorize=3)
    assert sizes(stacks) == [3, 3, 2, 3]  # and one by itself
    stacks.stacks.clear()
    monkeypatch.setattr(in_process.InProcessExecutor, "gpu_memory", lambda self: 5_080_000)  # 80 % are 6.006 members
    sweep(spec, tmp_path / "auto", workers=0)
    assert sizes(stacks) == [6, 2, 4]


@pytest.mark.parametrize(("sampler", "expected"), [("random", [12]), ("tpe", [10, 2])])
def test_a_search_that_learns_is_not_asked_for_everything_at_once(
    stacks: SerialStacks,
    study_dict: MakeStudy,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    sampler: str,
    expected: list[int],
) -> None:
    rates = {"low": 1e-3, "high": 1e-1, "log": True}
    budget = {"steps": 2, "batch_size": 4, "trials": 12}
    study = study_dict(arms={"muP": {}}, nuisance={"optim.lr": rates}, sampler=sampler, budget=budget)
    monkeypatch.setattr(in_process.InProcessExecutor, "gpu_memory", lambda self: 10**12)
    sweep(StudySpec.from_dict(study), tmp_path, workers=0)
    assert sizes(stacks) == expected


def test_what_cannot_be_stacked_is_run_cell_by_cell(
    stacks: SerialStacks, study_dict: MakeStudy, tmp_path: Path
) -> None:
    arms = {"plain": {}, "dropout": {"model.dropout": 0.1}}
    spec = StudySpec.from_dict(study_dict(arms=arms, factors={"train.batch_size": [2, 4]}, seeds=[0]))

    assert sweep(spec, tmp_path / "factors", workers=0, vectorize=9).ran == 8
    assert sizes(stacks) == [2, 2]  # two rates at either batch

    stacks.stacks.clear()
    nuisance = {"multipliers": ["none", "vector"]}
    assert sweep(StudySpec.from_dict(study_dict(arms={"one": {}}, nuisance=nuisance)), tmp_path / "n", 0).ran == 4
    assert stacks.stacks == []


class InTurn:
    """An executor with several workers in this process, which notes how many cells it was given at once."""

    def __init__(self, workers: int) -> None:
        self.workers, self.given, self._waiting = workers, [], []  # type: ignore[var-annotated]

    @property
    def free(self) -> int:
        return self.workers - len(self._waiting)

    def submit(self, jobs: Sequence[Job]) -> None:
        self.given.append(len(jobs))
        self._waiting.append(jobs)

    def poll(self, timeout: float, handle: Any) -> None:
        waiting, self._waiting = self._waiting, []
        for jobs in waiting:
            run_jobs(jobs, handle)

    def close(self) -> None:
        pass


def test_workers_and_sweeps_share_what_waits(
    stacks: SerialStacks, study_dict: MakeStudy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = StudySpec.from_dict(study_dict(arms={"muP": {}, "fixed": {"multipliers": "fixed"}}))
    executor = InTurn(workers=3)
    monkeypatch.setattr(sweeping.executors, "load", lambda name: lambda *arguments: executor)
    assert sweep(spec, tmp_path / "one", vectorize=64).ran == 8
    assert executor.given == [3, 3, 2]

    executor.given.clear()
    monkeypatch.setattr(StudyFolder, "running_sweeps", lambda self: [Path("this"), Path("other")])
    assert sweep(spec, tmp_path / "two", vectorize=64).ran == 8
    assert executor.given == [2, 2, 2, 1, 1]  # 8 cells for six workers, then 2


def test_two_queues_share_the_cells(spec: StudySpec, tmp_path: Path) -> None:
    folder = StudyFolder(tmp_path)
    both = queues(spec, folder, "a", "b")
    taken: list[list[Ticket]] = []
    for number in range(8):
        queue = both[number % 2]
        if first := queue.next():
            taken.append([first, *islice(queue.fitting(first), 2)])
            assert all(folder.attempts.begin(ticket.cell.id, 0) for ticket in taken[-1])

    assert [len(stack) for stack in taken] == [3, 3, 2, 3, 1]
    assert len({ticket.cell.id for stack in taken for ticket in stack}) == 12
    for stack in taken:
        assert len({stack_key(ticket.cell.config) for ticket in stack}) == 1
    both[0].refresh()
    assert (both[0].counts().here, both[0].counts().elsewhere) == (6, 6)


def test_trials_of_one_cell_do_not_meet_in_a_stack(
    stacks: SerialStacks, study_dict: MakeStudy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweeping, "_REFRESH_SECONDS", 0.05)
    arms, nuisance = {"muP": {}}, {"schedule.name": ["cosine", "linear", "constant"]}
    budget = {"steps": 6, "batch_size": 4, "trials": 3}
    start = [{"schedule.name": "cosine"}, {"schedule.name": "cosine"}]
    study = study_dict(arms=arms, nuisance=nuisance, seeds=[0], sampler="random", budget=budget, start=start)

    result = sweep(StudySpec.from_dict(study), tmp_path, workers=0, vectorize=3)

    assert (result.ran, result.failures) == (3, {})
    assert all(len(set(cells)) == len(cells) for cells in stacks.stacks)
    found = states(tmp_path / "optuna.journal")
    assert found.keys() <= {"COMPLETE", "FAIL"}
    assert found["COMPLETE"] == 3


def test_a_sampled_search_takes_several_suggestions_at_once_and_prunes_member_by_member(
    stacks: SerialStacks, study_dict: MakeStudy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = study_dict(
        arms={"muP": {}},
        nuisance={"optim.lr": {"low": 1e-3, "high": 1e-1, "log": True}},
        sampler="tpe",
        pruner={"name": "median"},
        budget={"steps": 6, "batch_size": 4, "trials": 5},
    )
    study["base"]["train"]["eval_every"] = 2
    asked: Counter[str] = Counter()
    unlucky: list[str] = []

    def verdict(ticket: Ticket, curve: list[tuple[int, float]]) -> bool:
        asked[ticket.cell.id] += 1
        unlucky.extend([ticket.cell.id] * (len(asked) == 3 and not unlucky))
        return ticket.cell.id in unlucky

    monkeypatch.setattr(Ticket, "should_prune", verdict)
    result = sweep(StudySpec.from_dict(study), tmp_path, workers=0, vectorize=4)

    assert sizes(stacks) == [4]
    assert (result.ran, result.pruned) == (5, 1)
    statuses = {path.stem: RunRecord.read(path).status for path in find_records(tmp_path)}
    assert {cell for cell, status in statuses.items() if status == "pruned"} == set(unlucky)
    assert sorted(asked.values()) == [1, 2, 2, 2, 2]  # after steps 2 and 4


def test_a_stopped_stack_goes_on(stacks: SerialStacks, spec: StudySpec, tmp_path: Path) -> None:
    folder = StudyFolder((tmp_path / "out").absolute())
    from_steps: dict[str, int] = {}

    def stop(cells: list[str], index: int) -> None:
        if index == 2:
            config = next(p for p in spec.points() if p.arm == "muP").cell({"optim.lr": 2**-8}, 1).config
            with pytest.raises(Interrupted):  # the third of the stack leaves a checkpoint
                run.run(config, folder.cell(cells[2]).path, should_stop=lambda: True, keep_checkpoint=False)
            raise Interrupted

    stacks.before = stop
    with pytest.raises(Interrupted):
        sweep(spec, folder.path, workers=0, vectorize=8)
    assert len(find_records(folder.path)) == 2
    attempts = [attempt for cell in folder.attempts.cells() for attempt in folder.attempts.of(cell)]
    assert [attempt.state for attempt in attempts] == ["stopped"] * 6
    assert "RUNNING" not in states(folder.journal)

    def look(cells: list[str], index: int) -> None:
        from_steps[cells[index]] = folder.attempts.of(cells[index])[-1].from_step

    stacks.before = look
    assert sweep(spec, folder.path, workers=0, vectorize=8).ran == 10
    assert sorted(from_steps.values()) == [0] * 9 + [1]
    assert_undisturbed(spec, folder.path)


@pytest.mark.parametrize(("most", "tried"), [(2, [8, 4, 2, 2, 4, 2, 2]), (1, [8, 4, 2, 2, 4, 2, 2])])
def test_a_stack_that_does_not_fit_is_run_in_halves(
    stacks: SerialStacks,
    study_dict: MakeStudy,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    most: int,
    tried: list[int],
) -> None:
    def run_out(cells: list[str], index: int) -> None:
        if len(cells) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")

    stacks.before = run_out
    spec = StudySpec.from_dict(study_dict(arms={"muP": {}, "fixed": {"multipliers": "fixed"}}))
    result = sweep(spec, tmp_path / "out", workers=0, vectorize=8)

    assert (result.ran, result.failures) == (8, {})
    assert sizes(stacks) == tried
    assert "8 cells together do not fit into memory; in two halves, one after the other" in capsys.readouterr().err
    assert_undisturbed(spec, tmp_path / "out")
    assert states(tmp_path / "out" / "optuna.journal") == {"COMPLETE": 8}


def test_a_bad_cell_fails_no_other(
    stacks: SerialStacks,
    spec: StudySpec,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    real = run.run

    def sabotage(config: RunConfig, *arguments: Any, **options: Any) -> RunRecord:
        if (config.seed, config.optim.lr, config.multipliers) == (1, 2**-8, "none"):
            raise RuntimeError("out of luck")
        return real(config, *arguments, **options)

    monkeypatch.setattr(run, "run", sabotage)
    result = sweep(spec, tmp_path, workers=0, vectorize=8)

    assert result.ran == 11
    assert list(result.failures.values()) == ["RuntimeError: out of luck"]
    assert sizes(stacks) == [8, 4]
    said = capsys.readouterr().err
    assert "6 cells together failed (RuntimeError: out of luck); one by one" in said  # 2 of 8 had their records
    assert not list(tmp_path.glob("cells/*/record.json"))


def test_bad_input_in_a_stack_ends_the_sweep_in_one_line(stacks: SerialStacks, spec: StudySpec, tmp_path: Path) -> None:
    def refuse(cells: list[str], index: int) -> None:
        raise UserError("disk: full")

    stacks.before = refuse
    with pytest.raises(UserError, match=r"^cell muP-s0-\w+: disk: full$"):
        sweep(spec, tmp_path, workers=0, vectorize=8)

    attempts = StudyFolder(tmp_path).attempts
    assert {attempts.of(cell)[-1].state for cell in attempts.cells()} == {"stopped"}
    stacks.before = lambda cells, index: None
    assert sweep(spec, tmp_path, workers=0, vectorize=8).ran == 12


def test_an_error_of_the_sweep_s_own_is_not_one_of_training(
    stacks: SerialStacks, spec: StudySpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lose(*arguments: Any) -> None:
        raise ArithmeticError("of the sweep")

    with monkeypatch.context() as patch:
        patch.setattr(CellQueue, "complete", lose)
        with pytest.raises(ArithmeticError, match="of the sweep"):
            sweep(spec, tmp_path, workers=0, vectorize=8)

    assert sizes(stacks) == [8]  # stopped there, and not run again cell by cell
    assert sweep(spec, tmp_path, workers=0, vectorize=8).failures == {}


# A stack as a worker sees it


@pytest.fixture
def jobs(tiny: Tiny, tmp_path: Path) -> list[Job]:
    """Three cells that differ in their seeds."""
    return [job_of(tiny({"seed": seed}), tmp_path, f"c{seed}") for seed in range(3)]


def ends(messages: list[tuple[str, Message]]) -> dict[str, type]:
    return {
        cell: type(message) for cell, message in messages if isinstance(message, Finished | AlreadyClaimed | Failed)
    }


def collect(jobs: list[Job], also: Callable[[str, Message], None] = lambda cell, message: None) -> list[Any]:
    messages: list[tuple[str, Message]] = []

    def post(cell: str, message: Message) -> bool:
        messages.append((cell, message))
        also(cell, message)
        return False

    run_jobs(jobs, post)
    return messages


def test_cells_that_are_taken_or_done_drop_out(stacks: SerialStacks, jobs: list[Job]) -> None:
    collect(jobs[:1])
    held = Attempts(jobs[1].attempts).begin("c1", 0)
    assert held is not None
    assert ends(collect(jobs)) == {"c0": Finished, "c1": AlreadyClaimed, "c2": Finished}
    assert stacks.stacks == []  # one was left
    held.close("stopped")
    for job in jobs:
        job.record.unlink(missing_ok=True)
    collect(jobs[:1])
    assert ends(collect(jobs)) == {"c0": Finished, "c1": Finished, "c2": Finished}
    assert stacks.stacks == [["c1", "c2"]]


def test_a_member_that_another_machine_has_taken_over_leaves_the_stack(
    stacks: SerialStacks, jobs: list[Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "LEASE_SECONDS", 0.3)
    real, held = Attempts.begin, {}

    def begin(self: Attempts, cell: str, from_step: int) -> leases.Lease | None:
        held[cell] = real(self, cell, from_step)
        return held[cell]

    def overtake(cell: str, message: Message) -> None:
        lease = held["c1"]
        if lease is not None and not lease.lost and not lease.successor.exists():
            lease.successor.write_text(json.dumps({"machine": "elsewhere/12345678", "pid": 1}))
            deadline = time.monotonic() + 10
            while not lease.lost and time.monotonic() < deadline:
                lease.successor.touch()
                time.sleep(0.01)

    monkeypatch.setattr(Attempts, "begin", begin)
    messages = collect(jobs, overtake)

    assert ends(messages) == {"c0": Finished, "c1": AlreadyClaimed, "c2": Finished}
    assert not jobs[1].record.exists()
    assert stacks.stacks == [["c0", "c1", "c2"], ["c0", "c2"]]


def test_a_cell_that_may_be_what_kills_its_process_is_run_by_itself_and_last(
    stacks: SerialStacks, jobs: list[Job]
) -> None:
    jobs[0].attempts.mkdir()
    for cell, deaths in (("c0", 2), ("c1", 1)):
        for number in range(1, deaths + 1):
            content = {"machine": leases.machine(), "pid": 1}
            (jobs[0].attempts / f"{cell}.{number}.json").write_text(json.dumps(content))

    assert list(ends(collect(jobs))) == ["c1", "c2", "c0"]
    assert stacks.stacks == [["c1", "c2"]]


def test_what_a_worker_says_is_one_line(stacks: SerialStacks, jobs: list[Job]) -> None:
    def fail(cells: list[str], index: int) -> None:
        raise RuntimeError("kaput\nand more")

    stacks.before = fail
    said = [message.line for _, message in collect(jobs) if isinstance(message, LogMessage)]
    assert said == ["3 cells together failed (RuntimeError: kaput); one by one"]


# In other processes


def test_the_death_of_a_worker_in_mid_stack_costs_no_cell(
    spec: StudySpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("STACK_DIED", str(tmp_path / "died"))
    monkeypatch.setattr(local, "_serve", serve_and_die_once)
    result = sweep(spec, tmp_path / "out", workers=1, vectorize=8)

    assert (tmp_path / "died").exists()
    assert (result.ran, result.failures) == (12, {})
    # Two of the eight had their records.
    said = [line for line in capsys.readouterr().err.splitlines() if "trying again" in line]
    assert len(said) == 1
    assert said[0].endswith(" and 5 more: its worker process died (killed by SIGKILL); trying again")
    assert states(tmp_path / "out" / "optuna.journal") == {"COMPLETE": 12}
    assert_undisturbed(spec, tmp_path / "out")


@pytest.mark.slow
@pytest.mark.usefixtures("ray")
def test_stacks_on_ray(spec: StudySpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STACK_SIZES", str(tmp_path / "sizes"))
    (tmp_path / "sizes").touch()
    monkeypatch.setattr(ray_executor, "_Cells", SerialCells)
    stand_in = sys.modules[SerialCells.__module__]  # which an actor could not import
    sys.modules["ray"].cloudpickle.register_pickle_by_value(stand_in)
    result = sweep(spec, tmp_path / "ray", workers=1, executor="ray", vectorize=8)

    assert (result.ran, result.failures) == (12, {})
    assert (tmp_path / "sizes").read_text() == "8 4 "
    assert_undisturbed(spec, tmp_path / "ray")
