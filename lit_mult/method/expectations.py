"""Width exponents that muP predicts. They come from theory, not from `rules`, which they check.

Sources: arXiv:2203.03466 table 3 and app. D.1; arXiv:2601.04890 table 1.

| kind           | what                                   | exponent                                                  |
|----------------|----------------------------------------|-----------------------------------------------------------|
| start          | activations                            | 0                                                         |
| start          | logits                                 | -1/2 (muP's head) to 0 (the standard one)                 |
| change, update | all                                    | 0                                                         |
| decay          | width rule lr, coupled decay           | that of the lr, the optimizer's `width_exponent` (AdamW    |
|                |                                        | -1, Muon -1/2) of hidden matrices and outputs; embedding 0 |
| decay          | lr_wd, multiplier, independent decay   | 0: the balance is reached equally fast at every width     |
"""

from __future__ import annotations

from lit_mult.config import RunConfig
from lit_mult.registry.optimizers import OPTIMIZERS, trained_by, unsupported
from lit_mult.registry.roles import Role


def expected_exponent(config: RunConfig, kind: str, coordinate: str, role: str) -> tuple[float, float]:
    """Lowest and highest exponent of a coordinate (`diagnostics.coordinates`) in the width.

    Raises:
        ConfigError: the optimizer states no width exponent.
    """
    settings = config.parametrization
    by_lr = settings.rule == "mup" and settings.width_rule == "lr" and config.optim.weight_decay_mode == "coupled"
    tied = role == Role.LM_HEAD and config.model.tie_embeddings
    return exponent_of(kind, coordinate, Role.EMBEDDING if tied else role, config.optimizer if by_lr else None)


def exponent_of(kind: str, coordinate: str, role: str, optimizer: str | None) -> tuple[float, float]:
    """The same where decay follows the lr that a width rule scales for `optimizer`; None: where decay does not.

    A tied head counts as the embedding.

    Raises:
        ConfigError: the optimizer states no width exponent.
    """
    if kind == "start" and coordinate == "logits":
        return -0.5, 0.0
    if kind != "decay" or optimizer is None or role in ("", Role.EMBEDDING, Role.POSITION):
        return 0.0, 0.0
    optimizer = trained_by(Role(role), optimizer)
    exponent = OPTIMIZERS[optimizer].width_exponent
    if exponent is None:
        raise unsupported(optimizer, "width exponent", "the coordinate check")
    return exponent, exponent
