"""What does a metric look at in an image? Inception's features, those of a classifier of ours, or the raw pixels.

Only features are kept, one batch of images after the other. torch-fidelity is imported where it is used.
"""

import pickle
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from diffusion.evaluation.reference import Images
from diffusion.progress import WorkBar

POOLED, LOGITS, SPATIAL = "pooled", "logits", "spatial"
LAYERS = {POOLED: "features", LOGITS: "class probabilities", SPATIAL: "spatial features"}
INCEPTION_HASH = "6726825d"  # of torch-fidelity's weights: the first digits of the SHA-256, and in the file's name
SPATIAL_CHANNELS = 7  # of Mixed_6d that sFID takes, as guided-diffusion's evaluator does

Features = dict[str, Tensor]  # by layer, (N, D) float32 on the CPU


@dataclass(frozen=True, kw_only=True)
class Extractor:
    """`extract` turns uint8 images (B, C, H, W) into float (B, D) for each of `layers`.

    `name` goes into the names of scores, `about` into the result. `channels` and `image_size` are what it must be
    given (None: anything). `published` says whether the field's published scores are made with it.
    """

    name: str
    about: str
    layers: tuple[str, ...]
    extract: Callable[[Tensor], Mapping[str, Tensor]]
    channels: int | None = None
    image_size: int | None = None
    published: bool = False


def choose_features(
    features: str, *, inception_weights: str | Path | None = None, device: torch.device | str = "cpu"
) -> Extractor:
    """Return the extractor of "inception", "pixels", or the file of a trained classifier, on `device`."""
    if features != "inception" and inception_weights is not None:
        raise ValueError(f"inception_weights={inception_weights} is for features=inception, not features={features}")
    if features == "inception":
        return inception(inception_file(inception_weights), device=device)
    if features == "pixels":
        return pixels()
    if not Path(features).expanduser().is_file():
        raise ValueError(
            f"features={features} is neither inception nor pixels, and there is no such file; give inception, pixels, "
            "or the model.safetensors of a trained classifier"
        )
    return classifier(features, device=device)


def extracted(
    images: Images,
    extractor: Extractor,
    *,
    layers: tuple[str, ...],
    channels: int,
    batch_size: int = 64,
    device: torch.device | str = "cpu",
    silent: bool = True,
) -> Features:
    """Return the named layers of all images, which are repeated from grey to RGB where `channels` is 3.

    `silent` False shows a bar. Raises ValueError for features that are not finite.
    """
    kept: Features = {}
    done = 0
    bar = None if silent else WorkBar(images.count, doing="extracting features", done="extracted features of")
    with bar or nullcontext(), torch.inference_mode():
        for batch in images.read(batch_size):
            x = torch.from_numpy(batch.copy()).permute(0, 3, 1, 2).to(device)
            found = extractor.extract(x.expand(-1, channels, -1, -1))
            for layer in layers:
                values = found[layer].float().cpu()
                _check_finite(values, f"the {LAYERS[layer]} ({extractor.name})", images.source, done)
                kept.setdefault(layer, torch.empty(images.count, values.shape[1]))[done : done + len(values)] = values
            done += len(batch)
            if bar is not None:
                bar.advance(len(batch))
    return kept


def _check_finite(values: Tensor, what: str, source: str, first: int) -> None:
    """Raise ValueError for values (B, D) that are not finite; `first` is the number of the batch's first image."""
    if broken := torch.nonzero(~values.isfinite().all(1)).flatten().tolist():
        raise ValueError(
            f"{what} of {len(broken)} images of {source} are not finite, first of image {first + broken[0]}; the "
            "weights may be damaged, or of a run that diverged"
        )


# ---------------------------------------------------------------------------------------------------------------------
# the extractors


def pixels() -> Extractor:
    """Every pixel a feature: for small images, and where nothing else is at hand."""
    return Extractor(
        name="pixels",
        about="raw pixels in [-1, 1]",
        layers=(POOLED,),
        extract=lambda x: {POOLED: x.flatten(1).float() / 127.5 - 1},
    )


