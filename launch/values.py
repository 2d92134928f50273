"""What may stand as a value in a cluster file: the types that `launch.config` makes its keys of.

Values reach shells, schedulers and Google Cloud. What those would take for something else (an option, another path, a
variable of the launcher's own), or would store although it is secret, is refused here, in words that say what is expected.
"""

import os
import re
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field

from launch.errors import UserError
from launch.text import shown
from launch.topology import find_tpu

# Set for each process by the launcher; a cluster file that set them too would contradict it.
OWNED_VARIABLES = frozenset(
    {"JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID", "JASMINE_RUN_DIR", "JASMINE_ATTEMPT"}
)

# Names whose values are not written anywhere. The URL of a database has a password in it. Where credentials lie is no secret,
# and Google's libraries and Amazon's have variables for that.
SECRET_NAME = re.compile(
    r"KEY|TOKEN(?!IZER)|SECRET|PASSW(OR)?D|PASSPHRASE|_PAT\b|_PASS\b|DATABASE_URL"
    r"|(?<!GOOGLE_APPLICATION_)CREDENTIAL(?!S?_(FILE|PATH|DIR)\b)",
    re.IGNORECASE,
)

# What a shell takes as a variable's name.
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_ID = re.compile(r"[a-z0-9]([a-z0-9.:_-]*[a-z0-9])?", re.IGNORECASE)
_SLURM_TIME = re.compile(r"\d+|\d+:\d\d(:\d\d)?|\d+-\d+(:\d\d){0,2}")
_ZONE = re.compile(r"[a-z]+-[a-z]+\d+-[a-z0-9]+")
_LABEL = re.compile(r"[a-z][a-z0-9_-]{0,62}")


def _numbers_as_text(env: Any) -> Any:
    """Let `OMP_NUM_THREADS: 2` mean "2"; a bare `true` stays an error, for programs disagree on how to spell it."""
    if not isinstance(env, dict):
        return env
    return {k: str(v) if isinstance(v, int | float) and not isinstance(v, bool) else v for k, v in env.items()}


def _variables(env: dict[str, str]) -> dict[str, str]:
    for name in env:
        if not _VARIABLE.fullmatch(name):
            raise ValueError(f"{shown(name)} is no variable's name: letters, digits and '_', the first no digit")
    return env


def _not_ours(env: dict[str, str]) -> dict[str, str]:
    _variables(env)
    if taken := sorted(OWNED_VARIABLES & env.keys()):
        raise ValueError(f"{taken[0]} is set by the launcher for each process; leave it out")
    return env


def _no_secrets(env: dict[str, str]) -> dict[str, str]:
    if secret := next((name for name in env if SECRET_NAME.search(name)), None):
        raise ValueError(f"{secret} looks like a secret, and would be stored: name it under secrets instead")
    return env


def _secrets_of_a_vm(secrets: dict[str, str]) -> dict[str, str]:
    for name, source in secrets.items():
        if not re.fullmatch(r"projects/[^/]+/secrets/[^/]+(/versions/[^/]+)?|/.+", source):
            raise ValueError(
                f"{name}: this does not reach a VM without being stored on the way; give the name of a secret in Secret "
                "Manager, projects/PROJECT/secrets/NAME, or the path of a file on the VMs"
            )
    return secrets


def _for_sbatch(text: str) -> str:
    if "\\" in text:
        raise ValueError(f"{shown(text)} has a backslash in it, which sbatch would leave out")
    return text


def _slurm_options(lines: list[str]) -> list[str]:
    for line in lines:
        if not line.startswith("-"):
            raise ValueError(
                f"{shown(line)} is no option of sbatch; write it as sbatch takes it, for example --exclusive"
            )
    return lines


def _minutes_as_text(value: Any) -> Any:
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _a_duration(text: str) -> str:
    if not _SLURM_TIME.fullmatch(text):
        raise ValueError(f"{shown(text)} is no time as sbatch takes it, such as 90 (minutes), 12:00:00 or 2-00:00:00")
    return text


def _an_image(text: str) -> str:
    if text.startswith("-"):
        raise ValueError(f"{shown(text)} would be an option of the container's runtime")
    return text


def _a_folder(text: str) -> str:
    if not text.startswith(("/", "~/")):
        raise ValueError(f"{shown(text)} is no full path; it begins with / or ~/")
    return text


def _an_id(text: str) -> str:
    if not _ID.fullmatch(text):
        raise ValueError(f"{shown(text)} is no name in Google Cloud: letters, digits and '-'")
    return text


def _a_project(text: str) -> str:
    return text if "$" in text else _an_id(text)


def _a_zone(text: str) -> str:
    if not _ZONE.fullmatch(text):
        raise ValueError(f"{shown(text)} is no zone of Google Cloud; write one such as us-west4-a")
    return text


def _a_tpu(name: str) -> str:
    if len(name) > 40:
        raise ValueError(f"{shown(name)} is too long for a type of TPU")
    try:
        return find_tpu(name).name
    except UserError as error:
        raise ValueError(str(error).removeprefix("accelerator_type ")) from error


def _one_as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _labels(labels: dict[str, str]) -> dict[str, str]:
    for key, value in labels.items():
        if not _LABEL.fullmatch(key) or not re.fullmatch(r"[a-z0-9_-]{0,63}", value) or key.startswith("jasmine"):
            raise ValueError(
                f"{shown({key: value})}: labels are lower-case letters, digits, '_' and '-', and do not begin with jasmine"
            )
    return labels


Text = Annotated[str, Field(min_length=1)]
SbatchText = Annotated[Text, AfterValidator(_for_sbatch)]
Folder = Annotated[Text, AfterValidator(_a_folder)]
Image = Annotated[Text, AfterValidator(_an_image)]
Duration = Annotated[str, BeforeValidator(_minutes_as_text), AfterValidator(_a_duration)]
SlurmOptions = Annotated[list[str], AfterValidator(_slurm_options)]

Variables = Annotated[dict[str, str], BeforeValidator(_numbers_as_text), AfterValidator(_not_ours)]
PlainVariables = Annotated[Variables, AfterValidator(_no_secrets)]
Secrets = Annotated[dict[str, Text], AfterValidator(_not_ours)]
SecretsOfVms = Annotated[Secrets, AfterValidator(_secrets_of_a_vm)]

TpuName = Annotated[str, AfterValidator(_a_tpu)]
# A variable that is not set stays as it is: a dry run shows it, a submission refuses it.
Project = Annotated[Text, AfterValidator(os.path.expandvars), AfterValidator(_a_project)]
Zones = Annotated[list[Annotated[str, AfterValidator(_a_zone)]], Field(min_length=1), BeforeValidator(_one_as_list)]
Labels = Annotated[dict[str, str], AfterValidator(_labels)]
