"""Evaluation end to end: trained runs through lm-eval, the exported model beside it, and nothing from a network."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from tiny_runs import MakeStudy

from lit_mult import cli
from lit_mult.config import DataConfig, RunConfig
from lit_mult.data.corpus import Document, open_corpus
from lit_mult.data.encoding import digest, split_documents
from lit_mult.errors import UserError
from lit_mult.evaluation import evaluate as evaluation
from lit_mult.evaluation.evaluate import Options, TrainedRun, evaluate, evaluate_all, find_runs, record_path
from lit_mult.evaluation.suites import HELD_OUT, PAPER, load_suite, mini_folder
from lit_mult.mini.benchmark import TASKS
from lit_mult.schema import EvaluationRecord
from lit_mult.study.spec import StudySpec
from lit_mult.study.sweep import sweep
from lit_mult.training.run import run

FEW = Options(limit=4, progress=False)
# Fails as an unplugged machine does, and says so where the test can see it.
NO_NETWORK = """
import socket, sys
def refuse(self, address):
    print("REACHED FOR", address, file=sys.stderr)
    raise OSError("network is unreachable")
socket.socket.connect = refuse
socket.getaddrinfo = lambda *a, **k: refuse(None, a)
"""


@pytest.fixture(scope="module", autouse=True)
def _own_hub_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("hub")))
        yield


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    text = tmp_path_factory.mktemp("text") / "sums.txt"
    text.write_text("".join(f"{a} + {b} = {a + b}. The answer is {a + b}.\n" for a in range(30) for b in range(30)))
    return RunConfig.from_dict(
        {
            "multipliers": "vector",
            "model": {"d_model": 32, "n_layers": 2, "head_dim": 8},
            "parametrization": {"base_d_model": 16},
            "data": {"corpus": str(text), "tokenizer": "bpe:300", "seq_len": 96, "val_windows": 4},
            "train": {"steps": 30, "batch_size": 8, "keep_every": 10},
            "trainer": {"accelerator": "cpu", "progress_bar": False, "tensorboard": True},
        }
    )


@pytest.fixture(scope="module")
def trained(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> TrainedRun:
    with pytest.MonkeyPatch.context() as patch:  # the fixture for each test comes too late for a module's
        patch.setenv("LIT_MULT_CACHE", str(tmp_path_factory.getbasetemp() / "token-cache"))
        folder = tmp_path_factory.mktemp("runs") / "a"
        run(config, folder)
    (found,) = find_runs(folder, best=False)
    return found


def last(trained: TrainedRun) -> tuple[int, Path]:
    return trained.record.steps, trained.folder.final_checkpoint


def test_mini_scores_every_task_and_is_not_run_twice(trained: TrainedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    suite = load_suite("mini")
    record = evaluate(trained, suite, *last(trained), FEW)
    assert [score.task for score in record.scores] == [task.name for task in TASKS]
    for score, task in zip(record.scores, TASKS, strict=True):
        assert (score.side, score.chance, score.metric) == (task.side, task.chance, task.metric)
        assert len(score.items) == (20 if task.name == "mini_symbolic" else 4)  # five subtasks
        assert score.value == pytest.approx(sum(score.items) / len(score.items))
    assert record.last
    assert record.tokens == 30 * 8 * 96
    place = record_path(trained, suite, trained.record.steps, FEW)
    assert EvaluationRecord.read(place) == record
    assert not list(place.parent.glob("samples*"))
    events = list((trained.folder.path / "tensorboard").glob("events*"))
    assert any(b"downstream/mini, first 4 items/mini_algebra" in path.read_bytes() for path in events)
    monkeypatch.setattr(evaluation, "load_trained", None)
    assert evaluate(trained, suite, *last(trained), FEW) == record
    said: list[str] = []
    evaluate_all([trained], suite, FEW, along=False, report=said.append)
    assert said == []  # nothing was left to do


def test_checkpoints_on_the_way_are_evaluated_too(trained: TrainedRun, tmp_path: Path) -> None:
    write_task(tmp_path, "one", [{"prompt": "1 + 2 =", "choices": ["3.", "9."], "target": 0}])
    said: list[str] = []
    evaluate_all([trained], load_suite("one", str(tmp_path)), FEW, along=True, report=said.append)
    found = [EvaluationRecord.read(path) for path in trained.folder.evaluations.glob("one-*.json")]
    assert sorted((record.step, record.last) for record in found) == [(10, False), (20, False), (30, True)]
    assert said[0].startswith("0/3 evaluated · one on a, step 10")
    assert "ETA" in said[1]


@pytest.mark.slow
def test_the_exported_model_under_lm_evals_own_has_the_same_scores_item_by_item(
    trained: TrainedRun, tmp_path: Path
) -> None:
    """By hand, as docs/how-to/downstream.md says, in processes that cannot import this package."""
    out, tasks = tmp_path / "model", tmp_path / "tasks"
    assert cli.main(["export", str(trained.folder.path), str(out)]) == 0
    assert cli.main(["tasks", str(tasks)]) == 0
    (tmp_path / "lit_mult.py").write_text("raise ImportError('not here')")
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--tasks", "mini", "--include_path", str(tasks)]
    command += ["--model_args", f"pretrained={out},dtype=float32", "--device", "cpu", "--batch_size", "8"]
    command += ["--limit", "16", "--log_samples", "--output_path", str(tmp_path / "answers")]
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    subprocess.run(command, check=True, cwd=tmp_path, env=environment, capture_output=True)

    options = Options(limit=16, progress=False, log_samples=True)
    place = record_path(trained, load_suite("mini"), trained.record.steps, options)
    evaluate(trained, load_suite("mini"), *last(trained), options)
    names = sorted(path.stem for path in tasks.glob("*.test.jsonl"))
    assert len(names) == 11
    for name in (name.removesuffix(".test") for name in names):
        (theirs,) = (tmp_path / "answers").rglob(f"samples_{name}_*.jsonl")
        pairs = zip(samples(place.with_suffix("") / f"samples_{name}.jsonl"), samples(theirs), strict=True)
        for ours, other in pairs:
            assert ours["doc"] == other["doc"]
            metric = ours["metrics"][0]
            assert ours[metric] == other[metric], (name, ours, other)
            if metric == "exact_match":
                assert ours["resps"] == other["resps"]
                continue
            for (mine, _), (their, _) in zip(ours["filtered_resps"], other["filtered_resps"], strict=True):
                assert float(mine) == pytest.approx(float(their), abs=1e-3)


def samples(path: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in path.read_text().splitlines()]
    return sorted(found, key=lambda sample: int(sample["doc_id"]))


def test_mini_reaches_for_no_host_and_paper_says_what_it_needs(trained: TrainedRun) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment["HF_HOME"] = str(trained.folder.path.parent / "hub")
    evaluation = ["evaluate", str(trained.folder.path), "--limit", "2", "--tasks"]
    script = f"{NO_NETWORK}\nfrom lit_mult.cli import main\nassert main({[*evaluation, 'mini']!r}) == 0\n"
    script += f"print('paper', file=sys.stderr, flush=True)\nsys.exit(main({[*evaluation, 'paper']!r}))"
    elsewhere = {"cwd": trained.folder.path}  # outside of a checkout
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, **elsewhere)
    assert done.returncode == 2, done.stderr
    of_mini, of_paper = done.stderr.split("\npaper\n")
    assert "REACHED FOR" not in of_mini
    assert "not a git repository" not in of_mini
    assert "Tokenizing inputs" not in of_mini
    line = of_paper.strip().splitlines()[-1]
    assert line.startswith("lit-mult evaluate: --tasks paper needs its data sets from huggingface.co")
    assert not list(trained.folder.evaluations.glob("paper-*"))


def write_task(folder: Path, name: str, rows: list[dict[str, Any]], **changes: Any) -> None:
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / f"{name}.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "prompt",
        "doc_to_choice": "choices",
        "doc_to_target": "target",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(task | changes))


def test_tasks_of_ones_own_and_groups_without_a_score_of_their_own(trained: TrainedRun, tmp_path: Path) -> None:
    for name, target in (("one", 0), ("two", 1)):
        rows = [{"prompt": f"{n} + {n} =", "choices": [f"{2 * n}.", "x"], "target": target} for n in range(4)]
        write_task(tmp_path, name, rows)
    (tmp_path / "both.yaml").write_text(yaml.safe_dump({"group": "both", "task": ["one", "two"]}))
    record = evaluate(trained, load_suite("both", str(tmp_path)), *last(trained), FEW)
    shown = [(score.task, score.metric, score.side) for score in record.scores]
    assert shown == [("one", "acc", None), ("two", "acc", None)]
    assert record.scores[0].items == [1 - item for item in record.scores[1].items]  # the other answer is right
    assert record.suite == "both"


def test_other_items_or_samples_that_lack_are_another_evaluation(trained: TrainedRun, tmp_path: Path) -> None:
    places = []
    for folder, answer in (("a", 0), ("b", 1)):
        tasks = tmp_path / folder / "tasks"
        tasks.mkdir(parents=True)
        write_task(tasks, "same", [{"prompt": "1 + 1 =", "choices": ["2.", "x"], "target": answer}])
        suite = load_suite("same", str(tasks))
        record = evaluate(trained, suite, *last(trained), FEW)
        places.append(record_path(trained, suite, record.step, FEW))
    assert places[0] != places[1]
    values = [EvaluationRecord.read(place).scores[0].value for place in places]
    assert sum(values) == 1
    keeping = replace(FEW, log_samples=True)
    evaluate(trained, suite, *last(trained), keeping)
    assert (places[1].with_suffix("") / "samples_same.jsonl").is_file()
    assert EvaluationRecord.read(places[1]).scores[0].value == values[1]


def test_tags_patterns_parts_with_options_and_single_tasks_of_the_benchmark(
    trained: TrainedRun, tmp_path: Path
) -> None:
    rows = [{"prompt": f"{n} + {n} =", "choices": [f"{2 * n}.", "x"], "target": 0} for n in range(4)]
    for name in ("one_a", "one_b"):
        write_task(tmp_path, name, rows, tag="tagged")
    parts = [{"task": "one_a", "num_fewshot": 1}, "one_b"]
    mean = [{"metric": "acc", "aggregation": "mean", "weight_by_size": True}]
    group = {"group": "pair", "task": parts, "aggregate_metric_list": mean}
    (tmp_path / "pair.yaml").write_text(yaml.safe_dump(group))
    for names, expected in (
        ("tagged", ["one_a", "one_b"]),
        ("one_*", ["one_a", "one_b"]),
        ("pair,mini_facts_rare", ["pair", "mini_facts_rare"]),
    ):
        record = evaluate(trained, load_suite(names, str(tmp_path)), *last(trained), FEW)
        assert [score.task for score in record.scores] == expected
    assert record.scores[1].side == "knowledge"
    assert len(record.scores[0].items) == 8


def test_a_task_that_cannot_be_run_is_a_user_error(trained: TrainedRun, tmp_path: Path) -> None:
    rows = [{"prompt": "1", "choices": ["a", "b"], "target": 0}]
    write_task(tmp_path, "bad", rows, doc_to_text="{{nothing.of.the.kind}}")
    with pytest.raises(UserError, match="--tasks bad: lm-eval cannot run them"):
        evaluate(trained, load_suite("bad", str(tmp_path)), *last(trained), FEW)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--tasks", "nothing_of_the_kind", "--include_path", "."], "nothing_of_the_kind: no such task, group or tag"),
        (["--tasks", "a,,a"], "give mini, paper, or names"),
        (["--tasks", "x", "--include_path", "/no/such"], "no such folder"),
        (["--limit", "0"], "limit"),
        (["--best"], "holds no study"),
        (["--batch_size", "many"], "batch_size"),
        (["--device", "toaster"], "--device toaster: cannot be used"),
    ],
)
def test_bad_input_gets_one_line(
    trained: TrainedRun,
    arguments: list[str],
    said: str,
    refused: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert said in refused("evaluate", str(trained.folder.path), *arguments)


def test_a_folder_without_a_run_or_a_checkpoint_is_named(trained: TrainedRun, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no finished run"):
        find_runs(tmp_path, best=False)
    trained.record.write(tmp_path / "record.json")
    (bare,) = find_runs(tmp_path, best=False)
    with pytest.raises(UserError, match="has no checkpoint"):
        evaluate_all([bare], load_suite("mini"), FEW, along=False, report=lambda line: None)
    diverged = trained.record.model_copy(update={"status": "diverged", "final_loss": None})
    (tmp_path / "b").mkdir()
    diverged.write(tmp_path / "b" / "record.json")
    with pytest.raises(UserError, match="the run was diverged"):
        find_runs(tmp_path / "b", best=False)


def test_the_best_runs_of_a_study_are_all_seeds_of_the_best_rate(small_study_dict: MakeStudy, tmp_path: Path) -> None:
    study = small_study_dict(
        {"data.tokenizer": "bpe:300"},
        arms={"none": {"multipliers": "none"}, "vectors": {"multipliers": "vector"}},
        nuisance={"optim.lr": {"log2": [-12, -5]}},
        seeds=[0, 1],
        budget={"steps": 8, "batch_size": 4},
        keep_checkpoints=True,
    )
    sweep(StudySpec.from_dict(study), tmp_path / "study", workers=0)
    assert len(find_runs(tmp_path / "study", best=False)) == 8
    best = find_runs(tmp_path / "study", best=True)
    assert [(one.record.cell.arm, one.record.seed) for one in best if one.record.cell] == [
        ("none", 0), ("none", 1), ("vectors", 0), ("vectors", 1),
    ]  # fmt: skip
    assert {one.record.config["optim"]["lr"] for one in best} == {2**-5}  # 2^-12 hardly moves in eight steps
    write_task(tmp_path, "one", [{"prompt": "1 + 2 =", "choices": ["3", "9"], "target": 0}])
    arguments = ["--tasks", "one", "--include_path", str(tmp_path)]
    assert cli.main(["evaluate", str(tmp_path / "study"), "--best", *arguments]) == 0
    assert len(list((tmp_path / "study" / "evaluations").rglob("*.json"))) == 4
    assert "## Downstream" not in (tmp_path / "study" / "report.md").read_text()  # one task has no mean over tasks
    assert (tmp_path / "study" / "tables" / "scores_one.md").is_file()
    cell = best[0].folder.path  # a cell by its folder: scored already, so the study's report is all there is to do
    assert cli.main(["evaluate", str(cell), *arguments]) == 0


def rows_of(path: str) -> list[dict[str, Any]]:
    """Rows in the form of a data set of the paper's seven: as many as examples in the prompt need, and two more."""
    choices = ["red", "green", "blue", "white"]
    made = {
        "Rowan/hellaswag": lambda n: {
            "ind": n, "activity_label": "Adding", "ctx_a": f"We add {n}.", "ctx_b": "then", "ctx": "",
            "endings": choices, "source_id": str(n), "split": "val", "split_type": "x", "label": str(n % 4),
        },
        "allenai/ai2_arc": lambda n: {
            "id": str(n), "question": f"Which colour is {n}?", "answerKey": "ABCD"[n % 4],
            "choices": {"text": choices, "label": list("ABCD")},
        },
        "cais/mmlu": lambda n: {"question": f"Colour {n}?", "subject": "art", "choices": choices, "answer": n % 4},
        "TIGER-Lab/MMLU-Pro": lambda n: {
            "question_id": n, "question": f"Colour {n}?", "options": choices, "answer": "ABCD"[n % 4],
            "answer_index": n % 4, "cot_content": "", "category": "art", "src": "x",
        },
        "SaylorTwift/bbh": lambda n: {"input": f"not not {n}", "target": "(A)"},
        "openai/gsm8k": lambda n: {"question": f"What is {n} + 1?", "answer": f"{n} + 1 = {n + 1}\n#### {n + 1}"},
        "DigitalLearningGmbH/MATH-lighteval": lambda n: {
            "problem": f"What is {n} + 1?", "level": "Level 5", "type": "Algebra", "solution": f"$\\boxed{{{n + 1}}}$",
        },
    }[path]  # fmt: skip
    return [made(n) for n in range(27)]


