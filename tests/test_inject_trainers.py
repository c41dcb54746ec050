"""Multipliers in scripts that exist already: transformers' Trainer, Lightning, LitGPT's names, and a bare loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
import transformers
from foreign_models import foreign, token_ids
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lit_mult
from lit_mult.errors import UserError
from lit_mult.inject.callbacks import check_optimizer
from lit_mult.inject.groups import multipliers_in

TEXT = "".join(f"the {word} of a {word} is a {word}. " for word in ("row", "column", "norm", "scale", "matrix")) * 8


@pytest.fixture
def windows(tmp_path: Path) -> list[dict[str, Tensor]]:
    """A text file as windows of bytes, 6 bits each."""
    (tmp_path / "text.txt").write_text(TEXT)
    ids = torch.tensor(list((tmp_path / "text.txt").read_bytes())) % 64
    return [{"input_ids": one, "labels": one} for one in ids[: len(ids) // 16 * 16].view(-1, 16)]


def arguments(folder: Path, **changes: Any) -> transformers.TrainingArguments:
    fixed = {"per_device_train_batch_size": 8, "report_to": "none", "use_cpu": True, "save_strategy": "no", "seed": 0}
    own = {"max_steps": 12, "learning_rate": 1e-2, "max_grad_norm": 0.0, "lr_scheduler_type": "constant"}
    shown = {"disable_tqdm": True, "logging_strategy": "no"}
    return transformers.TrainingArguments(output_dir=str(folder), **fixed | own | shown | changes)


def optimizer_of(model: nn.Module) -> Any:
    return lit_mult.HybridOptimizer(lit_mult.build_param_groups(model, lr=1e-2, weight_decay=0.1, optimizer="muon"))


def test_the_trainer_of_transformers_trains_as_a_bare_loop(windows: list[dict[str, Tensor]], tmp_path: Path) -> None:
    model = lit_mult.add_multipliers(foreign("llama"), verbose=False)
    callback = lit_mult.MultiplierTrainerCallback(max_norm=0.5)
    trainer = transformers.Trainer(
        model, arguments(tmp_path), train_dataset=windows, optimizers=(optimizer_of(model), None), callbacks=[callback]
    )
    seen: list[Tensor] = []
    watch = model.register_forward_pre_hook(lambda _, args, batch: seen.append(batch["input_ids"]), with_kwargs=True)
    trainer.train()
    watch.remove()
    assert len(seen) == 12

    alone = lit_mult.add_multipliers(foreign("llama"), verbose=False).train()
    optimizer = optimizer_of(alone)
    losses = []
    for ids in seen:
        optimizer.zero_grad()
        loss = alone(input_ids=ids, labels=ids).loss
        loss.backward()
        losses.append(float(loss.detach()))
        lit_mult.clip_grad_norm_(alone, 0.5)
        optimizer.step()
    for (name, one), other in zip(alone.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(other, one, atol=1e-5, rtol=0, msg=name)
    assert losses[-1] < losses[0] - 0.3
    assert all((one != 1).any() for one in multipliers_in(model))

    model.eval()
    ids = token_ids()
    logits = model(ids).logits
    lit_mult.merge_and_unload(model).save_pretrained(tmp_path / "out")
    read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(read(ids).logits, logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_grad_norm": 1.0}, "max_grad_norm = 1.0: clips the multipliers too; set it to 0"),
        ({"optimizer": None}, "multipliers share a parameter group with matrices; make groups with build_param_groups"),
        ({"optimizer": "early"}, "20 multipliers are in no parameter group; make the optimizer after add_multipliers"),
        ({"optimizer": "decay"}, "multipliers have weight_decay 0.1, as matrices have"),
        ({"optimizer": "muon"}, "groups are for muon, which AdamW is not; use HybridOptimizer"),
        ({"plain": True}, "model has no multipliers; call add_multipliers first"),
    ],
)
def test_the_trainer_does_not_do_it_wrong(
    changes: dict[str, Any], message: str, windows: list[dict[str, Tensor]], tmp_path: Path
) -> None:
    model = foreign("llama")
    early = torch.optim.AdamW([{"params": list(model.parameters()), "weight_decay": 0.1}])
    if not changes.get("plain"):
        lit_mult.add_multipliers(model, verbose=False)
    optimizer: Any = early
    if "max_grad_norm" in changes:
        optimizer = optimizer_of(model)
    elif changes.get("optimizer", "") is None:
        optimizer = None  # the Trainer's own
    elif changes.get("optimizer") == "muon":
        optimizer = torch.optim.AdamW(lit_mult.build_param_groups(model, lr=1e-2, optimizer="muon"))
    elif changes.get("optimizer") == "decay":
        groups = lit_mult.build_param_groups(model, lr=1e-2, multiplier_weight_decay=0.1)
        optimizer = torch.optim.AdamW(groups)
    trainer = transformers.Trainer(
        model,
        arguments(tmp_path, weight_decay=0.1, max_grad_norm=changes.get("max_grad_norm", 0.0)),
        train_dataset=windows,
        optimizers=(optimizer, None),
        callbacks=[lit_mult.MultiplierTrainerCallback()],
    )
    with pytest.raises(UserError) as error:
        trainer.train()
    assert message in str(error.value)
    assert all((one == 1).all() for one in multipliers_in(model))


def test_multipliers_alone_and_matrices_without_decay_pass_the_check() -> None:
    model = lit_mult.add_multipliers(foreign("llama"), verbose=False)
    check_optimizer(model, lit_mult.HybridOptimizer(lit_mult.build_param_groups(model, lr=1e-3, weight_decay=0.0)))
    model.requires_grad_(False)
    for one in multipliers_in(model):
        one.requires_grad_(True)
    check_optimizer(model, lit_mult.HybridOptimizer(lit_mult.build_param_groups(model, lr=1e-3)))


class Lit(lightning.LightningModule):
    """Somebody's module."""

    def __init__(self) -> None:
        super().__init__()
        self.model = lit_mult.add_multipliers(foreign("gpt2"), kind="scalar", verbose=False)
        self.norms: list[float] = []

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        return 50 * self.model(**batch).loss

    def configure_optimizers(self) -> Any:
        return lit_mult.HybridOptimizer(lit_mult.build_param_groups(self, lr=1e-2, optimizer="adamw"))

    def optimizer_step(self, *args: Any, **options: Any) -> None:
        super().optimizer_step(*args, **options)
        own = {id(one) for one in multipliers_in(self)}
        rest = [one.grad.norm() for one in self.parameters() if id(one) not in own and one.grad is not None]
        self.norms.append(float(torch.stack(rest).norm()))


