"""How do two optimizers take part in one training step? As one optimizer of several parts.

Lightning's manual optimisation, its own way to have two, counts every `step` of each as a step of the run and refuses
clipping and accumulation. To Lightning this is one optimizer: steps count batches, and clipping, accumulation,
schedules, half precision's loss scale and resuming work as for any other.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer


class JointOptimizer(Optimizer):
    """Step all `parts` together. Each keeps its own settings and state; their parameters must not overlap.

    A part whose parameters have no gradient (a discriminator that has not begun) does nothing. A learning-rate
    schedule multiplies the rates of all parts alike.
    """

    def __init__(self, parts: list[Optimizer]) -> None:
        self.parts = parts
        super().__init__([{"params": group["params"]} for part in parts for group in part.param_groups], {})
        self._share_groups()

    def _share_groups(self) -> None:
        """Show the very dictionaries of the parts, so that a schedule which changes a rate here changes it there."""
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Run the closure once and let every part take its step; return the closure's result."""
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        for part in self.parts:
            part.step()
        return result

    def state_dict(self) -> dict[str, Any]:
        """Return the states of the parts."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore every part. Raises ValueError for a state of another number of optimizers."""
        saved = state_dict.get("parts", [])
        if len(saved) != len(self.parts):
            raise ValueError(
                f"the checkpoint holds the state of {len(saved) or 1} optimizer(s) and this run has {len(self.parts)}: "
                "a discriminator cannot be added to a run or taken from it; start anew with another run_dir"
            )
        for part, state in zip(self.parts, saved, strict=True):
            part.load_state_dict(state)
        self._share_groups()
