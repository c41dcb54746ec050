"""The scripts in examples/ run as they are, for a few steps."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
import transformers
from foreign_models import FAMILIES, foreign, token_ids

import lit_mult
from lit_mult.data.tokenizers import load_tokenizer
from lit_mult.hf.export import write_tokenizer

PAGE = (Path(__file__).parents[1] / "docs" / "how-to" / "own_model.md").read_text()
EXAMPLES = Path(__file__).parents[1] / "examples"
TEXT = "".join(f"the {word} of a {word} is a {word}. " for word in ("row", "column", "norm", "scale", "matrix")) * 40


def test_the_loop_of_the_page_on_own_models_trains(capsys: pytest.CaptureFixture[str]) -> None:
    code = re.search(r"```python\n(.*?)```", PAGE, re.S)
    assert code is not None
    model, ids = foreign("llama"), token_ids()
    names = {"lit_mult": lit_mult, "model": model, "batches": [{"input_ids": ids, "labels": ids}] * 3}
    before = foreign("llama")(input_ids=ids, labels=ids).loss
    exec(code[1], names)
    assert model(input_ids=ids, labels=ids).loss < before
    assert "muon" in capsys.readouterr().out


def test_the_coordinate_check_of_that_page_runs() -> None:
    code = re.findall(r"```python\n(.*?)```", PAGE, re.S)[1]

    def build(width: int) -> torch.nn.Module:
        return foreign(
            "llama",
            hidden_size=width,
            intermediate_size=2 * width,
            num_attention_heads=width // 16,
            num_key_value_heads=width // 16,
            num_hidden_layers=1,
        )

    names = {"lit_mult": lit_mult, "torch": torch, "build": build, "batches": [token_ids(8, 32)]}
    exec(code, names)
    verdicts = names["check"].exponents["verdict"]
    assert (verdicts == "PASS").mean() > 0.8, names["check"].exponents  # a layer of random tokens, two steps
    assert len(verdicts) > 10


@pytest.fixture
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path / "text.txt"


def run(name: str, monkeypatch: pytest.MonkeyPatch, **options: object) -> None:
    arguments = [part for option, value in options.items() for part in (f"--{option}", str(value))]
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


@pytest.mark.parametrize("name", ["bare_loop.py", "lightning_module.py", "litgpt_fabric.py"])
def test_an_example_trains(
    name: str, text: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(name, monkeypatch, text=text, steps=20)
    shown = capsys.readouterr().out
    assert re.search(r"^(transformer|model)\S*attn\.\S+ \(2\) +q_proj\S* +\d+x\d+ +row$", shown, re.M)
    losses = [float(value) for value in re.findall(r"loss ([\d.]+)", shown)]
    assert losses[-1] < 3.5  # of 5.5 at the start


def test_the_trainer_continues_a_model_and_leaves_a_plain_one(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, fields = FAMILIES["llama"]
    torch.manual_seed(0)
    start = transformers.AutoModelForCausalLM.from_config(getattr(transformers, config)(**fields | {"vocab_size": 256}))
    start.save_pretrained(tmp_path / "start")
    write_tokenizer(tmp_path / "start", load_tokenizer("bytes"), 64)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")

    run("hf_trainer.py", monkeypatch, model=tmp_path / "start", text=text, out=tmp_path / "out", steps=3, length=32)

    end = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(end.model.layers[0].mlp.up_proj) is torch.nn.Linear
    assert end.state_dict().keys() == start.state_dict().keys()
    assert not torch.equal(end.lm_head.weight, start.lm_head.weight)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.decode(tokenizer("a row")["input_ids"]) == "a row"