def lightning_trainer(folder: Path, **flags: Any) -> lightning.Trainer:
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    callback = lit_mult.MultiplierCallback(max_norm=0.25, noise_every=2)
    return lightning.Trainer(
        max_steps=4, accelerator="cpu", default_root_dir=folder, callbacks=[callback], **quiet | flags
    )


def test_lightning_clips_without_the_multipliers(windows: list[dict[str, Tensor]], tmp_path: Path) -> None:
    module = Lit()
    trainer = lightning_trainer(tmp_path)
    trainer.fit(module, DataLoader(windows, batch_size=8))  # type: ignore[arg-type]
    readings = trainer.callbacks[0].readings  # type: ignore[attr-defined]
    assert {row["step"] for row in readings} == {0, 2}
    assert len(readings) == 2 * len(list(module.parameters()))
    assert all(0.9 < row["ratio"] < 1.1 for row in readings if row["step"] == 0 and row["role"] != "vector")
    assert module.norms == pytest.approx([0.25] * 4, rel=1e-4)
    assert all((one != 1).all() for one in multipliers_in(module))
    with pytest.raises(UserError, match=r"gradient_clip_val = 1\.0: clips the multipliers too"):
        lightning_trainer(tmp_path, gradient_clip_val=1.0).fit(Lit(), DataLoader(windows, batch_size=8))  # type: ignore[arg-type]
