"""Presets: tuned per-role forward, learning-rate and weight-decay multipliers, kept as YAML files."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, model_validator

from lit_mult.config import Tier, config_error
from lit_mult.errors import ConfigError, UserError
from lit_mult.roles import MATRIX_ROLES, Role

_LEFT_OUT: dict[Tier, tuple[str, ...]] = {
    "NONE": ("lr", "weight_decay", "forward"),
    "LR": ("weight_decay", "forward"),
    "LRWD": ("forward",),
    "FULL": (),
}


class Preset(BaseModel):
    """Multipliers by role; a role that is not named has 1."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    name: str
    source: str
    """Where the numbers come from."""
    forward: dict[Role, FiniteFloat] = Field(default_factory=dict)
    """Forward multiplier of the matrix (the muP multipliers that learnable ones replace)."""
    lr: dict[Role, FiniteFloat] = Field(default_factory=dict)
    """Factor on the learning rate of the matrix, on top of the width rule."""
    weight_decay: dict[Role, FiniteFloat] = Field(default_factory=dict)
    """Factor on the weight decay of the matrix, on top of the width rule."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        for part, floor in (("forward", "above 0"), ("lr", "above 0"), ("weight_decay", "0 or above")):
            for role, value in getattr(self, part).items():
                if role not in MATRIX_ROLES:
                    raise ConfigError(f"{part}.{role}", value, "only weight matrices have preset multipliers")
                if value < 0 or (value == 0 and floor == "above 0"):
                    raise ConfigError(f"{part}.{role}", value, f"must be {floor}")
        return self

    def at_tier(self, tier: Tier) -> Preset:
        """The part of the preset that a tier uses (arXiv:2601.04890 fig. 7): NONE, LR, LRWD or FULL."""
        return self.model_copy(update={part: {} for part in _LEFT_OUT[tier]})


def load_preset(name_or_path: str) -> Preset:
    """Load a shipped preset by name or a user's YAML file by path.

    Raises:
        UserError: no such preset or file, or the file does not hold a preset.
    """
    shipped = resources.files(__package__) / "presets"
    entry = shipped / f"{name_or_path}.yaml"
    if not entry.is_file():
        entry = Path(name_or_path)
    if not entry.is_file():
        names = sorted(item.name.removesuffix(".yaml") for item in shipped.iterdir())
        raise ConfigError("parametrization.preset", name_or_path, f"must be a YAML file or one of {', '.join(names)}")
    try:
        return Preset.model_validate(yaml.safe_load(entry.read_text()))
    except ConfigError as error:
        raise UserError(f"preset {name_or_path}: {error}") from None
    except ValidationError as error:
        raise UserError(f"preset {name_or_path}: {config_error(error)}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"preset {name_or_path}: not a YAML file ({str(error).splitlines()[0]})") from None
