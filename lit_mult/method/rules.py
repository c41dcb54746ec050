"""The width and depth rules as pure functions.

Width: (role, shape, base shape, optimizer) -> init std, lr, weight decay, factor.

With m = d / d_base, table 1 of arXiv:2601.04890 for a hidden matrix under AdamW reads

    rule         lr     weight decay   forward factor
    lr           1/m    1              1
    lr_wd        1/m    m              1
    multiplier   1      1              1/m

and all three follow from the `width_factor` by which a unit update of the effective matrix must shrink. So does

    lr_sqrt_wd   1/m    m^1/2          1

of arXiv:2510.15262 for AdamW, where sqrt(lr / weight_decay), the norm of the balance, falls as m^-3/4: there the top
singular values are observed to be as at base width. For other factors f it is f and f^-1/2. Depth comes on top, by
further factors (`depth_scaling`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

from lit_mult.errors import ConfigError
from lit_mult.registry.contracts import Matrix
from lit_mult.registry.optimizers import OPTIMIZERS, trained_by, unsupported
from lit_mult.registry.roles import HIDDEN_ROLES, SSM_ROLES, Role, Shape


class WidthSettings(Protocol):
    """What the rules read of `config.ParametrizationConfig`."""

    @property
    def rule(self) -> str: ...

    @property
    def width_rule(self) -> str: ...

    @property
    def embedding_std(self) -> float: ...


class DepthSettings(Protocol):
    """What `depth_scaling` reads of `config.ParametrizationConfig`."""

    @property
    def depth_rule(self) -> str: ...

    @property
    def base_n_layers(self) -> int: ...


@dataclass(frozen=True)
class Scaling:
    """How one matrix is initialized and trained, relative to the run's base learning rate and weight decay."""

    init_std: float
    """Standard deviation of the trained matrix W at the start."""
    lr: float
    """Factor on the base learning rate."""
    weight_decay: float
    """Factor on the base weight decay."""
    forward: float
    """Constant factor of the effective matrix, W_eff = forward * W."""


def width_factor(role: Role, shape: Shape, base_shape: Shape, optimizer: str, config: WidthSettings) -> float:
    """Factor on the size of an update for which activations change equally at every width.

    A change dW moves the output by dW x, and x has unit RMS. The change has constant RMS if the spectral norm is
    |dW|_2 ~ sqrt(d_out / d_in) (arXiv:2310.17813 cond. 1); `registry.optimizers` derives the factor of each optimizer.
    For embeddings, norms and multipliers, the input is one-hot or element-wise, no sum grows with width, and the factor
    is 1. A router is a head with experts for tokens: its input grows with width, its output does not.

    Raises:
        ConfigError: the optimizer of the role has no width factor, or not under this width rule.
    """
    if role not in HIDDEN_ROLES | SSM_ROLES | _OUTPUTS:
        return 1.0
    spec = OPTIMIZERS[trained_by(role, optimizer)]
    if spec.width_factor is None:
        remedy = "set parametrization.rule to standard"
        raise unsupported(spec.name, "width factor", "parametrization.rule = mup", remedy)
    if config.width_rule not in spec.width_rules:
        raise unsupported(spec.name, "such width rule", f"parametrization.width_rule = {config.width_rule}")
    pair = (Matrix(*sides, init_std(role, sides, base_shape, config)) for sides in (shape, base_shape))
    return spec.width_factor(*pair)


_OUTPUTS = frozenset({Role.LM_HEAD, Role.ROUTER})


def init_std(role: Role, shape: Shape, base_shape: Shape, config: WidthSettings) -> float:
    """Standard deviation at which the effective matrix starts.

    | role                | standard      | mup                                             |
    |---------------------|---------------|-------------------------------------------------|
    | embedding, position | embedding_std | embedding_std                                   |
    | hidden              | 1 / sqrt(d_in)| 1 / sqrt(d_in)                                  |
    | lm_head, router     | 1 / sqrt(d_in)| sqrt(base d_in) / d_in (logits vanish as 1/m^½) |

    Source: arXiv:2203.03466 table 3.
    """
    if role in (Role.EMBEDDING, Role.POSITION):
        return config.embedding_std
    d_in, base_in = shape[1], base_shape[1]
    if role in _OUTPUTS and config.rule == "mup":
        return math.sqrt(base_in / d_in) / math.sqrt(d_in)  # at base width exactly 1 / sqrt(d_in)
    return 1 / math.sqrt(d_in)


