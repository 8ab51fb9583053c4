"""Encode the images of a training run once, for all its epochs.

    uv run python -m diffusion.data.latents experiment=digits_latent autoencoder.checkpoint=FILE latent_cache=DIR
    uv run python -m diffusion.data.latents ... latent_cache=DIR latent_dtype=float16    # half the size

fills DIR, or goes on where it was stopped. `uv run train.py` with the same settings and latent_cache=DIR then reads
latents, labels and captions from there and no image; it fills DIR itself where that is empty. The cache of another
autoencoder, of other images or of another transform is refused.
"""

from pathlib import Path

from omegaconf import DictConfig

from diffusion.cli import command


@command("train", __doc__, folder="run_dir")
def main(cfg: DictConfig) -> None:
    """Fill the folder `latent_cache` for the composed training run."""
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    from diffusion.data.latent_cache import cached  # torch and lightning: not for --help

    config = OmegaConf.to_container(cfg, resolve=True)
    if not config["latent_cache"]:
        raise ValueError("name the folder to fill: latent_cache=DIR")
    if not config["autoencoder"]:
        raise ValueError("this run has no autoencoder; choose one: autoencoder=trained autoencoder.checkpoint=FILE")
    folder = Path(config["latent_cache"]).expanduser()
    data, autoencoder = (instantiate(config[name], _convert_="all") for name in ("data", "autoencoder"))
    cached(data, autoencoder, folder, dtype=config["latent_dtype"])
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(f"{folder} holds the latents of {len(data.train_set)} + {len(data.val_set)} images, {size / 1e6:,.2f} MB")


if __name__ == "__main__":
    main()
