"""What do the settings metrics=, reference=, features=, ... of sample.py mean, and where does the result go?

What is wrong with them is found before anything is drawn.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusion.asked import choose_shape
from diffusion.evaluation.features import choose_features
from diffusion.evaluation.metrics import METRICS, Evaluation, check_compared, check_metrics, counted, report
from diffusion.evaluation.reference import Reference, open_images, open_reference
from diffusion.files import atomic_write
from diffusion.generate import choose_device
from diffusion.progress import WorkBar

RESULT = "metrics.json"
BITS = "bits_per_dim"  # the one metric of a checkpoint and not of images
# What is of no use without metrics.
BELONGING = ("samples", "reference", "inception_weights", "resize")


def asked_metrics(config: Mapping[str, Any]) -> tuple[list[str], bool]:
    """Return the metrics of images that are asked for, and whether bits per dimension are."""
    given = check_metrics(config["metrics"], (*METRICS, BITS)) if config["metrics"] else ()
    return [name for name in given if name != BITS], BITS in given


def needs_samples(config: Mapping[str, Any]) -> bool:
    """Say whether samples are to be drawn: not where some are named, and not for bits per dimension alone."""
    of_images, bits = asked_metrics(config)
    if config["samples"] is not None and bits:
        raise ValueError(f"{BITS} is a metric of a checkpoint; leave out samples={config['samples']}, or {BITS}")
    return config["samples"] is None and (bool(of_images) or not bits)


def evaluation_for(
    config: Mapping[str, Any], *, device: str | None = None, reference: Reference | None = None, silent: bool = False
) -> Evaluation | None:
    """Build what the settings ask for, with features and reference in place; None where no metric of images is.

    `device` and `reference` stand in for those of the settings. Raises ValueError for what does not go together.
    """
    if not config["metrics"]:
        if idle := [f"{name}={config[name]}" for name in BELONGING if config[name] is not None]:
            raise ValueError(f"{', '.join(idle)} without metrics; say which: metrics=[fid,kid,precision,recall]")
        return None
    metrics, _ = asked_metrics(config)
    if not metrics:
        return None
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


def measure(config: Mapping[str, Any], path: str | Path | None) -> str:
    """Measure the images of a file or folder, the checkpoint, or both, as the settings say; return it in words.

    The result lies beside the images, or in `out_dir` where there are none.
    """
    _, bits = asked_metrics(config)
    result: dict[str, Any] = {"scores": {}}
    evaluation = evaluation_for(config)
    if evaluation is not None and path is not None:
        result = evaluation(open_images(path, resize=evaluation.resize))
    if bits:
        found = _bits_per_dim(config)
        result["scores"][f"{BITS}_{counted(found['num_images'])}"] = found[BITS]
        result[BITS] = found
    return report(result, write(result, Path(config["out_dir"]) / RESULT if path is None else result_path(path)))


def _bits_per_dim(config: Mapping[str, Any]) -> dict[str, Any]:
    """Evaluate the bound on as many images as `num_samples`, of the data set's validation unless it says otherwise."""
    from diffusion.checkpoint import load_model
    from diffusion.evaluation.bits_per_dim import bits_per_dim

    model = load_model(config["checkpoint"], buildable=config["buildable"], autoencoder=config["autoencoder"])
    images, source = _unseen(config, model)
    wanted = min(config["num_samples"], len(images))
    with WorkBar(wanted, doing="evaluating bits/dim", done="evaluated bits/dim of") as bar:
        found = bits_per_dim(
            model,
            images,
            config["seed"],
            num_images=wanted,
            batch_size=config["batch_size"],
            device=choose_device(config["device"]),
            on_images=bar.advance,
        )
    return {**found, "images": source}


def _unseen(config: Mapping[str, Any], model: Any) -> tuple[Any, str]:
    """Return the images that bits per dimension are of, and what they are called."""
    from diffusion.data.named import data_names
    from diffusion.evaluation import bits_per_dim

    name, split = config["reference"], config["reference_split"] or "val"
    if name not in data_names():
        raise ValueError(
            f"{BITS} is of a data set, reference=NAME ({', '.join(data_names())}), but reference={name} is none; for a "
            "folder: reference=image_folder reference_data={root: DIR}"
        )
    images = bits_per_dim.open_images({"data": name, "split": split}, config["reference_data"] or {}, model.facts)
    return images, f"data set {name} ({split})"


def check_wanted(config: Mapping[str, Any], model: Any) -> None:
    """Raise ValueError where what a model is going to draw, or the model itself, cannot be measured as asked."""
    _, bits = asked_metrics(config)
    if (evaluation := evaluation_for(config)) is not None:
        check_shape(evaluation, choose_shape(model, config), config["num_samples"])
    if bits:
        from diffusion.evaluation.bits_per_dim import check_model

        check_model(model, _unseen(config, model)[0])


def check_shape(evaluation: Evaluation, shape: Sequence[int], count: int) -> None:
    """Raise ValueError where `count` samples of `shape` (C, H, W), not drawn yet, cannot be measured."""
    channels, height, width = shape
    size = (height, width) if evaluation.resize is None else (evaluation.resize, evaluation.resize)
    evaluation.check((*size, channels), count)


def result_path(samples: str | Path) -> Path:
    """Return where the result goes: metrics.json in a folder and beside samples.npz, else NAME.metrics.json."""
    path = Path(samples).expanduser()
    if path.is_dir():
        return path / RESULT
    return path.with_name(RESULT if path.name == "samples.npz" else f"{path.stem}.metrics.json")


def write(result: Mapping[str, Any], path: Path) -> Path:
    """Write a result as JSON, atomically, and return its path."""
    with atomic_write(path) as partial:
        partial.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return path
