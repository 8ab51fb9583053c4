"""How are the averaged weights kept? Exponential moving averages (EMA) of the trainable parameters, several at once.

A decay rule gives the decay of the n-th update; three rules reproduce guided-diffusion, CompVis ldm and diffusers.
The callback updates after optimizer steps only, rides in the checkpoint, and lends its weights by a context manager.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from diffusion.training.sharded import local, spread_like

DecayRule = Callable[[float, int], float]  # (target decay, number of this update, from 1) -> decay to use
# The rules are objects, not partial functions: Hydra guards each call of its partials, at 0.2 ms a step.


@dataclass(frozen=True)
class ConstantDecay:
    """The same decay from the first update on, as guided-diffusion's `update_ema`."""

    def __call__(self, decay: float, n: int) -> float:
        return decay


@dataclass(frozen=True)
class LdmDecay:
    """Warm-up of CompVis ldm's `LitEma`: min(decay, (1 + n) / (10 + n))."""

    def __call__(self, decay: float, n: int) -> float:
        return min(decay, (1 + n) / (10 + n))


@dataclass(frozen=True)
class DiffusersDecay:
    """Warm-up of diffusers' `EMAModel`; decay 0 copies the weights, which it does up to `update_after_step + 1`.

    `use_ema_warmup` chooses 1 - (1 + s / inv_gamma)^-power (power 2/3 reaches 0.999 after 31.6K steps, 0.9999 after
    1M), otherwise (1 + s) / (10 + s), where s counts the updates after the copies. Bounded by `min_decay` and decay.
    """

    min_decay: float = 0.0
    update_after_step: int = 0
    use_ema_warmup: bool = False
    inv_gamma: float = 1.0
    power: float = 2 / 3

    def __call__(self, decay: float, n: int) -> float:
        s = max(0, n - self.update_after_step - 1)
        if s == 0:
            return 0.0
        warm = 1 - (1 + s / self.inv_gamma) ** -self.power if self.use_ema_warmup else (1 + s) / (10 + s)
        return max(min(warm, decay), self.min_decay)


def average_name(decay: float) -> str:
    """Name an average by its decay, as metrics and checkpoints do: 0.999 -> "0.999"."""
    return f"{decay:g}"


class EMA(Callback):
    """Keep averages of `task.model`'s trainable parameters, one for each of `decays`; the first is the one exported.

    `rule` maps (target decay, number of the update from 1) to the decay used; ldm's by default. Averages start as a
    copy of the initial weights, live on the parameters' device, and are held in float32 even where the parameters are
    not (in bfloat16 an update by 1e-4 would be rounded away). Buffers are not averaged: a swapped network uses its own.
    Under DDP every rank has the same averages; of parameters in shards (FSDP) each has its shards.
    """

    def __init__(self, decays: Sequence[float] = (0.9999,), rule: DecayRule | None = None) -> None:
        super().__init__()
        bad = [decay for decay in decays if not 0 <= decay < 1]
        if bad or not decays:
            raise ValueError(f"ema decays must be one or more numbers in [0, 1), got {list(decays)}; try [0.999]")
        if len({average_name(decay) for decay in decays}) < len(decays):
            raise ValueError(f"ema decays must differ, got {list(decays)}")
        self.decays = tuple(float(decay) for decay in decays)
        self.rule = rule or LdmDecay()
        self.num_updates = 0
        self.averages: dict[float, dict[str, Tensor]] = {}
        self._last_step = 0
        self._parameters: dict[str, nn.Parameter] = {}

    @torch.no_grad()
    def start(self, net: nn.Module) -> None:
        """Begin every average that does not exist yet as a copy of the parameters, and bring all to their device."""
        self._parameters = parameters = trainable(net)
        for decay in self.decays:
            average = self.averages.get(decay)
            if average is None:
                average = {name: full_precision(p.detach()).clone() for name, p in parameters.items()}
            check_names(average, parameters)
            self.averages[decay] = {name: spread_like(average[name], p) for name, p in parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Move every average towards the parameters: average += (1 - decay) * (parameter - average)."""
        self.num_updates += 1
        now = [full_precision(local(p.detach())) for p in self._parameters.values()]
        for decay, average in self.averages.items():
            averages = [local(tensor) for tensor in average.values()]
            torch._foreach_lerp_(averages, now, 1 - self.rule(decay, self.num_updates))

    @contextlib.contextmanager
    def swapped(self, net: nn.Module, decay: float | None = None) -> Iterator[None]:
        """Run the block with an average (the first one by default) in `net`; the weights return bit for bit after it.

        Save no checkpoint and take no optimizer step inside.
        """
        average = self.average(decay)
        parameters = trainable(net)
        check_names(average, parameters)
        tensors = [local(p.detach()) for p in parameters.values()]
        raw = [tensor.clone() for tensor in tensors]
        try:
            torch._foreach_copy_(tensors, [local(tensor) for tensor in average.values()])
            yield
        finally:
            torch._foreach_copy_(tensors, raw)

    def average(self, decay: float | None = None) -> dict[str, Tensor]:
        """Return the average of this decay by parameter name, the first decay's by default."""
        wanted = self.decays[0] if decay is None else decay
        if wanted not in self.averages:
            raise ValueError(f"no average with decay {wanted}; there are {sorted(self.averages)} (after `start`)")
        return self.averages[wanted]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin the averages at the weights that training begins with, unless they were restored."""
        self.start(pl_module.model)
        self._last_step = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: object) -> None:
        """Follow each optimizer step."""
        if trainer.global_step != self._last_step:  # not after the micro-batches of an accumulated step
            self._last_step = trainer.global_step
            self.update()

    def state_dict(self) -> dict:
        """Return the averages by the names that they have in checkpoints."""
        averages = {average_name(decay): average for decay, average in self.averages.items()}
        return {"num_updates": self.num_updates, "averages": averages}

    def load_state_dict(self, state_dict: dict) -> None:
        """Take over the averages whose decay is configured; a decay that is new starts from the resumed weights."""
        self.num_updates = state_dict["num_updates"]
        saved = state_dict["averages"]
        self.averages = {
            decay: dict(saved[average_name(decay)]) for decay in self.decays if average_name(decay) in saved
        }


def trainable(net: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that an optimizer changes, by name."""
    return {name: p for name, p in net.named_parameters() if p.requires_grad}


def full_precision(tensor: Tensor) -> Tensor:
    """Return a half-precision tensor as float32 and any other as it is."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def check_names(average: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter]) -> None:
    """Raise ValueError for averages of other parameters than these."""
    if average.keys() != parameters.keys():
        odd = sorted(average.keys() ^ parameters.keys())
        raise ValueError(
            f"the averages belong to other parameters than the network's trainable ones ({len(odd)} differ, first "
            f"{odd[:3]}); averages follow the parameters that were trainable when the run began"
        )
