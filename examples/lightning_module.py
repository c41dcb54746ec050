"""Learnable multipliers in a LightningModule of one's own: Qwen3 from scratch on the bytes of a text file.

python examples/lightning_module.py --text FILE [--steps 500] [--devices 2 --strategy ddp]
"""

import argparse
from pathlib import Path

import torch
from lightning import LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import Qwen3Config, Qwen3ForCausalLM

import lit_mult

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--text", type=Path, required=True)
parser.add_argument("--steps", type=int, default=500)
parser.add_argument("--devices", type=int, default=1)
parser.add_argument("--strategy", default="auto")


class LanguageModel(LightningModule):
    """Next-byte prediction."""

    def __init__(self) -> None:
        super().__init__()
        shape = {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2, "head_dim": 16}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
        self.model = Qwen3ForCausalLM(Qwen3Config(vocab_size=256, **shape, **heads, pad_token_id=None))
        lit_mult.add_multipliers(self.model, kind="vector")

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        """Mean cross-entropy of windows (B, T)."""
        loss = self.model(input_ids=batch, labels=batch).loss
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Muon for the hidden matrices; multipliers with a weight decay of their own."""
        return lit_mult.HybridOptimizer(lit_mult.build_param_groups(self, lr=1e-2, optimizer="muon"))


if __name__ == "__main__":
    options = parser.parse_args()
    torch.manual_seed(0)
    data = torch.tensor(list(options.text.read_bytes()))
    windows = data[: len(data) // 64 * 64].view(-1, 64)
    clipping = lit_mult.MultiplierCallback(max_norm=1.0)  # and no gradient_clip_val
    trainer = Trainer(
        max_steps=options.steps, devices=options.devices, strategy=options.strategy, callbacks=[clipping], logger=False
    )
    module = LanguageModel()
    trainer.fit(module, DataLoader(windows, batch_size=16, shuffle=True))
    print(f"loss {trainer.callback_metrics['loss']:.3f}")
