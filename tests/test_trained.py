"""Trained models from the folders of their runs: the very model, or one line that says why not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, Trainer
from refusals import refusal
from tiny_runs import Tiny

from lit_mult.data.batches import validation_windows
from lit_mult.errors import UserError
from lit_mult.schema import RunRecord
from lit_mult.training.folder import RunFolder
from lit_mult.training.module import LitLlama
from lit_mult.training.run import run
from lit_mult.training.trained import Trained, checkpoint_at, load_trained

OVERRIDES = {"multipliers": "vector", "train.eval_every": 6, "model.tie_embeddings": True, "model.dropout": 0.1}


class Keep(Callback):
    """Leaves the weights of one step behind."""

    def __init__(self, folder: Path, step: int) -> None:
        self.path, self.step = RunFolder(folder).kept_checkpoint(step), step

    def on_train_batch_end(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        if trainer.global_step == self.step:
            self.path.parent.mkdir(parents=True)
            trainer.save_checkpoint(self.path, weights_only=True)


@pytest.fixture
def folder(tiny: Tiny, tmp_path: Path) -> Path:
    """A finished run that kept the weights of step 6."""
    run(tiny(OVERRIDES), tmp_path / "run", callbacks=[Keep(tmp_path / "run", 6)])
    return tmp_path / "run"


def loss(trained: Trained) -> float:
    """Validation loss as the run measured it."""
    windows_BT1 = torch.from_numpy(validation_windows(trained.corpus.val, 16, trained.config.data.val_windows))
    with torch.no_grad():
        logits_BTV = trained.model(windows_BT1[:, :-1])
    return float(torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1), windows_BT1[:, 1:].flatten()))


def test_the_model_is_the_one_that_was_validated(folder: Path, tiny: Tiny) -> None:
    record = RunRecord.read(folder / "record.json")
    trained = load_trained(folder)

    assert loss(trained) == pytest.approx(record.final_loss, rel=1e-6)
    assert (trained.step, trained.config) == (12, tiny(OVERRIDES))
    assert trained.corpus.hash == record.corpus_hash
    assert trained.tokenizer.decode(trained.tokenizer.encode("1 + 1")) == "1 + 1"
    assert not trained.model.training
    assert trained.model.lm_head.weight is trained.model.embed_tokens.weight
    lightning = LitLlama.load_from_checkpoint(trained.checkpoint, map_location="cpu", weights_only=True)
    ours, theirs = trained.model.state_dict(), lightning.model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_checkpoint_kept_on_the_way_is_the_model_of_its_step(folder: Path) -> None:
    record = RunRecord.read(folder / "record.json")
    trained = load_trained(folder, checkpoint_at(folder, 6))

    assert trained.step == 6
    assert loss(trained) == pytest.approx(dict(record.val_curve)[6], rel=1e-6)
    assert dict(record.val_curve)[6] != record.final_loss
    with pytest.raises(UserError, match=r"no checkpoint of step 5 was kept; kept on the way: 6$"):
        checkpoint_at(folder, 5)


def test_the_record_of_a_cell_lies_with_its_study(folder: Path, tmp_path: Path) -> None:
    cell = tmp_path / "results" / "cells" / "muP-seed0"
    shutil.copytree(folder, cell)
    assert RunFolder(cell).find_record() == RunRecord.read(folder / "record.json")
    (cell / "record.json").unlink()
    assert RunFolder(cell).find_record() is None
    RunRecord.read(folder / "record.json").write(tmp_path / "results" / "records" / "muP-seed0.json")
    assert RunFolder(cell).find_record() == RunRecord.read(folder / "record.json")


def test_what_cannot_be_loaded_is_said_in_one_line(folder: Path, tmp_path: Path, tiny: Tiny) -> None:
    final = RunFolder(folder).final_checkpoint
    whole = final.read_bytes()
    other = tmp_path / "other"
    run(tiny(OVERRIDES | {"seed": 1}), other)

    def said(path: Path, checkpoint: Path | None = None) -> str:
        with refusal() as caught:
            load_trained(path, checkpoint)
        return str(caught.value)

    assert "not the folder of a run" in said(tmp_path / "nowhere")
    assert "a checkpoint of another run" in said(folder, RunFolder(other).final_checkpoint)
    for damage in (whole[: len(whole) // 2], b"", b"not a checkpoint"):
        final.write_bytes(damage)
        assert "final.ckpt: damaged, not a checkpoint" in said(folder)
    held = torch.load(RunFolder(other).final_checkpoint, weights_only=True)
    del held["state_dict"]["model.norm.weight"]
    torch.save(held, RunFolder(other).final_checkpoint)
    assert "final.ckpt: damaged, its weights do not fit" in said(other)
    final.unlink()
    assert "a study with keep_checkpoints: true" in said(folder)
    held = json.loads((folder / "config.json").read_text())
    held["config"]["optimizer"] = "lion"
    (folder / "config.json").write_text(json.dumps(held))
    assert "config.json: not valid here, it may be of a package that is not installed, or of a newer" in said(folder)
    (folder / "config.json").write_text("{}")
    assert "config.json: damaged, not the config of a run" in said(folder)


def test_a_corpus_that_is_not_there_is_said_to_be_the_runs(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "text.txt").write_text("a line of text\n" * 200)
    monkeypatch.chdir(tmp_path)
    run(tiny({"data.corpus": "text.txt"}), tmp_path / "run")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")

    with refusal(f"{tmp_path / 'run'}: the corpus of this run cannot be read; a relative path is", "text.txt: no such"):
        load_trained(tmp_path / "run")


def test_another_corpus_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("a line of text\n" * 200)
    run(tiny({"data.corpus": str(text)}), tmp_path / "run")
    text.write_text("another line of text\n" * 200)

    held = json.loads((tmp_path / "run" / "config.json").read_text())["corpus_hash"]
    with pytest.raises(UserError, match=rf"data\.corpus = .*text\.txt': has changed since the run, hash {held} is now"):
        load_trained(tmp_path / "run")
