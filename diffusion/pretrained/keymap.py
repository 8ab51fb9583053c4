"""How do tensors change names between us and a foreign layout without loss, in both directions?

A `KeyMap` is a bijection: rules that rename one tensor each, if need be with a reversible change of shape or order.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


@dataclass(frozen=True)
class Transform:
    """A reversible change: `load` takes the foreign tensors to ours, `save` takes ours to the tuple of foreign ones."""

    load: Callable[..., Tensor]
    save: Callable[[Tensor], tuple[Tensor, ...]]


SAME = Transform(lambda tensor: tensor, lambda tensor: (tensor,))
CONV1D = Transform(lambda tensor: tensor.flatten(1), lambda tensor: (tensor[:, :, None],))
CONV2D = Transform(lambda tensor: tensor.flatten(1), lambda tensor: (tensor[:, :, None, None],))
TRANSPOSED = Transform(lambda tensor: tensor.T, lambda tensor: (tensor.T,))
STACKED = Transform(lambda *parts: torch.cat(parts), lambda tensor: tensor.chunk(3))
SWAPPED_HALVES = Transform(
    lambda tensor: torch.cat(tensor.chunk(2, dim=1)[::-1], dim=1),
    lambda tensor: (torch.cat(tensor.chunk(2, dim=1)[::-1], dim=1),),
)


def heads_outermost(num_heads: int, then: Transform = SAME) -> Transform:
    """Rows ordered [heads, 3, width] on the foreign side, [3, heads, width] on ours; after the change `then`."""

    def load(tensor: Tensor) -> Tensor:
        return then.load(tensor).unflatten(0, (num_heads, 3, -1)).transpose(0, 1).flatten(0, 2)

    def save(tensor: Tensor) -> tuple[Tensor, ...]:
        return then.save(tensor.unflatten(0, (3, num_heads, -1)).transpose(0, 1).flatten(0, 2))

    return Transform(load, save)


@dataclass(frozen=True)
class Rule:
    """One of our tensors and the foreign tensors (one, rarely several) that hold the same numbers."""

    ours: str
    foreign: tuple[str, ...]
    transform: Transform = SAME


class KeyMap:
    """The two-way table between `template`'s state dict and a foreign one.

    template: our network (meta device is enough), whose names and shapes are the standard; the rules must name each of
    its tensors exactly once, and each foreign tensor once.
    """

    def __init__(self, template: nn.Module, rules: Iterable[Rule]) -> None:
        self.rules = tuple(rules)
        self.shapes = {name: tuple(tensor.shape) for name, tensor in template.state_dict().items()}
        ours = [rule.ours for rule in self.rules]
        foreign = [name for rule in self.rules for name in rule.foreign]
        assert len(set(ours)) == len(ours) and set(ours) == set(self.shapes), set(ours) ^ set(self.shapes)
        assert len(set(foreign)) == len(foreign), "two rules claim one foreign name"

    @property
    def foreign_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every foreign tensor, in our order."""
        empty = {name: torch.empty(shape, device="meta") for name, shape in self.shapes.items()}
        return {name: tuple(tensor.shape) for name, tensor in self._save(empty).items()}

    def to_ours(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Our state dict from a foreign one; one ValueError lists every missing, unexpected and mis-shaped key."""
        check_keys(state, self.foreign_shapes, "the foreign weights")
        return {rule.ours: rule.transform.load(*(state[name] for name in rule.foreign)) for rule in self.rules}

    def to_foreign(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The foreign state dict from ours, contiguous; the same report as `to_ours`."""
        check_keys(state, self.shapes, "our weights")
        return {name: tensor.contiguous() for name, tensor in self._save(state).items()}

    def _save(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        saved: dict[str, Tensor] = {}
        for rule in self.rules:
            saved.update(zip(rule.foreign, rule.transform.save(state[rule.ours]), strict=True))
        return saved


def check_keys(state: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], what: str) -> None:
    """Raise one ValueError with every key of `state` that is missing, unexpected or shaped unlike `shapes` says."""
    missing = [f"  missing     {name} {list(shape)}" for name, shape in shapes.items() if name not in state]
    unexpected = [f"  unexpected  {name} {list(tensor.shape)}" for name, tensor in state.items() if name not in shapes]
    misshaped = [
        f"  mis-shaped  {name} {list(state[name].shape)}, expected {list(shape)}"
        for name, shape in shapes.items()
        if name in state and tuple(state[name].shape) != shape
    ]
    if missing or unexpected or misshaped:
        summary = f"{len(missing)} missing, {len(unexpected)} unexpected, {len(misshaped)} mis-shaped"
        lines = "\n".join(missing + unexpected + misshaped)
        raise ValueError(
            f"{what} do not fit the network ({summary} of {len(shapes)} keys); "
            f"check the config, and strip prefixes such as 'model.diffusion_model.':\n{lines}"
        )


def renamed(
    module: nn.Module,
    ours: str,
    foreign: str,
    names: Mapping[str, str],
    transforms: Mapping[str, Transform] | None = None,
) -> Iterator[Rule]:
    """Rules for all tensors of `module`: submodule names by the table `names`, weight transforms by `transforms`."""
    for key in module.state_dict():
        part, _, leaf = key.rpartition(".")
        transform = (transforms or {}).get(key, SAME)
        yield Rule(join(ours, key), (join(foreign, names[part], leaf),), transform)


def join(*parts: str) -> str:
    """A dotted name from its non-empty parts."""
    return ".".join(part for part in parts if part)


class Config:
    """A foreign constructor's keyword arguments, read once each, so that none is overlooked.

    defaults: the foreign signature; a value of `REQUIRED` has no default. `harmless` names change nothing we compute.
    """

    REQUIRED = object()

    def __init__(
        self, what: str, given: Mapping[str, Any], defaults: Mapping[str, Any], harmless: Iterable[str]
    ) -> None:
        self.what = what
        self.values = {**defaults, **given}
        known, harmless = set(defaults), set(harmless)
        if unknown := sorted(set(given) - known - harmless):
            raise ValueError(f"{what} takes no {', '.join(unknown)}; it takes {', '.join(sorted(known | harmless))}")
        if absent := [name for name, value in self.values.items() if value is self.REQUIRED]:
            raise ValueError(f"the config of {what} lacks {', '.join(absent)}")

    def __getitem__(self, name: str) -> Any:
        return self.values[name]

    def only(self, **allowed: tuple[Any, ...]) -> None:
        """Raise ValueError for a setting whose value we cannot honour, naming it and the values that we can."""
        for name, values in allowed.items():
            if not any(self.values[name] == value and type(self.values[name]) is type(value) for value in values):
                choices = " or ".join(repr(value) for value in values)
                raise ValueError(f"{self.what} with {name}={self.values[name]!r} is not supported; only {choices}")


DRAWS = ("normal_", "uniform_", "kaiming_uniform_", "kaiming_normal_", "trunc_normal_", "zeros_", "ones_", "constant_")


class Uninitialised(TorchFunctionMode):
    """Within this, modules leave out their initial weights, which cost seconds even where there is no memory."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in DRAWS:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


@contextmanager
def without_memory() -> Iterator[None]:
    """Within this, modules are built on the meta device: names, shapes and settings alone, in no time."""
    with torch.device("meta"), Uninitialised():
        yield
