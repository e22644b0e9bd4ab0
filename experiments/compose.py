"""From the command line to a `Run`: Hydra composes config.yaml, a set, a size, a tier, an arm and dotted keys.

An arm is a YAML file in a room (experiments/ROOM/ARM.yaml), a tier one in tiers/. This file imports no torch, so that a
typo is answered in a second.
"""

import copy
import itertools
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from experiments.room import ROOT, Experiment, arm_files, load_experiment, rooms
from liquiddiff.config import DATA_SETS, SIZES, BadInput, Run, check, choose, flatten


@dataclass
class Launch(Run):
    """A `Run`, and how to launch it."""

    experiment: str | None = None  # a room: its whole grid
    jobs: int = 1  # local processes of a grid
    dry: bool = False  # print, run nothing
    force: bool = False  # start again although done; the old folder is kept


@cache
def arms() -> dict[str, Path]:
    """Every arm's file, by name."""
    return arm_files()


def tiers() -> dict[str, Path]:
    """Every tier's file, by name."""
    return {path.stem: path for path in sorted((ROOT / "tiers").glob("*.yaml"))}


def room_of(arm: str) -> str:
    """The room that an arm stands in."""
    return arms()[arm].parent.name if arm in arms() else ""


def groups() -> dict[str, list[str]]:
    """What `data=`, `model=`, `tier=` and `ablation=` choose from."""
    return {
        "data": list(DATA_SETS),
        "model": list(SIZES),
        "tier": list(tiers()),
        "ablation": ["baseline", *arms()],
    }


def check_overrides(overrides: list[str]) -> tuple[dict[str, str], dict[str, Any]]:
    """Refuse unknown keys and choices in one line. Returns the chosen groups, and the values of the other keys."""
    if flag := next((override for override in overrides if override.startswith("-")), None):
        raise BadInput(f"{flag}: there is no such option; write key=value, as in dry=true (--help lists the keys)")
    try:
        parsed = OverridesParser.create().parse_overrides(overrides)
    except HydraException as error:
        quoted = "and quote a value with spaces or signs twice: \"data.path='My Photos (2)'\""
        raise BadInput(f"cannot read the command line ({first_line(error)}); write key=value, {quoted}") from error
    chosen, given = {}, {}
    keys = {**flatten(Launch()), **groups()}
    for label in ("arm", "model.size", "data.name"):  # set by ablation=, model=, data=; alone they would only rename it
        del keys[label]
    for override in parsed:
        key, value = override.key_or_group, override.value()
        if override.is_add() or override.is_force_add() or override.is_delete():
            raise BadInput(f"{override.input_line}: every key is there already; write key=value, without +, ++ or ~")
        choose("key", key, keys)
        if override.is_sweep_override():
            raise BadInput(f"{override.input_line}: only ablation=, seed= and optim.lr= take a list a,b,c")
        if key in groups():
            chosen[key] = choose(
                {"ablation": "arm", "data": "data set", "model": "size"}.get(key, key), str(value), groups()[key]
            )
        else:
            given[key] = value
    return chosen, given


def one(overrides: list[str]) -> Launch:
    """The launch that `overrides` ask for. Raises BadInput, in one line."""
    return copy.deepcopy(_one(tuple(overrides), tuple(sorted(arms().items()))))


def of_room(room: Experiment, overrides: list[str]) -> Launch:
    """An arm as `room` trains it: with the room's overrides, and at the rate chosen for it there if none is given.

    The rate was chosen at the room's own size and budget, and is the arm's at no other.
    """
    launch = one([*room.overrides, *overrides])
    rate = room.rates.get((launch.tier, launch.data.name, launch.arm))
    if rate and not any(override.startswith("optim.lr=") for override in [*room.overrides, *overrides]):
        own = ("tier", "data", "data.path", "ablation")
        kept = [override for override in overrides if override.split("=")[0] in own]
        if budget_of(launch) == budget_of(one([*room.overrides, *kept])):
            launch.optim.lr = rate
    return launch


def budget_of(run: Run) -> tuple[Any, ...]:
    """What a learning rate hangs on, beside the arm and the data."""
    return run.model.channels, run.model.blocks, run.data.resolution, run.optim.images, run.optim.batch


@cache
def _one(overrides: tuple[str, ...], _arms: tuple[tuple[str, Path], ...]) -> Launch:
    """`_arms` keeps apart the answers for different rooms."""
    chosen, given = check_overrides(list(overrides))
    arm, place = chosen.pop("ablation", "baseline"), ""
    try:
        config = _base(tuple(f"{group}={name}" for group, name in chosen.items())).copy()
        place = f"{arms().get(arm)}: "  # where what cannot be stands
        config.merge_with(load(arms()[arm]) if arm in arms() else {}, {"arm": arm})
        place = ""
        for key, value in given.items():
            if OmegaConf.is_list(OmegaConf.select(config, key)) and not isinstance(value, list):
                raise BadInput(f"{key}={value} must be a list: write {key}=[{value}]")
            OmegaConf.update(config, key, value)
        launch = OmegaConf.to_object(config)
    except (HydraException, OmegaConfBaseException) as error:
        raise BadInput(place + first_line(error)) from error
    assert isinstance(launch, Launch)
    if launch.data.name == "folder":
        if not launch.data.path:
            raise BadInput("data=folder needs data.path=DIR, a folder of images or parquet files")
        launch.data.name = f"folder-{Path(launch.data.path).expanduser().resolve().name}"
    check(launch)
    return launch