def test_the_papers_seven_run_by_their_stock_definitions_on_local_rows(
    trained: TrainedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    asked: set[str] = set()

    def load_dataset(path: str, name: str | None = None, **ignored: Any) -> Any:
        asked.add(path)
        rows = datasets.Dataset.from_list(rows_of(path))
        return datasets.DatasetDict(dict.fromkeys(("train", "validation", "dev", "test"), rows))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    options = Options(limit=1, progress=False, max_length=4096)
    record = evaluate(trained, load_suite("paper"), *last(trained), options)
    assert len(asked) == 7
    assert [score.task for score in record.scores] == [column.task for column in PAPER]
    assert [score.metric for score in record.scores] == [
        "acc_norm", "acc_norm", "acc", "acc", "acc_norm", "exact_match", "exact_match",
    ]  # fmt: skip
    assert [score.num_fewshot for score in record.scores] == [10, 25, 5, 5, 3, 5, 4]
    assert record.truncated == 0
    sizes = {score.task: len(score.items) for score in record.scores}
    assert sizes == {
        "hellaswag": 1, "arc_challenge": 1, "mmlu": 57, "leaderboard_mmlu_pro": 1,
        "leaderboard_bbh": 24, "gsm8k": 1, "leaderboard_math_hard": 7,
    }  # fmt: skip


def test_the_benchmark_is_written_once_and_whole(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LIT_MULT_CACHE", str(tmp_path))
    folder = mini_folder()
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]
    assert str(folder) in (folder / "mini_algebra.yaml").read_text()
    with monkeypatch.context() as patch:
        patch.setattr("lit_mult.evaluation.suites.write_benchmark", None)
        assert mini_folder() == folder
    moved = tmp_path / "moved"
    moved.mkdir()
    folder.rename(moved / folder.name)
    monkeypatch.setenv("LIT_MULT_CACHE", str(moved))
    assert str(moved) in (mini_folder() / "mini_algebra.yaml").read_text()


def test_lines_to_continue_are_those_that_a_mixture_validates_on() -> None:
    documents = [document.text for document in open_corpus(DataConfig(corpus="stdlib+mini:0.02")).documents()]
    split = split_documents((Document("", text) for text in documents), HELD_OUT)
    held_out = {text for text in documents if digest(text) < HELD_OUT * 2**64}
    assert all(split.parts(text) == [("val", text)] for text in held_out)
    assert held_out & {document.text for document in open_corpus(DataConfig()).documents()}


def test_a_run_that_validates_on_less_is_warned(trained: TrainedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    data = {**trained.record.config["data"], "corpus": "stdlib", "val_fraction": 0.01}
    record = trained.record.model_copy(update={"config": {**trained.record.config, "data": data}})
    said: list[str] = []
    monkeypatch.setattr(evaluation, "evaluate", lambda *_: SimpleNamespace(truncated=0))
    run_ = replace(trained, record=record)
    evaluate_all([run_], load_suite("mini"), replace(FEW, limit=1), along=False, report=said.append)
    assert any("validates on 0.01 of stdlib" in line for line in said)
