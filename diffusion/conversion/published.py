"""Read a published file of guided-diffusion by the name of its recipe, or write one of our models as such a file.

What is read from a .pt file lies beside its recipe's network and process, as any model of ours. Nothing is unpickled
but tensors, and every tensor must fit: what is missing, unexpected or mis-shaped is listed, all at once. The way back
gives guided-diffusion's names and layout, for those who evaluate with its code.
"""

import sys
from pathlib import Path

from diffusion.cli import composed


def from_published(file: str | Path, out: str | Path, *, recipe: str | None = None) -> Path:
    """Write a .pt file of guided-diffusion as a model.safetensors of ours, built by the recipe, and return its path.

    `recipe` None takes the published file of that name. The weights count as what the recipe's training leaves:
    averages where it has some, as the published denoisers are, after its number of steps. Raises ValueError for a file
    that holds anything but the tensors wanted.
    """
    import torch

    from diffusion.checkpoint import Part, build, save_model
    from diffusion.model_file import NODES, kind_of
    from diffusion.pretrained.guided_diffusion_files import published, read_tensors, table

    entry = published(recipe, file)
    config = composed("train", [f"experiment={entry.recipe}", *entry.overrides])
    with torch.device("meta"):
        net = build(config[NODES[kind_of(config)][0]])
    state = table(net, new_attention_order=entry.new_attention_order).to_ours(read_tensors(file))
    net.load_state_dict({name: tensor.float() for name, tensor in state.items()}, assign=True)
    parts = {}
    if config.get("conditioner"):
        parts["conditioner"] = Part(module=build(config["conditioner"]), config=config["conditioner"])
    data = config["data"]
    facts = {
        "shape": [data["channels"], data["image_size"], data["image_size"]],
        "num_classes": data["num_classes"],
        "class_names": None,
        "condition_drop": 0.0,
    }
    steps, decay = config["trainer"]["max_steps"], (config["ema"].get("decays") or [None])[0]
    weights = "raw" if decay is None else "ema"
    save_model(out, net, config, weights=weights, step=steps, ema_decay=decay, facts=facts, parts=parts)
    return Path(out)


def to_published(file: str | Path, out: str | Path, *, recipe: str | None = None) -> Path:
    """Write the network of a model.safetensors of ours as a .pt file that guided-diffusion loads, and return its path.

    Rows of self-attention are ordered as the published file of that `recipe` (None: the model's own name) has them,
    else as guided-diffusion does by default. Raises ValueError for a network that it has no names for.
    """
    import torch

    from diffusion.checkpoint import load_classifier, load_model, read_header
    from diffusion.files import atomic_write
    from diffusion.pretrained.guided_diffusion_files import FILES, check_expressible, published, table

    header = read_header(file)
    load = load_classifier if header.kind == "classifier" else load_model
    name = recipe or header.config.get("name")
    known = recipe is not None or any(entry.recipe == name for entry in FILES.values())
    order = published(name).new_attention_order if known else False
    net = load(file).net
    check_expressible(net)
    state = table(net, new_attention_order=order).to_foreign(net.state_dict())
    with atomic_write(out) as partial:
        torch.save(state, partial)
    print(f"for guided-diffusion: --use_new_attention_order {order}", file=sys.stderr)
    return Path(out)
