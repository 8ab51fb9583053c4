"""What was varied among runs, and which of them differ by their seed alone?"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from diffusion.report.runs import PLACES, SEED, Run, Sweep

LACKING = "–"  # a key that this run has no value for
MANY = 12  # values of a key that are listed
# Keys that never tell two choices apart: where a run lies, what it prints, how its process works.
IDLE = (*PLACES, "sweep", "forecast", "threads", "devices", "logger", "callbacks.progress", "debug", "data.num_workers")
# Where one of these changes, the loss itself is another one, and a lower one is no better model.
LOSS_DEFINING = (
    *("schedule", "loss", "data", "num_train_timesteps", "timestep_sampler", "autoencoder", "experiment"),
    *("task.parameterization", "task.variance", "diffusion", "latent_cache"),
)


@dataclass(frozen=True)
class Row:
    """Runs that differ by their seed alone: one row of the table of results."""

    values: tuple[str, ...]  # of the varied keys but the seed, in their order
    label: str
    runs: tuple[int, ...]  # their numbers among all runs


@dataclass(frozen=True)
class Varied:
    """All runs of a report, told apart by what was varied."""

    runs: tuple[Run, ...]
    keys: tuple[str, ...]  # what was varied, without the seed
    names: tuple[str, ...]  # the same, as short as they are clear
    values: tuple[tuple[str, ...], ...]  # of each run, of each key
    rows: tuple[Row, ...]
    also: Mapping[str, tuple[str, ...]]  # keys that changed together with a key, without being chosen

    @property
    def labels(self) -> list[str]:
        """What to call each run: its row and its seed; its folder's name where nothing was varied."""
        seeds = len({run.seed for run in self.runs if run.seed}) > 1
        own = [
            ", ".join([*self._words(values), *([f"seed={run.seed}"] if seeds and run.seed else [])]) or run.name
            for run, values in zip(self.runs, self.values, strict=True)
        ]
        return [
            name if own.count(name) == 1 else f"{name} ({run.name})" for name, run in zip(own, self.runs, strict=True)
        ]

    def choices(self, key: str) -> list[str]:
        """Return the values of a key in the order in which they first come."""
        number = self.keys.index(key)
        return list(dict.fromkeys(values[number] for values in self.values))

    def range_of(self, key: str) -> str:
        """Return what a key was set to: all values, or where they are many, how many and between which."""
        values = self.choices(key)
        if len(values) <= MANY:
            return " · ".join(values)
        try:
            ends = [f"{end:g}" for end in (min(map(float, values)), max(map(float, values)))]
        except ValueError:
            return f"{len(values)} values: {' · '.join(values[:MANY])} · …"
        return f"{len(values)} values from {ends[0]} to {ends[1]}"

    @property
    def loss_defining(self) -> list[str]:
        """The names of varied keys that make the loss another loss, themselves or by what changed with them."""
        named = zip(self.keys, self.names, strict=True)
        return [name for key, name in named if any(map(_defines_loss, (key, *self.also.get(key, ()))))]

    def _words(self, values: Sequence[str]) -> list[str]:
        return [f"{name}={value}" for name, value in zip(self.names, values, strict=True)]


def find_varied(sweeps: Sequence[Sweep]) -> Varied:
    """Tell the runs of several sweeps apart by their overrides, or where a run has none, by their configs."""
    runs = tuple(run for sweep in sweeps for run in sweep.runs)
    also: dict[str, tuple[str, ...]] = {}
    if all(run.overrides for run in runs):
        order = [*(key for sweep in sweeps for key in sweep.keys), *(key for run in runs for key in run.overrides)]
        wanted = [key for key in dict.fromkeys(order) if not _is_idle(key)]
        keys = [key for key in wanted if len({value_of(run, key) for run in runs}) > 1]
    else:
        keys, also = _differing(runs)
    keys = [key for key in keys if key != SEED]
    names = short_names(keys)
    values = tuple(tuple(value_of(run, key) for key in keys) for run in runs)
    everything = runs[0].name if len(runs) == 1 else "all runs"
    return Varied(runs, tuple(keys), tuple(names), values, tuple(_rows(values, names, everything)), also)


def value_of(run: Run, key: str) -> str:
    """Return what a run has for a key of the config or a group of it, as short text."""
    if key in run.overrides:
        return _normal(run.overrides[key])
    node: Any = run.config
    for part in key.replace("/", ".").split("."):
        if not isinstance(node, Mapping) or part not in node:
            return LACKING
        node = node[part]
    if isinstance(node, Mapping):
        return str(node.get("_target_", "none")).rpartition(".")[2]
    return _normal("null" if node is None else str(node).lower() if isinstance(node, bool) else str(node))


def short_names(keys: Sequence[str]) -> list[str]:
    """Shorten dotted keys to as many last parts as tell them apart: task.parameterization to parameterization."""
    names = []
    for key in keys:
        parts = key.split(".")
        ends = [".".join(parts[i:]) for i in range(len(parts) - 1, -1, -1)]
        names.append(next((end for end in ends if sum(f".{k}".endswith(f".{end}") for k in keys) == 1), key))
    return names


def _normal(text: str) -> str:
    """Return a value as one spelling of it: 1e-3 and 0.001 are the same."""
    bare = text.strip("\"'")
    try:
        number = float(bare)
    except ValueError:
        return bare
    return bare if bare.isdigit() or not math.isfinite(number) else f"{number:.6g}"


def _is_idle(key: str) -> bool:
    return any(key == idle or key.startswith(f"{idle}.") for idle in IDLE)


def _defines_loss(key: str) -> bool:
    return any(key == head or key.startswith(f"{head}.") for head in LOSS_DEFINING)


def _differing(runs: Sequence[Run]) -> tuple[list[str], dict[str, tuple[str, ...]]]:
    """Return as few of the config's keys as tell the runs apart, and for each the keys that changed with it.

    A config repeats itself (`diffusion.schedule` is `schedule`): of keys that part the runs in the same way the
    shortest one, which people set, stands for all, and a key that only repeats what others say is left out.
    """
    candidates = dict.fromkeys(key for run in runs for key in run.flat if not _is_idle(key))
    together: dict[tuple[int, ...], list[str]] = {}
    for key in candidates:
        told = [_normal(_text(run.flat[key])) if key in run.flat else LACKING for run in runs]
        if len(set(told)) > 1:
            together.setdefault(tuple(map(told.index, told)), []).append(key)
    parted = {min(keys, key=lambda key: (key != SEED, key.count("."))): parts for parts, keys in together.items()}
    keys: list[str] = []
    apart: list[tuple[int, ...]] = [() for _ in runs]
    for key in sorted(parted, key=lambda key: (key != SEED, key.count("."))):
        finer = [(*before, part) for before, part in zip(apart, parted[key], strict=True)]
        if len(set(finer)) > len(set(apart)):
            keys, apart = [*keys, key], finer
    also = {key: tuple(other for other in together[parted[key]] if other != key) for key in keys}
    return [key.removesuffix("._target_") for key in keys], {k.removesuffix("._target_"): v for k, v in also.items()}


def _text(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n").strip()


def _rows(values: Sequence[tuple[str, ...]], names: Sequence[str], everything: str) -> list[Row]:
    numbers: dict[tuple[str, ...], list[int]] = {}
    for number, own in enumerate(values):
        numbers.setdefault(own, []).append(number)
    return [
        Row(
            own, ", ".join(f"{name}={value}" for name, value in zip(names, own, strict=True)) or everything, tuple(them)
        )
        for own, them in numbers.items()
    ]
