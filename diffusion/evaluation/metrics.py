"""How good are samples by the field's measures? FID, sFID, KID, Inception score, precision and recall, honestly named.

Every score's name carries the number of samples and the features ("fid_500_pixels"); what else it depends on stands
beside it. The formulas are torch-fidelity's, on features in float64.
"""

import warnings
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffusion.evaluation.features import LAYERS, LOGITS, POOLED, SPATIAL, Extractor, Features, extracted
from diffusion.evaluation.reference import Images, Reference, Statistics

LAYER_OF = {"fid": POOLED, "sfid": SPATIAL, "kid": POOLED, "is": LOGITS, "precision": POOLED, "recall": POOLED}
METRICS = tuple(LAYER_OF)
OF_STATISTICS = ("fid", "sfid")  # what a mean and a covariance suffice for
ALONE = ("is",)  # what needs no reference
SEED = 2020  # of KID's subsets and of the shuffle before the Inception score: torch-fidelity's own
KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000
IS_SPLIT_SIZE = 5000  # images in a split of the Inception score, as in guided-diffusion; 50,000 make the usual ten
NEIGHBOURS = 3  # k of precision and recall, as in the paper and in guided-diffusion
DISTANCES = 50_000_000  # that are held at once
LARGEST_COVARIANCE = 4096  # features; beyond, FID takes minutes and gigabytes
CUSTOMARY = "50,000 are customary"


def check_metrics(metrics: Sequence[str] | str, allowed: Sequence[str] = METRICS) -> tuple[str, ...]:
    """Return the metrics without repetitions; ValueError for a name that is none."""
    given = [metrics] if isinstance(metrics, str) else list(metrics)
    if wrong := [name for name in given if name not in allowed]:
        raise ValueError(f"metrics={given}: there is no {', '.join(map(str, wrong))}; there are {', '.join(allowed)}")
    if not given:
        raise ValueError(f"metrics=[] measures nothing; there are {', '.join(allowed)}")
    return tuple(dict.fromkeys(given))


def check_compared(metrics: Sequence[str], reference: object | None) -> None:
    """Raise ValueError where a metric needs a reference and there is none."""
    if reference is None and (compared := [name for name in metrics if name not in ALONE]):
        raise ValueError(
            f"{', '.join(compared)}: compared with what? Give reference= a data set, a folder or an .npz file (without "
            f"one there is only {', '.join(ALONE)})"
        )


def counted(number: int) -> str:
    """Return a number of images as scores' names have it: 500, 2k, 50k."""
    return f"{number // 1000}k" if number % 1000 == 0 else str(number)