def classifier(checkpoint: str | Path, *, device: torch.device | str = "cpu") -> Extractor:
    """What a trained classifier's last layer reads of an image at t = 0, and its logits. Only one of images, not of
    latents."""
    from diffusion.checkpoint import load_classifier
    from diffusion.sample_folder import file_hash

    path = Path(checkpoint).expanduser()
    loaded = load_classifier(path, device=device)
    if "autoencoder" in loaded.parts:
        raise ValueError(f"{path} classifies latents, and metrics compare images; give a classifier of images")
    sha256 = file_hash(path)
    seen: dict[str, Tensor] = {}

    def keep(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen[POOLED] = inputs[0]

    loaded.net.head.out.register_forward_pre_hook(keep)

    def extract(x: Tensor) -> Mapping[str, Tensor]:
        logits = loaded.net(x.float() / 127.5 - 1, torch.zeros(len(x), dtype=torch.long, device=x.device))
        return {POOLED: seen.pop(POOLED), LOGITS: logits}

    return Extractor(
        name=f"classifier_{sha256[:8]}",
        about=f"last hidden layer and logits at t=0 of the classifier {path} (SHA-256 {sha256})",
        layers=(POOLED, LOGITS),
        extract=extract,
        channels=loaded.net.in_channels,
        image_size=loaded.net.image_size,
    )


def inception(weights: Path, *, device: torch.device | str = "cpu") -> Extractor:
    """torch-fidelity's InceptionV3 with weights from a file: pool_3, logits without bias, and Mixed_6d for sFID."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    from diffusion.sample_folder import file_hash

    check_inception(weights)
    with torch.random.fork_rng(devices=[]):  # building draws initial weights
        try:
            net = FeatureExtractorInceptionV3(
                "inception", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(weights)
            )
        except RuntimeError as error:
            problems = str(error).split("\n\t")[:2]
            raise ValueError(f"{weights} does not fit torch-fidelity's InceptionV3: {' '.join(problems)}") from error
    net.to(device)
    sha256 = file_hash(weights)
    published = sha256.startswith(INCEPTION_HASH)
    seen: dict[str, Tensor] = {}

    def keep(module: nn.Module, inputs: object, output: Tensor) -> None:
        seen[SPATIAL] = output[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)  # in TensorFlow's order

    net.Mixed_6d.register_forward_hook(keep)

    def extract(x: Tensor) -> Mapping[str, Tensor]:
        pooled, logits = net(x)
        return {POOLED: pooled, LOGITS: logits, SPATIAL: seen.pop(SPATIAL)}

    return Extractor(
        name="inception" if published else f"inception_{sha256[:8]}",
        about="pool_3 and logits of InceptionV3, which resizes to 299x299 bilinearly as TensorFlow 1 does; weights "
        + (str(weights) if published else f"{weights} (SHA-256 {sha256}), which are not the published ones"),
        layers=(POOLED, LOGITS, SPATIAL),
        extract=extract,
        channels=3,
        published=published,
    )


def inception_file(weights: str | Path | None = None) -> Path:
    """Return the file of Inception's weights: the given one, the one in torch's cache, or a fresh download into it.

    Raises one ValueError that says what to put where, and what works without.
    """
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    without = "or choose features=pixels, or features=FILE of a trained classifier"
    if weights is not None:
        path = Path(weights).expanduser()
        if not path.is_file():
            raise ValueError(f"inception_weights={weights}: there is no such file; it is {URL_INCEPTION_V3}; {without}")
        return path
    path = Path(torch.hub.get_dir()) / "checkpoints" / URL_INCEPTION_V3.rpartition("/")[2]
    if not path.is_file():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(URL_INCEPTION_V3, str(path), hash_prefix=INCEPTION_HASH)
        except (OSError, RuntimeError) as error:  # no network, no disk; another file than expected
            raise ValueError(
                f"features=inception needs weights that are not here and cannot be downloaded ({error}). Get "
                f"{URL_INCEPTION_V3} where there is a network and put it at {path}, or give inception_weights=FILE; "
                + without
            ) from error
    return path


def check_inception(path: Path) -> None:
    """Raise ValueError unless a file holds weights and nothing that could run; the library itself would unpickle it."""
    try:
        state = torch.load(path, map_location="meta", weights_only=True)
    except (LookupError, TypeError, ValueError, RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} is damaged or holds more than weights ({reason})") from error
    if not isinstance(state, Mapping) or "Mixed_7c.branch1x1.conv.weight" not in state or "fc.weight" not in state:
        keys = ", ".join(map(str, list(state)[:3])) if isinstance(state, Mapping) else type(state).__name__
        raise ValueError(
            f"{path} holds no weights of torch-fidelity's InceptionV3 (but {keys}); pytorch-fid's and torchvision's "
            f"have other names. Take the file whose name ends in {INCEPTION_HASH}.pth"
        )
