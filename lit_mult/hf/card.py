"""The model card of an exported model."""

from __future__ import annotations

from pathlib import Path

from lit_mult.config import RunConfig, split_pin
from lit_mult.hf.check import Agreement
from lit_mult.hf.folder import family
from lit_mult.registry.kinds import KINDS
from lit_mult.schema import RunRecord

_CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
tags: [{tag}, learnable-multipliers, lit-mult]
---

# {family} of {size}: {multipliers}, {optimizer}

A language model trained by lit_mult with {multipliers}.

What multipliers it was trained with are folded into the weights, `W_eff[i,j] = constant * scalar * row[i] * W[i,j] *
column[j]` ([arXiv:2601.04890](https://arxiv.org/abs/2601.04890) eq. 2 and 3): this is a plain {family}, and nothing but
transformers is needed to run it.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH")
tokenizer = AutoTokenizer.from_pretrained("PATH")
```

## The model

| | |
|---|---|
{rows}

## Checked against the trained model

{checks}
"""


def model_card(
    config: RunConfig,
    corpus_hash: str,
    step: int,
    record: RunRecord | None,
    dtype: str,
    merged: Agreement,
    written: Agreement,
) -> str:
    """The text of README.md.

    `merged` compares the trained model with its merged weights in float32, `written` with the folder's model as
    transformers loads it, in `dtype`.
    """
    model, kind = config.model, family(config.model)
    layers = f"{model.n_layers} layer{'s' * (model.n_layers > 1)}"
    rows = {
        "size": f"{layers} of width {model.d_model}, MLP {model.d_ff}",
        "heads": f"{model.n_heads} of size {model.head_dim}, {model.n_kv_heads} for keys and values",
        "rotary base, norm epsilon": f"{model.rope_theta:g}, {model.norm_eps:g}",
        "embeddings": "trained with a tied head, written apart" if model.tie_embeddings else "not tied",
        "weights": dtype,
        "multipliers": _multipliers(config),
        "parametrization": _parametrization(config),
        "optimizer": f"{config.optimizer}, lr {config.optim.lr:g}, weight decay {_decay(config)}",
        "schedule": config.schedule.name,
        "started from": "a random draw" if model.pretrained is None else _base(model.pretrained),
        "steps": f"{step:,} of {config.train.steps:,}",
        "tokens": f"{step * config.train.batch_size * config.data.seq_len:,}, in windows of {config.data.seq_len}",
        "corpus": f"{_bare(config.data.corpus)} (hash {corpus_hash}), tokenizer {_bare(config.data.tokenizer)}",
        "validation loss": _loss(record, step),
        "seed": str(config.seed),
        "config hash": config.hash,
        "git commit": "unknown" if record is None or record.git_commit is None else record.git_commit,
    }
    return _CARD.format(
        tag=kind.model_type,
        family=kind.label,
        size=f"{layers}, width {model.d_model}",
        optimizer=config.optimizer,
        multipliers=_multipliers(config),
        rows="\n".join(f"| {name} | {value} |" for name, value in rows.items()),
        checks=_checks(dtype, merged, written),
    )


def _checks(dtype: str, merged: Agreement, written: Agreement) -> str:
    line = (
        f"Logits over {merged.tokens:,} tokens of validation text, in float32: they differ from those of the trained "
        f"model, multipliers and all, by at most {merged.largest_difference:.1e} (allowed: {merged.bound:.1e}; largest "
        f"logit {merged.largest_logit:.3g}), and the likeliest token is the same at {merged.same_argmax:.2%} of them."
    )
    if dtype == "float32":
        return line
    return (
        f"{line}\n\nThese weights, rounded to {dtype}, are what this folder holds, bit for bit. Computed in {dtype}, "
        f"logits differ by at most {written.largest_difference:.1e}, and the likeliest token is the same at "
        f"{written.same_argmax:.2%}."
    )


def _multipliers(config: RunConfig) -> str:
    kind = KINDS[config.multipliers]
    return kind.label + (f" (placement {config.placement.table})" if kind.is_learnable else "")


def _parametrization(config: RunConfig) -> str:
    rule = config.parametrization
    width = f"mup ({rule.width_rule}, base width {rule.base_d_model})" if rule.rule == "mup" else rule.rule
    depth = "" if rule.depth_rule == "none" else f", {rule.depth_rule} (base depth {rule.base_n_layers})"
    return f"{width}{depth}, attention scale {rule.attention_scale}"


def _loss(record: RunRecord | None, step: int) -> str:
    losses = {} if record is None else dict(record.val_curve)
    return f"{losses[step]:.4f} nats per token" if step in losses else "not measured at this step"


def _base(pretrained: str) -> str:
    folder, pin = split_pin(pretrained)
    return f"{_bare(folder)} (hash {pin})"


def _bare(source: str) -> str:
    """A hub name, or the last part of a path."""
    return source if source.startswith("hf:") else Path(source).name


def _decay(config: RunConfig) -> str:
    mode = config.optim.weight_decay_mode
    return f"{config.optim.weight_decay:g}" + (f" ({mode})" if mode != "coupled" else "")
