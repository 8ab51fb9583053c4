"""Which settings of ours are in the graph of nodes that ComfyUI stores in its pictures?

The graph is followed back from the picture's sampler to the loader, the texts and the latents, as ComfyUI runs it.
Nothing here imports torch.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from diffusion.pictures.foreign_pictures import Found, read_prompts, strength_of, unique

KEY = "prompt"  # the PNG text entry that holds the graph; "workflow" beside it is its drawing
SAMPLERS = ("KSampler", "KSamplerAdvanced", "SamplerCustom", "SamplerCustomAdvanced")
LOADERS = {"CheckpointLoaderSimple": "ckpt_name", "CheckpointLoader": "ckpt_name", "UNETLoader": "unet_name",
           "unCLIPCheckpointLoader": "ckpt_name", "DiffusersLoader": "model_path",
           "ImageOnlyCheckpointLoader": "ckpt_name"}  # fmt: skip
EMPTY = ("EmptyLatentImage", "EmptySD3LatentImage")
MASKED = ("SetLatentNoiseMask", "VAEEncodeForInpaint", "InpaintModelConditioning")
# The scheduler of ComfyUI that a node of sigmas is, where it has none by name.
SIGMAS = {"KarrasScheduler": "karras", "ExponentialScheduler": "exponential", "SDTurboScheduler": "sgm_uniform",
          "PolyexponentialScheduler": "polyexponential", "BetaSamplingScheduler": "beta",
          "AlignYourStepsScheduler": "align_your_steps"}  # fmt: skip


class Node:
    """One node: its class, and its inputs, each a value or another node."""

    def __init__(self, graph: "Graph", name: str, content: Mapping[str, Any]):
        self.graph, self.name = graph, name
        self.kind = str(content.get("class_type", ""))
        inputs = content.get("inputs")
        self.inputs: Mapping[str, Any] = inputs if isinstance(inputs, Mapping) else {}

    def node(self, name: str) -> "Node | None":
        """Return the node that an input comes from; None for a value."""
        link = self.inputs.get(name)
        return self.graph.nodes.get(str(link[0])) if isinstance(link, list) and len(link) == 2 else None

    def value(self, name: str, seen: int = 0) -> Any:
        """Return an input's value, through nodes that hold one value only (primitives); None where there is none."""
        source = self.node(name)
        if source is None:
            return None if isinstance(self.inputs.get(name), list) else self.inputs.get(name)
        known = [key for key in (name, "value", "text", "string", "seed", "int", "float") if key in source.inputs]
        if not known or seen > len(self.graph.nodes):
            return None
        return source.value(known[0], seen + 1)

    def number(self, name: str) -> float | None:
        """Return an input's value if it is a finite number; None otherwise."""
        value = self.value(name)
        return value if type(value) in (int, float) and abs(value) < float("inf") else None

    def whole(self, name: str) -> int | None:
        """Return an input's value if it is a whole number; None otherwise."""
        value = self.value(name)
        return value if type(value) is int else None

    def text(self, name: str) -> str | None:
        """Return an input's value if it is a text; None otherwise."""
        value = self.value(name)
        return value if isinstance(value, str) else None

    def sources(self) -> Iterator["Node"]:
        """Yield the nodes that this one's inputs come from."""
        for name in self.inputs:
            if (source := self.node(name)) is not None:
                yield source

    def upstream(self, name: str) -> Iterator["Node"]:
        """Yield the chain of nodes behind an input: the node there, what it takes under the same name, and so on."""
        node, seen = self.node(name), set()
        while node is not None and node.name not in seen:
            seen.add(node.name)
            yield node
            node = node.node(name)


class Graph:
    """The nodes of a picture, by number."""

    def __init__(self, nodes: Mapping[str, Any]):
        self.nodes = {str(name): Node(self, str(name), node) for name, node in nodes.items() if isinstance(node, dict)}

    def sampler(self) -> Node:
        """Return the sampler that made the picture: the nearest behind a node that saves, or else the only one."""
        savers = [node for node in self.nodes.values() if "save" in node.kind.lower() or "preview" in node.kind.lower()]
        front, seen = savers, set()
        while front:
            if found := [node for node in front if node.kind in SAMPLERS]:
                return found[0]
            seen |= {node.name for node in front}
            front = [source for node in front for source in node.sources() if source.name not in seen]
        if found := [node for node in self.nodes.values() if node.kind in SAMPLERS]:
            return found[-1]
        kinds = ", ".join(sorted({node.kind for node in self.nodes.values()}))
        raise ValueError(f"its ComfyUI graph has none of the samplers {', '.join(SAMPLERS)}; its nodes are {kinds}")


