"""The optimizers. A run has one, which trains some roles; `others` names the optimizers of the rest."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Final

from lit_mult.errors import ConfigError, did_you_mean
from lit_mult.registry import fault_of, with_plugins
from lit_mult.registry.contracts import Matrix, OptimizerSpec
from lit_mult.registry.roles import HIDDEN_ROLES, MATRIX_ROLES, SSM_ROLES, Role


def adamw_width_factor(matrix: Matrix, base: Matrix) -> float:
    """Entries of size lr that align with the input give |dW|_2 ~ lr sqrt(d_out d_in), hence lr ~ 1 / d_in.

    Sources: arXiv:2203.03466 table 3; "LR only" in arXiv:2601.04890 table 1.

    On a sphere the step is the same, whatever the norm of the matrix. What the projection takes away is the part along
    W and, to second order, the share (lr RMS(u) / init_std)^2 of W. At muP's initial std neither grows with width:
    lr / init_std goes as 1 / sqrt(m) for hidden matrices under AdamW and is constant for the head and under Muon. That
    ratio is the relative step, so `hyperball_width_factor` is this factor times that of 1 / init_std.
    """
    return base.d_in / matrix.d_in


def muon_width_factor(matrix: Matrix, base: Matrix) -> float:
    """Muon matched to Adam's RMS: dW = 0.2 lr sqrt(max(d_out, d_in)) O with O orthogonal.

    So |dW|_2 is lr sqrt(max(d_out, d_in)) and lr ~ sqrt(d_out / d_in / max(d_out, d_in)), which is 1 / sqrt(m) for a
    fixed aspect ratio, not 1 / m: an orthogonal update does not accumulate in one direction.
    """
    unit = matrix.d_out / matrix.d_in / max(matrix.d_out, matrix.d_in)
    base_unit = base.d_out / base.d_in / max(base.d_out, base.d_in)
    return math.sqrt(unit / base_unit)


def hyperball_width_factor(matrix: Matrix, base: Matrix) -> float:
    """A step of relative size lr on a matrix of norm R = init_std sqrt(d_out d_in), aligned with the input.

    |dW|_2 ~ lr R, hence lr ~ sqrt(d_out / d_in) / R = 1 / (init_std d_in): 1 / sqrt(m) for hidden matrices, and
    1 for muP's head, whose R falls as 1 / sqrt(m).
    """
    return (base.init_std * base.d_in) / (matrix.init_std * matrix.d_in)


def muon_hyperball_width_factor(matrix: Matrix, base: Matrix) -> float:
    """An orthogonal step of relative size lr: |dW|_2 = lr R / sqrt(min(d_out, d_in)).

    Hence lr ~ sqrt(min(d_out, d_in)) / (init_std d_in), 1 for hidden matrices of a fixed aspect ratio
    (as in arXiv:2603.28743, which has no width factor). This assumes a momentum of full rank: with few different tokens
    (bytes) its rank r does not grow with width, |dW|_2 is lr R / sqrt(r), and updates grow by up to sqrt(m). The
    coordinate check shows both (docs/decisions.md).
    """
    unit = math.sqrt(min(matrix.d_out, matrix.d_in) / min(base.d_out, base.d_in))
    return unit * hyperball_width_factor(matrix, base)


def muown_width_factor(matrix: Matrix, base: Matrix) -> float:
    """As Muon's: the step of a direction V is Muon's, and V starts at W.

    A rate of row norms needs no factor: a step of lr on each changes W by lr diag(signs) U, of spectral norm
    lr |U|_2 ~ lr sqrt(d_out / d_in) for rows of norm 1. So at the matrix's rate their share of the change falls as
    1 / sqrt(m), which `optim.muown_norm_lr` avoids.
    """
    return muon_width_factor(matrix, base)


def scion_width_factor(matrix: Matrix, base: Matrix) -> float:
    """1: |dW|_2 is lr radius sqrt(d_out / d_in) on the spectral ball, as the change of activations asks for.

    So it is on the ball of the largest entry, where entries of size 1 / d_in that align with the input give
    |dW|_2 ~ sqrt(d_out d_in) / d_in.
    """
    return 1.0


class Optimizers(dict[str, OptimizerSpec]):
    """Name -> optimizer. It also finds those of libraries, import:MODULE.CLASS, which it does not list."""

    def __missing__(self, name: str) -> OptimizerSpec:
        if not is_imported(name):
            raise KeyError(name)
        module, _, kind = name.removeprefix("import:").rpartition(".")
        return OptimizerSpec(
            name,
            f"{kind} ({module})",
            f"{kind} of {module} for the hidden matrices, AdamW for the rest",
            trains=HIDDEN_ROLES | SSM_ROLES,  # as Muon, so that an arm differs from its arm in the optimizer alone
            build="lit_mult.optim.imported:build",
            owns_weights=True,  # perhaps: some keep a copy of the weights
        )

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or (isinstance(name, str) and is_imported(name))


def is_imported(optimizer: str) -> bool:
    """Whether a name is that of a library's optimizer, import:MODULE.CLASS; whether there is one is not known."""
    return re.fullmatch(r"import:[^\W\d]\w*(\.[^\W\d]\w*)+", optimizer) is not None


