"""What do the settings metrics=, reference=, features=, ... of sample.py mean, and where does the result go?

What is wrong with them is found before anything is drawn.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusion.evaluation.features import choose_features
from diffusion.evaluation.metrics import Evaluation, check_compared, check_metrics, report
from diffusion.evaluation.reference import Reference, open_images, open_reference
from diffusion.files import atomic_write
from diffusion.generate import choose_device

# What is of no use without metrics.
BELONGING = ("samples", "reference", "inception_weights", "resize")


def evaluation_for(
    config: Mapping[str, Any], *, device: str | None = None, reference: Reference | None = None, silent: bool = False
) -> Evaluation | None:
    """Build what the settings ask for, with features and reference in place; None where `metrics` is empty.

    `device` and `reference` stand in for those of the settings. Raises ValueError for what does not go together.
    """
    if not config["metrics"]:
        if idle := [f"{name}={config[name]}" for name in BELONGING if config[name] is not None]:
            raise ValueError(f"{', '.join(idle)} without metrics; say which: metrics=[fid,kid,precision,recall]")
        return None
    metrics = check_metrics(config["metrics"])
    check_compared(metrics, reference or config["reference"])
    if config["resize"] is not None and (type(config["resize"]) is not int or config["resize"] < 1):
        raise ValueError(f"resize={config['resize']} must be a whole number of pixels, or null")
    place = choose_device(device or config["device"])
    if reference is None and config["reference"] is not None:
        reference = open_reference(
            config["reference"],
            split=config["reference_split"],
            settings=config["reference_data"],
            resize=config["resize"],
        )
    extractor = choose_features(str(config["features"]), inception_weights=config["inception_weights"], device=place)
    batch_size = config["batch_size"]
    return Evaluation(
        metrics, extractor, reference, resize=config["resize"], batch_size=batch_size, device=place, silent=silent
    )


def measure(evaluation: Evaluation, path: str | Path) -> str:
    """Measure the images of a file or folder, write the result beside them, and return it in words."""
    images = open_images(path, resize=evaluation.resize)
    result = evaluation(images)
    return report(result, write(result, result_path(path)))


def check_wanted(evaluation: Evaluation, shape: tuple[int, int, int], count: int) -> None:
    """Raise ValueError where `count` samples of `shape` (C, H, W), not drawn yet, cannot be measured."""
    channels, height, width = shape
    size = (height, width) if evaluation.resize is None else (evaluation.resize, evaluation.resize)
    evaluation.check((*size, channels), count)


def result_path(samples: str | Path) -> Path:
    """Return where the result goes: metrics.json in a folder and beside samples.npz, else NAME.metrics.json."""
    path = Path(samples).expanduser()
    if path.is_dir():
        return path / "metrics.json"
    return path.with_name("metrics.json" if path.name == "samples.npz" else f"{path.stem}.metrics.json")


def write(result: Mapping[str, Any], path: Path) -> Path:
    """Write a result as JSON, atomically, and return its path."""
    with atomic_write(path) as partial:
        partial.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return path
