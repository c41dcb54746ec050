"""README and docs/: every command parses, what takes seconds runs, Python blocks run, and links lead somewhere.

A page runs from top to bottom in an empty folder: a yaml block that begins with a comment of a file name is that file,
bash and Python blocks do what they say. Runs and studies of a page are made smaller by `smaller` and `SHORTER`; a study
that ships is not trained, its committed results stand in for it.
"""

from __future__ import annotations

import html
import re
import shlex
import shutil
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import yaml
from extensions.decisions import decisions
from jsonargparse import ArgumentParser
from matplotlib.figure import Figure
from sphinx.cmd.build import build_main
from test_evaluate import write_task

import lit_mult
from lit_mult.cli import COMMANDS, main
from lit_mult.config import RunConfig, flatten
from lit_mult.registry.kinds import KINDS
from lit_mult.registry.optimizers import OPTIMIZERS
from lit_mult.schema import EvaluationRecord, Question, RunRecord
from lit_mult.study import sweep as sweep_module
from lit_mult.study.files import load_study
from lit_mult.study.spec import StudySpec
from lit_mult.study.sweep import SweepResult
from lit_mult.study.sweep import sweep as real_sweep

ROOT = Path(__file__).parent.parent
GENERATED = ROOT / "docs" / "results" / "reports"
FILES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES = {str(path.relative_to(ROOT)): path.read_text() for path in FILES if GENERATED not in path.parents}

NOT_RUN = {
    "--executor ray": "needs a cluster; tests/test_ray.py",
    "--trainer.devices": "needs several devices; tests/test_fsdp2.py",
    "--tasks paper": "needs the hub; tests/test_evaluate.py",
    "evaluate results/": "needs the checkpoints of a study of an hour; tests/test_evaluate.py",
    "--print_config": "ends in SystemExit; tests/test_cli.py",
    "lit-mult watch": "serves until it is stopped",
}
"""Parts of commands that are parsed and not run, with the reason."""

PYTHON_NOT_RUN = {
    "README.md": "has a test of its own below",
    "docs/how-to/own_model.md": "needs a model and its batches; tests/test_examples.py",
}
"""Pages whose Python blocks do not run with the page, with the reason."""

SHELL = {"cd", "export", "lm_eval", "mkdir", "sbatch", "source", "srun"}
"""Other programs that pages name; what `srun` starts is a command of ours."""

SHORTER = ["--train.steps", "2", "--train.batch_size", "2", "--data.seq_len", "16"]


class Block(NamedTuple):
    """A fenced block of a page."""

    page: str
    language: str
    text: str


class Line(NamedTuple):
    """A line of a bash block."""

    page: str
    words: list[str]

    @property
    def text(self) -> str:
        return shlex.join(self.words)


def blocks(page: str) -> Iterator[Block]:
    for language, text in re.findall(r"^```(\w+)\n(.*?)^```", PAGES[page], re.M | re.S):
        yield Block(page, language, text)


def lines(block: Block) -> Iterator[Line]:
    for line in block.text.replace("\\\n", " ").splitlines():
        if words := shlex.split(line, comments=True):
            yield Line(block.page, words)


def is_of(block: Block, language: str) -> bool:
    return block.language == language


SHELL_LINES = [line for page in PAGES for block in blocks(page) if is_of(block, "bash") for line in lines(block)] + [
    Line(page, shlex.split(text))
    for page in ("README.md",)
    for text in re.findall(r"`(lit-mult [a-z][^`]*)`", PAGES[page])
]


def command_of(line: Line) -> list[str] | None:
    """The arguments of lit-mult, if it is what the line starts."""
    words = line.words[1:] if line.words[0] == "srun" else line.words
    return words[1:] if words[0] == "lit-mult" else None


OURS = [
    line for line in SHELL_LINES if (arguments := command_of(line)) is not None and not arguments[0].startswith("-")
]


class Parsed(Exception):  # noqa: N818
    """Carries the parsed options out of a command."""