def check_known(optimizer: str, field: str = "optimizer") -> None:
    """Raises: ConfigError when there is no optimizer of this name."""
    if optimizer not in OPTIMIZERS:
        known = f"must be one of {', '.join(OPTIMIZERS)}, or import:MODULE.CLASS"
        raise ConfigError(field, optimizer, known + (fault_of(optimizer) or did_you_mean(optimizer, OPTIMIZERS)))


_DEPTH_RULES: Final = frozenset({"depth_mup", "completep"})

_REGISTERED = with_plugins(
    (
        OptimizerSpec(
            "adamw",
            "AdamW",
            "AdamW for all parameters",
            trains=MATRIX_ROLES | SSM_ROLES | {Role.ROUTER, Role.POSITION},
            build="lit_mult.optim.adamw:build",
            width_factor=adamw_width_factor,
            width_exponent=-1.0,
            depth_rules=_DEPTH_RULES,
            has_eps=True,
            noise="lit_mult.optim.adamw:NOISE",
            stacked="lit_mult.optim.adamw:StackedAdamW",
            sharded=True,
        ),
        OptimizerSpec(
            "muon",
            "Muon",
            "Muon for the hidden matrices, AdamW for the rest",
            trains=HIDDEN_ROLES
            | SSM_ROLES,  # embedding, head, norms and multipliers stay under AdamW (arXiv:2502.16982)
            build="lit_mult.optim.muon:build",
            width_factor=muon_width_factor,
            width_exponent=-0.5,
            depth_rules=_DEPTH_RULES,
            noise="lit_mult.optim.muon:NOISE",
            stacked="lit_mult.optim.muon:StackedMuon",
            sharded=True,
        ),
        OptimizerSpec(
            "hyperball",
            "Hyperball",
            "AdamW's steps with relative size lr at a constant norm of each matrix, AdamW for the rest",
            trains=HIDDEN_ROLES | SSM_ROLES | {Role.LM_HEAD},
            build="lit_mult.optim.sphere:build_hyperball",
            width_factor=hyperball_width_factor,
            width_exponent=-0.5,
            width_rules=frozenset({"lr"}),  # relative steps: a factor on the matrix or on its decay changes nothing
            depth_rules=_DEPTH_RULES | {"hyperp"},
            has_eps=True,
            decays=False,
            owns_weights=True,
            noise="lit_mult.optim.sphere:HYPERBALL_NOISE",
            stacked="lit_mult.optim.sphere:StackedHyperball",
        ),
        OptimizerSpec(
            "muon-hyperball",
            "Muon-Hyperball",
            "Muon's steps likewise for the hidden matrices, hyperball for the LM head, AdamW for the rest",
            trains=HIDDEN_ROLES | SSM_ROLES,
            others={Role.LM_HEAD: "hyperball"},
            build="lit_mult.optim.sphere:build_muon_hyperball",
            width_factor=muon_hyperball_width_factor,
            width_exponent=0.0,
            width_rules=frozenset({"lr"}),
            depth_rules=_DEPTH_RULES | {"hyperp"},
            decays=False,
            owns_weights=True,
            noise="lit_mult.optim.sphere:HYPERBALL_NOISE",
            stacked="lit_mult.optim.sphere:StackedMuonHyperball",
        ),
        OptimizerSpec(
            "sphere",
            "Sphere",
            "AdamW's steps, after each of which a matrix is brought back to its initial norm, AdamW for the rest",
            trains=HIDDEN_ROLES | SSM_ROLES | {Role.LM_HEAD},
            build="lit_mult.optim.sphere:build_sphere",
            width_factor=adamw_width_factor,
            width_exponent=-1.0,
            width_rules=frozenset({"lr", "multiplier"}),  # there is no decay that others would scale
            depth_rules=_DEPTH_RULES,
            has_eps=True,
            decays=False,
            owns_weights=True,
            stacked="lit_mult.optim.sphere:StackedSphere",
        ),
        OptimizerSpec(
            "muon-sphere",
            "Muon-Sphere",
            "Muon's steps likewise for the hidden matrices, sphere for the LM head, AdamW for the rest",
            trains=HIDDEN_ROLES | SSM_ROLES,
            others={Role.LM_HEAD: "sphere"},
            build="lit_mult.optim.sphere:build_muon_sphere",
            width_factor=muon_width_factor,
            width_exponent=-0.5,
            width_rules=frozenset({"lr", "multiplier"}),
            depth_rules=_DEPTH_RULES,
            decays=False,
            owns_weights=True,
            stacked="lit_mult.optim.sphere:StackedMuonSphere",
        ),
        OptimizerSpec(
            "muown",
            "Muown",
            "Muon for the directions of the rows of hidden matrices and Adam for their norms, AdamW for the rest",
            trains=HIDDEN_ROLES | SSM_ROLES,
            build="lit_mult.optim.muown:build",
            width_factor=muown_width_factor,
            width_exponent=-0.5,
            decays_entries=False,  # but norms of rows
            owns_weights=True,
        ),
        OptimizerSpec(
            "normuon",
            "NorMuon",
            "Muon with rows of equal size for the hidden matrices, AdamW for the rest",
            trains=HIDDEN_ROLES | SSM_ROLES,
            build="lit_mult.optim.normuon:build",
            width_factor=muon_width_factor,  # a row's factor is the root of its share, which does not depend on width
            width_exponent=-0.5,
            depth_rules=_DEPTH_RULES,
            noise="lit_mult.optim.normuon:NOISE",
            stacked="lit_mult.optim.normuon:StackedNorMuon",
        ),
        OptimizerSpec(
            "scion",
            "Scion",
            "steps on spectral balls for the hidden matrices, scion-sign for the LM head, AdamW for the rest",
            trains=HIDDEN_ROLES | SSM_ROLES,
            others={Role.LM_HEAD: "scion-sign"},
            build="lit_mult.optim.scion:build",
            width_factor=scion_width_factor,
            width_exponent=0.0,
            depth_rules=_DEPTH_RULES,
            own_decay=1.0,
            stacked="lit_mult.optim.scion:StackedScion",
            sharded=True,
        ),
        OptimizerSpec(
            "scion-sign",
            "Scion (sign)",
            "Scion's steps by the sign of the momentum for hidden matrices and LM head, AdamW for the rest",
            trains=HIDDEN_ROLES | SSM_ROLES | {Role.LM_HEAD},
            build="lit_mult.optim.scion:build_sign",
            width_factor=scion_width_factor,
            width_exponent=0.0,
            depth_rules=_DEPTH_RULES,
            own_decay=1.0,
            stacked="lit_mult.optim.scion:StackedScionSign",
            sharded=True,
        ),
    ),
    "lit_mult.optimizers",
)
OPTIMIZERS: Final = Optimizers(_REGISTERED)
"""Name -> optimizer. The order is that of the parts of a `HybridOptimizer`, and so of its parameter groups."""


