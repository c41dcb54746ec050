"""A trained model from the folder of its run: weights, config, tokenizer and corpus, for evaluation and export."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_mult.config import RunConfig
from lit_mult.data.cache import TokenizedCorpus, prepare
from lit_mult.data.tokenizers import Tokenizer
from lit_mult.errors import UserError, one_line
from lit_mult.method.plan import plan_run
from lit_mult.nn.llama import Llama
from lit_mult.training.folder import RunFolder

_PREFIX = "model."  # of the Llama in the state dict of LitLlama


@dataclass(frozen=True)
class Trained:
    """The model of a run."""

    config: RunConfig
    model: Llama
    """In float32, on the CPU, in eval mode, with its multipliers."""
    tokenizer: Tokenizer
    corpus: TokenizedCorpus
    """Its training and validation tokens."""
    step: int
    """Optimizer steps done."""
    checkpoint: Path
    """Source of the weights."""


def load_trained(folder: Path, checkpoint: Path | None = None) -> Trained:
    """The trained model of a run, or of a cell of a study.

    Args:
        folder: folder of the run; of a study's cell, results/STUDY/cells/CELL.
        checkpoint: one of this run's checkpoints, with or without optimizer state; by default the final one.

    Raises:
        UserError: there is no run or no such checkpoint, it is damaged or another run's, or the corpus has changed or
            is not there.
    """
    run = RunFolder(folder)
    config, corpus_hash = run.held()
    path = checkpoint or run.final_checkpoint
    if not path.is_file():
        remedy = "fit keeps the final one, and a study with keep_checkpoints: true"
        raise UserError(f"{path}: there is no such checkpoint ({remedy}; an unfinished run has none yet)")
    vocab_size, step, weights = _read(path, config)
    try:
        corpus = prepare(config.data)
    except UserError as error:
        where = "a relative path is one from the folder where it was trained: give the command again there"
        raise UserError(f"{folder}: the corpus of this run cannot be read; {where} ({error})") from None
    if corpus.hash != corpus_hash:
        changed = f"has changed since the run, hash {corpus_hash} is now {corpus.hash}"
        remedy = "the tokens would not be the model's; restore the text or, for stdlib, the Python version"
        raise UserError(f"data.corpus = {config.data.corpus!r}: {changed}: {remedy}")
    model = Llama(config.model, plan_run(config, vocab_size))
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(f"{path}: damaged, its weights do not fit the config of the run ({one_line(error)})") from None
    return Trained(config, model.eval(), corpus.tokenizer, corpus, step, path)


def _read(path: Path, config: RunConfig) -> tuple[int, int, dict[str, Tensor]]:
    """Vocabulary size, optimizer steps and weights of a Lightning checkpoint of the run."""
    try:
        held: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        owner = RunConfig.from_dict(held["hyper_parameters"]["config"])
        vocab_size, step = int(held["hyper_parameters"]["vocab_size"]), int(held["global_step"])
        weights = {name.removeprefix(_PREFIX): value for name, value in held["state_dict"].items()}
    except Exception as error:  # zipfile and torch raise many types on damaged files
        raise UserError(f"{path}: damaged, not a checkpoint that can be read ({one_line(error)})") from None
    if owner.on_devices_of(config).hash != config.hash:
        raise UserError(f"{path}: a checkpoint of another run, of config {owner.hash} and not {config.hash}")
    return vocab_size, step, weights


def checkpoint_at(folder: Path, step: int) -> Path:
    """The checkpoint that a run kept at an optimizer step, the last one included.

    Raises:
        UserError: it kept none there; the message lists the steps where it did.
    """
    run = RunFolder(folder)
    path = run.kept_checkpoint(step)
    if step == run.held()[0].train.steps and run.final_checkpoint.is_file():
        return run.final_checkpoint
    if not path.is_file():
        kept = ", ".join(map(str, run.kept_steps())) or "none"
        raise UserError(f"{folder}: no checkpoint of step {step} was kept; kept on the way: {kept}")
    return path
