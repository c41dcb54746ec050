"""Width exponents that muP predicts. They come from theory, not from `rules`, which they check.

Sources: arXiv:2203.03466 table 3 and app. D.1; arXiv:2601.04890 table 1; arXiv:2510.15262.

| kind           | what                                   | exponent                                                  |
|----------------|----------------------------------------|-----------------------------------------------------------|
| start          | activations                            | 0                                                         |
| start          | logits                                 | -1/2 (muP's head) to 0 (the standard one)                 |
| change, update | all                                    | 0                                                         |
| decay          | width rule lr, decay by the lr         | that of the lr, the optimizer's `width_exponent` (AdamW    |
|                |                                        | -1, Muon -1/2) of hidden matrices and outputs; embedding 0 |
| decay          | lr_sqrt_wd, likewise                   | half of that                                              |
| decay          | lr_wd, multiplier, decay without the lr | 0: the balance is reached equally fast at every width     |
"""

from __future__ import annotations

from typing import Final

from lit_mult.config import RunConfig
from lit_mult.method.decay import BY_LR
from lit_mult.registry.optimizers import OPTIMIZERS, trained_by, unsupported
from lit_mult.registry.roles import Role


def expected_exponent(config: RunConfig, kind: str, coordinate: str, role: str) -> tuple[float, float]:
    """Lowest and highest exponent of a coordinate (`diagnostics.coordinates`) in the width.

    Raises:
        ConfigError: the optimizer states no width exponent.
    """
    settings = config.parametrization
    by_lr = settings.rule == "mup" and config.optim.weight_decay_mode in BY_LR
    tied = role == Role.LM_HEAD and config.model.tie_embeddings
    widths = (config.optimizer, settings.width_rule) if by_lr else None
    return exponent_of(kind, coordinate, Role.EMBEDDING if tied else role, widths)


_DECAY_POWERS: Final = {"lr": 1.0, "lr_sqrt_wd": 0.5}
"""Width rule -> power of the factor on the lr that lr * weight_decay has; 0 for the others."""


def exponent_of(kind: str, coordinate: str, role: str, widths: tuple[str, str] | None) -> tuple[float, float]:
    """The same, for matrices whose decay follows the lr.

    Args:
        kind: of the coordinate.
        coordinate: its name.
        role: of the matrix; a tied head counts as the embedding.
        widths: optimizer and width rule that scale the lr; None: decay does not follow it, or it is not scaled.

    Raises:
        ConfigError: the optimizer states no width exponent.
    """
    if kind == "start" and coordinate == "logits":
        return -0.5, 0.0
    power = 0.0 if widths is None else _DECAY_POWERS.get(widths[1], 0.0)
    if kind != "decay" or widths is None or not power or role in ("", Role.EMBEDDING, Role.POSITION):
        return 0.0, 0.0
    optimizer = trained_by(Role(role), widths[0])
    exponent = OPTIMIZERS[optimizer].width_exponent
    if exponent is None:
        raise unsupported(optimizer, "width exponent", "the coordinate check")
    return power * exponent, power * exponent