class Evaluation:
    """The chosen metrics against one reference, whose features are extracted once, when they are first needed.

    `resize` is stated in the result; whoever opened the images did it. What does not go together raises ValueError
    here or in `check`, before any image is drawn. Call it with images for the result: {"scores": {name: number}, ...}.
    """

    def __init__(
        self,
        metrics: Sequence[str] | str,
        extractor: Extractor,
        reference: Reference | None = None,
        *,
        resize: int | None = None,
        batch_size: int = 64,
        device: torch.device | str = "cpu",
        silent: bool = True,
    ) -> None:
        self.metrics = check_metrics(metrics)
        self.extractor, self.reference, self.resize = extractor, reference, resize
        self.batch_size, self.device, self.silent = batch_size, device, silent
        self._kept: tuple[int, Features] | None = None  # channels and features of the reference's images
        self._check_layers()
        check_compared(self.metrics, reference)
        self._check_reference()

    def _check_layers(self) -> None:
        for name in self.metrics:
            if LAYER_OF[name] not in self.extractor.layers:
                has = [metric for metric, layer in LAYER_OF.items() if layer in self.extractor.layers]
                raise ValueError(
                    f"{name} needs {LAYERS[LAYER_OF[name]]}, which features={self.extractor.name} do not have; with "
                    f"them there are {', '.join(has)}"
                )

    def _check_reference(self) -> None:
        reference = self.reference
        if reference is None or reference.images is not None:
            return
        if lacking := [name for name in self.metrics if name not in (*OF_STATISTICS, *ALONE)]:
            raise ValueError(
                f"{', '.join(lacking)} need images, but {reference.source} holds statistics only; with it there is "
                "fid, or give a folder or a file of images"
            )
        if "sfid" in self.metrics and reference.spatial is None:
            raise ValueError(f"sfid needs mu_s and sigma_s, which {reference.source} does not hold; leave sfid out")

    def check(self, shape: tuple[int, int, int], count: int, source: str = "the samples") -> list[str]:
        """Raise ValueError where `count` samples of `shape` (H, W, C) cannot be measured; return doubts about them."""
        sides = {source: (shape, count)}
        if self.reference is not None and self.reference.images is not None:
            sides[self.reference.source] = (self.reference.images.shape, self.reference.images.count)
        for name, (size, number) in sides.items():
            least = NEIGHBOURS + 1 if {"precision", "recall"} & set(self.metrics) else 2
            if number < least:
                raise ValueError(
                    f"{name}: {number} images are too few, {', '.join(self.metrics)} need at least {least}"
                )
            self._check_shape(name, size)
        sizes = {size[:2] for size, _ in sides.values()}
        if len(sizes) > 1:
            worded = " and ".join(f"{size[1]}x{size[0]} ({name})" for name, (size, _) in sides.items())
            raise ValueError(
                f"images of different sizes cannot be compared: {worded}; give resize=N, which makes every image NxN "
                "(shorter side resized by Lanczos, centre cut out) on both sides, or a reference of the samples' size "
                "(for a data set that has a choice: reference_data={image_size: N})"
            )
        return self._doubts(sides)

    def _check_shape(self, name: str, shape: tuple[int, int, int]) -> None:
        wanted, size = self.extractor.channels, self.extractor.image_size
        if wanted == 1 and shape[2] == 3:
            raise ValueError(f"{name}: images are RGB, but features={self.extractor.name} read grey ones")
        if size is not None and shape[:2] != (size, size):
            raise ValueError(
                f"{name}: images are {shape[1]}x{shape[0]}, but features={self.extractor.name} read {size}x{size}; "
                f"give resize={size}, or other features"
            )
        if "fid" in self.metrics and self.extractor.name == "pixels" and np.prod(shape) > LARGEST_COVARIANCE:
            raise ValueError(
                f"{name}: fid on {np.prod(shape)} raw pixels needs a covariance of more than {LARGEST_COVARIANCE} "
                "dimensions; give resize=32, or other features"
            )

    def _doubts(self, sides: Mapping[str, tuple[tuple[int, int, int], int]]) -> list[str]:
        """Return a warning for each side that has fewer images than its covariance has dimensions."""
        if "fid" not in self.metrics and "sfid" not in self.metrics:
            return []
        dimensions = self._dimensions(next(iter(sides.values()))[0])
        stored = self.reference.source if self.reference is not None and self._stored() else None
        return [
            f"{name}: {count} images for {dimensions} features; a covariance needs at least {dimensions + 1} "
            f"({CUSTOMARY}), and with fewer FID is too high. Compare it with scores of as many images only"
            for name, (_, count) in sides.items()
            if count <= dimensions and name != stored
        ]

    def _dimensions(self, shape: tuple[int, int, int]) -> int:
        """Return how many numbers the features of one image are, as an image of this shape tells."""
        blank = torch.zeros(1, self._channels(shape), *shape[:2], dtype=torch.uint8, device=self.device)
        with torch.inference_mode():
            return self.extractor.extract(blank)[POOLED].shape[1]

    def _channels(self, shape: tuple[int, int, int]) -> int:
        """Return the channels that both sides have in the end: grey is repeated where the other side is RGB."""
        images = None if self.reference is None else self.reference.images
        return self.extractor.channels or max(shape[2], 0 if images is None else images.shape[2])

    def __call__(self, samples: Images) -> dict[str, Any]:
        """Measure images; the result says by what, against what, and what it may be compared with."""
        doubts = self.check(samples.shape, samples.count, samples.source)
        for doubt in doubts:
            warnings.warn(doubt, stacklevel=2)
        channels = self._channels(samples.shape)
        found = self._extract(samples, self.metrics, channels)
        real, statistics = self._of_reference(channels, found)
        values = self._scores(found, real, statistics)
        many = counted(samples.count)
        return {
            "scores": {f"{name}_{many}_{self.extractor.name}": value for name, value in values.items()},
            "num_samples": samples.count,
            "samples": samples.described,
            "num_reference": None if statistics or not real else len(next(iter(real.values()))),
            "reference": self._described_reference(statistics),
            "features": self.extractor.about,
            "resize": self._described_resize(samples, channels),
            "settings": self._settings(samples.count),
            "comparable": self._comparable(),
            "warnings": doubts,
            "torch_fidelity": version("torch-fidelity"),
        }

    def _extract(self, images: Images, metrics: Sequence[str], channels: int) -> Features:
        layers = tuple(dict.fromkeys(LAYER_OF[name] for name in metrics))
        return extracted(
            images,
            self.extractor,
            layers=layers,
            channels=channels,
            batch_size=self.batch_size,
            device=self.device,
            silent=self.silent,
        )

    def _stored(self) -> dict[str, Statistics]:
        """Return the statistics, by metric, that the reference's file holds and that serve for these features.

        A file with images besides holds those of the published Inception; for other features its images count.
        """
        if self.reference is None or (self.reference.images is not None and not self.extractor.published):
            return {}
        kept = {"fid": self.reference.statistics, "sfid": self.reference.spatial}
        return {name: kept[name] for name in self.metrics if kept.get(name) is not None}

    def _of_reference(self, channels: int, found: Features) -> tuple[Features, dict[str, Statistics]]:
        """Return the features of the reference's images, as far as they are needed, and its stored statistics."""
        statistics = self._stored()
        for name, kept in statistics.items():
            if len(kept.mu) != found[LAYER_OF[name]].shape[1]:
                raise ValueError(
                    f"the statistics of {self.reference.source} are of {len(kept.mu)} features, but "
                    f"features={self.extractor.name} are {found[LAYER_OF[name]].shape[1]}; give a reference of images"
                )
        needed = [name for name in self.metrics if name not in (*statistics, *ALONE)]
        if not needed:
            return {}, statistics
        if self._kept is None or self._kept[0] != channels:
            self._kept = channels, self._extract(self.reference.images, needed, channels)
        return self._kept[1], statistics

    def _scores(self, found: Features, real: Features, statistics: Mapping[str, Statistics]) -> dict[str, float]:
        scores: dict[str, float] = {}
        for name in self.metrics:
            layer = LAYER_OF[name]
            if name in OF_STATISTICS:
                other = statistics[name] if name in statistics else statistics_of(real[layer])
                scores[name] = frechet_distance(statistics_of(found[layer]), other)
            elif name == "kid":
                scores["kid"], scores["kid_std"] = kernel_distance(found[layer], real[layer])
            elif name == "is":
                scores["is"], scores["is_std"] = inception_score(found[layer])
            elif name not in scores:
                both = precision_recall(found[layer], real[layer], device=self.device)
                scores |= {one: value for one, value in both.items() if one in self.metrics}
        return scores

    # -- what the result says ------------------------------------------------------------------------------------------

    def _described_reference(self, statistics: Mapping[str, Statistics]) -> str | None:
        if self.reference is None or not set(self.metrics) - set(ALONE):
            return None
        images = None if self.reference.images is None else self.reference.images.described
        if not statistics:
            return images
        kept = f"{' and '.join(statistics)} with the statistics stored in {self.reference.source}"
        return f"{kept}; {images}" if images else f"{kept}, of an unknown number of images"

    def _described_resize(self, samples: Images, channels: int) -> str:
        said = (
            "none" if self.resize is None else f"shorter side to {self.resize} by Lanczos, centre cut out, both sides"
        )
        images = None if self.reference is None else self.reference.images
        grey = [side.source for side in (samples, images) if side is not None and side.shape[2] < channels]
        return said + (f"; grey repeated to RGB: {', '.join(grey)}" if grey else "")

    def _settings(self, count: int) -> dict[str, str]:
        images = None if self.reference is None else self.reference.images
        said = {}
        if "kid" in self.metrics:
            subsets, size = kid_subsets(count, images.count)
            said["kid"] = f"{subsets} subsets of {size}, seed {SEED}" if subsets > 1 else f"all {size} at once"
        if "is" in self.metrics:
            said["is"] = f"{is_splits(count)} splits, shuffled by seed {SEED}"
        if {"precision", "recall"} & set(self.metrics):
            said["precision, recall"] = f"{NEIGHBOURS} nearest neighbours"
        return said

    def _comparable(self) -> str:
        if self.extractor.published:
            return f"with scores of the same number of samples ({CUSTOMARY}), the same reference and the same resize"
        return "with scores on these features, of as many samples and the same reference only: not with published ones"


