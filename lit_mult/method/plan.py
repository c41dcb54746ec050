"""The plan of a run: scaling, multipliers and init of every matrix, from which model and optimizer are built."""

from __future__ import annotations

from dataclasses import dataclass

from lit_mult.config import RunConfig
from lit_mult.method.decay import DecayRule, decay_of
from lit_mult.method.placement import place
from lit_mult.method.presets import run_multipliers
from lit_mult.method.rules import DepthScaling, depth_scaling, init_std, scaling
from lit_mult.method.schedule import peak_steps
from lit_mult.registry.contracts import Axes, Axis
from lit_mult.registry.kinds import KINDS
from lit_mult.registry.optimizers import OPTIMIZERS, trained_by
from lit_mult.registry.roles import BRANCH_OUTPUTS, HIDDEN_ROLES, Role, Shape


@dataclass(frozen=True)
class MatrixPlan:
    """Settings of one weight matrix."""

    name: str
    """Module name, as in Hugging Face's Llama without its `model.` prefix."""
    kind: str
    """Kind of its multipliers."""
    role: Role
    shape: Shape
    """(d_out, d_in)"""
    axes: Axes
    """Its learnable multipliers."""
    start: dict[Axis, float]
    """Initial value of each learnable multiplier; its expectation if that depends on the weights."""
    start_factor: float
    """W_eff / (constant * W) at the start: what the multipliers start with of a preset's forward multiplier."""
    constant: float
    """Fixed factor of the effective matrix: that of the width rule, that of the depth rule on a residual branch, and,
    unless a multiplier learns it, the preset's."""
    init_std: float
    optimizer: str
    lr: float
    """Peak learning rate of the matrix."""
    weight_decay: float
    """Weight decay for the optimizer: a step shrinks the matrix by lr * weight_decay."""
    decay_rule: DecayRule = "plain"
    eps: float | None = None
    """Adam's epsilon, where it is not `optim.eps`."""


@dataclass(frozen=True)
class VectorPlan:
    """How vector-like parameters of one role train."""

    optimizer: str
    lr: float
    weight_decay: float
    eps: float | None = None
    """Adam's epsilon, where it is not `optim.eps`."""


@dataclass(frozen=True)
class RunPlan:
    """Plans of all matrices by module name, and of the vector-like roles."""

    matrices: dict[str, MatrixPlan]
    norm: VectorPlan
    """Of the final norm."""
    multiplier: VectorPlan
    """Of the multipliers of embedding and LM head."""
    block_norm: VectorPlan
    block_multiplier: VectorPlan
    attention_scale: float
    """Factor on the attention logits."""


def plan_run(config: RunConfig, vocab_size: int) -> RunPlan:
    """Combine placement, width and depth rule, multipliers by role and optimizer settings of a run.

    Multipliers by role are the config's and, for other roles, the preset's; the tier restricts both. Depending on
    `registry.contracts.Kind.forward`, the forward multiplier is unused, a constant, or the initial value of a learnable
    multiplier (a constant for matrices without one).

    Raises:
        UserError: the preset, a multiplier or a placement override is not usable, or the optimizer does not support the
            width rule, the depth rule or the mode of the weight decay.
    """
    base_model = config.model.model_copy(update={"d_model": config.parametrization.base_d_model})
    shapes, base_shapes = config.model.matrix_shapes(vocab_size), base_model.matrix_shapes(vocab_size)
    given = run_multipliers(config)
    roles = config.model.matrix_roles()
    kind = KINDS[config.multipliers]
    axes_by_name = place(config.multipliers, config.placement, roles)
    steps = peak_steps(config.train.steps, config.schedule)

    # A tied head shares the embedding's weight, so its constant does all of its scaling: logits start as those of an
    # untied head and, as the embedding's lr does not depend on width, scale with width in the same way.
    head_std = init_std(Role.LM_HEAD, shapes[Role.LM_HEAD], base_shapes[Role.LM_HEAD], config.parametrization)
    tied = head_std / config.parametrization.embedding_std if config.model.tie_embeddings else None
    depth = depth_scaling(config.model.n_layers, config.optimizer, config.parametrization)

    matrices = {}
    for name, role in roles.items():
        optimizer = trained_by(role, config.optimizer)
        rule = scaling(role, shapes[role], base_shapes[role], config.optimizer, config.parametrization)
        axes = axes_by_name[name]
        forward = given.forward.get(role, 1.0)
        start = {axis: kind.start(axis, shapes[role], rule.init_std) for axis in Axis if axis in axes}
        start_factor = 1.0
        if start:
            # One multiplier gets the whole value: scalar before row before column.
            first, start_factor = next(iter(start)), forward
            start[first] = kind.scaled(start[first], forward)
            forward = 1.0
        constant = forward * (tied if role is Role.LM_HEAD and tied else rule.forward)
        constant *= depth.branch if role in BRANCH_OUTPUTS else 1.0
        lr = config.optim.lr * rule.lr * given.lr.get(role, 1.0)
        lr *= depth.lr if role in HIDDEN_ROLES else 1.0
        decay = decay_of(
            optimizer,
            config.optim.weight_decay_mode,
            config.optim.weight_decay * given.weight_decay.get(role, 1.0),
            role,
            lr,
            width_factor=rule.weight_decay,
            steps=steps,
            is_head=config.model.tie_embeddings and role is Role.EMBEDDING,
            section="optim.",
        )
        matrices[name] = MatrixPlan(
            name=name,
            kind=kind.name,
            role=role,
            shape=shapes[role],
            axes=axes,
            start=start,
            start_factor=start_factor,
            constant=constant,
            init_std=rule.init_std,
            optimizer=optimizer,
            lr=lr,
            weight_decay=decay.weight_decay,
            decay_rule=decay.rule,
            eps=_eps(optimizer, config, depth.eps if role in HIDDEN_ROLES else 1.0),
        )
    scales = {"1/sqrt(head_dim)": config.model.head_dim**-0.5, "1/head_dim": 1 / config.model.head_dim}
    scale = scales[config.parametrization.attention_scale]
    return RunPlan(matrices, *_vector_plans(config), *_vector_plans(config, depth), attention_scale=scale)


def _vector_plans(config: RunConfig, depth: DepthScaling | None = None) -> tuple[VectorPlan, VectorPlan]:
    """Of norm weights and multipliers: outside the blocks, or with factors by depth in them."""
    optim = config.optim
    unit = 1.0 if optim.vector_lr_mode == "absolute" else optim.lr
    norm_lr = unit * optim.vector_lr
    multiplier_lr = unit * (optim.vector_lr if optim.multiplier_lr is None else optim.multiplier_lr)
    norm, multiplier = (trained_by(role, config.optimizer) for role in (Role.NORM, Role.MULTIPLIER))
    lr, eps = (depth.lr, depth.eps) if depth else (1.0, 1.0)
    return (
        VectorPlan(norm, norm_lr * lr, 0.0, _eps(norm, config, eps)),
        VectorPlan(multiplier, multiplier_lr * lr, optim.multiplier_weight_decay, _eps(multiplier, config, eps)),
    )


def _eps(optimizer: str, config: RunConfig, factor: float) -> float | None:
    return config.optim.eps * factor if factor != 1 and OPTIMIZERS[optimizer].has_eps else None
