"""How does a checkpoint become a model file by hand? Also one in shards (FSDP), on one machine and without a GPU.

    uv run python -m diffusion.training.merge outputs/digits/RUN                       # its newest checkpoint
    uv run python -m diffusion.training.merge outputs/digits/RUN/checkpoints/last-1.ckpt out=before.safetensors

The first average of the weights is taken, or with weights=raw the weights themselves. Training writes model.safetensors
beside each checkpoint, so this is for checkpoints that were kept, copied, or saved with callbacks.checkpoints.export
off.
"""

import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from lightning.pytorch import LightningModule
from torch import Tensor

from diffusion.checkpoint import save_model
from diffusion.training.checkpoint_files import META, Damaged, candidates, read_checkpoint
from diffusion.training.ema import trainable
from diffusion.training.sharded import CALLBACKS


def merge(source: str | Path, *, out: str | Path | None = None, weights: str = "ema") -> Path:
    """Write the model of a checkpoint (a file, a folder of shards, or a run's newest one) and return its path.

    `weights`: "ema" for the first average, where there is one, or "raw". Raises ValueError for what is no checkpoint.
    """
    if weights not in ("ema", "raw"):
        raise ValueError(f"weights={weights!r} is neither ema nor raw; choose one of them")
    path = checkpoint_at(Path(source).expanduser())
    held, state, averages = read(path)
    if "facts" not in held:
        raise ValueError(f"{path} does not say what its model is of: it is of an older version; resume its run once")
    from diffusion.training.run import build_task  # which imports what writes checkpoints

    task = build_task(held["config"])
    task.load_state_dict(state)
    if averages and weights == "ema":
        fill(task, averages[0][1])
    config, parts = task.for_export(held["config"])
    target = Path(out) if out is not None else path.parent.parent / "model.safetensors"
    taken = "ema" if averages and weights == "ema" else "raw"
    save_model(
        target,
        task.net,
        config,
        weights=taken,
        step=int(held["global_step"]),
        facts=held["facts"],
        ema_decay=averages[0][0] if taken == "ema" else None,
        parts=parts,
    )
    return target


def checkpoint_at(path: Path) -> Path:
    """Return the checkpoint that a path names: itself, or a run's newest. Raises ValueError where there is none."""
    if path.is_dir() and not (path / META).exists():
        found = candidates(path)
        if not found:
            raise ValueError(f"{path} holds no checkpoint; name a run folder or one of the checkpoints in it")
        return found[0]
    if not path.exists():
        raise ValueError(f"there is no {path}; name a run folder or one of the checkpoints in it")
    return path


def read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor], list[tuple[float, dict[str, Tensor]]]]:
    """Return what a checkpoint says, the weights of its task, and its averages by decay, the first one first."""
    try:
        read_checkpoint(path)
    except Damaged as error:
        raise ValueError(f"{path} is damaged or no checkpoint of train.py ({error}); take another one") from error
    held = torch.load(path / META if path.is_dir() else path, map_location="cpu", weights_only=True)
    if not path.is_dir():
        states = (state for name, state in held["callbacks"].items() if name.startswith("EMA"))
        ema = next(states, {"averages": {}})
        return held, held["state_dict"], [(float(name), average) for name, average in ema["averages"].items()]
    flat = tensors(path, ("state_dict.", f"{CALLBACKS}.EMA"))
    state = {name.removeprefix("state_dict."): value for name, value in flat.items() if name.startswith("state_dict.")}
    averages: dict[str, dict[str, Tensor]] = {}
    for name, value in flat.items():
        if name.startswith(CALLBACKS):
            *_, decay, parameter = name.split("/")
            averages.setdefault(decay, {})[parameter] = value
    order = next((list(of["averages"]) for name, of in held[CALLBACKS].items() if name.startswith("EMA")), [])
    return held, state, [(float(decay), averages[decay]) for decay in order]


def tensors(path: Path, prefixes: tuple[str, ...]) -> dict[str, Tensor]:
    """Read the tensors of a folder of shards whose names begin with one of `prefixes`, whole."""
    reader = dcp.FileSystemReader(path)
    known = reader.read_metadata().state_dict_metadata
    wanted = {
        name: torch.empty(of.size, dtype=of.properties.dtype)
        for name, of in known.items()
        if name.startswith(prefixes) and hasattr(of, "size")
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as it is meant to be
        dcp.load(wanted, storage_reader=reader, no_dist=True)
    return wanted


@torch.no_grad()
def fill(task: LightningModule, average: dict[str, Tensor]) -> None:
    """Put an average into the weights that it is of."""
    for name, parameter in trainable(task.model).items():
        parameter.copy_(average[name])


def main(words: Sequence[str]) -> None:
    """Read the command line: a path, then out=FILE and weights=ema|raw."""
    if not words or words[0] in ("-h", "--help"):
        print(__doc__)
        return
    settings = dict(word.split("=", 1) for word in words[1:] if "=" in word)
    if unknown := [word for word in words[1:] if word.split("=", 1)[0] not in ("out", "weights") or "=" not in word]:
        raise ValueError(f"unknown: {' '.join(unknown)}; there are out=FILE and weights=ema|raw")
    print(f"wrote {merge(words[0], **settings)}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
