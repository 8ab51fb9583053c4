"""Do sampled digits show the classes that were asked for, in the eyes of a classifier that saw real ones only?

    uv run python -m diffusion.evaluation.digits checkpoint=FILE      # 500 samples, 50 a class
    uv run python -m diffusion.evaluation.digits checkpoint=FILE guidance_scale=1 num_samples=1000

The judge is a support vector machine on the 64 raw pixels, trained on the first 1,200 of scikit-learn's digits; it
names 96 % of the 597 others. Further settings: see SETTINGS.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from diffusion.cli import read_words, run_words

SETTINGS = {
    "checkpoint": None,  # a class-conditional model of the digits, in pixels or in latents
    "num_samples": 500,
    "guidance_scale": 2.0,
    "num_steps": 50,
    "batch_size": 250,
    "seed": 0,
}


class DigitJudge:
    """`SVC(gamma=0.001, C=10)` on pixels 0..16, trained on the digits that the models train on."""

    def __init__(self) -> None:
        from sklearn.datasets import load_digits  # scipy and all: not at import
        from sklearn.svm import SVC

        from diffusion.data.digits import NUM_TRAIN

        pixels, digits = load_digits(return_X_y=True)
        self._classifier = SVC(gamma=0.001, C=10).fit(pixels[:NUM_TRAIN], digits[:NUM_TRAIN])
        self.accuracy = self._classifier.score(pixels[NUM_TRAIN:], digits[NUM_TRAIN:])  # on real digits it never saw

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Return the digit (N,) that each image shows, uint8 (N, 8, 8, 1)."""
        return self._classifier.predict(images.reshape(len(images), 64) * (16 / 255))


def agreement(images: np.ndarray, labels: Sequence[int]) -> float:
    """Return the share of images, uint8 (N, 8, 8, 1), in which the judge sees their label."""
    return float((DigitJudge()(images) == np.asarray(labels)).mean())


def draw_samples(settings: Mapping[str, Any]) -> tuple[np.ndarray, list[int]]:
    """Return samples, uint8 (N, 8, 8, 1), and the labels that were asked for, all ten taking turns."""
    from diffusion.checkpoint import load_model
    from diffusion.generate import batches, choose_labels, classes_of
    from diffusion.guidance import ClassifierFreeGuidance
    from diffusion.images import to_uint8
    from diffusion.sampling import Sampler

    model = load_model(settings["checkpoint"])
    if model.facts["shape"] != [1, 8, 8] or classes_of(model.net, model.conditioner) != 10:
        raise ValueError(f"{settings['checkpoint']} draws no digits by class; the judge knows scikit-learn's 8x8 ones")
    labels = choose_labels(None, settings["num_samples"], 10)
    drawn = batches(
        model.net,
        model.diffusion,
        Sampler(num_steps=settings["num_steps"]),
        ClassifierFreeGuidance(settings["guidance_scale"]),
        num_samples=len(labels),
        batch_size=settings["batch_size"],
        seed=settings["seed"],
        labels=labels,
        inputs=None if model.conditioner is None else {"label": labels},
        conditioner=model.conditioner,
        autoencoder=model.autoencoder,
        shape=model.facts["shape"],
    )
    return np.concatenate([to_uint8(batch.images) for batch in drawn]), labels


def main(arguments: Sequence[str]) -> None:
    """Sample as the `name=value` words say, and print the share of samples whose class the judge names."""
    settings = read_words(arguments, SETTINGS)
    if settings["checkpoint"] is None:
        raise ValueError("give the model to judge: checkpoint=FILE")
    images, labels = draw_samples(settings)
    right = DigitJudge()(images) == np.asarray(labels)
    print(f"the judge names the class of {right.mean():.1%} of {len(labels)} samples; by class:")
    print("  ".join(f"{digit}: {right[np.asarray(labels) == digit].mean():.0%}" for digit in range(10)))


if __name__ == "__main__":
    run_words(main, __doc__)
