"""Recognising published models: every full-size list in both layouts, every family, and what is none of them."""

import json

import pytest
import torch
from foreign_cases import full_size, header_only, of_shapes, part_of, write_header
from golden_cases import key_configs, key_lists

from diffusion.checkpoint import build_empty
from diffusion.pretrained import compvis, compvis_autoencoder, diffusers, guided_diffusion, ldm_text
from diffusion.pretrained.compare import differences
from diffusion.pretrained.guided_diffusion_classifier import classifier_config, classifier_flags
from diffusion.pretrained.places import template
from diffusion.pretrained.recognise import recognise
from diffusion.pretrained.report import report
from diffusion.pretrained.single_files import recognise_file
from diffusion.pretrained.weight_files import Entry

CHECKPOINTS = {  # list, delta -> family, parameterization, parts, sizes
    ("sd15_checkpoint", None): ("sd1", "eps", 3),
    ("sd15_checkpoint", "sd15_inpainting_delta"): ("sd1-inpainting", "eps", 3),
    ("sd15_checkpoint", "instruct_pix2pix_delta"): ("instruct-pix2pix", "eps", 3),
    ("sd21_checkpoint", None): ("sd2", None, 3),
    ("sdxl_base_checkpoint", None): ("sdxl-base", "eps", 4),
}
TEXTS = {  # how each family reads its text encoders: layer, final norm, padding, pooled
    "sd1": [("last", True, "end", False)],
    "sd2": [("penultimate", True, "zero", False)],
    "sdxl-base": [("penultimate", False, "end", False), ("penultimate", False, "zero", True)],
    "sdxl-refiner": [("penultimate", False, "zero", True)],
}
FOLDERS = {
    ("sd15_diffusers", None): "sd1",
    ("sd15_diffusers", "sd15_inpainting_diffusers_delta"): "sd1-inpainting",
    ("sd15_diffusers", "instruct_pix2pix_diffusers_delta"): "instruct-pix2pix",
    ("sd21_diffusers", None): "sd2",
    ("sdxl_base_diffusers", None): "sdxl-base",
}
SCHEDULER = {"_class_name": "PNDMScheduler", "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2


def small(context):
    """A UNet as of Stable Diffusion 1 or 2 by its context, of the fewest blocks, in CompVis' names."""
    kwargs = LDM_TEXT | {"model_channels": 64, "num_res_blocks": 1, "channel_mult": [1], "context_dim": context}
    kwargs |= {"attention_resolutions": [1], "use_linear_in_transformer": context == 1024, "num_heads": -1}
    table = compvis.unet_table(kwargs | {"num_head_channels": 64})
    return of_shapes(table.foreign_shapes, "model.diffusion_model.") | of_shapes({"betas": (1000,)})


def unet(**settings):
    return build_empty({"_target_": "diffusion.models.unet.UNet", **settings})


def same_network(found, settings):
    """Whether a recognised UNet computes what one with these settings does: heads, norms and all."""
    assert differences(template(found.config["net"]), unet(**settings)) == []


def read_as(found):
    """What a recognised conditioner takes of each of its text encoders."""
    node = found.config["conditioner"]
    texts = node.get("texts", [node])
    return [(text["layer"], text["final_norm"], text["pad"], text.get("pooled", False)) for text in texts]


@pytest.mark.parametrize(("keys", "expected"), CHECKPOINTS.items(), ids=lambda value: str(value[1] or value[0]))
def test_every_full_size_checkpoint_fits_one_to_one_and_is_the_published_network(keys, expected):
    entries, (family, parameterization, parts) = full_size(*keys), expected
    found = recognise_file(header_only(entries, values={"betas": BETAS}))
    assert (found.family, found.parameterization, found.layout, found.kind) == (
        *(family, parameterization),
        *("compvis", "denoiser"),
    )
    assert found.fits and not found.absent and len(found.places) == parts, (found.missing, found.unexpected)
    used = [name for place in found.places for name in place.names]
    assert len(used) == len(set(used)) and set(used) | set(found.harmless) == set(entries)
    assert read_as(found) == TEXTS.get(family, TEXTS["sd1"])
    config = key_configs()[keys[0]] | {"in_channels": found.config["net"]["in_channels"]}
    same_network(found, compvis.unet_config(config))
    for node in ("autoencoder", "conditioner"):
        build_empty(found.config[node])


@pytest.mark.parametrize("name", [name for name in key_lists() if name.startswith("adm_")])
def test_every_full_size_list_of_guided_diffusion_fits_and_is_its_recipe(name):
    found = recognise_file(header_only(full_size(name), f"{name}.pt"))
    assert found.fits and found.layout == "guided-diffusion"
    flags = key_configs()[name]
    if "classifier" in name:
        assert found.kind == "classifier" and found.facts["shape"] == [3, flags["image_size"], flags["image_size"]]
        theirs = build_empty(
            {"_target_": found.config["classifier"]["_target_"], **classifier_config(classifier_flags(flags))}
        )
        assert differences(template(found.config["classifier"]), theirs) == []
        return
    assert (found.family == f"adm_imagenet{flags['image_size']}") == flags["class_cond"]
    assert found.config["diffusion"]["variance"] == "learned"
    assert found.config["diffusion"]["schedule"]["_target_"].endswith("cosine") == ("noise_schedule" in flags)
    kwargs = guided_diffusion.kwargs_from_flags(
        {k: v for k, v in flags.items() if k not in ("noise_schedule", "dropout")}
    )
    same_network(found, guided_diffusion.unet_config(kwargs))


UPSAMPLERS = {
    "adm_upsample_64_256": {"image_size": 256, "num_heads": 4, "attention_resolutions": "32,16,8"},
    "adm_upsample_128_512": {"image_size": 512, "num_head_channels": 64, "attention_resolutions": "32,16"},
}


@pytest.mark.parametrize("name", UPSAMPLERS)
def test_upsamplers_of_guided_diffusion_are_known_and_get_their_condition(name):
    flags = {"num_channels": 192, "learn_sigma": True, "class_cond": True, "resblock_updown": True, **UPSAMPLERS[name]}
    kwargs = guided_diffusion.kwargs_from_flags({**flags, "channel_mult": "1,1,2,2,4,4"})
    shapes = guided_diffusion.unet_table(kwargs, super_resolution=True).foreign_shapes
    found = recognise_file(header_only(of_shapes(shapes), "upsampler.pt"))
    assert found.family == name and found.fits and found.facts["shape"] == [3, *[flags["image_size"]] * 2]
    theirs = guided_diffusion.unet_config(kwargs, super_resolution=True)
    assert found.config["net"]["_target_"].endswith("SuperResolutionUNet")
    assert differences(template(found.config["net"]), build_empty({**found.config["net"], **theirs})) == []
    assert build_empty(found.config["conditioner"]).low_size == (flags["image_size"] // 4,) * 2


def save_folder(path, name, delta=None, *, variant="", without=(), scheduler=SCHEDULER):
    """A folder in diffusers' layout of one of the full-size lists, its data holes in the disk."""
    entries, config = full_size(name, delta), key_configs()[name]
    configs = {"unet": config["unet"], "vae": config["vae"]}
    configs |= {folder.strip("/"): text for folder, text in config["text"]}
    if delta:
        configs["unet"] = key_configs()[delta]
    for folder in (folder for folder in configs if folder not in without):
        stem = "model" if folder.startswith("text") else "diffusion_pytorch_model"
        write_header(path / folder / f"{stem}{variant}.safetensors", part_of(entries, folder))
        (path / folder / "config.json").write_text(json.dumps(configs[folder]))
    (path / "scheduler").mkdir()
    (path / "scheduler/scheduler_config.json").write_text(json.dumps(scheduler))
    (path / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    return path


@pytest.mark.parametrize(("keys", "family"), FOLDERS.items(), ids=lambda value: str(value))
def test_every_full_size_folder_fits_one_to_one_with_its_config(keys, family, tmp_path):
    found = recognise(save_folder(tmp_path, *keys))
    assert (found.family, found.layout, found.parameterization) == (family, "diffusers", "eps")
    assert found.fits and not found.absent and not found.harmless
    config = key_configs()[keys[1] or keys[0]]
    same_network(found, diffusers.unet_config(config.get("unet", config)))
    assert found.facts["shape"] == [3, config.get("unet", config)["sample_size"] * 8, *found.facts["shape"][-1:]]
    assert found.facts["sampler"] == "diffusers_pndm"
    # The copies of Stable Diffusion 2's encoder end before the layer that is not read.
    assert read_as(found) == ([("last", True, "zero", False)] if family == "sd2" else TEXTS.get(family, TEXTS["sd1"]))


@pytest.mark.parametrize("name", ["sd15_diffusers", "sdxl_base_diffusers"])
def test_sizes_are_read_from_shapes_where_configs_are_missing(name, tmp_path):
    path = save_folder(tmp_path, name)
    believed = recognise(path)
    for config in path.glob("*/config.json"):
        config.unlink()
    found = recognise(path)
    assert found.fits and found.family == believed.family and sum("config.json" in note for note in found.notes) >= 2
    assert differences(template(found.config["net"]), template(believed.config["net"])) == []
    assert differences(template(found.config["autoencoder"]), template(believed.config["autoencoder"])) == []


# ---------------------------------------------------------------------------------------------------------------------
# families without a list: their published settings, in the names of the tables

XL_REFINER = {
    "adm_in_channels": 2560,
    "num_classes": "sequential",
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 384,
    "attention_resolutions": [4, 2],
    "num_res_blocks": 2,
    "channel_mult": [1, 2, 4, 4],
    "num_head_channels": 64,
    "use_linear_in_transformer": True,
    "transformer_depth": 4,
    "context_dim": 1280,
}
LDM_TEXT = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 320,
    "num_res_blocks": 2,
    "attention_resolutions": [4, 2, 1],
    "channel_mult": [1, 2, 4, 4],
    "num_heads": 8,
    "legacy": True,
    "use_spatial_transformer": True,
    "transformer_depth": 1,
    "context_dim": 1280,
}
LDM_CLASS = {
    "image_size": 64,
    "in_channels": 3,
    "out_channels": 3,
    "model_channels": 192,
    "num_res_blocks": 2,
    "attention_resolutions": [8, 4, 2],
    "channel_mult": [1, 2, 3, 5],
    "num_heads": 1,
    "legacy": True,
    "use_spatial_transformer": True,
    "transformer_depth": 1,
    "context_dim": 512,
}
LDM_CLASS_OLD = LDM_CLASS | {
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 256,
    "channel_mult": [1, 2, 4],
    "attention_resolutions": [4, 2, 1],
    "num_heads": -1,
    "num_head_channels": 32,
    "legacy": False,
}
CODER = {"ch": 128, "out_ch": 3, "in_channels": 3, "resolution": 256, "num_res_blocks": 2, "attn_resolutions": []}
KL = {"embed_dim": 4, "ddconfig": {**CODER, "z_channels": 4, "ch_mult": [1, 2, 4, 4]}}
VQ_4 = {"embed_dim": 3, "n_embed": 8192}
VQ_4 |= {"ddconfig": {**CODER, "z_channels": 3, "ch_mult": [1, 2, 4], "double_z": False}}
VQ_8 = {"embed_dim": 4, "n_embed": 16384}
VQ_8 |= {"ddconfig": {**CODER, "z_channels": 4, "ch_mult": [1, 2, 2, 4], "double_z": False, "attn_resolutions": [32]}}
BERT = {"vocab_size": 30522, "channels": 1280, "num_layers": 32, "num_heads": 8, "head_channels": 64, "max_length": 77}
BERT |= {"hidden_channels": 5120, **ldm_text.OURS}


def model_of(kwargs, autoencoder, others=None):
    entries = of_shapes(compvis.unet_table(kwargs).foreign_shapes, "model.diffusion_model.")
    entries |= of_shapes(compvis_autoencoder.autoencoder_table(autoencoder).foreign_shapes, "first_stage_model.")
    return entries | of_shapes(others or {})


def xl_texts(*, first=True):
    """The text encoders of XL's list, the second one at the refiner's place if it is alone."""
    names = {n: e for n, e in full_size("sdxl_base_checkpoint").items() if n.startswith("conditioner.")}
    if first:
        return {name: entry.shape for name, entry in names.items()}
    second = "conditioner.embedders.1."
    return {f"conditioner.embedders.0.{n[len(second) :]}": e.shape for n, e in names.items() if n.startswith(second)}


def bert():
    shapes = ldm_text.text_table(BERT, "compvis").foreign_shapes
    return {f"cond_stage_model.transformer.{name}": shape for name, shape in shapes.items()}


FAMILIES = {
    "sdxl-refiner": (XL_REFINER, KL, lambda: xl_texts(first=False)),
    "ldm-text": (LDM_TEXT, KL, bert),
    "ldm-class": (LDM_CLASS, VQ_4, lambda: {"cond_stage_model.embedding.weight": (1001, 512)}),
    "ldm-class of 1000 rows": (LDM_CLASS_OLD, VQ_8, lambda: {"cond_stage_model.embedding.weight": (1000, 512)}),
    "ldm-class with KL": (LDM_CLASS_OLD, KL, lambda: {"cond_stage_model.embedding.weight": (1000, 512)}),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_families_are_known_by_their_published_settings(name):
    kwargs, autoencoder, others = FAMILIES[name]
    found = recognise_file(header_only(model_of(kwargs, autoencoder, others())))
    assert found.family == name.split()[0] and found.fits and not found.absent
    same_network(found, compvis.unet_config(kwargs))
    for node in ("autoencoder", "conditioner"):
        build_empty(found.config[node])
    if found.family in TEXTS:
        assert read_as(found) == TEXTS[found.family] and found.config["conditioner"]["aesthetic"]
    if found.family == "ldm-class":
        assert (found.facts["guidance_scale"] == 1.0) == (others()["cond_stage_model.embedding.weight"][0] == 1000)
        assert found.facts["num_classes"] == 1000 and found.config["diffusion"]["schedule"]["beta_end"] == 0.0195


@pytest.mark.parametrize(
    ("name", "channels", "family"),
    [("sd21_checkpoint", 9, "sd2-inpainting"), ("sdxl_base_checkpoint", 9, "sdxl-inpainting")],
)
def test_inpainting_models_are_known_by_their_input_channels(name, channels, family):
    entries = full_size(name)
    entries["model.diffusion_model.input_blocks.0.0.weight"] = Entry((320, channels, 3, 3), torch.float32)
    found = recognise_file(header_only(entries, values={"betas": BETAS}))
    assert found.family == family and found.fits and found.facts["task"] == "inpainting"


@pytest.mark.parametrize(("channels", "words"), [(5, "depth"), (7, "upscaler"), (6, "6 input channels")])
def test_channels_without_a_task_are_named_with_the_nearest_family(channels, words):
    entries = full_size("sd21_checkpoint")
    entries["model.diffusion_model.input_blocks.0.0.weight"] = Entry((320, channels, 3, 3), torch.float32)
    with pytest.raises(ValueError, match=f"(?s){words}.*") as error:
        recognise_file(header_only(entries, values={"betas": BETAS}))
    assert "the nearest is Stable Diffusion 2" in str(error.value)


# ---------------------------------------------------------------------------------------------------------------------
# what comes along, and which weights are taken

EXTRAS = {
    "model_ema.decay": Entry((), torch.float32),
    "model_ema.num_updates": Entry((), torch.int32),
    "denoiser.sigmas": Entry((1000,), torch.float32),
    "cond_stage_model.logit_scale": Entry((), torch.float32),
    "first_stage_model.loss.logvar": Entry((), torch.float32),
    "optimizer.state.0": Entry((3,), torch.float32),
}


def with_averages(entries):
    """The list with a full copy of averaged weights, whose names have no dots."""
    unets = {name: entry for name, entry in entries.items() if name.startswith("model.diffusion_model.")}
    copies = {"model_ema." + name.removeprefix("model.").replace(".", ""): entry for name, entry in unets.items()}
    return entries | copies


@pytest.mark.parametrize("kind", [torch.int64, torch.float32, None])
def test_harmless_keys_are_listed_as_such_and_change_nothing(kind):
    entries = full_size("sd15_checkpoint") | EXTRAS
    position = "cond_stage_model.transformer.text_model.embeddings.position_ids"
    entries.pop(position)
    if kind is not None:
        entries[position] = Entry((1, 77), kind)
    found = recognise_file(header_only(entries, values={"betas": BETAS}))
    assert found.fits and set(EXTRAS) <= set(found.harmless) and (position in found.harmless) == (kind is not None)


def test_raw_or_averaged_weights_are_taken_as_asked_or_as_the_original_code_does():
    stable, pix2pix = with_averages(small(768)), with_averages(small(768))
    pix2pix["model.diffusion_model.input_blocks.0.0.weight"] = Entry((64, 8, 3, 3), torch.float32)
    pix2pix["model_ema.diffusion_modelinput_blocks00weight"] = Entry((64, 8, 3, 3), torch.float32)
    for entries, weights, averaged in (
        (stable, "auto", False),
        (stable, "ema", True),
        (pix2pix, "auto", True),
        (pix2pix, "raw", False),
    ):
        found = recognise_file(header_only(entries, values={"betas": BETAS}), weights=weights)
        assert found.fits and found.places[0].prefix.startswith("model_ema.") == averaged
        assert bool(found.notes) == (weights == "auto")
    with pytest.raises(ValueError, match="no averaged weights"):
        recognise_file(header_only(small(768), values={"betas": BETAS}), weights="ema")


def test_missing_unexpected_and_misshaped_keys_are_all_reported():
    entries = full_size("sd15_checkpoint")
    name = "model.diffusion_model.middle_block.1.proj_in.weight"
    entries[name] = Entry((1280, 1281, 1, 1), torch.float32)
    del entries["first_stage_model.decoder.mid.block_1.conv1.bias"]
    entries["first_stage_model.stray"] = Entry((2,), torch.float32)
    found = recognise_file(header_only(entries, values={"betas": BETAS}))
    assert found.missing == ("first_stage_model.decoder.mid.block_1.conv1.bias [512]",)
    assert found.unexpected == ("first_stage_model.stray [2]",)
    assert found.misshaped == (f"{name} [1280, 1281, 1, 1], expected [1280, 1280, 1, 1]",)
    text = "\n".join(report(found, nan="none"))
    assert "cannot be used" in text and "1 missing keys" in text and "first_stage_model.stray" in text


def test_parts_that_are_not_there_are_named_with_what_would_fit():
    entries = {n: e for n, e in full_size("sdxl_base_checkpoint").items() if n.startswith("model.")}
    found = recognise_file(header_only(entries))
    assert found.family == "sdxl-base" and found.absent == ("autoencoder", "conditioner")
    assert [text["encoder"]["channels"] for text in found.config["conditioner"]["texts"]] == [768, 1280]
    assert found.config["autoencoder"]["scale_factor"] == 0.13025
    assert "vae=FILE text_encoder=FILE" in "\n".join(report(found, nan="none"))


@pytest.mark.parametrize(
    ("without", "absent"), [(("vae",), ("autoencoder",)), (("text_encoder_2", "vae"), ("autoencoder", "conditioner"))]
)
def test_a_folder_that_lacks_a_part_says_which(without, absent, tmp_path):
    found = recognise(save_folder(tmp_path, "sdxl_base_diffusers", without=without))
    assert found.absent == absent and found.fits and found.family == "sdxl-base"


def test_a_folder_without_a_unet_says_what_it_has(tmp_path):
    with pytest.raises(ValueError, match=r"has no unet/.*it has scheduler, text_encoder, vae"):
        recognise(save_folder(tmp_path, "sd15_diffusers", without=("unet",)))


def test_variants_shards_and_old_names_of_folders_are_read(tmp_path):
    path = save_folder(tmp_path, "sd15_diffusers", variant=".fp16")
    entries = part_of(full_size("sd15_diffusers"), "unet")
    (path / "unet/diffusion_pytorch_model.fp16.safetensors").unlink()
    halves = (list(entries)[::2], list(entries)[1::2])
    places = {}
    for number, names in enumerate(halves):
        file = f"diffusion_pytorch_model.fp16-0000{number + 1}-of-00002.safetensors"
        write_header(path / "unet" / file, {name: entries[name] for name in names})
        places |= dict.fromkeys(names, file)
    index = path / "unet/diffusion_pytorch_model.safetensors.index.fp16.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    coder = {}
    for name, entry in part_of(full_size("sd15_diffusers"), "vae").items():
        for today, former in old.items():
            name = name.replace(f"attentions.0.{today}.", f"attentions.0.{former}.")
        coder[name] = entry
    write_header(path / "vae/diffusion_pytorch_model.fp16.safetensors", coder)
    texts = part_of(full_size("sd15_diffusers"), "text_encoder")
    texts["text_model.embeddings.position_ids"] = Entry((1, 77), torch.int64)
    write_header(path / "text_encoder/model.fp16.safetensors", texts)
    found = recognise(path)
    assert found.fits and found.harmless == ("text_model.embeddings.position_ids",)
    assert sum("variant fp16" in note for note in found.notes) == 3
    assert [place.file.container for place in found.places] == ["shards", "safetensors", "safetensors"]