def parsed(arguments: list[str]) -> dict[str, Any]:
    """The options of a command line, by the parser of the command, which is stopped before it does anything."""
    real = ArgumentParser.parse_args

    def stop(parser: ArgumentParser, *given: Any, **options: Any) -> None:
        raise Parsed(real(parser, *given, **options).as_dict())

    with mock.patch.object(ArgumentParser, "parse_args", stop), pytest.raises(Parsed) as found:
        COMMANDS[arguments[0]](arguments[1:])
    return dict(found.value.args[0])


def page_files(page: str) -> dict[str, dict[str, Any]]:
    """Files that the yaml blocks of a page make: name -> content."""
    found = {}
    for block in blocks(page):
        name = re.match(r"# (\S+\.yaml)\n", block.text)
        if is_of(block, "yaml") and name:
            found[name[1]] = yaml.safe_load(block.text)
    return found


def test_there_are_commands_and_pages() -> None:
    assert len(PAGES) > 30
    assert len(OURS) > 60
    assert {command_of(line)[0] for line in OURS} == set(COMMANDS)  # type: ignore[index]


@pytest.mark.parametrize("line", OURS, ids=lambda line: f"{line.page}: {line.text}")
def test_a_command_of_the_pages_parses(line: Line, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = command_of(line)
    assert arguments is not None
    for name in ("run.yaml", "start.yaml"):
        (tmp_path / name).write_text("{}")
    if "--print_config" in arguments:
        arguments.remove("--print_config")
        arguments += ["--out", "out"]
    options = parsed(arguments)
    if "model" in options:
        RunConfig.from_dict({name: options[name] for name in RunConfig.model_fields})
    if arguments[0] == "sweep" and not options["study"].endswith(".yaml"):
        presets = [str(ROOT / "lit_mult" / "method" / "presets" / "mup_tuning.yaml")] * bool(options["preset"])
        if load_without(options["study"]) or presets:
            load_study(options["study"], presets, options["profile"])


def load_without(study: str) -> bool:
    """Whether a shipped study needs no preset from a file."""
    presets = yaml.safe_load((ROOT / "sweeps" / f"{study}.yaml").read_text()).get("presets") or {}
    return None not in presets.values()


@pytest.mark.parametrize("line", SHELL_LINES, ids=lambda line: f"{line.page}: {line.text}")
def test_what_else_a_line_of_the_shell_names_exists(line: Line) -> None:
    match line.words:
        case ["lit-mult", command, *_]:
            assert line in OURS or command in ("--help", "--version")
        case ["make", *targets]:
            makefile = (ROOT / "Makefile").read_text()
            assert all(re.search(rf"^{target}:", makefile, re.M) for target in targets)
        case ["pip", "install", *packages]:
            extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
            wanted = [extra for package in packages for extra in re.findall(r"lit-mult\[(.+)\]", package)]
            assert wanted
            assert set(wanted) <= set(extras)
        case ["python", "-m", "pytest", *options]:
            assert all((ROOT / option).exists() for option in options if option.endswith(".py"))
        case ["python", script, *_]:
            assert (ROOT / script).is_file()
        case [program, *_]:
            assert program in SHELL


def smaller(study: dict[str, Any]) -> dict[str, Any]:
    """The study of a page on a text of a page, in runs of two steps, with few seeds and trials."""
    base = study.get("base", {})
    data = {name: value for name, value in base.get("data", {}).items() if name in ("val_offset",)}
    base = base | {"data": data | {"corpus": "notes.txt", "seq_len": 16, "val_windows": 4}}
    base |= {"trainer": {"accelerator": "cpu", "tensorboard": False}}
    budget = study["budget"] | {"steps": 2, "batch_size": 2}
    seeds = study["seeds"][: budget.get("seeds_per_trial", 2)]
    budget |= {name: min(most, budget[name]) for name, most in (("trials", 3), ("seeds", 3)) if name in budget}
    rerank = {"rerank": {"best": 1, "seeds": [200]}} if "rerank" in study else {}
    factors = {name: values for name, values in study.get("factors", {}).items() if name != "data.tokenizer"}
    return study | rerank | {"base": base, "budget": budget, "seeds": seeds, "factors": factors}


@pytest.fixture
def folder(tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which a page is run: a text, a study, tasks, and committed results in place of hours."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(text_file, tmp_path / "notes.txt")
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(smaller(page_files("docs/how-to/study.md")["mine.yaml"])))
    (tmp_path / "my" / "tasks").mkdir(parents=True)
    rows = [{"prompt": f"{n} plus 1 is", "choices": [str(n + 1), "none"], "target": 0} for n in range(6)]
    write_task(tmp_path / "my" / "tasks", "mine", rows)

    def sweep(spec: StudySpec, out: Path, workers: int | None, **options: Any) -> SweepResult:
        if spec.base_config.data.corpus == "notes.txt":
            return real_sweep(spec, out, 0, **options)
        committed(spec.name)
        return SweepResult(out, cells=0)  # hence no report, whose command comes later

    monkeypatch.setattr(sweep_module, "sweep", sweep)
    for slow in ("savefig", "draw_without_rendering"):  # figures are looked at elsewhere
        monkeypatch.setattr(Figure, slow, lambda *given, **options: None)
    return tmp_path


def committed(study: str) -> None:
    """Put the committed results of a study into results/; those of a small one in place of `quick`, which has none."""
    source = ROOT / "results" / ("pays_other_text" if study == "quick" else study)
    if source.is_dir() and not Path("results", study).exists():
        shutil.copytree(source, Path("results", study))


def run(line: Line) -> None:
    arguments = command_of(line)
    if arguments is None or any(part in line.text for part in NOT_RUN):
        return
    for study in re.findall(r"\bresults/(\w+)", line.text):
        committed(study)
    codes = (0,)
    match arguments[0]:
        case "fit":
            arguments += [*SHORTER, "--data.corpus", "notes.txt"]
        case "evaluate":
            arguments += ["--max_length", "512", "--limit", "2"]
        case "coord-check":  # so few tokens say nothing about width: PASS or FAIL
            arguments += ["--train.batch_size", "2", "--data.seq_len", "16", "--data.corpus", "notes.txt"]
            codes = (0, 1)
        case "lint-placement":  # 1: what drifts is held by nothing but decay
            codes = (0, 1)
    assert main(arguments) in codes, line.text


@pytest.mark.parametrize(
    "page", [page for page in PAGES if any(block.language in ("bash", "python") for block in blocks(page))]
)
def test_a_page_runs_from_top_to_bottom(page: str, folder: Path) -> None:
    names: dict[str, Any] = {}
    for block in blocks(page):
        name = re.match(r"# (\S+\.yaml)\n", block.text)
        match block.language:
            case "yaml" if name:
                content = yaml.safe_load(block.text)
                (folder / name[1]).write_text(yaml.safe_dump(smaller(content) if "budget" in content else content))
            case "bash":
                for line in lines(block):
                    run(line)
            case "python" if page not in PYTHON_NOT_RUN:
                for study in re.findall(r"\"results/(\w+)\"", block.text):
                    committed(study)
                exec(block.text, names)


def test_the_python_of_the_readme_trains_and_draws(folder: Path) -> None:
    (code,) = [block.text for block in blocks("README.md") if is_of(block, "python")]
    committed("pays")
    names: dict[str, Any] = {}
    exec(code, names)

    assert names["record"].final_loss < names["record"].initial_loss
    assert len(names["figure"].axes) == 4  # a panel an optimizer and width


def test_the_example_study_runs_from_yaml_to_report(
    tmp_path: Path, text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = page_files("docs/how-to/study.md")["mine.yaml"]
    study["base"] |= {"data": {"corpus": str(text_file), "seq_len": 32}}  # a short text instead of the library's
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(study))
    out = tmp_path / "results" / "mine"

    assert main(["sweep", str(tmp_path / "mine.yaml"), "--out", str(out), "--workers", "0"]) == 0
    shown = capsys.readouterr()
    assert "12/12 cells" in shown.err
    assert "sensitivity" in shown.out
    before = {path: path.read_bytes() for path in out.rglob("*.*") if path.suffix in {".csv", ".md", ".png", ".svg"}}
    assert {path.name for path in before} >= {"loss_vs_lr.png", "loss_vs_lr.svg", "report.md", "summary.csv"}

    assert main(["report", str(out)]) == 0
    assert {path: path.read_bytes() for path in before} == before


def test_every_public_name_is_on_the_page_of_the_python_interface() -> None:
    named = re.findall(r"^\.\. auto\w+:: lit_mult\.(\w+)$", PAGES["docs/reference/python.md"], re.M)
    assert sorted(named) == sorted(lit_mult.__all__)


def test_the_page_of_commands_says_what_each_leaves() -> None:
    said = re.findall(r"^\| `([\w-]+)` \|", PAGES["docs/reference/commands.md"], re.M)
    assert sorted(said) == sorted(COMMANDS)


def slug(heading: str) -> str:
    """The anchor of a heading, as code hosts and these pages make it."""
    plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").strip().lower()
    return re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")


def anchors(path: Path) -> set[str]:
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.M | re.S)
    return {slug(heading) for heading in re.findall(r"^#+ (.*)$", text, re.M)}


