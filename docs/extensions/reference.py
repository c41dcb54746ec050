"""Reference that is read off the code when the pages are built: commands, fields of files and records, registries."""

from __future__ import annotations

import json
import re
from argparse import Action
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args, get_origin

import yaml
from docutils import nodes
from docutils.parsers.rst import directives
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective
from sphinx.util.typing import ExtensionMetadata

from lit_mult import schema
from lit_mult.cli import COMMANDS
from lit_mult.cli.parsing import parser_of
from lit_mult.config import RunConfig, flatten
from lit_mult.registry.kinds import KINDS
from lit_mult.registry.optimizers import OPTIMIZERS
from lit_mult.study import fields
from lit_mult.study.grids import Distribution, Grid, PowersOfTwo


_RUN_OPTIONS = (
    "Every field of a [run config](config.md) is an option as well, as in `--model.d_model 128`. `--config FILE` reads "
    "a part of one first, and `--print_config` prints the whole."
)


def commands() -> Iterator[str]:
    """A section a command: what it does, its arguments and its options."""
    of_a_run = {"config", "print_config"} | set(flatten(RunConfig().to_dict()))
    for name, function in COMMANDS.items():
        yield from (f"(command-{name})=", f"## {name}", "", " ".join((function.__doc__ or "").split()), "")
        actions = [one for one in parser_of(function)._actions if one.dest not in ("help", "")]
        takes_run = any(action.dest == "model.d_model" for action in actions)
        own = [one for one in actions if one.dest not in of_a_run and not _is_section(one)] if takes_run else actions
        for action in own:
            yield from _definition(_heading_of(action), [action.help or "", _default_of(action)])
        if takes_run:
            yield from (_RUN_OPTIONS, "")


def _is_section(action: Action) -> bool:
    return action.dest in RunConfig.model_fields


def _heading_of(action: Action) -> str:
    takes_value = action.nargs != 0
    metavar = action.metavar if isinstance(action.metavar, str) else action.dest.rpartition(".")[2].upper()
    if not action.option_strings:
        return f"`{metavar}`"
    options = ", ".join(action.option_strings)
    return f"`{options} {metavar}`" if takes_value else f"`{options}`"


def _default_of(action: Action) -> str:
    if action.required:
        return "required"
    says_so = action.default in (None, [], False) or "(default" in (action.help or "")
    return "" if says_so else f"default `{action.default}`"


def of_model(model: type[BaseModel], prefix: str, *, hashed: bool) -> Iterator[str]:
    """The fields of a pydantic model: help, values that are allowed, default, and whether a config's hash has it."""
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel) and hashed:
            continue  # a section of the config
        details = [_values(field), _default(field), *([_hashed(field)] if hashed else [])]
        text = " ".join((field.description or "").split())
        yield from _definition(f"`{prefix}{name}`", [text, " · ".join(filter(None, details))])


def _definition(term: str, parts: list[str]) -> Iterator[str]:
    """An entry of a Markdown definition list: what it is, and details, smaller."""
    first, *details = [_escaped(part) for part in parts if part] or ["-"]
    yield from (term, f": {first}", *(f"\n  [{detail}]{{.details}}" for detail in details), "")


def _escaped(text: str) -> str:
    """Help texts are plain text: asterisks, angle brackets and dollars in them are no markup, outside of code."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(part if part.startswith("`") else re.sub(r"([*<>$\[\]|])", r"\\\1", part) for part in parts)


def _values(field: FieldInfo) -> str:
    bounds = [
        f"{sign} {getattr(rule, name)}"
        for rule in field.metadata
        for name, sign in (("gt", ">"), ("ge", "≥"), ("lt", "<"), ("le", "≤"))
        if getattr(rule, name, None) is not None and not (name == "lt" and rule.lt == 2**63)
    ]
    return ", ".join([_type(field.annotation), *bounds])


def _type(annotation: Any) -> str:
    """A type as people write it: `int or null`, or the choices."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " or ".join(f"`{choice}`" for choice in parts)
    if annotation == Grid:
        return "grid"
    if origin is Annotated:
        return _type(parts[0])
    if origin is dict:
        return f"mapping of {_type(parts[0])} to {_type(parts[1])}"
    if origin in (list, tuple):
        return f"list of {', '.join(_type(part) for part in parts if part is not Ellipsis)}"
    if parts:
        return " or ".join(_type(part) for part in parts)
    plain = {type(None): "null", Any: "anything", str: "text", bool: "true or false"}
    return plain.get(annotation, getattr(annotation, "__name__", str(annotation)))


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    default = field.get_default(call_default_factory=True)
    return "" if isinstance(default, BaseModel) or default == "" else f"default `{json.dumps(default)}`"


