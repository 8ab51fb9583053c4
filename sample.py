"""Sample from a checkpoint.

    uv run sample.py                                       # the digits that come with this repository
    uv run sample.py checkpoint=outputs/digits/TIME/model.safetensors num_samples=100 seed=1000
    uv run sample.py labels=[3,7] guidance.guidance_scale=4 sampler.num_steps=20
    uv run sample.py checkpoint=FILE prompt="a small red star on a blue background" negative_prompt="a circle"
    uv run sample.py sampler=ddpm guidance=none
    uv run sample.py checkpoint=FILE labels=[3,7] guidance=classifier guidance.classifier_checkpoint=FILE
    uv run sample.py -m sampler.num_steps=5,10,20,50,100             # a sweep: a folder each, and a report
    uv run sample.py sweep=sampler_x_steps checkpoint=FILE           # a named one; sweep= lists them
    uv run sample.py checkpoint=FILE prompts=FILE.txt                # one prompt a line
    uv run sample.py checkpoint=FILE prompt="..." image=PICTURE strength=0.6 mask=PICTURE   # from a picture, or a part
    uv run sample.py sampler=                                        # lists them
    uv run sample.py from=IMAGE.png                                  # the same image again, from what it says of itself
    uv run sample.py from=IMAGE.png seed=5 sampler.num_steps=50      # or another one; also images of A1111 and ComfyUI
    uv run sample.py from=IMAGE.png verify=true                      # is it the same? the exit status says
    uv run sample.py out_dir=outputs/many num_samples=50000 devices=8   # on 8 GPUs; stopped, the same command goes on
    uv run torchrun --nproc-per-node=8 sample.py out_dir=outputs/many num_samples=50000          # or so, or with srun
    uv run sample.py num_samples=500 metrics=[fid,kid,precision,recall] reference=digits features=pixels
    uv run sample.py samples=FOLDER_OR_NPZ metrics=[fid] reference=FOLDER_OR_NPZ    # measures, and draws nothing

out_dir gets grid.png, samples.npz (arr_0 uint8 images NHWC, arr_1 int64 labels), images/000000.png ..., each of which
says in its PNG text how it was made (as JSON, and as the `parameters` that A1111 writes), config.yaml and, with
metrics=, metrics.json.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from diffusion.cli import command, typed_words

if TYPE_CHECKING:
    from diffusion.processes import Team

TEXTS = ("prompt", "negative_prompt", "prompts", "from", "image", "mask")


def spelled_out(arguments: list[str]) -> list[str]:
    """Put the settings that from=PICTURE stands for in front of the words that were typed."""
    if not any(word.lstrip("+").startswith("from=") for word in arguments):
        return arguments
    from diffusion.pictures.from_picture import with_picture

    return with_picture(arguments)


def draw(config: dict[str, Any], team: "Team") -> Path:
    """Load, build, sample and write, as one of the processes that share the work; return the folder.

    `config["typed"]` are the words of the command line: what they leave open a published model brings along.
    """
    from hydra.utils import instantiate

    from diffusion.asked import choose_shape
    from diffusion.checkpoint import load_model
    from diffusion.evaluation.command import check_wanted
    from diffusion.own_settings import with_own_settings
    from diffusion.prepare import is_published
    from diffusion.sample_folder import sample_to_folder
    from diffusion.sample_settings import files_given, with_counts

    config, typed = {name: value for name, value in config.items() if name != "typed"}, config["typed"]
    for part in ("sampler", "guidance"):
        instantiate(config[part], _convert_="all")  # what is wrong with them is found before a large file is loaded
    model = load_model(config["checkpoint"], buildable=config["buildable"], settled=False, **files_given(config))
    config = with_own_settings(config, model, typed, silent=not team.first)
    config = with_counts(config, choose_shape(model, config), published=is_published(model))
    sampler, guidance = (instantiate(config[part], _convert_="all") for part in ("sampler", "guidance"))
    if team.rank == 0:
        check_wanted(config, model)  # what is wrong with metrics= is found before drawing
    return sample_to_folder(model, sampler, guidance, config, team)


@command("sample", __doc__, folder="out_dir", texts=TEXTS, expand=spelled_out)
def main(cfg: DictConfig) -> None:
    """Sample in as many processes as there are, and measure in one."""
    from omegaconf import OmegaConf

    from diffusion.evaluation.command import RESULT, measure, needs_samples
    from diffusion.pictures.verify import check_verify, verified
    from diffusion.processes import together
    from diffusion.sample_settings import with_counts, with_prompts

    config = with_prompts(OmegaConf.to_container(cfg, resolve=True))
    check_verify(config)
    images = config["samples"]
    if needs_samples(config):
        images = together(draw, {**config, "typed": typed_words()}, devices=config["devices"])
        if images is None:  # another process goes on
            return
        print(images)
        (images / RESULT).unlink(missing_ok=True)  # of samples that were there before
    if config["metrics"] or config["samples"]:
        print(measure(with_counts(config), images))
    if config["verify"]:
        raise SystemExit(verified(config["from"], images))


if __name__ == "__main__":
    main()
