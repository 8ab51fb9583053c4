"""Does `forecast=true` tell what a run will cost? Forecast and run in processes of their own, on four recipes.

    python benchmarks/forecast.py [recipe ...]      # targets: memory within 10 %, time within 15 %

The runs are of some hundred steps, with validation, pictures and checkpoints in them. Time is that of the whole
command, memory the peak in metrics.csv.
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml
from harness import composed, report

from diffusion.training.metrics import GIB, read_rows

ROOT = Path(__file__).resolve().parent.parent
RECIPES = {
    "digits": (
        *("trainer.max_steps=300", "trainer.val_check_interval=100"),
        *("callbacks.samples.every_n_steps=150", "callbacks.checkpoints.every_n_steps=100"),
    ),
    "shapes": (
        *("trainer.max_steps=120", "trainer.val_check_interval=60", "data.num_val=256"),
        *("callbacks.samples.every_n_steps=60", "callbacks.checkpoints.every_n_steps=60"),
    ),
    "shapes_autoencoder": (
        *("trainer.max_steps=300", "trainer.val_check_interval=100", "loss.adversarial.start=100"),
        *("callbacks.reconstructions.every_n_steps=100", "callbacks.checkpoints.every_n_steps=100"),
    ),
    "digits_latent": (
        *("trainer.max_steps=300", "trainer.val_check_interval=150", "autoencoder.checkpoint=AUTOENCODER"),
        *("callbacks.samples.every_n_steps=150", "callbacks.checkpoints.every_n_steps=150"),
    ),
    "shapes_text": (
        *("trainer.max_steps=150", "trainer.val_check_interval=75"),
        *("callbacks.samples.every_n_steps=150", "callbacks.checkpoints.every_n_steps=75"),
    ),
}


def forecast_of(words: list[str]) -> dict[str, Any]:
    """Forecast in a process of its own, as train.py does."""
    command = [sys.executable, __file__, "only", *words]
    said = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout
    return yaml.safe_load(said[said.index("device:") :])


def truth_of(words: list[str]) -> dict[str, Any]:
    """Run for real; return what it took."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        subprocess.run(
            [sys.executable, "train.py", *words, f"run_dir={folder}/run"], check=True, capture_output=True, cwd=ROOT
        )
        total = time.perf_counter() - began
        run = Path(folder, "run")
        rows = [row for row in read_rows(run / "metrics.csv") if row.get("train/memory_gb")]
        start = yaml.safe_load((run / "forecast.yaml").read_text(encoding="utf-8"))
        disk = sum(path.stat().st_size for path in [*(run / "checkpoints").iterdir(), run / "model.safetensors"])
    memory = max(float(row["train/memory_gb"]) for row in rows) * GIB
    return {"time": total, "memory": memory, "disk": disk, "start": start}


def row(name: str) -> str:
    """Compare forecast and truth of a recipe in one line."""
    with tempfile.TemporaryDirectory() as folder:
        autoencoder = f"{folder}/autoencoder/model.safetensors"
        words = [f"experiment={name}", *(word.replace("AUTOENCODER", autoencoder) for word in RECIPES[name])]
        if f"autoencoder.checkpoint={autoencoder}" in words:
            few = ["experiment=digits_autoencoder", "trainer.max_steps=5", f"run_dir={folder}/autoencoder"]
            subprocess.run([sys.executable, "train.py", *few], check=True, capture_output=True, cwd=ROOT)
        told, true = forecast_of(words), truth_of(words)
    lines = []
    for what, unit, scale, of in (
        ("memory", "GiB", GIB, lambda found: found["memory"]["total"]),
        ("time", "s", 1, lambda found: found["total_seconds"]),
        ("disk", "MiB", 2**20, lambda found: found["disk_bytes"]),
    ):
        before, early = (of(found) / true[what] - 1 for found in (told, true["start"]))
        lines.append(
            f"{what:7}{true[what] / scale:7.3f} {unit:4} forecast {before:+6.1%}, at the run's start {early:+6.1%}"
        )
    return "\n    ".join(lines)


def main(names: list[str]) -> None:
    rows = {}
    for name in names or RECIPES:
        rows[name] = row(name)
        print(name, rows[name], flush=True)
    report("Forecast against the run that follows, each in a process of its own", rows)


if __name__ == "__main__":
    if sys.argv[1:2] == ["only"]:
        from diffusion.training.forecast_run import forecast

        print(forecast(composed(*sys.argv[2:], "run_dir=outputs/forecast_only")).to_yaml())
    else:
        main(sys.argv[1:])
