"""Latents in place of images: what `task=cache_latents` wrote, without the images that it was made from.

uv run train.py task=cache_latents experiment=digits_latent autoencoder.checkpoint=FILE latents_dir=DIR
uv run train.py experiment=digits_latent autoencoder.checkpoint=FILE data=latents data.root=DIR
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from diffusion.conditioner import Conditioner
from diffusion.data.base import ImageData
from diffusion.data.images import digest
from diffusion.data.latent_build import MANIFEST, PROGRESS, exists, read, refuse_other
from diffusion.data.latent_cache import autoencoder_origin, condition_origin, latent_set
from diffusion.stored_condition import PREFIX, why_not_stored

AUGMENTED = ("horizontal_flip", "random_crop")  # settings of images that a cache has or has not


class Latents(ImageData):
    """Batches {"moments": (B, 2C, h, w), "label", "caption", "index", "condition.context", ...} from the folder `root`.

    Shape, classes and mirrors are those of the images when they were encoded. `images` are settings that a recipe gives
    for its images: another shape, number of classes or augmentation than the cache's is refused, all else says nothing
    here; num_classes=None leaves the labels out.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        batch_size: int = 64,
        num_workers: int = 0,
        pin_memory: bool | None = None,
        seed: int = 0,
        **images: Any,
    ) -> None:
        self.root = Path(root).expanduser()
        if not exists(self.root / MANIFEST):
            begun = exists(self.root / PROGRESS)
            raise ValueError(
                f"{self.root} holds no {'complete ' if begun else ''}latents; "
                + ("run task=cache_latents again, which goes on there" if begun else "")
                + ("" if begun else f"write some: uv run train.py task=cache_latents ... latents_dir={self.root}")
            )
        self.manifest = read(self.root / MANIFEST)
        facts = self.manifest["facts"]
        self._refuse_other_images(facts, images)
        labelled = images.get("num_classes", facts["num_classes"]) is not None
        self._leave_out = set() if labelled else {"label"}
        super().__init__(
            channels=facts["shape"][0],
            image_size=facts["shape"][1],
            num_classes=facts["num_classes"] if labelled else None,
            class_names=facts["class_names"] if labelled else None,
            batch_size=batch_size,
            num_workers=num_workers,
            pin_memory=pin_memory,
            seed=seed,
        )

    def _refuse_other_images(self, facts: Mapping[str, Any], images: Mapping[str, Any]) -> None:
        channels, image_size = facts["shape"][:2]
        known = {"channels": channels, "image_size": image_size, "num_classes": facts["num_classes"]}
        known |= {name: value for name, value in self.manifest["settings"].items() if name in AUGMENTED}
        known |= {"num_classes": None} if images.get("num_classes") is None else {}
        if changed := [key for key, value in images.items() if key in known and known[key] != value]:
            told = ", ".join(f"data.{key} was {known[key]} and is {images[key]}" for key in changed)
            raise ValueError(
                f"the latents in {self.root} are of images with other settings: {told}; leave them out, or write "
                "others with task=cache_latents"
            )

    def setup(self, stage: str | None = None) -> None:
        """Open the files. Raises ValueError where one is gone or damaged."""
        if self.train_set is None:
            self.train_set, self.val_set = (
                latent_set(self.root, self.manifest, name, seed=self.seed, leave_out=self._leave_out)
                for name in ("train", "val")
            )

    def fingerprint(self) -> dict[str, Any]:
        made_from = digest([*sorted(self.manifest["made_from"].items()), self.manifest["dtype"]])
        return {"name": "Latents", "num_samples": sum(self.manifest["rows"].values()), "hash": made_from}

    def check(self, autoencoder: nn.Module, conditioner: Conditioner | None) -> None:
        """Raise ValueError where these are the latents, or the text embeddings, of other networks than a run's.

        Embeddings that a run has no use for are not read.
        """
        made_from = self.manifest["made_from"]
        wanted, parts = autoencoder_origin(autoencoder), ["autoencoder."]
        if conditioner is None or why_not_stored(conditioner) is not None:
            self._leave_out |= {name for name in self.manifest["columns"]["train"] if name.startswith(PREFIX)}
        elif any(name.startswith("conditioner.") for name in made_from):
            wanted |= condition_origin(conditioner)
            parts.append("conditioner.")
        has = {name: value for name, value in made_from.items() if name.startswith(tuple(parts))}
        refuse_other(self.root, has, wanted, advice="Write others: task=cache_latents latents_dir=ANOTHER_DIR")