def from_graph(text: str) -> Found:
    """Translate ComfyUI's graph. Raises ValueError for text that holds none, or one without a known sampler."""
    try:
        nodes = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"its ComfyUI graph is no JSON ({error})") from None
    except RecursionError:
        raise ValueError("its ComfyUI graph is nested too deeply") from None
    if not isinstance(nodes, dict):
        raise ValueError("its ComfyUI graph is no mapping of nodes")
    return _read(Graph(nodes))


def _read(graph: Graph) -> Found:
    """Follow a graph back from its sampler."""
    found = Found("ComfyUI")
    sampler = _first_pass(graph.sampler(), found)
    guider = sampler.node("guider") or sampler
    _steps(sampler, found)
    _scale(guider, found)
    _model(guider, found)
    _texts(guider, found)
    _latents(sampler, found)
    decoder = next((node for node in sampler.graph.nodes.values() if node.kind.startswith("VAEDecode")), None)
    for node in decoder.upstream("vae") if decoder else ():
        found.vae = node.text("vae_name") if node.kind == "VAELoader" else found.vae
    found.notes.append("its starting noise (drawn on the CPU)")
    found.notes = unique(found.notes)
    return found


def _first_pass(sampler: Node, found: Found) -> Node:
    """Go back from a sampler that refines the latents of another to the first one."""
    passed = {sampler.name}
    while (before := _refined(sampler)) is not None and before.name not in passed:
        found.notes.append(f"the second pass ({sampler.kind} {sampler.name} on the latents of {before.name})")
        passed.add(before.name)
        sampler = before
    return sampler


def _refined(sampler: Node) -> Node | None:
    """Return the sampler whose latents this one begins with."""
    chain = sampler.upstream("latent_image")
    return next((node for part in chain for node in (part, *part.upstream("samples")) if node.kind in SAMPLERS), None)


def _steps(sampler: Node, found: Found) -> None:
    """Read the grid, the solver and the seed, whichever nodes hold them."""
    sigmas, chosen, noise = sampler.node("sigmas"), sampler.node("sampler"), sampler.node("noise")
    grid = sigmas or sampler
    scheduler = grid.text("scheduler") or (SIGMAS.get(grid.kind) if sigmas else None)
    if sigmas and scheduler is None:
        found.notes.append(f"the sigmas of {grid.kind}")
    name = (chosen or sampler).text("sampler_name")
    if chosen is not None and name is None:
        found.notes.append(f"the sampler of {chosen.kind}")
    found.sampler = (name, scheduler) if name else None
    for seed in ((noise or sampler).whole("noise_seed"), sampler.whole("seed")):
        found.settings |= {} if seed is None else {"seed": seed}
    for holder, keys in ((sigmas, ("sigma_max", "sigma_min", "rho")), (chosen, ("eta", "s_noise"))):
        for key in keys if holder else ():
            if (value := holder.number(key)) is not None:
                found.settings[f"sampler.{key}"] = value
    _part_of_the_way(grid, found)
    if sampler.kind == "KSamplerAdvanced" and (sampler.whole("start_at_step") or _early(sampler)):
        found.notes.append("start_at_step and end_at_step")


def _part_of_the_way(grid: Node, found: Found) -> None:
    """Read the number of steps and the strength: ComfyUI makes all its steps on the last part of a longer grid."""
    steps, strength = grid.whole("steps"), grid.number("denoise")
    if strength is not None and not 0.001 <= strength <= 1:
        raise ValueError(f"its denoise is {strength}, which is no part of the way from 0 to 1")
    if steps is not None:
        found.settings["sampler.num_steps"] = steps if strength is None else int(steps / strength)
    if strength is not None and strength < 1:
        total = found.settings.get("sampler.num_steps")
        found.settings["strength"] = float(strength) if total is None else strength_of(steps, total, float(strength))