@cache
def _base(groups: tuple[str, ...]) -> DictConfig:
    """The baseline of a set, a size and a tier. Hydra takes a fifth of a second, so an arm is merged into it here."""
    store = ConfigStore.instance()
    store.store(name="launch", node=Launch)
    for name, data in DATA_SETS.items():
        store.store(group="data", name=name, node={"name": name, **data}, package="data")
    for name, size in SIZES.items():
        store.store(group="model", name=name, node={"size": name, **size}, package="model")
    for name, path in tiers().items():
        store.store(group="tier", name=name, node={**load(path), "tier": name}, package="_global_")
    with initialize_config_dir(str(ROOT), version_base="1.3"):
        return compose("config", list(groups))


def plan(overrides: list[str]) -> tuple[Launch, list[Run]]:
    """The launch and its runs: one, or the grid of ablation=a,b, seed=0,1, optim.lr=1e-3,2e-3, or experiment=ROOM|all.

    Runs that several rooms share occur once. Raises BadInput.
    """
    sweeps = {"ablation": [""], "seed": [""], "optim.lr": [""]}
    rest = []
    for override in overrides:
        key, _, values = override.partition("=")
        if key in sweeps and values.strip(", "):
            sweeps[key] = [v.strip() for v in values.split(",") if v.strip()]
        else:
            rest.append(override)
    for seed in filter(None, sweeps["seed"]):
        if not seed.isdecimal():
            raise BadInput(f"seed={seed} must be a whole number, or several as seed=0,1,2")
    sweeps["seed"] = list(dict.fromkeys(str(int(seed)) if seed else "" for seed in sweeps["seed"]))
    grid = next((o.partition("=")[2] for o in rest if o.startswith("experiment=")), None)
    cells: list[tuple[Callable[[list[str]], Launch], list[str], list[str]]]  # how a room composes; arms, seeds
    if grid in (None, "null"):
        cells = [(one, sweeps["ablation"], sweeps["seed"])]
    else:
        names = list(rooms()) if grid == "all" else [choose("experiment", grid, ["all", *rooms()])]
        tier = next((o.partition("=")[2] for o in rest if o.startswith("tier=")), "laptop")
        loaded = [load_experiment(rooms()[name]).at(tier) for name in names]
        if arm := next((a for a in sweeps["ablation"] if a and not any(a in room.arms for room in loaded)), None):
            choose(f"arm of experiment={grid}", arm, {a for room in loaded for a in room.arms})
        cells = [
            (
                partial(of_room, room),
                [a for a in room.arms if a in sweeps["ablation"] or sweeps["ablation"] == [""]],
                sweeps["seed"] if sweeps["seed"] != [""] else [str(s) for s in room.seeds],
            )
            for room in loaded
        ]
    launch: Launch | None = None
    runs: dict[tuple[str, str, str], Run] = {}
    for compose_one, chosen, seeds in cells:
        for arm, lr in itertools.product(chosen, sweeps["optim.lr"]):
            rate = [f"optim.lr={lr}"] if lr else []
            arm_overrides = [*rest, *rate, *([f"ablation={arm}"] if arm else [])]
            composed = compose_one([*arm_overrides, *([f"seed={seeds[0]}"] if seeds[0] else [])])
            launch = launch or composed
            run = as_run(composed)
            signature = run.signature()  # once: it is the same for every seed
            for seed in seeds:
                runs.setdefault((run.arm, signature, seed), replace(run, seed=int(seed or run.seed)))
    assert launch is not None
    return launch, sorted(runs.values(), key=lambda run: run.seed)  # a seed of every arm first: early answers


def as_run(launch: Launch) -> Run:
    """The `Run` in a launch."""
    return Run(**{f.name: getattr(launch, f.name) for f in fields(Run)})


def diff(run: Run, baseline: Run) -> dict[str, tuple[Any, Any]]:
    """{key: (baseline's value, run's value)} where they differ, the arm's name apart."""
    mine, theirs = flatten(run), flatten(baseline)
    return {key: (theirs[key], mine[key]) for key in mine if mine[key] != theirs[key] and key != "arm"}


def load(path: Path) -> dict[str, Any]:
    """A YAML file as a dict. Raises BadInput where it does not parse."""
    try:
        return OmegaConf.to_container(OmegaConf.load(path)) or {}  # type: ignore[return-value]
    except Exception as error:  # yaml and omegaconf raise many kinds
        raise BadInput(f"{path} is not valid YAML: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    """The message of the innermost cause, on one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    key = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("full_key:")), "")
    return f"{key}: {lines[0]}" if key else (lines or [type(error).__name__])[0]
