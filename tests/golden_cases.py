"""Reference cases made by running the original codebases: found by name, driven by the config each file carries.

`DIFFUSION_GOLDEN=DIR pytest` runs the same tests on every case of the same kinds in another folder.
"""

import gzip
import json
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

GOLDEN = Path(os.environ.get("DIFFUSION_GOLDEN", Path(__file__).parent / "golden"))


@dataclass(frozen=True)
class Case:
    name: str
    config: dict
    tensors: dict[str, Tensor]

    def __getitem__(self, key: str) -> Tensor:
        return self.tensors[key]

    def group(self, prefix: str) -> dict[str, Tensor]:
        """The tensors below `prefix.`, without it; float16 weights are exact in float32."""
        found = {k[len(prefix) + 1 :]: v for k, v in self.tensors.items() if k.startswith(prefix + ".")}
        return {k: v.float() if v.dtype == torch.float16 else v for k, v in found.items()}


def names(pattern: str) -> list[str]:
    """Names such as "gd/loop_0_ddpm_linear_10" of the files that match a glob such as "gd/loop_*"."""
    found = sorted(str(p.relative_to(GOLDEN).with_suffix("")) for p in GOLDEN.glob(pattern + ".safetensors"))
    assert found, f"no golden file matches {pattern} in {GOLDEN}"
    return found


@cache
def load(name: str) -> Case:
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        config = json.loads(file.metadata()["config"])
        return Case(name, config, {key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118


def key_lists() -> list[str]:
    """Stems of the full-size lists of tensors, such as "sd15_checkpoint"."""
    files = {path.name.split(".")[0] for path in (GOLDEN / "keys").glob("*.json*")}
    return sorted(files - {"configs"})


def key_list(name: str) -> dict[str, list]:
    """One list: {tensor name: [dimension, ..., type]}."""
    return _json(GOLDEN / "keys" / f"{name}.json")


def key_configs() -> dict[str, dict]:
    """The peers' settings by list, from the folder's index or the extract beside the copied files."""
    if (GOLDEN / "index.json").exists():
        return {entry["id"].removeprefix("keys/"): entry["config"] for entry in _json(GOLDEN / "index.json")}
    return _json(GOLDEN / "keys" / "configs.json")


def _json(path: Path) -> dict | list:
    """Read a JSON file; those copied here are compressed to a twentieth."""
    if path.exists():
        return json.loads(path.read_text())
    return json.loads(gzip.decompress(path.with_name(path.name + ".gz").read_bytes()))


def assert_close(ours: Tensor, theirs: Tensor, tolerance: float, what: str = "") -> None:
    """|ours - theirs| <= tolerance * max(1, max|theirs|), elementwise."""
    assert ours.shape == theirs.shape, f"{what}: shape {tuple(ours.shape)} instead of {tuple(theirs.shape)}"
    error = (ours.double() - theirs.double()).abs().max().item()
    bound = tolerance * max(1.0, theirs.double().abs().max().item())
    assert error <= bound, f"{what}: off by {error:.3g}, allowed {bound:.3g}"


def assert_bijection(table, weights: dict) -> None:
    """Assert that a table of names takes weights to ours and back with not a bit changed."""
    ours = table.to_ours(weights)
    theirs = table.to_foreign(ours)
    assert theirs.keys() == weights.keys()
    assert all(torch.equal(theirs[key], weights[key]) for key in weights)
    again = table.to_ours(theirs)
    assert again.keys() == ours.keys()
    assert all(torch.equal(again[key], ours[key]) for key in ours)
