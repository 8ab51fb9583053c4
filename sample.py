"""Sample from a checkpoint.

    uv run sample.py                                       # the digits that come with this repository
    uv run sample.py checkpoint=outputs/digits/TIME/model.safetensors num_samples=100 seed=1000
    uv run sample.py labels=[3,7] guidance.guidance_scale=4 sampler.num_steps=20
    uv run sample.py checkpoint=FILE prompt="a small red star on a blue background" negative_prompt="a circle"
    uv run sample.py sampler=ddpm guidance=none
    uv run sample.py -m out_dir=outputs/steps sampler.num_steps=5,10,20,50,100

out_dir gets grid.png, samples.npz (arr_0 uint8 images NHWC, arr_1 int64 labels), images/000000.png ..., each of which
says in its PNG text how it was made, and config.yaml.
"""

from omegaconf import DictConfig

from diffusion.cli import command


@command("sample", __doc__, folder="out_dir", texts=("prompt", "negative_prompt"))
def main(cfg: DictConfig) -> None:
    """Load, build, sample, write."""
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    from diffusion.checkpoint import load_model
    from diffusion.sample_folder import sample_to_folder

    config = OmegaConf.to_container(cfg, resolve=True)
    sampler, guidance = (instantiate(config[part], _convert_="all") for part in ("sampler", "guidance"))
    model = load_model(config["checkpoint"], buildable=config["buildable"], autoencoder=config["autoencoder"])
    print(sample_to_folder(model, sampler, guidance, config))


if __name__ == "__main__":
    main()
