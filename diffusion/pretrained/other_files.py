"""Which files are no models by themselves: LoRA, textual inversions, our own files, and networks not built here?"""

import json
import re

from diffusion.pretrained.places import Recognised
from diffusion.pretrained.weight_files import WeightFile

OURS = "diffusion-model"  # the `format` in the header of our own files
LORA = re.compile(r"(^|[._])lora([._]|$)|lora_(up|down|[AB]|unet|te)|\.(hada_w[12]|lokr_w[12]|dora_scale)|_lora\.")
BASES = {768: "Stable Diffusion 1", 1024: "Stable Diffusion 2", 2048: "Stable Diffusion XL"}
EMBEDDINGS = {768: "Stable Diffusion 1", 1024: "Stable Diffusion 2", 1280: "Stable Diffusion XL"}
# What a name in a file betrays; nothing here samples from these alone.
NETWORKS = {
    r"(^|\.)control_model\.|controlnet_cond_embedding\.|input_hint_block\.": "a ControlNet, which steers another model",
    r"^(ip_adapter|image_proj)\.": "an IP-Adapter, which steers another model",
    r"^adapter\.(body|conv_in)|^body\.\d+\.block1\.": "a T2I-Adapter, which steers another model",
    r"motion_modules?\.": "a motion module of AnimateDiff, for videos",
    r"time_stack\.|\.time_mixer\.|temporal_transformer_blocks\.": "Stable Video Diffusion or its kin, for videos",
    r"(^|\.)joint_blocks\.\d+\.": "Stable Diffusion 3, a transformer and no UNet",
    r"(^|\.)double_blocks\.\d+\.|(^|\.)single_transformer_blocks\.\d+\.": "Flux, a transformer and no UNet",
    r"(^|\.)blocks\.\d+\.adaLN_modulation\.": "a diffusion transformer (DiT), and no UNet",
    r"(^|\.)adaln_single\.": "PixArt, a transformer and no UNet",
    r"(^|\.)(concept_embeds|special_care_embeds)$": "a safety checker",
    r"RRDB_trunk\.|^body\.\d+\.rdb1\.": "an upscaler of ESRGAN's kind, and no diffusion model",
    r"(^|\.)encoder\.block\.0\.layer\.0\.SelfAttention\.": "a T5 text encoder, which no model here reads",
    r"clip_txt_pooled_mapper\.": "Stable Cascade",
}


def recognise_other(file: WeightFile) -> Recognised | None:
    """What a file is, if it is one of these. Raises ValueError for networks that are known and not built here."""
    if file.metadata.get("format") == OURS:
        return _ours(file)
    if any(LORA.search(name) for name in file):
        return _lora(file)
    if (inversion := _textual_inversion(file)) is not None:
        return inversion
    for pattern, what in NETWORKS.items():
        if (found := next((name for name in file if re.search(pattern, name)), None)) is not None:
            raise ValueError(f"{file.path} is {what} (it holds {found[:80]}); nothing here samples from it")
    return None


def _ours(file: WeightFile) -> Recognised:
    try:
        config, facts = json.loads(file.metadata["config"]), json.loads(file.metadata["facts"])
        kind = {"net": "denoiser", "classifier": "classifier", "autoencoder": "autoencoder"}
        found = next(kind[node] for node in kind if config.get(node))
    except (KeyError, ValueError, StopIteration, AttributeError, RecursionError) as error:
        raise ValueError(f"the header of {file.path} is damaged ({error!r:.80}); take another copy of it") from error
    said = (config.get("diffusion") or {}).get("parameterization")
    return Recognised(
        path=file.path,
        layout="ours",
        kind=found,
        family=str(config.get("name") or "custom"),
        title=f"{'an' if found[0] in 'aeiou' else 'a'} {found} of ours, {config.get('name') or 'without a name'}",
        config=config,
        facts=facts,
        parameterization=said,
        files=(file,),
    )


def _lora(file: WeightFile) -> Recognised:
    """Its naming, rank and base, by the tensors that lead into the low rank."""
    into = {n: e.shape for n, e in file.items() if re.search(r"lora_down|lora_A|\.down\.weight|hada_w1_b|lokr_w", n)}
    ranks = sorted({shape[0] for shape in into.values() if shape})
    crossed = [shape[1] for name, shape in into.items() if re.search(r"attn2.*to_(k|v)", name) and len(shape) > 1]
    base = BASES.get(crossed[0], "another model") if crossed else "a text encoder"
    naming = "kohya's" if any(n.startswith(("lora_unet", "lora_te")) for n in file) else "diffusers' or PEFT's"
    rank = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}" if ranks else "unknown rank"
    return Recognised(
        path=file.path,
        layout="lora",
        kind="lora",
        family="lora",
        title=f"a LoRA for {base}, {rank}, in {naming} names",
        facts={"base": base, "ranks": ranks},
        files=(file,),
    )


def _textual_inversion(file: WeightFile) -> Recognised | None:
    """A few vectors as wide as a text encoder's embeddings, and nothing else."""
    named = {"emb_params", "clip_l", "clip_g"} & set(file)
    vectors = {name: e.shape for name, e in file.items() if name in named or name.startswith("string_to_param.")}
    if not vectors and len(file) <= 4 and all(0 < len(entry.shape) <= 2 for entry in file.values()):
        vectors = {n: e.shape for n, e in file.items() if "." not in n and e.shape[-1] in EMBEDDINGS}
        vectors = vectors if len(vectors) == len(file) else {}
    if not vectors:
        return None
    widths = sorted({shape[-1] for shape in vectors.values() if shape})
    base = EMBEDDINGS.get(widths[-1], "another model") if widths else "another model"
    count = max((shape[0] if len(shape) > 1 else 1 for shape in vectors.values()), default=0)
    word = file.metadata.get("name") or next((n for n in file if n not in named and "." not in n), file.path.stem)
    return Recognised(
        path=file.path,
        layout="textual-inversion",
        kind="textual-inversion",
        family="textual-inversion",
        title=f"a textual inversion of {count} vector(s) for {base}, called {word}",
        facts={"base": base, "vectors": count, "word": word},
        files=(file,),
    )