FROM_CODE: dict[str, Callable[[], set[str]]] = {
    "docs/reference/config.md": lambda: set(RunConfig.model_fields),
    "docs/reference/commands.md": lambda: {slug(name) for name in COMMANDS},
}
"""Pages with headings that the code makes -> these."""


@pytest.mark.parametrize("page", PAGES)
def test_links_of_a_page_lead_somewhere(page: str) -> None:
    text = re.sub(r"^```(?!\{(?:figure|image)\}).*?^```", "", PAGES[page], flags=re.M | re.S)
    text = re.sub(r"`[^`\n]*`", "", text)
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"^:::+\{figure\} (\S+)$", text, re.M)
    for target in targets:
        if re.match(r"[a-z]+:", target):
            assert re.fullmatch(r"https://[\w.-]+/[\w./%-]*", target), target
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), target
        if anchor:
            made = FROM_CODE.get(str(file.resolve().relative_to(ROOT)), set)()
            assert anchor in anchors(file) | made, target


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What the reference pages show of the code, as text: a page built by the extensions of docs/."""
    source = tmp_path_factory.mktemp("reference")
    shutil.copy(ROOT / "docs" / "conf.py", source)
    shutil.copytree(ROOT / "docs" / "static", source / "static")
    names = ("commands", "config", "study", "studies", "records", "kinds", "optimizers")
    for name in names:
        (source / f"{name}.md").write_text(f"# Page\n\n```{{from-code}} {name}\n```\n")
    (source / "index.md").write_text("\n".join(["# Pages", "", "```{toctree}", *names, "```", "", "$a_b$", ""]))
    assert build_main(["-q", "-b", "html", str(source), str(source / "out")]) == 0
    pages = (source / "out" / f"{name}.html" for name in ("index", *names))
    text = "".join(page.read_text() for page in pages).replace("</dt>", "\n")  # each term on a line of its own
    assert "<msub>" in text  # formulas need no script
    return html.unescape(re.sub(r"<[^>]+>", "", text))


def test_the_reference_has_every_option_and_field(reference: str) -> None:
    for name, command in COMMANDS.items():
        assert " ".join((command.__doc__ or "").replace("`", "").split()) in reference, name
    for option in ("--retry-failed", "--include_path INCLUDE_PATH", "--widths WIDTHS", "--dtype {float32,bfloat16}"):
        assert option in reference
    models = (StudySpec, RunRecord, EvaluationRecord, Question)
    fields = [*flatten(RunConfig().to_dict()), *(name for model in models for name in model.model_fields)]
    assert [name for name in fields if not re.search(rf"^{re.escape(name)}$", reference, re.M)] == []
    assert "default 0.015625 · in the hash\n" in reference  # optim.lr
    assert "true or false · default false · in the hash unless default" in reference  # model.qk_norm
    assert "int or null, > 0 · default null · not in the hash" in reference  # train.keep_every
    for name in [*KINDS, *OPTIMIZERS, *(path.stem for path in (ROOT / "sweeps").glob("*.yaml"))]:
        assert re.search(rf"^{name}$", reference, re.M), name


def test_the_index_has_every_decision_once() -> None:
    text = PAGES["docs/decisions.md"]
    found = decisions(text)
    assert len(found) == len(re.findall(r"^\*\*\d{4}-\d\d-\d\d", text, re.M))
    assert len({one.anchor for one in found}) == len(found)
    assert all(one.title and one.text.strip() for one in found)
