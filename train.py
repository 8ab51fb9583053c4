"""Train a diffusion model.

    uv run train.py                                        # handwritten digits: a few minutes on two CPU cores
    uv run train.py experiment=cifar10 trainer=gpu         # a recipe: see configs/experiment
    uv run train.py data=image_folder data.root=DIR        # change one part of the default recipe
    uv run train.py task.parameterization=v optimizer.lr=1e-3 trainer.max_steps=2000
    uv run train.py -m schedule=linear,cosine task.parameterization=eps,v seed=0,1,2   # a sweep, and its report
    uv run train.py sweep=adm_table1 hydra/launcher=joblib # a named one, several jobs at a time; sweep= lists them
    uv run train.py run_dir=outputs/mine                   # run it again, and it goes on where it stopped

The run folder gets config.yaml, metrics.csv, samples/*.png, checkpoints/last.ckpt and model.safetensors, which
`uv run sample.py checkpoint=FOLDER/model.safetensors` reads.
"""

from omegaconf import DictConfig

from diffusion.cli import command


@command("train", __doc__, folder="run_dir")
def main(cfg: DictConfig) -> None:
    """Hand the composed config to the training run."""
    from diffusion.training.run import train  # torch and lightning: not for --help

    train(cfg)


if __name__ == "__main__":
    main()
