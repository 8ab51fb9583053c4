"""Sample from a checkpoint.

    uv run sample.py                                       # the digits that come with this repository
    uv run sample.py checkpoint=outputs/digits/TIME/model.safetensors num_samples=100 seed=1000
    uv run sample.py labels=[3,7] guidance.guidance_scale=4 sampler.num_steps=20
    uv run sample.py checkpoint=FILE prompt="a small red star on a blue background" negative_prompt="a circle"
    uv run sample.py sampler=ddpm guidance=none
    uv run sample.py checkpoint=FILE labels=[3,7] guidance=classifier guidance.classifier_checkpoint=FILE
    uv run sample.py -m out_dir=outputs/steps sampler.num_steps=5,10,20,50,100
    uv run sample.py out_dir=outputs/many num_samples=50000 devices=8   # on 8 GPUs; stopped, the same command goes on
    uv run torchrun --nproc-per-node=8 sample.py out_dir=outputs/many num_samples=50000          # or so, or with srun
    uv run sample.py num_samples=500 metrics=[fid,kid,precision,recall] reference=digits features=pixels
    uv run sample.py samples=FOLDER_OR_NPZ metrics=[fid] reference=FOLDER_OR_NPZ    # measures, and draws nothing

out_dir gets grid.png, samples.npz (arr_0 uint8 images NHWC, arr_1 int64 labels), images/000000.png ..., each of which
says in its PNG text how it was made, config.yaml and, with metrics=, metrics.json.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from diffusion.cli import command

if TYPE_CHECKING:
    from diffusion.processes import Team


def draw(config: dict[str, Any], team: "Team") -> Path:
    """Load, build, sample and write, as one of the processes that share the work; return the folder."""
    from hydra.utils import instantiate

    from diffusion.checkpoint import load_model
    from diffusion.evaluation.command import check_wanted
    from diffusion.sample_folder import sample_to_folder

    sampler, guidance = (instantiate(config[part], _convert_="all") for part in ("sampler", "guidance"))
    model = load_model(config["checkpoint"], buildable=config["buildable"], autoencoder=config["autoencoder"])
    if team.rank == 0:
        check_wanted(config, model)  # what is wrong with metrics= is found before drawing
    return sample_to_folder(model, sampler, guidance, config, team)


@command("sample", __doc__, folder="out_dir", texts=("prompt", "negative_prompt"))
def main(cfg: DictConfig) -> None:
    """Sample in as many processes as there are, and measure in one."""
    from omegaconf import OmegaConf

    from diffusion.evaluation.command import RESULT, measure, needs_samples
    from diffusion.processes import together

    config = OmegaConf.to_container(cfg, resolve=True)
    images = config["samples"]
    if needs_samples(config):
        images = together(draw, config, devices=config["devices"])
        if images is None:  # another process goes on
            return
        print(images)
        (images / RESULT).unlink(missing_ok=True)  # of samples that were there before
    if config["metrics"] or config["samples"]:
        print(measure(config, images))


if __name__ == "__main__":
    main()