# ---------------------------------------------------------------------------------------------------------------------
# from features to numbers


def statistics_of(features: Tensor) -> Statistics:
    """Return mean and (N - 1) covariance of features (N, D)."""
    from torch_fidelity.metric_fid import fid_features_to_statistics

    found = fid_features_to_statistics(features.double())  # float32 would lose digits in sums of 50,000
    return Statistics(found["mu"], found["sigma"])


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """Squared Frechet (2-Wasserstein) distance of the Gaussians with these moments (1706.08500, equation 6)."""
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric

    return fid_statistics_to_metric(a._asdict(), b._asdict(), False)[KEY_METRIC_FID]


def kernel_distance(a: Tensor, b: Tensor) -> tuple[float, float]:
    """Unbiased squared MMD with the kernel (x y / D + 1)^3, its mean and standard deviation over subsets (1801.01401).

    The subsets are those of `kid_subsets`.
    """
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric

    subsets, size = kid_subsets(len(a), len(b))
    settings = {"kid_subsets": subsets, "kid_subset_size": size, "rng_seed": SEED, "verbose": False}
    found = kid_features_to_metric(a.double(), b.double(), **settings)
    return found[KEY_METRIC_KID_MEAN], found[KEY_METRIC_KID_STD]


def kid_subsets(count: int, others: int) -> tuple[int, int]:
    """How many subsets of how many images of each side KID takes: 100 of 1,000, or of as many as the smaller side has.

    Where that is all of both, one: KID is then that of the whole sets.
    """
    size = min(KID_SUBSET_SIZE, count, others)
    return (1 if size == count == others else KID_SUBSETS), size


