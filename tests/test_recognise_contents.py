"""What a file says of itself, parts that come alone, what is no model, and the command that says all of it."""

import json

import pytest
import sd_cases
import torch
from foreign_cases import full_size, header_only, of_shapes, part_of, write_header
from test_recognise import BETAS, LDM_TEXT, SCHEDULER, same_network, save_folder, small

from diffusion.pretrained import compvis
from diffusion.pretrained.__main__ import main
from diffusion.pretrained.prediction import schedule_node
from diffusion.pretrained.recognise import recognise
from diffusion.pretrained.report import report
from diffusion.pretrained.single_files import recognise_file
from diffusion.pretrained.weight_files import Entry

# ---------------------------------------------------------------------------------------------------------------------
# what is predicted, and from which schedule


@pytest.mark.parametrize(
    ("name", "metadata", "extra", "expected"),
    [
        ("model.safetensors", {}, (), None),
        ("v2-1_768-ema-pruned.safetensors", {}, (), "v"),
        ("v2-1_512-ema-pruned.safetensors", {}, (), "eps"),
        ("model.safetensors", {"modelspec.prediction_type": "v"}, (), "v"),
        ("768-v-ema.safetensors", {"modelspec.prediction_type": "epsilon"}, (), "eps"),
        ("model.ckpt", {"global_step": "875000"}, (), "eps"),
        ("model.ckpt", {"global_step": "110000"}, (), "v"),
        ("model.safetensors", {}, ("v_pred",), "v"),
        ("model.safetensors", {}, ("v_pred", "ztsnr"), "v"),
    ],
)
def test_what_stable_diffusion_2_predicts_is_read_where_the_file_tells(name, metadata, extra, expected):
    entries = small(1024) | {key: Entry((0,), torch.float32) for key in extra}
    found = recognise_file(header_only(entries, name, metadata=metadata, values={"betas": BETAS}))
    assert found.fits and found.parameterization == expected
    assert found.config["diffusion"]["parameterization"] == (expected or "eps")
    assert found.config["diffusion"]["schedule"]["_target_"].endswith("zero_terminal_snr") == ("ztsnr" in extra)
    assert bool(found.notes) == (expected is not None)
    assert found.facts["shape"][1] == (512 if expected == "eps" else 768)
    assert ("not told" in "\n".join(report(found, nan="none"))) == (expected is None)


@pytest.mark.parametrize(
    ("betas", "target"),
    [
        (torch.linspace(0.0015**0.5, 0.0195**0.5, 1000) ** 2, "scaled_linear"),
        (torch.linspace(1e-4, 0.02, 1000), "linear"),
        (BETAS.clone().index_fill(0, torch.tensor(999), 1.0), "Schedule"),
    ],
)
def test_a_files_own_schedule_is_believed(betas, target):
    found = recognise_file(header_only(small(768), values={"betas": betas.float()}))
    node = found.config["diffusion"]["schedule"]
    assert node["_target_"].endswith(f".{target}") and "own schedule" in found.notes[0]
    if target != "Schedule":
        assert (node["beta_start"], node["beta_end"]) == pytest.approx((betas[0].item(), betas[-1].item()), rel=1e-5)


def test_betas_that_are_no_schedule_are_left_aside():
    found = recognise_file(header_only(small(768), values={"betas": torch.randn(1000)}))
    assert found.config["diffusion"]["schedule"]["beta_end"] == 0.012 and "no schedule" in found.notes[0]


def test_schedules_are_recognised_by_form_only_if_they_have_it():
    assert schedule_node(torch.rand(10, dtype=torch.float64))["_target_"].endswith(".Schedule")


