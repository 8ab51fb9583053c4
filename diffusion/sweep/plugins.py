"""Is what launches or searches there? Hydra's plugins are extras of this package, each with a command that installs it.

Nothing here imports torch.
"""

import importlib.util
import re
import warnings
from typing import Any

# Packages of `hydra_plugins`, and the extra of pyproject.toml that brings each.
EXTRAS = {
    "hydra_joblib_launcher": "joblib",
    "hydra_submitit_launcher": "slurm",
    "hydra_ray_launcher": "ray",
    "hydra_optuna_sweeper": "optuna",
}
# The extras that bring options of hydra/launcher and hydra/sweeper, for where the plugin is not there to be asked.
OPTIONS = {
    "launcher": {
        "joblib": "joblib",
        "ray": "ray",
        "ray_aws": "ray",
        "slurm": "slurm",
        "slurm_local": "slurm",
        "submitit_local": "slurm",
        "submitit_slurm": "slurm",
    },
    "sweeper": {"optuna": "optuna"},
}


def let_ours_stand_first() -> None:
    """Silence what Hydra says about configs of the plugins' own names: configs/hydra/launcher/{joblib,ray}.yaml."""
    warnings.filterwarnings("ignore", message=r"(?s).*hydra/\w+/\w+' is validated against ConfigStore schema")


def install_command(extra: str) -> str:
    """Return what brings an extra of this package."""
    return f"uv sync --extra {extra}"


def check_plugins(cfg: Any) -> None:
    """Raise ValueError where a sweep's launcher or sweeper is not installed."""
    for role in ("launcher", "sweeper"):
        target = cfg.hydra[role].get("_target_", "")
        package = target.split(".")[1] if target.startswith("hydra_plugins.") else None
        if package is not None and not _is_there(f"hydra_plugins.{package}"):
            option = cfg.hydra.runtime.choices.get(f"hydra/{role}") or package
            raise ValueError(_missing(f"hydra/{role}={option}", EXTRAS.get(package)))


def explain_missing(error: Exception) -> str | None:
    """Return one line about a launcher or sweeper that is not there to compose with; None for other errors."""
    if not re.search(r"[Cc]ould not (find|load) 'hydra/", str(error)):
        return None
    found = re.search(r"'hydra/(launcher|sweeper)/([^']+)'", str(error))
    if found is None:
        return None
    role, option = found.groups()
    if option in OPTIONS[role]:
        return _missing(f"hydra/{role}={option}", OPTIONS[role][option])
    there = re.findall(r"^\t(\S+)$", str(error), flags=re.MULTILINE)
    absent = [f"{name} (`{install_command(extra)}`)" for name, extra in OPTIONS[role].items() if name not in there]
    more = f"; to be installed: {', '.join(absent)}" if absent else ""
    return f"hydra/{role} has no option {option!r}; options: {', '.join(there)}{more}"


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _missing(what: str, extra: str | None) -> str:
    bring = f"`{install_command(extra)}` installs it" if extra else "install the plugin that has it"
    return f"{what} needs a plugin that is not installed; {bring}"