def scaling(role: Role, shape: Shape, base_shape: Shape, optimizer: str, config: WidthSettings) -> Scaling:
    """Scaling of one matrix under the run's parametrization, before any preset.

    Args:
        role: role of the matrix.
        shape: (d_out, d_in) of the matrix.
        base_shape: (d_out, d_in) of the same matrix at width `base_d_model`.
        optimizer: optimizer of the run; which one trains the matrix follows from the role.
        config: rule, width rule and init.
    """
    std = init_std(role, shape, base_shape, config)
    if config.rule == "standard":
        return Scaling(init_std=std, lr=1.0, weight_decay=1.0, forward=1.0)
    factor = width_factor(role, shape, base_shape, optimizer, config)
    match config.width_rule:
        case "lr":
            return Scaling(init_std=std, lr=factor, weight_decay=1.0, forward=1.0)
        case "lr_wd":
            return Scaling(init_std=std, lr=factor, weight_decay=1 / factor, forward=1.0)
        case "lr_sqrt_wd":
            return Scaling(init_std=std, lr=factor, weight_decay=1 / math.sqrt(factor), forward=1.0)
        case "multiplier":
            return Scaling(init_std=std / factor, lr=1.0, weight_decay=1.0, forward=factor)
        case unknown:
            raise ConfigError("width_rule", unknown, "must be lr, lr_wd, lr_sqrt_wd or multiplier")


@dataclass(frozen=True)
class DepthScaling:
    """Factors on what is in a block, on top of the width rule's."""

    branch: float
    """Constant factor of the effective matrix that ends a residual branch."""
    lr: float
    """Factor on the learning rate of matrices, norm weights and multipliers."""
    eps: float
    """Factor on Adam's epsilon of all of these."""


_ALPHA = {"depth_mup": 0.5, "completep": 1.0, "hyperp": 0.5}


def depth_scaling(n_layers: int, optimizer: str, config: DepthSettings) -> DepthScaling:
    """Factors of the depth rules, with l = n_layers / base_n_layers.

    A block is x <- x + l^-alpha f(x), for attention and MLP (arXiv:2505.01618 table 1):

    | in a block                                  | depth_mup | completep | hyperp                    |
    |---------------------------------------------|-----------|-----------|---------------------------|
    | alpha                                       | 1/2       | 1         | 1/2                       |
    | branch, l^-alpha: o_proj, down_proj         | l^-1/2    | l^-1      | (2 n_layers)^-1/2         |
    | lr, l^(alpha-1): matrices, norms, multipl.  | l^-1/2    | 1         | l^-1/2                    |
    | Adam's epsilon, l^-alpha: the same          | l^-1/2    | l^-1      | l^-1/2                    |
    | coupled weight decay (a step: lr * decay)   | 1         | 1         | 1 (hyperball has none)    |

    Embedding, final norm and LM head stay as the width rule has them.

    - lr: if a step changes f by lr, whatever the size of the gradient, n_layers branches change the residual stream by
      n_layers l^-alpha lr, which does not depend on depth for lr ~ l^(alpha-1). That holds for AdamW, Muon, steps of
      relative size lr and Scion's to the border of a ball alike, and for a multiplier as for a norm weight, which is
      one of the next matrix.
    - Adam's epsilon: gradients in a branch have its factor. They fall with width too, for which the paper's epsilon has
      1/m; the width rules leave epsilon alone, and at the base depth all is theirs.
    - hyperp divides by sqrt(2 n_layers) at the base depth as well (arXiv:2603.28743): the 2 n_layers branches add up to
      the variance of one. Relative to the base depth it would be depth_mup.

    Raises:
        ConfigError: the optimizer of hidden matrices does not support the rule.
    """
    if config.depth_rule == "none":
        return DepthScaling(branch=1.0, lr=1.0, eps=1.0)
    spec = OPTIMIZERS[trained_by(Role.O_PROJ, optimizer)]
    if config.depth_rule not in spec.depth_rules:
        raise unsupported(spec.name, "such depth rule", f"parametrization.depth_rule = {config.depth_rule}")
    alpha, depth = _ALPHA[config.depth_rule], n_layers / config.base_n_layers
    branch = 1 / math.sqrt(2 * n_layers) if config.depth_rule == "hyperp" else depth**-alpha
    return DepthScaling(branch=branch, lr=depth ** (alpha - 1), eps=depth**-alpha)
