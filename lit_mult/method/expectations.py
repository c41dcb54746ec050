"""Exponents in width and depth that theory predicts. They come from theory, not from `rules`, which they check.

**Width.** Sources: arXiv:2203.03466 table 3 and app. D.1; arXiv:2601.04890 table 1.

| kind           | what                                   | exponent                                                  |
|----------------|----------------------------------------|-----------------------------------------------------------|
| start          | activations                            | 0                                                         |
| start          | logits                                 | -1/2 (muP's head) to 0 (the standard one)                 |
| change, update | all                                    | 0                                                         |
| decay          | width rule lr, coupled decay           | that of the lr, the optimizer's `width_exponent` (AdamW    |
|                |                                        | -1, Muon -1/2) of hidden matrices and outputs; embedding 0 |
| decay          | lr_wd, multiplier, independent decay   | 0: the balance is reached equally fast at every width     |

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
| decay  | of a block, coupled           | alpha - 1, that of the lr                                                  |
| decay  | others; independent decay     | 0                                                                          |

Without a depth rule no alpha fits, and 1/2 to 1 is expected where it matters: what a rule would have to do.
"""

from __future__ import annotations

from typing import Final

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
        case "decay" if config.optim.weight_decay_mode == "independent":
            return 0.0, 0.0
        case _:
            return low - 1, high - 1
