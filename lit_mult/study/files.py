"""Study files: read by path or, for the shipped ones, by name; the presets they name are read in."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from lit_mult.errors import ConfigError, UserError
from lit_mult.parametrization.presets import load_preset
from lit_mult.study.spec import StudySpec


def load_study(name_or_path: str, presets: Sequence[str] = ()) -> StudySpec:
    """Read a study file by path, or a shipped one by name.

    Args:
        name_or_path: a file, or the name of a shipped study.
        presets: preset files to use in place of those that the study names: FILE where it names one, NAME=FILE where
            it names several.

    Raises:
        UserError: there is no such study or preset, or it is not valid.
    """
    path = Path(name_or_path)
    if not path.is_file():
        shipped = _shipped_studies()
        if name_or_path not in shipped:
            raise UserError(f"study {name_or_path}: no such file, nor a shipped study ({', '.join(sorted(shipped))})")
        path = shipped[name_or_path]
    try:
        data = yaml.safe_load(path.read_text())
        if isinstance(data, dict):
            data["presets"] = _presets(data.get("presets") or {}, presets)
        return StudySpec.from_dict(data)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"study {path}: not a YAML file ({' '.join(str(error).split())})") from None
    except ConfigError as error:
        raise UserError(f"study {path}: {error}") from None


def _presets(named: Any, given: Sequence[str]) -> dict[str, Any]:
    """Contents of the presets that a study names, {name: file, name of a shipped preset, or null}."""
    if not isinstance(named, dict):
        raise ConfigError("presets", named, "must map names to preset files")
    sources = dict(named)
    for one in given:
        name, _, source = one.rpartition("=")
        if not name and len(named) == 1:
            name = next(iter(named))
        if name not in named:
            raise UserError(f"--preset {one}: the study names {', '.join(named) or 'no preset'}; give NAME=FILE")
        sources[name] = source
    for name, source in sources.items():
        if source is None:
            raise ConfigError(f"presets.{name}", None, "must be given with --preset FILE (`lit-mult preset` makes one)")
        if isinstance(source, str):
            sources[name] = load_preset(source).model_dump(mode="json")
    return sources


def _shipped_studies() -> dict[str, Path]:
    """Study files of the wheel (lit_mult/sweeps) or, in a checkout, of its top-level sweeps/."""
    package = Path(str(resources.files("lit_mult")))
    folder = package / "sweeps"
    if not folder.is_dir():
        folder = package.parent / "sweeps"
    return {path.stem: path for path in folder.glob("*.yaml")}
