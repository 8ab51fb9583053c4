"""What does a folder of cached latents say of its images, for configs that refer to the data's shape and classes?

`${latents:channels}` in a config reads it from the folder that `root` beside it names; nothing here imports torch.
"""

import json
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"


def facts(root: Path) -> dict[str, Any]:
    """Return "channels", "image_size" and "num_classes"; {} where the folder holds no latents."""
    try:
        found = json.loads((root / MANIFEST).read_text(encoding="utf-8"))["facts"]
        channels, image_size = found["shape"][:2]
        return {"channels": channels, "image_size": image_size, "num_classes": found["num_classes"]}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def register() -> None:
    """Let configs refer to these facts; one that is not to be had is None, and the datamodule says why."""
    from omegaconf import DictConfig, OmegaConf

    def fact(name: str, *, _parent_: DictConfig) -> Any:
        missing = OmegaConf.is_missing(_parent_, "root") or _parent_.root is None
        return None if missing else facts(Path(str(_parent_.root)).expanduser()).get(name)

    OmegaConf.register_new_resolver("latents", fact, replace=True)
