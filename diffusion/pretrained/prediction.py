"""What does a published denoiser predict, and with which schedule: as far as a file says so itself?

Believed in this order: what the header says, marker tensors, the step that published checkpoints have, the file's name.
"""

import re
from typing import Any

import torch

from diffusion.pretrained import families
from diffusion.pretrained.families import Family
from diffusion.pretrained.weight_files import WeightFile

NAMES = {"epsilon": "eps", "eps": "eps", "v": "v", "v_prediction": "v", "v-prediction": "v", "sample": "x0", "x0": "x0"}
EPS_STEPS = (875_000, 220_000)  # Stable Diffusion 2.0's and 2.1's base, at 512
V_NAME = re.compile(r"v[-_ ]?pred|768[-_]?v|v2-?[01]?_?[01]?_768|768-ema|768-nonema", re.IGNORECASE)
EPS_NAME = re.compile(r"512[-_]?base|base-ema|512-ema", re.IGNORECASE)


def read_parameterization(file: WeightFile, family: Family, notes: list[str]) -> str | None:
    """What the network predicts; None where its family has both kinds and the file does not tell."""
    for key in ("modelspec.prediction_type", "prediction_type"):
        if (said := NAMES.get(file.metadata.get(key, "").lower())) is not None:
            return _told(said, family, f"its header says {key}={file.metadata[key]}", notes)
    if "v_pred" in file:
        return _told("v", family, "it has the marker v_pred", notes)
    if family.parameterization is None and file.metadata.get("global_step", "").isdigit():
        step = int(file.metadata["global_step"])
        said = "eps" if step in EPS_STEPS else "v"
        return _told(said, family, f"it is of step {step}", notes)
    for said, pattern in (("v", V_NAME), ("eps", EPS_NAME)):
        if pattern.search(file.path.name):
            return _told(said, family, f"its name is {file.path.name}", notes)
    return family.parameterization


def _told(said: str, family: Family, why: str, notes: list[str]) -> str:
    if said != family.parameterization:
        notes.append(f"parameterization={said}, because {why}")
    return said


def read_schedule(file: WeightFile, family: Family, parameterization: str | None, notes: list[str]) -> dict[str, Any]:
    """The schedule's config node: the family's, or the file's own where its buffers differ from that."""
    node = families.scaled_linear(family.betas)
    if "ztsnr" in file and parameterization in ("v", "x0"):
        notes.append("its schedule ends in pure noise, because it has the marker ztsnr")
        return {"_target_": "diffusion.schedule.zero_terminal_snr", "schedule": node}
    if "betas" not in file or len(file["betas"].shape) != 1 or file["betas"].shape[0] > 100_000:
        return node
    betas = file.read("betas").double()
    tolerance = 1e-4 if file["betas"].dtype in (torch.float32, torch.float64) else 2e-2
    ends = torch.tensor(family.betas, dtype=torch.float64)
    if len(betas) == 1000 and torch.allclose(betas[[0, -1]], ends, rtol=tolerance, atol=0):
        return node
    if not bool(((betas > 0) & (betas <= 1)).all()):
        notes.append(f"its betas, {betas.min():.3g} to {betas.max():.3g}, are no schedule; {family.title}'s is taken")
        return node
    found = schedule_node(betas)
    notes.append(f"its own schedule of {len(betas)} betas, {betas[0]:.6g} to {betas[-1]:.6g}, is taken")
    return found


def schedule_node(betas: torch.Tensor) -> dict[str, Any]:
    """The config node of a schedule with these betas, by a known form if they have one."""
    if len(betas) > 2 and bool(((betas > 0) & (betas < 1)).all()):
        ends = tuple(float(f"{float(beta):.6g}") for beta in betas[[0, -1]])
        for power, name in ((0.5, "scaled_linear"), (1.0, "linear")):
            steps = betas.pow(power).diff()
            if float((steps - steps.mean()).abs().max()) < 1e-3 * float(steps.mean().abs()):
                node = families.scaled_linear(ends, len(betas)) | {"_target_": f"diffusion.schedule.{name}"}
                return node | ({"reference_steps": None} if name == "linear" else {})
    return {"_target_": "diffusion.schedule.Schedule", "betas": betas.tolist()}


def assumed_scale(file: WeightFile, notes: list[str]) -> float:
    """The scale of an autoencoder's latents where only its name or header hints at the model that it belongs to."""
    hints = f"{file.path.name} {file.metadata.get('modelspec.architecture', '')}".lower()
    scale = families.FAMILIES["sdxl-base" if "xl" in hints else "sd1"].scale_factor
    if any(name.endswith("quantize.embedding.weight") for name in file):
        scale = 1.0
    notes.append(f"the file does not tell the scale of its latents; {scale} is assumed (beside a model, the model's)")
    return scale
