"""Small models on disk and the two commands in this process: what the tests of the entry points share."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

import torch

from diffusion.checkpoint import build, save_model

ROOT = Path(__file__).resolve().parent.parent
NET: dict[str, Any] = {
    "_target_": "diffusion.models.unet.UNet",
    "in_channels": 1,
    "out_channels": 1,
    "channels": 16,
    "norm_groups": 8,
    "num_heads": 2,
    "num_classes": 10,
    "stages": [{"depth": 1}, {"depth": 1, "attention": "self"}],
}
DIFFUSION: dict[str, Any] = {
    "_target_": "diffusion.process.GaussianDiffusion",
    "schedule": {"_target_": "diffusion.schedule.cosine", "num_train_timesteps": 100},
    "parameterization": "v",
}


def facts(**changes: Any) -> dict[str, Any]:
    names = [str(digit) for digit in range(10)]
    return {"shape": [1, 8, 8], "num_classes": 10, "class_names": names, "condition_drop": 0.1, **changes}


def config(**net: Any) -> dict[str, Any]:
    return {"net": {**NET, **net}, "diffusion": DIFFUSION}


def random_net(settings: dict[str, Any]) -> torch.nn.Module:
    """A network whose last layer is not zero, as it is at the start of training: its answers differ."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = build(settings["net"])
        torch.nn.init.normal_(net.conv_out.weight, std=0.1)
    return net


def save_tiny(path: Path, *, about: dict[str, Any] | None = None, **net: Any) -> Path:
    settings = config(**net)
    save_model(path, random_net(settings), settings, weights="ema", step=7, ema_decay=0.99, facts=about or facts())
    return path


def names_in(folder: Path) -> list[str]:
    """What lies in a folder of samples, but the changes of the code that nobody has committed yet."""
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("changes_"))


def run(script: str, arguments: list[str], monkeypatch, capsys) -> tuple[int, str, str]:
    """Run train.py or sample.py as if typed, in this process; return exit status, stdout, stderr."""
    spec = importlib.util.spec_from_file_location(f"entry_{script}", ROOT / f"{script}.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *arguments])
    monkeypatch.setattr("warnings.formatwarning", None, raising=False)
    status = 0
    try:
        spec.loader.exec_module(module)
        module.main()
    except SystemExit as stop:
        status = stop.code
    captured = capsys.readouterr()
    return status, captured.out, captured.err