def _hashed(field: FieldInfo) -> str:
    mark = field.json_schema_extra
    kind = mark.get("hashed") if isinstance(mark, Mapping) else None
    return {"never": "not in the hash", "unless default": "in the hash unless default"}.get(str(kind), "in the hash")


def config_fields() -> Iterator[str]:
    """The fields of a run config, a section for each of its sections."""
    yield from ("## The whole run", "")
    yield from of_model(RunConfig, "", hashed=True)
    for name, field in RunConfig.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from (f"## {name}", "", _first_paragraph(field.annotation), "")
            yield from of_model(field.annotation, f"{name}.", hashed=True)


def _sections(models: Mapping[str, type[BaseModel]]) -> Iterator[str]:
    for title, model in models.items():
        yield from (f"## {title}", "", _first_paragraph(model), "")
        yield from of_model(model, "", hashed=False)


def _first_paragraph(model: type[BaseModel]) -> str:
    return " ".join((model.__doc__ or "").split("\n\n")[0].split())


def study_fields() -> Iterator[str]:
    """The fields of a study file and of its parts."""
    parts = {
        "A study": fields.StudyFields,
        "budget": fields.Budget,
        "questions": schema.Question,
        "pruner": fields.Pruner,
        "rerank": fields.Rerank,
        "A grid of powers of two": PowersOfTwo,
        "A range to sample from": Distribution,
    }
    return _sections(parts)


def record_fields() -> Iterator[str]:
    """The fields of records and of their parts."""
    parts = {
        "A run": schema.RunRecord,
        "cell": schema.CellInfo,
        "regime": schema.MatrixRegime,
        "An evaluation": schema.EvaluationRecord,
        "scores": schema.Score,
        "The tuning in a preset": schema.Tuning,
    }
    return _sections(parts)


def studies() -> Iterator[str]:
    """The studies that ship: title, profiles, and the comment that their file begins with."""
    for path in sorted((Path(__file__).parents[2] / "sweeps").glob("*.yaml")):
        text = path.read_text(encoding="utf-8")
        study = yaml.safe_load(text)
        comment = " ".join(line.removeprefix("#").strip() for line in text.partition("name:")[0].splitlines())
        profiles = ", ".join(f"`{name}`" for name in study.get("profiles", {}))
        yield from _definition(f"`{study['name']}`", [study["title"], comment, profiles and f"profiles: {profiles}"])


def kinds() -> Iterator[str]:
    """A table of the multiplier kinds."""
    yield from ("| kind | multipliers | a preset's forward multipliers | redundancies known |", "|---|---|---|---|")
    for kind in KINDS.values():
        yield f"| `{kind.name}` | {_escaped(kind.help)} | {kind.forward} | {_mark(kind.is_product)} |"


def optimizers() -> Iterator[str]:
    """A table of the optimizers, and of what each supports."""
    yield "| optimizer | | width rules | depth rules | noise reference | stacks | shards |"
    yield "|---|---|---|---|---|---|---|"
    for spec in OPTIMIZERS.values():
        both = (spec.width_rules, spec.depth_rules)
        rules = (", ".join(f"`{rule}`" for rule in sorted(one)) or "-" for one in both)
        marks = (_mark(value) for value in (spec.noise, spec.stacked, spec.sharded))
        yield f"| `{spec.name}` | {_escaped(spec.help)} | {' | '.join([*rules, *marks])} |"


def _mark(supported: object) -> str:
    return "yes" if supported else "-"


class _Generated(SphinxDirective):
    """`{from-code} NAME`: the Markdown of one of the functions above."""

    required_arguments: ClassVar = 1
    sources: ClassVar[dict[str, Callable[[], Iterator[str]]]] = {
        "commands": commands,
        "config": config_fields,
        "study": study_fields,
        "studies": studies,
        "records": record_fields,
        "kinds": kinds,
        "optimizers": optimizers,
    }

    def run(self) -> list[nodes.Node]:
        lines = self.sources[directives.choice(self.arguments[0], tuple(self.sources))]()
        return self.parse_text_to_nodes("\n".join(lines), allow_section_headings=True)


def setup(app: Sphinx) -> ExtensionMetadata:
    """Register the directive."""
    app.add_directive("from-code", _Generated)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