def inception_score(logits: Tensor) -> tuple[float, float]:
    """exp(E KL(p(y|x) || p(y))), its mean and standard deviation over splits (1606.03498)."""
    from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric

    found = isc_features_to_metric(logits, splits=is_splits(len(logits)), shuffle=True, rng_seed=SEED)
    return found[KEY_METRIC_ISC_MEAN], found[KEY_METRIC_ISC_STD]


def is_splits(count: int) -> int:
    """Into how many parts the Inception score divides its images; it cannot exceed the number of images of a part."""
    return max(1, count // IS_SPLIT_SIZE)


def precision_recall(found: Tensor, real: Tensor, *, device: torch.device | str = "cpu") -> dict[str, float]:
    """Shares of samples inside the real manifold, and of real images inside the samples' (1904.06991, equation 2)."""
    from torch_fidelity.metric_prc import prc_features_to_metric

    rows = max(1, DISTANCES // max(len(found), len(real)))
    place = device if torch.device(device).type == "cuda" else "cpu"
    sides = [side.to(place).double() for side in (found, real)]
    scores = prc_features_to_metric(
        *sides, prc_neighborhood=NEIGHBOURS, prc_batch_size=rows, save_cpu_ram=True, verbose=False
    )
    return {name: scores[name] for name in ("precision", "recall")}


def report(result: Mapping[str, Any], path: Path | None = None) -> str:
    """Return a result as lines for people."""
    scores = result["scores"]
    width = max(map(len, scores))
    lines = [f"{name:<{width}}  {value:.6g}" for name, value in scores.items()]
    for key in ("samples", "reference", "features", "resize", "comparable"):
        if result.get(key):
            lines.append(f"{key}: {result[key]}")
    lines += [f"{name}: {said}" for name, said in result.get("settings", {}).items()]
    if bits := result.get("bits_per_dim"):
        error = f"standard error {bits['standard_error']:.2g}, " if bits["standard_error"] else ""
        lines.append(
            f"bits_per_dim: {error}{bits['num_images']} of the {bits['of_images']} images of {bits['images']}, "
            f"{bits['num_steps']} steps, {bits['weights']} weights"
        )
    return "\n".join(lines if path is None else [*lines, f"in {path}"])
