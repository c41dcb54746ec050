"""Exponents in width and depth that theory predicts. They come from theory, not from `rules`, which they check.

**Width.** Sources: arXiv:2203.03466 table 3 and app. D.1; arXiv:2601.04890 table 1; arXiv:2510.15262.

| kind           | what                                   | exponent                                                  |
|----------------|----------------------------------------|-----------------------------------------------------------|
| start          | activations                            | 0                                                         |
| start          | logits                                 | -1/2 (muP's head) to 0 (the standard one)                 |
| change, update | all                                    | 0                                                         |
| decay          | width rule lr, decay by the lr         | that of the lr, the optimizer's `width_exponent` (AdamW    |
|                |                                        | -1, Muon -1/2) of hidden matrices and outputs; embedding 0 |
| decay          | lr_sqrt_wd, likewise                   | half of that                                              |
| decay          | lr_wd, multiplier, decay without the lr | 0: the balance is reached equally fast at every width     |

**Depth.** Source: arXiv:2505.01618. Blocks x <- x + L^-alpha f(x), with alpha 1 for completep and 1/2 for depth_mup and
hyperp. The L branches are independent at the start, so that together they have sqrt(L) L^-alpha of one, and so have
changes of their inputs alone. What training adds is aligned: L times the change of one, which must hence be 1 / L.

| kind   | what                          | exponent                                                                   |
|--------|-------------------------------|----------------------------------------------------------------------------|
| start  | attention and MLP outputs     | -alpha                                                                     |
| start  | last block                    | 1/2 - alpha (branches) to 0 (embedding)                                    |
| start  | final norm, logits            | 0                                                                          |
| change | attention and MLP outputs     | -1, by their own matrices, to -alpha, by the change of their input         |
| change | last block                    | 1/2 - alpha (changed inputs) to 0 (changed matrices, embedding)            |
| change | final norm, logits            | 0                                                                          |
| update | matrix that ends a branch     | -1                                                                         |
| update | others of a block             | alpha - 1, as the branch has L^-alpha already                              |
| update | embedding, head               | 0                                                                          |
| decay  | of a block, decay by the lr   | alpha - 1, that of the lr                                                  |
| decay  | others; decay without the lr  | 0                                                                          |

Without a depth rule no alpha fits, and 1/2 to 1 is expected where it matters: what a rule would have to do.
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


def _decays_by_lr(config: RunConfig, role: str) -> bool:
    """Whether the share that a step removes is proportional to the peak lr; a decay of the optimizer's own is."""
    own_decay = OPTIMIZERS[trained_by(Role(role), config.optimizer)].own_decay
    return own_decay is not None or config.optim.weight_decay_mode in BY_LR


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


_ALPHAS: Final = {"none": (0.5, 1.0), "depth_mup": (0.5, 0.5), "completep": (1.0, 1.0), "hyperp": (0.5, 0.5)}


def depth_exponent(config: RunConfig, kind: str, coordinate: str, role: str) -> tuple[float, float]:
    """Lowest and highest exponent of a coordinate (`diagnostics.coordinates.over_layers`) in the depth."""
    low, high = _ALPHAS[config.parametrization.depth_rule]
    if coordinate == "last block":
        return 0.5 - high, 0.0
    if not coordinate.startswith("layers.*"):
        return 0.0, 0.0
    match kind:
        case "start":
            return -high, -low
        case "change":
            return -1.0, -low
        case "update" if role in (Role.O_PROJ, Role.DOWN_PROJ):
            return -1.0, -1.0
        case "decay" if not _decays_by_lr(config, role):
            return 0.0, 0.0
        case _:
            return low - 1, high - 1