@pytest.mark.parametrize(
    ("said", "kind", "target"),
    [
        ({"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}, "v", "zero_terminal_snr"),
        ({"prediction_type": "epsilon", "rescale_betas_zero_snr": True}, "eps", "scaled_linear"),
        ({"prediction_type": "sample", "beta_schedule": "linear"}, "x0", "linear"),
        ({"beta_schedule": "squaredcos_cap_v2"}, "eps", "cosine"),
        ({"trained_betas": [0.1, 0.2]}, "eps", "Schedule"),
    ],
)
def test_the_schedulers_config_is_believed(said, kind, target, tmp_path):
    found = recognise(save_folder(tmp_path, "sd21_diffusers", scheduler=SCHEDULER | said))
    assert found.parameterization == kind == found.config["diffusion"]["parameterization"]
    assert found.config["diffusion"]["schedule"]["_target_"].endswith(f".{target}")
    assert found.facts["scheduler"] == SCHEDULER | said


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("scheduler/scheduler_config.json", "beta_end", [1, "a"]),
        ("scheduler/scheduler_config.json", "beta_start", -1),
        ("scheduler/scheduler_config.json", "num_train_timesteps", "many"),
        ("scheduler/scheduler_config.json", "trained_betas", [2.0]),
        ("scheduler/scheduler_config.json", "prediction_type", "flow"),
        ("scheduler/scheduler_config.json", "beta_schedule", "mine"),
        ("unet/config.json", "block_out_channels", "wide"),
        ("unet/config.json", "attention_head_dim", 0),
        ("unet/config.json", "addition_embed_type", "image"),
        ("vae/config.json", "latent_channels", 10**9),
        ("vae/config.json", "down_block_types", [1]),
        ("text_encoder/config.json", "hidden_size", None),
        ("text_encoder/config.json", "hidden_act", "relu"),
    ],
)
def test_configs_that_make_no_sense_are_named(file, key, value, tmp_path):
    path = save_folder(tmp_path, "sd15_diffusers")
    config = json.loads((path / file).read_text())
    (path / file).write_text(json.dumps(config | {key: value}))
    with pytest.raises(ValueError, match=file.split("/")[0]) as error:
        recognise(path)
    assert str(path) in str(error.value)


# ---------------------------------------------------------------------------------------------------------------------
# parts alone, and what is no model


@pytest.mark.parametrize("layout", ["compvis", "diffusers"])
@pytest.mark.parametrize(("name", "scale"), [("vae-ft-mse.safetensors", 0.18215), ("sdxl_vae.safetensors", 0.13025)])
def test_autoencoders_alone_are_known_in_both_layouts(layout, name, scale):
    if layout == "compvis":
        whole = full_size("sd15_checkpoint").items()
        entries = {n.removeprefix("first_stage_model."): e for n, e in whole if n.startswith("first_stage_model.")}
    else:
        entries = part_of(full_size("sd15_diffusers"), "vae")
    found = recognise_file(header_only(entries, name))
    assert (found.kind, found.layout, found.fits) == ("autoencoder", layout, True)
    assert found.config["autoencoder"]["scale_factor"] == scale and "scale" in "".join(found.notes)
    assert f"vae={name}" in "\n".join(report(found, nan="none"))


@pytest.mark.parametrize("folder", ["text_encoder", "text_encoder_2"])
def test_text_encoders_alone_are_known(folder):
    found = recognise_file(header_only(part_of(full_size("sdxl_base_diffusers"), folder)))
    assert (found.kind, found.layout, found.fits) == ("text", "transformers", True)
    encoder = found.config["conditioner"]["encoder"]
    assert (encoder["activation"], encoder["num_heads"]) == {768: ("quick_gelu", 12), 1280: ("gelu", 20)}[
        encoder["channels"]
    ]


def low_rank(prefix, down, up, width=768):
    layer = "down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    name = layer if "_unet_" in prefix else "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    return of_shapes({f"{prefix}{name}{down}": (4, width), f"{prefix}{name}{up}": (320, 4)})


@pytest.mark.parametrize(
    ("entries", "kind", "words"),
    [
        (
            low_rank("lora_unet_", ".lora_down.weight", ".lora_up.weight"),
            "lora",
            "Stable Diffusion 1, rank 4, in kohya",
        ),
        (low_rank("unet.", ".lora_A.weight", ".lora_B.weight", 2048), "lora", "Stable Diffusion XL, rank 4"),
        (low_rank("unet.", ".lora.down.weight", ".lora.up.weight", 1024), "lora", "Stable Diffusion 2"),
        (of_shapes({"emb_params": (3, 768)}), "textual-inversion", "3 vector"),
        (of_shapes({"clip_l": (2, 768), "clip_g": (2, 1280)}), "textual-inversion", "Stable Diffusion XL"),
        (of_shapes({"<my-cat>": (768,)}), "textual-inversion", "called <my-cat>"),
        (of_shapes({"string_to_param.*": (1, 1024)}), "textual-inversion", "Stable Diffusion 2"),
    ],
)
def test_lora_and_textual_inversions_are_named(entries, kind, words):
    found = recognise_file(header_only(entries))
    assert found.kind == found.layout == kind and words in found.title
    assert "no model by itself" in "\n".join(report(found, nan="none"))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("control_model.input_blocks.0.0.weight", "ControlNet"),
        ("joint_blocks.0.x.weight", "Stable Diffusion 3"),
        ("model.diffusion_model.double_blocks.0.img_attn.qkv.weight", "Flux"),
        ("blocks.0.adaLN_modulation.1.weight", "DiT"),
        ("encoder.block.0.layer.0.SelfAttention.q.weight", "T5"),
        ("down_blocks.0.motion_modules.0.norm.weight", "AnimateDiff"),
        ("something.else", "no UNet, autoencoder, CLIP text encoder, LoRA"),
        ("model.diffusion_model.time_embed.0.weight", "nearest is a UNet in the names of CompVis.*lacks input_blocks"),
        ("encoder.down_blocks.0.resnets.0.conv2.weight", "no model that is known"),
        ("decoder.conv_in.weight", "nearest is an autoencoder"),
    ],
)
def test_what_is_no_known_model_is_one_line_with_the_nearest(name, words):
    with pytest.raises(ValueError, match=words) as error:
        recognise_file(header_only(of_shapes({name: (4, 4)})))
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------------------------------------------------------------
# tiny models that diffusers built


