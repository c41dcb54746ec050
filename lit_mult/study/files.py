"""Study files: read by path or, for shipped ones, by name, together with the presets that they name."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from lit_mult.errors import ConfigError, UserError, did_you_mean, one_of
from lit_mult.method.presets import load_preset
from lit_mult.study.spec import StudySpec


def load_study(name_or_path: str, presets: Sequence[str] = (), profile: str | None = None) -> StudySpec:
    """Read a study file by path, or a shipped one by name.

    `profiles` in the file maps the name of a variant, such as gpu, to the fields that it replaces; the profile's name
    is appended to the study's.

    Args:
        name_or_path: a file, or the name of a shipped study.
        presets: preset files to use in place of those that the study names: FILE where it names one, NAME=FILE where
            it names several.
        profile: name of a profile in the file.

    Raises:
        UserError: there is no such study, preset or profile, or it is not valid.
    """
    path = Path(name_or_path)
    if not path.is_file():
        shipped = shipped_studies()
        if name_or_path not in shipped:
            known = f"({', '.join(sorted(shipped))}){did_you_mean(name_or_path, shipped)}"
            raise UserError(f"study {name_or_path}: no such file, nor a shipped study {known}")
        path = shipped[name_or_path]
    try:
        data = yaml.safe_load(path.read_text())
        if isinstance(data, dict):
            data = _with_profile(data, profile)
            data["presets"] = _presets(data.get("presets") or {}, presets)
        return StudySpec.from_dict(data)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"study {path}: not a YAML file ({' '.join(str(error).split())})") from None
    except ConfigError as error:
        raise UserError(f"study {path}: {error}") from None


def _with_profile(data: dict[str, Any], name: str | None) -> dict[str, Any]:
    profiles = data.get("profiles") or {}
    if not isinstance(profiles, dict) or not all(isinstance(profile, dict) for profile in profiles.values()):
        raise ConfigError("profiles", profiles, "must map names to parts of a study")
    plain = {key: value for key, value in data.items() if key != "profiles"}
    if name is None:
        return plain
    if name not in profiles:
        raise ConfigError("--profile", name, f"must be one of the study's: {one_of(name, profiles) or 'it has none'}")
    return _merged(plain, profiles[name] | {"name": f"{plain.get('name')}-{name}"})


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """`below` updated with `above`, recursively in mappings."""
    return below | {
        key: _merged(below[key], value) if isinstance(value, dict) and isinstance(below.get(key), dict) else value
        for key, value in above.items()
    }


def _presets(named: Any, given: Sequence[str]) -> dict[str, Any]:
    """Contents of the presets that a study names, {name: file, name of a shipped preset, or null}."""
    if not isinstance(named, dict):
        raise ConfigError("presets", named, "must map names to preset files")
    sources = dict(named)
    for option in given:
        name, _, source = option.rpartition("=")
        if not name and len(named) == 1:
            name = next(iter(named))
        if name not in named:
            raise UserError(f"--preset {option}: the study names {', '.join(named) or 'no preset'}; give NAME=FILE")
        sources[name] = source
    for name, source in sources.items():
        if source is None:
            raise ConfigError(f"presets.{name}", None, "must be given with --preset FILE (`lit-mult preset` makes one)")
        if isinstance(source, str):
            sources[name] = load_preset(source).model_dump(mode="json")
    return sources


def shipped_studies() -> dict[str, Path]:
    """Study files of the wheel (lit_mult/sweeps) or, in a checkout, of its top-level sweeps/."""
    package = Path(str(resources.files("lit_mult")))
    folder = package / "sweeps"
    if not folder.is_dir():
        folder = package.parent / "sweeps"
    return {path.stem: path for path in folder.glob("*.yaml")}
