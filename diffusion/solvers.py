"""What to believe about an interval t -> s, given the network's answers so far. The one file a new sampler touches.

A solver is a function of the denoiser, the newest state and the history (newest first, at most four answers); it
returns a Prediction and keeps nothing between calls. How to move, given the belief, is `process.transition`.
"""

from torch import Tensor

from .denoiser import Denoiser
from .guidance import Levels
from .process import Prediction

History = tuple[tuple[float, Prediction], ...]


def euler(denoise: Denoiser, level: Levels, x: Tensor, t: float, s: float, history: History) -> Prediction:
    """Believe the last answer: DDIM with eta = 0, DDPM with eta = 1. First order."""
    return history[0][1]
