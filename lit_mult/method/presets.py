"""Presets: tuned per-role forward, learning-rate and weight-decay multipliers, kept as YAML files.

    version: 1
    name: mine
    source: where the numbers come from
    forward: {k_proj: 0.5}          # role -> factor; a role that is not named has 1
    lr: {q_proj: 2}
    weight_decay: {}
    optimizers:                     # in place of the above for the optimizers named here
      muon:
        lr: {q_proj: 1.5}
        tuning: {...}               # what finding them took; written by a tuning study

A run uses the parts in its tier; multipliers in its config override the preset's. A tied LM head has no lr or weight
decay of its own: a factor on them, other than 1, is refused.
"""

from __future__ import annotations

from functools import cache
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from lit_mult.config import RunConfig, Tier, config_error
from lit_mult.errors import ConfigError, UserError, one_of
from lit_mult.numbers import Number
from lit_mult.registry.kinds import KINDS
from lit_mult.registry.optimizers import check_known
from lit_mult.registry.roles import MATRIX_ROLES, Role
from lit_mult.schema import Tuning

Part = Literal["lr", "weight_decay", "forward"]

TIER_PARTS: Final[dict[Tier, tuple[Part, ...]]] = {
    "NONE": (),
    "LR": ("lr",),
    "LRWD": ("lr", "weight_decay"),
    "FULL": ("lr", "weight_decay", "forward"),
}
"""Parts of the multipliers that each tier uses (arXiv:2601.04890 fig. 7)."""

RATE_PARTS: Final[tuple[Part, ...]] = ("lr", "weight_decay")
"""Parts about the training of a matrix, which a tied head shares with the embedding."""

_PARTS = TIER_PARTS["FULL"]
_SHIPPED = resources.files(__package__) / "presets"


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


class _Multipliers(_Section):
    forward: dict[Role, Annotated[Number, Field(gt=0)]] = Field({})
    """Forward multiplier of the matrix (the muP multipliers that learnable ones replace)."""
    lr: dict[Role, Annotated[Number, Field(gt=0)]] = Field({})
    """Factor on the learning rate of the matrix, on top of the width rule."""
    weight_decay: dict[Role, Annotated[Number, Field(ge=0)]] = Field({})
    """Factor on the weight decay of the matrix, on top of the width rule."""

    @field_validator(*_PARTS, mode="before")
    @classmethod
    def _check_roles(cls, value: Any, info: ValidationInfo) -> Any:
        for role in value if isinstance(value, dict) else ():
            if role not in MATRIX_ROLES:
                known = one_of(role, [known for known in Role if known in MATRIX_ROLES])
                raise ConfigError(f"{info.field_name}.{role}", value[role], f"the role must be one of {known}")
        return value

    @field_validator(*_PARTS)
    @classmethod
    def _in_order_of_roles(cls, value: dict[Role, float]) -> dict[Role, float]:
        return {role: value[role] for role in Role if role in value}


class RoleMultipliers(_Multipliers):
    """Multipliers by role; a role that is not named has 1."""

    tuning: Tuning | None = None
    """Cost and gain of tuning them; None if unknown."""

    def at_tier(self, tier: Tier) -> RoleMultipliers:
        """The part that a tier uses; the rest is 1."""
        return self.model_copy(update={part: {} for part in _PARTS if part not in TIER_PARTS[tier]})


