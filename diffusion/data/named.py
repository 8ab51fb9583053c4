"""Which data sets have a name, and how is one built outside a training run?"""

from collections.abc import Mapping
from typing import Any

from diffusion.cli import CONFIGS, explain, plain
from diffusion.data.base import ImageData


def data_names() -> list[str]:
    """List what `data=NAME` and `reference=NAME` understand: the files of configs/data."""
    return sorted(path.stem for path in (CONFIGS / "data").glob("*.yaml"))


def open_data(name: str, settings: Mapping[str, Any] | None = None) -> ImageData:
    """Build and set up the data set of configs/data/NAME.yaml, with `settings` in place of values that stand there.

    Raises ValueError for a name or a setting that does not exist, and for a value that the file leaves to the user.
    """
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    if name not in data_names():
        raise ValueError(f"there is no data set {name!r}; there are {', '.join(data_names())}")
    node = OmegaConf.load(CONFIGS / "data" / f"{name}.yaml")
    settings = dict(settings or {})
    if unknown := sorted(settings.keys() - node.keys()):
        known = ", ".join(key for key in node if not key.startswith("_"))
        raise ValueError(f"the data set {name} has no setting {', '.join(unknown)}; it has {known}")
    whole = OmegaConf.create(
        {"data": OmegaConf.merge(node, settings)}
    )  # `seed` refers to the root's, which is not ours
    if missing := sorted(key.removeprefix("data.") for key in OmegaConf.missing_keys(whole)):
        needed = ", ".join(f"{key}: ..." for key in missing)
        raise ValueError(f"the data set {name} needs its {', '.join(missing)}: reference_data={{{needed}}}")
    try:
        data = instantiate(plain(whole)["data"], _convert_="all")
    except InstantiationException as error:
        raise ValueError(explain(error)) from error
    data.prepare_data()
    data.setup("fit")
    return data