@pytest.mark.parametrize("name", ["sd1", "sd2-v", "sdxl-base"])
def test_tiny_folders_that_diffusers_saved_are_recognised_whole(name):
    found = recognise(sd_cases.folder(name))
    assert found.fits and not found.absent and found.family == {"sd2-v": "sd2"}.get(name, name)
    assert found.parameterization == ("v" if name == "sd2-v" else "eps")
    for place in found.places:  # every tensor is read and goes there and back
        weights = {key: place.file.read(place.prefix + key) for key in place.table.foreign_shapes}
        back = place.table.to_foreign(place.table.to_ours(weights))
        assert all(torch.equal(back[key], weights[key]) for key in weights)


def test_what_our_exports_say_of_themselves_is_believed():
    kwargs = LDM_TEXT | {"model_channels": 32, "context_dim": 24, "num_heads": 2, "channel_mult": [1, 2]}
    net = {"_target_": "diffusion.models.unet.UNet", **compvis.unet_config(kwargs)}
    process = {"_target_": "diffusion.process.GaussianDiffusion", "parameterization": "v"}
    told = {
        "diffusion.config": json.dumps({"net": net, "diffusion": process}),
        "diffusion.facts": '{"shape": [4, 8, 8]}',
    }
    entries = of_shapes(compvis.unet_table(kwargs).foreign_shapes, "model.diffusion_model.")
    found = recognise_file(header_only(entries, metadata=told))
    assert found.fits and not found.absent and found.parameterization == "v" and found.facts == {"shape": [4, 8, 8]}
    same_network(found, compvis.unet_config(kwargs))
    told["diffusion.config"] = "{}"
    with pytest.raises(ValueError, match=r"no net|damaged"):
        recognise_file(header_only(entries, metadata=told))


# ---------------------------------------------------------------------------------------------------------------------
# the command


def test_inspect_prints_what_a_file_is_and_how_to_use_it(tmp_path, capsys):
    path = write_header(tmp_path / "sd 1.safetensors", full_size("sd15_checkpoint"))
    assert main(["inspect", str(path)]) == 0
    out = capsys.readouterr().out
    for words in ("Stable Diffusion 1", "network 859.5 M", "0.18215", "13 harmless", f"checkpoint='{path}'", "none ("):
        assert words in out, words


def test_inspect_finds_nan_in_a_sample_or_in_all(tmp_path, capsys):
    folder = sd_cases.folder("sd1")
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "vae/diffusion_pytorch_model.safetensors")
    name = next(iter(weights))
    weights[name].view(-1)[-1] = float("nan")
    save_file(weights, tmp_path / "vae.safetensors")
    assert main(["inspect", str(tmp_path / "vae.safetensors"), "nan=all"]) == 0
    assert f"in 1 tensors, such as {name}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["inspect"], "one file or folder, got 0"),
        (["inspect", "a", "b"], "got 2"),
        (["inspect", "nowhere.safetensors"], "there is no file nowhere.safetensors"),
        (["inspect", "x", "weights=both"], "weights=both is unknown; choose one of auto, ema, raw"),
        (["inspect", "x", "--layout", "ours"], "inspect takes no layout"),
        (["convert", "x", "y"], "needs --layout"),
        (["convert", "x", "y", "--dtype"], "--dtype needs a value"),
        (["convert", "x", "y", "--layout=ours", "--dtype=int8"], "dtype=int8 is unknown"),
        (["look", "x"], "look is unknown; choose inspect or convert"),
    ],
)
def test_mistakes_at_the_command_are_one_line(words, message, capsys):
    assert main(words) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


def test_the_command_alone_prints_its_help(capsys):
    assert main([]) == 0
    assert "inspect FILE" in capsys.readouterr().out