class Preset(_Multipliers):
    """Multipliers by role, for all optimizers or per optimizer."""

    version: Literal[1] = 1
    """Version of the format."""
    name: str
    """Name, for readers."""
    source: str
    """Where the numbers come from."""
    optimizers: dict[str, RoleMultipliers] = Field({})
    """Optimizer -> multipliers in place of those above."""

    @field_validator("optimizers", mode="before")
    @classmethod
    def _check_optimizers(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        for name in value:
            check_known(name, f"optimizers.{name}")
        return {name: _role_multipliers(multipliers, f"optimizers.{name}") for name, multipliers in value.items()}

    def multipliers(self, optimizer: str, tier: Tier) -> RoleMultipliers:
        """The parts in a tier, for an optimizer. Raises: ConfigError when the preset is for other optimizers only."""
        shared = {part: getattr(self, part) for part in _PARTS}
        if optimizer not in self.optimizers and self.optimizers and not any(shared.values()):
            allowed = f"has multipliers for {', '.join(self.optimizers)} only, not for {optimizer}"
            raise ConfigError("parametrization.preset", self.name, allowed)
        return self.optimizers.get(optimizer, RoleMultipliers(**shared)).at_tier(tier)

    def to_yaml(self) -> str:
        """The text of a preset file, roles in the order of the forward pass."""
        head = {"version": self.version, "name": self.name, "source": self.source}
        return yaml.safe_dump(head | self.model_dump(mode="json", exclude_defaults=True), sort_keys=False, width=110)


def load_preset(name_or_path: str) -> Preset:
    """Load a shipped preset by name or a user's YAML file by path.

    Raises:
        UserError: no such preset or file, or the file does not hold a preset.
    """
    entry = _shipped(name_or_path)
    if not entry.is_file():
        entry = Path(name_or_path)
    if not entry.is_file():
        known = one_of(name_or_path, shipped_presets())
        raise ConfigError("parametrization.preset", name_or_path, f"must be a YAML file or one of {known}")
    try:
        return _parsed(entry.read_text())
    except ConfigError as error:
        raise UserError(f"preset {name_or_path}: {error}") from None
    except ValidationError as error:
        raise UserError(f"preset {name_or_path}: {config_error(error)}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"preset {name_or_path}: not a YAML file ({str(error).splitlines()[0]})") from None


def shipped_presets() -> list[str]:
    """Names of the presets that ship."""
    return sorted(item.name.removesuffix(".yaml") for item in _SHIPPED.iterdir())


@cache
def _parsed(text: str) -> Preset:
    return Preset.model_validate(yaml.safe_load(text))


def apply_preset(config: RunConfig, preset: Preset) -> RunConfig:
    """The config with a preset's numbers for its optimizer inlined, so that it depends on no file.

    Multipliers in the config take precedence. Raises: ConfigError when the preset is for other optimizers only.
    """
    ours = preset.multipliers(config.optimizer, "FULL").model_dump(mode="json")
    parts = {f"parametrization.{part}": ours[part] | getattr(config.parametrization, part) for part in _PARTS}
    return config.with_overrides({"parametrization.preset": "neutral", **parts})


def inlined(config: RunConfig) -> RunConfig:
    """The config with the numbers of its preset file inlined; unchanged with a shipped preset.

    Raises:
        UserError: the preset cannot be loaded, or has no numbers for the optimizer.
    """
    name = config.parametrization.preset
    return config if _shipped(name).is_file() else apply_preset(config, load_preset(name))


def run_multipliers(config: RunConfig) -> RoleMultipliers:
    """The multipliers that a run uses: its config's and, for other roles, its preset's, restricted to its tier.

    Without forward multipliers if the kind does not use them.

    Raises:
        UserError: the preset, or a role or value in the config's multipliers, is not valid, or the LM head is tied and
            one of its rates has a factor.
    """
    settings = config.parametrization
    own = _role_multipliers({part: getattr(settings, part) for part in _PARTS}, "parametrization")
    preset = load_preset(settings.preset).multipliers(config.optimizer, "FULL")
    parts = {part: getattr(preset, part) | getattr(own, part) for part in _PARTS}
    if not KINDS[config.multipliers].uses_forward(config.placement.init):
        parts["forward"] = {}
    used = RoleMultipliers(**parts).at_tier(settings.tier)
    if config.model.tie_embeddings:
        _check_tied_head(used)
    return used


def _check_tied_head(used: RoleMultipliers) -> None:
    """Raises: ConfigError when a rate of the LM head, whose matrix is the embedding's, has a factor other than 1."""
    for part in RATE_PARTS:
        factor = getattr(used, part).get(Role.LM_HEAD, 1.0)
        if factor != 1:
            fault = "a tied head (model.tie_embeddings) has the embedding's matrix and rates; 1 overrides a preset"
            raise ConfigError(f"parametrization.{part}.{Role.LM_HEAD.value}", factor, f"must be 1: {fault}")


def _shipped(name: str) -> Traversable:
    return _SHIPPED / f"{name}.yaml"


def _role_multipliers(data: Any, where: str) -> RoleMultipliers:
    """Validate multipliers; errors name the field below `where`."""
    try:
        return RoleMultipliers.model_validate(data)
    except ConfigError as error:
        cause = error
    except ValidationError as error:
        cause = config_error(error)
    raise ConfigError(f"{where}.{cause.field}".rstrip("."), cause.value, cause.allowed)
