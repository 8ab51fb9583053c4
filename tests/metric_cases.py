"""Images and features that the tests of the metrics share, and Inception's weights drawn at random."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from diffusion.evaluation.reference import Images, Reference, of_array
from diffusion.sampling import Sampler


def random_images(count: int, *, size: int = 4, channels: int = 1, seed: int = 0, level: int = 128) -> np.ndarray:
    """Uint8 images around a level, each with its own brightness."""
    draws = np.random.default_rng(seed)
    values = level + draws.normal(0, 25, (count, size, size, channels)) + draws.normal(0, 20, (count, 1, 1, 1))
    return values.round().clip(0, 255).astype(np.uint8)


def images(count: int, source: str = "samples", **settings) -> Images:
    return of_array(random_images(count, **settings), source)


def reference(count: int, **settings) -> Reference:
    found = images(count, "real", **settings)
    return Reference(source="real", images=found)


class Broken(Sampler):
    """A sampler whose answers are no numbers."""

    def states(self, *args, **kwargs):
        for state in super().states(*args, **kwargs):
            yield state._replace(x=state.x * float("nan"))


def features(count: int, dimensions: int, *, seed: int, shift: float = 0.0, scale: float = 1.0) -> Tensor:
    draws = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dimensions, dimensions, generator=draws, dtype=torch.float64)
    return torch.randn(count, dimensions, generator=draws, dtype=torch.float64) @ mixing * scale + shift


def save_random_inception(path: Path, monkeypatch) -> Path:
    """Write weights with the names and shapes of the published ones; features keep their size through the layers."""
    with monkeypatch.context() as patch, torch.random.fork_rng():
        patch.setattr("torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url", lambda *a, **k: {})
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        torch.manual_seed(0)
        net = FeatureExtractorInceptionV3("random", ["2048"])
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            fan_in = module.weight[0].numel()
            module.weight.normal_(0, (2 / fan_in) ** 0.5, generator=torch.Generator().manual_seed(fan_in))
    torch.save(net.state_dict(), path)
    return path


def score(result: dict, metric: str) -> float:
    """The one score of this metric, whatever its name carries besides."""
    (found,) = [value for name, value in result["scores"].items() if name.split("_")[0] == metric and "std" not in name]
    return found
