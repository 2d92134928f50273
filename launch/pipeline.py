"""Pipeline files: several jobs that are submitted as one, each with what those before it have made.

    name: world
    stages:
      tokenizer: {job: train_tokenizer_vqvae, args: --data_dir data/coinrun}
      lam:       {job: train_lam, args: --data_dir data/coinrun}
      dynamics:
        job: train_dynamics_maskgit
        args: --data_dir data/coinrun --tokenizer_checkpoint {tokenizer} --lam_checkpoint {lam}
        set: [nodes=4]

`{tokenizer}` stands for the run directory of that stage, and makes this stage wait until it has finished; `after: [lam]`
only waits. The runs are called `<name>-<stage>`. Stages come in the order in which they can run.
"""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from launch.errors import UserError, did_you_mean
from launch.plain_yaml import YamlError, read_yaml
from launch.text import shown, told, unfit

_PLACE = re.compile(r"\{([A-Za-z0-9_-]+)\}")


@dataclass(frozen=True)
class Stage:
    """One job of a pipeline; `after` are the stages it waits for, `set` overrides keys of the cluster."""

    name: str
    job: str
    arguments: tuple[str, ...]
    after: tuple[str, ...]
    set: tuple[str, ...]


@dataclass(frozen=True)
class Pipeline:
    """The stages of a pipeline, in an order in which they can run."""

    name: str
    stages: tuple[Stage, ...]


class _StageText(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    job: str
    args: Annotated[list[str], BeforeValidator(lambda v: shlex.split(v) if isinstance(v, str) else v)] = []
    after: list[str] = []
    set: list[str] = []


class _PipelineText(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    stages: dict[str, _StageText] = Field(min_length=1, max_length=100)


def fill_places(argument: str, places: dict[str, str]) -> str:
    """Return an argument with each `{stage}` replaced by that stage's run directory."""
    return _PLACE.sub(lambda match: places.get(match.group(1), match.group()), argument)


def read_pipeline(path: Path) -> Pipeline:
    """Read a pipeline file.

    Raises:
        UserError: it cannot be read, or a key or a stage's name is wrong.
    """
    try:
        values, _ = read_yaml(path)
        text = _PipelineText.model_validate(values)
    except OSError as error:
        raise UserError(f"--pipeline {path}: cannot be read: {error.strerror}") from error
    except YamlError as error:
        line = "" if error.line is None else f" (line {error.line})"
        raise UserError(f"--pipeline {path}: not valid YAML: {error}{line}") from error
    except ValidationError as error:
        raise UserError(f"--pipeline {path}: {_first_problem(error)}") from error
    stages: list[Stage] = []
    for name, stage in text.stages.items():
        problems = [unfit(part) for part in (name, stage.job, *stage.after, *stage.set)]
        if found := next(filter(None, [*problems, *(unfit(part, lines=True) for part in stage.args)]), None):
            raise UserError(f"--pipeline {path}: stage {shown(name)}: {found}")
        places = [place for argument in stage.args for place in _PLACE.findall(argument)]
        after = tuple(dict.fromkeys([*stage.after, *places]))
        known = [one.name for one in stages]
        for other in after:
            if other not in known:
                where = "comes later in the file; put it first" if other in text.stages else "is no stage of the file"
                raise UserError(
                    f"--pipeline {path}: stage {shown(name)}: {shown(other)} {where}{did_you_mean(other[:99], known)}"
                )
        stages.append(Stage(name, stage.job, tuple(stage.args), after, tuple(stage.set)))
    return Pipeline(text.name, tuple(stages))


def _first_problem(error: ValidationError) -> str:
    """Turn the first complaint of pydantic into words; a misspelt key comes before all others."""
    first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    place = [str(part) for part in first["loc"]]
    where = told(".".join(place) or "the file")
    if first["type"] == "extra_forbidden":
        keys = _StageText.model_fields if place[0] == "stages" else _PipelineText.model_fields
        return f"{where}: unknown key{did_you_mean(place[-1][:99], keys)} (keys: {', '.join(keys)})"
    if first["type"] == "missing":
        return f"{where}: the key is missing"
    if first["type"] == "string_pattern_mismatch":
        return f"{where} is {shown(first['input'])}; expected letters, digits, '.', '_' and '-', the first a letter or digit"
    message = first["msg"].removeprefix("Value error, ")
    return f"{where}: {message[:1].lower()}{message[1:]}"
