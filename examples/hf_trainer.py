"""Continue the pretraining of a Hugging Face model on a text file, with learnable multipliers, by the Trainer.

python examples/hf_trainer.py --model MODEL --text FILE --out FOLDER [--steps 1000] [--lr 3e-4] [--optimizer muon]
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import lit_mult

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", required=True, help="folder or name of a causal language model")
parser.add_argument("--text", type=Path, required=True)
parser.add_argument("--out", required=True)
parser.add_argument("--steps", type=int, default=1000)
parser.add_argument("--lr", type=float, default=3e-4)
parser.add_argument("--optimizer", default="adamw", help="adamw or muon")
parser.add_argument("--length", type=int, default=128, help="tokens of a window")
options = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(options.model)
model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
ids = torch.tensor(tokenizer(options.text.read_text())["input_ids"])
windows = [{"input_ids": one, "labels": one} for one in ids.split(options.length) if len(one) == options.length]

lit_mult.add_multipliers(model, kind="vector", split="rms_power_of_two")  # logits stay what they are, to the bit
groups = lit_mult.build_param_groups(model, lr=options.lr, weight_decay=0.1, optimizer=options.optimizer)
trainer = Trainer(
    model,
    TrainingArguments(
        options.out, max_steps=options.steps, max_grad_norm=0, report_to="none", save_strategy="no", warmup_steps=0.1
    ),
    train_dataset=windows,
    optimizers=(lit_mult.HybridOptimizer(groups), None),
    callbacks=[lit_mult.MultiplierTrainerCallback(max_norm=1.0)],
)
trainer.train()
lit_mult.merge_and_unload(model).save_pretrained(options.out)  # a plain model, with the same logits
tokenizer.save_pretrained(options.out)
