"""Is the shipped model any good, judged by what has never seen a generated image?"""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from diffusion.checkpoint import load_model
from diffusion.evaluation.digits import DigitJudge, agreement, main
from diffusion.generate import batches
from diffusion.guidance import ClassifierFreeGuidance, NoGuidance
from diffusion.images import to_uint8
from diffusion.sampling import Sampler

NUM_TRAIN = 1200
LABELS = [digit for digit in range(10) for _ in range(50)]


def draw(guidance) -> np.ndarray:
    """500 samples, 50 a class, uint8 (500, 8, 8, 1)."""
    model = load_model("checkpoints/digits.safetensors")
    drawn = batches(
        model.net,
        model.diffusion,
        Sampler(num_steps=50),
        guidance,
        num_samples=len(LABELS),
        batch_size=250,
        labels=LABELS,
        shape=model.facts["shape"],
    )
    return np.concatenate([to_uint8(batch.images) for batch in drawn])


@pytest.mark.slow
@pytest.mark.parametrize(("guidance", "least"), [(ClassifierFreeGuidance(2.0), 0.97), (NoGuidance(), 0.93)])
def test_an_svc_trained_on_real_digits_names_the_requested_class(guidance, least):
    named = agreement(draw(guidance), LABELS)
    print(f"{guidance}: {named:.1%}")
    assert named >= least


def test_the_judge_is_right_about_real_digits_and_blind_to_none():
    assert DigitJudge().accuracy > 0.95
    pixels, digits = load_digits(return_X_y=True)
    images = (pixels[NUM_TRAIN:] * (255 / 16)).round().astype(np.uint8).reshape(-1, 8, 8, 1)
    assert agreement(images, digits[NUM_TRAIN:]) > 0.95
    assert agreement(images, (digits[NUM_TRAIN:] + 1) % 10) < 0.02


def test_the_command_samples_and_judges(capsys):
    main(["checkpoint=checkpoints/digits.safetensors", "num_samples=20", "num_steps=10"])
    assert "of 20 samples" in capsys.readouterr().out
    with pytest.raises(ValueError, match="checkpoint=FILE"):
        main([])
    with pytest.raises(ValueError, match="'steps=3' is no setting"):
        main(["steps=3"])


@pytest.mark.slow
def test_samples_are_no_copies_of_the_training_images():
    """A sample is as far from its nearest training image as training images are from each other, and as held-out
    images of the same size of set; a memorised image would be at distance 0.
    """
    pixels = torch.from_numpy(load_digits().data).float()
    train, held_out = pixels[:NUM_TRAIN], pixels[NUM_TRAIN:]
    samples = torch.from_numpy(draw(NoGuidance())).flatten(1).float() * (16 / 255)
    same = torch.cdist(train, train).fill_diagonal_(torch.inf)
    some = torch.randperm(NUM_TRAIN, generator=torch.Generator().manual_seed(0))[: len(held_out)]
    distances = {
        "sample to train": torch.cdist(samples, train).min(1).values,
        "train to other train": same.min(1).values,
        "held out to train": torch.cdist(held_out, train).min(1).values,
        "sample to held out": torch.cdist(samples, held_out).min(1).values,
        "sample to as many of train": torch.cdist(samples, train[some]).min(1).values,
    }
    for name, values in distances.items():
        print(f"{name}: mean {values.mean():.1f}, least {values.min():.1f}")
    assert distances["sample to train"].min() > 4  # half a grey level in each of 64 pixels
    assert distances["sample to train"].mean() > 0.9 * distances["train to other train"].mean()