def _early(sampler: Node) -> bool:
    end, steps = sampler.whole("end_at_step"), sampler.whole("steps")
    return end is not None and steps is not None and end < steps


def _scale(guider: Node, found: Found) -> None:
    scale = 1.0 if guider.kind == "BasicGuider" else guider.number("cfg")
    if scale is not None:
        found.settings["guidance.guidance_scale"] = float(scale)


def _model(guider: Node, found: Found) -> None:
    """Follow the model to its loader, through the nodes that change it."""
    for node in guider.upstream("model"):
        predicted = {"eps": "eps", "v_prediction": "v"}.get(node.text("sampling") or "")
        if node.kind in LOADERS:
            found.model = node.text(LOADERS[node.kind])
        elif node.kind == "ModelSamplingDiscrete" and predicted:
            found.settings["parameterization"] = predicted
            found.notes += ["zsnr"] if node.value("zsnr") else []
        elif node.kind == "RescaleCFG" and node.number("multiplier") is not None:
            found.settings["guidance.rescale"] = float(node.number("multiplier"))
        else:
            names = [node.text(key) or "" for key in node.inputs if key.endswith("_name")]
            found.notes.append(" ".join([node.kind, *names]))


def _texts(guider: Node, found: Found) -> None:
    """Follow both conditionings to their texts."""
    texts = {}
    for side in ("positive", "negative", "conditioning"):
        texts[side] = "" if guider.node(side) is None else _text(guider.node(side), side, found)
    read_prompts(found, texts["positive"] or texts["conditioning"], texts["negative"])
    if found.settings.get("emphasis"):
        found.notes.append("ComfyUI's way of weighing words (weighed as A1111 does)")


def _text(node: Node | None, side: str, found: Found) -> str:
    """Return the text of a conditioning; nodes on the way to it are noted."""
    for _ in node.graph.nodes if node else ():
        if node is None or node.kind.startswith("CLIPTextEncode") or node.kind == "ConditioningZeroOut":
            break
        if node.kind in MASKED:
            found.from_image = found.masked = True
        elif node.kind != "InstructPixToPixConditioning":
            found.notes.append(node.kind)
        found.from_image |= node.kind == "InstructPixToPixConditioning"
        node = next((node.node(key) for key in (side, "conditioning", "conditioning_1") if node.node(key)), None)
    if node is None:
        return ""
    if node.kind == "ConditioningZeroOut":
        found.notes.append("ConditioningZeroOut, a negative text that is no text")
        return ""
    _clip(node, found)
    text = [node.text(key) for key in ("text", "text_g", "text_l") if node.text(key) is not None]
    if not text:
        found.notes.append(f"the {side} text, which comes from elsewhere")
    if len(set(text)) > 1:
        found.notes.append("text_l, another text for the first encoder")
    if node.kind == "CLIPTextEncodeSDXL":
        for key, (first, second) in {"original_size": ("height", "width"), "crop": ("crop_h", "crop_w")}.items():
            pair = [node.whole(first), node.whole(second)]
            found.settings |= {} if None in pair else {key: pair}
    return text[0] if text else ""


def _clip(node: Node, found: Found) -> None:
    """Follow the text encoder to its loader, through LoRA (noted with the model) and the choice of its last layer."""
    for part in node.upstream("clip"):
        if part.kind == "CLIPSetLastLayer" and part.whole("stop_at_clip_layer") is not None:
            found.settings["clip_skip"] = -part.whole("stop_at_clip_layer")


def _latents(sampler: Node, found: Found) -> None:
    """Find the size, or that the picture was made from another image."""
    chain = list(sampler.upstream("latent_image"))
    chain += [behind for node in chain for behind in node.upstream("samples")]
    for node in chain:
        if node.kind in EMPTY:
            for key in ("height", "width"):
                if node.whole(key) is not None:
                    found.settings[key] = node.whole(key)
            if (count := node.value("batch_size")) not in (None, 1):
                found.notes.append(f"which of its {count} pictures this is: it is taken for the first")
        elif node.kind in MASKED or node.kind.startswith("VAEEncode"):
            found.from_image = True
            found.masked |= node.kind in MASKED
        elif node.kind not in ("RepeatLatentBatch", "LatentFromBatch"):
            found.notes.append(node.kind)
