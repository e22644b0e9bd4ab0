"""The three files that install the project say the same."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOCK = (ROOT / "requirements.lock").read_text()
PINS = dict(re.findall(r"^([A-Za-z0-9._-]+)==(\S+)", LOCK, flags=re.MULTILINE))


FOLDERS = ("liquiddiff", "experiments", "analysis", "slurm")


def imports(folder, everywhere=True):
    for path in (ROOT / folder).rglob("*.py"):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree) if everywhere else tree.body:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            yield from ((path, name.split(".")[0]) for name in names)


def wanted():
    extras = PROJECT["optional-dependencies"]
    lines = [*PROJECT["dependencies"], *(line for extra in extras.values() for line in extra)]
    return [Requirement(line) for line in lines if not line.startswith("liquiddiff")]


def test_every_dependency_is_locked_inside_its_range():
    for requirement in wanted():
        pin = PINS[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(pin), f"{requirement} is locked at {pin}: run `make lock`"


def test_the_lock_has_hashes_and_no_address():
    assert "://" not in LOCK
    blocks = re.split(r"^(?=[A-Za-z0-9._-]+==)", LOCK, flags=re.MULTILINE)[1:]
    assert all("--hash=sha256:" in block for block in blocks)


def test_environment_yml_reads_the_same_files():
    from rattler import MatchSpec

    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    conda = [line for line in environment["dependencies"] if isinstance(line, str)]
    (pip,) = [line["pip"] for line in environment["dependencies"] if isinstance(line, dict)]
    specs = {MatchSpec(line).name.normalized: MatchSpec(line) for line in conda}
    assert set(specs) == {"python", "pip"}
    assert str(specs["python"].version).startswith(PROJECT["requires-python"])
    assert pip == ["-r requirements.lock"]


def test_every_import_is_declared():
    declared = {canonicalize_name(r.name).replace("-", "_") for r in wanted()}
    # a wheel's odd module name; a kernel used where it happens to be; what torch's wheels for CUDA bring along
    declared |= {"efficientnet_lite0_model", "mamba_ssm", "triton"}
    alias = {"yaml": "pyyaml", "hydra": "hydra_core", "PIL": "pillow", "sklearn": "scikit_learn"}
    for folder in FOLDERS:
        for path, name in imports(folder):
            if name not in sys.stdlib_module_names and name not in FOLDERS:
                assert alias.get(name, name) in declared, f"{path} imports {name}, which pyproject.toml does not name"


def test_arrows_run_one_way():
    rank = {"liquiddiff": 0, "analysis": 1, "experiments": 2, "slurm": 3}
    for folder, mine in rank.items():
        # A command of analysis/ may ask experiments/ for its rooms when it runs; no module depends on what is above it.
        for path, name in imports(folder, everywhere=False):
            assert rank.get(name, mine) <= mine, (
                f"{path} imports {name}: arrows run slurm, experiments, analysis, liquiddiff"
            )


def test_no_registry_host_or_local_path_is_committed():
    files = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-co", "--exclude-standard"], capture_output=True, text=True
    )
    for name in files.stdout.split():
        path = ROOT / name
        if path.suffix in {".py", ".yml", ".yaml", ".toml", ".md", ".lock", ""} and path.is_file():
            assert not re.search(r"https?://[\w.-]+/simple", path.read_text(errors="ignore")), path
