"""Run folders as training leaves them, made up in milliseconds: curves with noise, pictures, states of every kind."""

import itertools
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

PACKAGES = {"torch": "2.15.0", "lightning": "2.6.6"}
DIFF = "diff --git a/train.py b/train.py\n--- a/train.py\n+++ b/train.py\n@@ -1 +1 @@\n-old\n+{line}\n"


def write_yaml(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(value, sort_keys=False), encoding="utf-8")


def write_metrics(folder: Path, rows: list[dict[str, Any]]) -> None:
    """metrics.csv as MetricsCSV writes it: a column a metric, what a row lacks left empty."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [columns, *([_cell(row.get(column, "")) for column in columns] for row in rows)]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.csv").write_text("".join(",".join(line) + "\n" for line in lines), encoding="utf-8")


def _cell(value: Any) -> str:
    return f"{value:.8g}" if isinstance(value, float) else str(value)


def status(folder: Path, state: str, step: int, max_steps: int, error: str | None = None) -> None:
    time = "2026-11-21T12:04:10+00:00"
    found = {
        "state": state,
        "step": step,
        "max_steps": max_steps,
        "time": time,
        "error": error,
        "host": "one",
        "pid": 1,
    }
    write_yaml(folder / "STATUS", found)


def learn(level: float, seed: int, steps: int, every: int, memory: float = 0.9) -> list[dict[str, Any]]:
    """The rows of a run whose loss falls to about `level`, the same steps for all."""
    draw = random.Random(f"{level} {seed}")
    rows = []
    for step in range(every, steps + 1, every):
        loss = level * (1 + 3 * math.exp(-step / steps * 6) + draw.gauss(0, 0.02))
        row: dict[str, Any] = {"step": step, "train/loss": loss, "train/grad_norm": 2 * loss + draw.gauss(0, 0.05)}
        row |= {f"train/loss_q{q}": loss * (1.9 - 0.35 * q) for q in (1, 2, 3, 4)}
        row |= {"train/lr": 2e-3 * (1 - step / steps), "train/images_per_second": 900 + draw.gauss(0, 20)}
        row |= {"train/memory_gb": memory}
        if step % (5 * every) == 0:
            row |= {
                "val/loss": loss * 1.05,
                "val/loss_ema": loss * 1.02,
                "eval/fid_500_pixels": 90 * loss + draw.gauss(0, 1),
            }
        rows.append(row)
    return rows


def picture(path: Path, seed: int, sharpness: float) -> None:
    """A grid of blobs that get sharper, four by eight of 8 x 8 pixels, enlarged."""
    draw = np.random.default_rng(seed)
    cells = draw.random((4, 8, 2)) * 4 + 2
    y, x = np.mgrid[0:8, 0:8]
    blobs = np.exp(-((y - cells[..., :1, None]) ** 2 + (x - cells[..., 1:, None]) ** 2) * sharpness)
    noise = draw.random(blobs.shape) * max(0.0, 0.6 - sharpness)
    image = ((blobs + noise).clip(0, 1) * 255).astype(np.uint8).transpose(0, 2, 1, 3).reshape(32, 64)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).resize((256, 128), Image.Resampling.NEAREST).save(path)


def make_run(
    folder: Path, *, overrides: dict[str, Any], level: float, seed: int, steps: int = 2000, every: int = 20,
    state: str = "finished", error: str | None = None, reached: float = 1.0, hint: bool = False,
) -> None:  # fmt: skip
    """A run folder; `reached` is the part of its steps that it did."""
    done = int(steps * reached) // every * every
    target = overrides.get("task.parameterization", "v")
    config = {
        "name": "digits", "seed": seed, "run_dir": str(folder), "resume": "auto",
        "schedule": {"_target_": f"diffusion.schedule.{overrides.get('schedule', 'cosine')}"},
        "data": {"_target_": "diffusion.data.digits.Digits", "batch_size": 128, "seed": seed},
        "task": {"_target_": "diffusion.training.denoiser.DenoiserTask", "parameterization": target},
        "optimizer": {"lr": float(overrides.get("optimizer.lr", 2e-3))},
        "trainer": {"max_steps": steps, "accumulate_grad_batches": 1},
        "callbacks": {"samples": {"seed": 0}},
    }  # fmt: skip
    config["diffusion"] = {"schedule": config["schedule"], "parameterization": config["task"]["parameterization"]}
    write_yaml(folder / "config.yaml", config)
    write_yaml(folder / "overrides.yaml", [f"{key}={value}" for key, value in overrides.items()])
    status(folder, state, done, steps, error)
    start = {
        "time": "2026-11-21T12:00:00+00:00",
        "command": "train.py",
        "commit": "a3b1" * 10,
        "changes": "changes_1.diff",
    }
    start |= {"python": "3.12.1", "packages": PACKAGES, "host": "one", "device": "NVIDIA H100", "world_size": 1}
    data = {"name": "Digits", "hash": f"{seed:08x}" * 4, "num_samples": 1437}
    write_yaml(folder / "record.yaml", {"starts": [start], "data": data, "parameters": 1_234_567})
    write_yaml(folder / "forecast.yaml", {"total_seconds": 275.0, "memory": {"total": 2**30}, "flops_per_step": 10**9})
    (folder / "changes_1.diff").write_text(DIFF.format(line=f"seed {seed % 2}"))
    (folder / "log.txt").write_text(
        "training\n\x1b[1mstep 20\x1b[0m loss 0.9\r" + f"step {done}\n" + (error or "done") + "\n"
    )
    if rows := learn(level, seed, steps, every)[: done // every]:
        write_metrics(folder, rows)
        write_microscope(folder, rows[-1]["step"], level)
    for part in (0.25, 0.5, 0.75, 1.0):
        if part <= reached:
            for kind in ("raw", "ema"):
                picture(folder / "samples" / f"step={int(steps * part):07d}_{kind}.png", 3, part * 0.4 / (level + 0.2))
    if hint:
        said = {"name": "data in 0..1", "seen": "the data's mean is 0.48 and none is below 0", "check": "data.rescale"}
        write_yaml(folder / "hints.yaml", [said | {"means": "the data are not in -1..1", "since": 20, "until": done}])


def write_microscope(folder: Path, step: int, level: float) -> None:
    rows = [
        {"step": step, "t": t, "loss": level * (0.4 + 1.6 * (1 - t / 1000) ** 3), "grad_norm": level * (1 + t / 500),
         "x0_mse": level * (t / 1000) ** 2 + 0.001}
        for t in range(0, 1000, 66)
    ]  # fmt: skip
    lines = [list(rows[0]), *([_cell(value) for value in row.values()] for row in rows)]
    (folder / "microscope.csv").write_text("".join(",".join(line) + "\n" for line in lines))


def make_sweep(folder: Path, varied: dict[str, list[Any]], **special: dict[str, Any]) -> list[Path]:
    """A sweep over all combinations of `varied`; `special` are settings of `make_run` for the job of that number."""
    jobs, folders = [], []
    for number, values in enumerate(itertools.product(*varied.values())):
        overrides = {"experiment": "digits", **dict(zip(varied, values, strict=True))}
        name = ",".join(f"{key}={value}" for key, value in overrides.items() if key in varied)
        jobs.append({"folder": name, "overrides": [f"{key}={value}" for key, value in overrides.items()]})
        folders.append(folder / name)
        settings = special.get(f"job_{number}", {})
        if settings.get("state") != "waiting":
            make_run(
                folder / name,
                overrides=overrides,
                level=level_of(overrides),
                seed=int(overrides.get("seed", 0)),
                **settings,
            )
    words = " ".join(f"{key}={','.join(map(str, values))}" for key, values in varied.items())
    command = f"train.py -m experiment=digits {words}"
    record = {"name": folder.name, "command": command, "words": command.split()[1:], "time": "2026-11-21T12:00:00"}
    write_yaml(folder / "sweep.yaml", record | {"keys": list(varied), "jobs": jobs})
    return folders


def level_of(overrides: dict[str, Any]) -> float:
    """What a run's loss comes to: cosine beats linear by a little, v beats eps by more."""
    level = (
        0.25 + 0.02 * (overrides.get("schedule") == "linear") + 0.06 * (overrides.get("task.parameterization") == "eps")
    )
    return level + 0.01 * abs(math.log10(float(overrides.get("optimizer.lr", 2e-3)) / 2e-3))


EIGHT = {"schedule": ["linear", "cosine"], "task.parameterization": ["eps", "v"], "seed": [0, 1]}
HUNDRED = {
    "schedule": ["linear", "cosine"],
    "task.parameterization": ["eps", "v"],
    "optimizer.lr": [1e-4, 3e-4, 1e-3, 3e-3, 1e-2],
    "seed": [0, 1, 2, 3, 4],
}