def trained_by(role: Role, optimizer: str) -> str:
    """The optimizer that trains a role in a run with `optimizer`."""
    spec = OPTIMIZERS[optimizer]
    return optimizer if role in spec.trains else spec.others.get(role, "adamw")


def optimizers_of(optimizer: str) -> list[str]:
    """All optimizers that a run of this one uses, in order of their names."""
    return sorted({trained_by(role, optimizer) for role in Role})


def check_any_stacked_form(optimizers: Iterable[str]) -> None:
    """Raises: ConfigError when runs with none of these optimizers can be stacked, as of `check_stacked_form`."""
    refusals = []
    for optimizer in sorted(optimizers):
        try:
            check_stacked_form(optimizer)
        except ConfigError as error:
            refusals.append(error)
        else:
            return
    raise refusals[0]


def check_stacked_form(optimizer: str) -> None:
    """Raises: ConfigError when runs with this optimizer cannot be stacked."""
    for name in optimizers_of(optimizer):
        if OPTIMIZERS[name].stacked is None:
            raise unsupported(name, "stacked form", "training runs together")


def unsupported(optimizer: str, lacks: str, feature: str, remedy: str = "") -> ConfigError:
    """The error of a feature that an optimizer does not support; `remedy`: what goes without it."""
    return ConfigError("optimizer", optimizer, f"has no {lacks}, which {feature} needs" + f"; {remedy}" * bool(remedy))
