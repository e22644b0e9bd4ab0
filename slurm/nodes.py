"""What a site's nodes are, as Slurm knows them: slurm/profiles/*.yaml, or any file with the same keys."""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from experiments.compose import first_line
from liquiddiff.config import BadInput, choose

PROFILES = Path(__file__).resolve().parent / "profiles"


@dataclass
class Profile:
    """A kind of node, as Slurm knows it. A site's own is a YAML file with these keys."""

    name: str
    minutes: int  # time limit; a run over it is saved and requeued
    partition: str | None = None
    gpus_per_node: int = 0  # of a node; 0: none, and gpus= counts processes
    cpus_per_task: int = 1
    mem_gb: float = 4  # a process
    array_parallelism: int = 64  # jobs at once
    signal_s: int = 120  # seconds before the limit that are left for saving
    setup: list[str] = field(default_factory=list)  # shell lines before Python: modules, environment
    sbatch: dict[str, Any] = field(default_factory=dict)  # any other option of sbatch, e.g. {account: abc}


def profiles() -> dict[str, Path]:
    """Every profile's file, by name."""
    return {path.stem: path for path in sorted(PROFILES.glob("*.yaml"))}


def load_profile(name: str) -> Profile:
    """slurm/profiles/NAME.yaml, or the file `name`. Raises BadInput."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else profiles()[choose("profile", name, profiles())]
    try:
        values = yaml.safe_load(path.expanduser().read_text())
    except (OSError, yaml.YAMLError) as error:
        raise BadInput(f"profile={name} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict) or "minutes" not in values:
        raise BadInput(f"{path} must be lines of key: value, with minutes: among them")
    for key in values:
        choose(f"key in {path}", key, {f.name for f in fields(Profile)} - {"name"})
    # These two are the shell's and sbatch's: OmegaConf would take their ${HOME} for a key of the profile.
    setup, sbatch = values.pop("setup", None) or [], values.pop("sbatch", None) or {}
    if not isinstance(setup, list) or not all(isinstance(line, str) for line in setup):
        raise BadInput(f"{path}: setup: must be a list of shell lines, each a text")
    if not isinstance(sbatch, dict) or not all(isinstance(key, str) for key in sbatch):
        raise BadInput(f"{path}: sbatch: must be lines of option: value")
    try:
        profile = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Profile(name, 0)), values))
    except OmegaConfBaseException as error:
        raise BadInput(f"{path}: {first_line(error)}") from error
    assert isinstance(profile, Profile)
    profile.setup, profile.sbatch = setup, sbatch
    return profile
