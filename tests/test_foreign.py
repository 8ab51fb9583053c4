"""Published files as models: every layout gives the same network, parts come from elsewhere, mistakes are named."""

import gc
import shutil
from pathlib import Path

import pytest
import sd_cases
import torch
from golden_cases import assert_close
from safetensors.torch import load_file, save_file

from diffusion.checkpoint import ALIGNED, build_empty, load_autoencoder, load_model, settle
from diffusion.conversion.convert import convert
from diffusion.conversion.foreign import load_foreign
from diffusion.model_file import is_ours, weights_hash
from diffusion.pretrained.compare import differences
from diffusion.text_conditioning import TextConditioner, XLConditioner


def without(prefix: str, out: Path, name: str = "sd1", **changed: torch.Tensor) -> Path:
    """A copy of a single file without the tensors below a prefix."""
    state = load_file(sd_cases.single_file(name))
    save_file({k: v for k, v in state.items() if not k.startswith(prefix)} | changed, out)
    return out


def answers(model) -> torch.Tensor:
    """What a network says to a fixed latent and text."""
    x = torch.randn(1, model.net.in_channels, 8, 8, generator=torch.Generator().manual_seed(0))
    dtype = next(model.net.parameters()).dtype
    with torch.no_grad():
        condition = model.conditioner(model.conditioner.prepare(["a cat"]))
        condition = {name: value.to(dtype) for name, value in condition.items()}
        return model.net(x.to(dtype), torch.tensor([500]), **condition)


@pytest.fixture(scope="module")
def vae(tmp_path_factory) -> Path:
    """sd1's autoencoder alone, in CompVis' names."""
    state = load_file(sd_cases.single_file("sd1"))
    prefix, path = "first_stage_model.", tmp_path_factory.mktemp("vae") / "vae.safetensors"
    save_file({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}, path)
    return path


# --- every container and layout --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sd1", "sd2-v", "sdxl-base"])
def test_a_folder_and_a_single_file_answer_alike_and_as_diffusers(name):
    models = [load_model(path) for path in (sd_cases.folder(name), sd_cases.single_file(name))]
    expected = answers(models[0])
    assert torch.equal(answers(models[1]), expected)
    for model in models:
        assert not (model.net.training or model.autoencoder.training or model.conditioner.training)
        assert model.facts["task"] == "text-to-image" and model.path.exists() and model.recognised.kind == "denoiser"
    pipe = sd_cases.peer(name)
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    condition = models[0].conditioner(models[0].conditioner.prepare(["a cat"]))
    extra = {}
    if "vector" in condition:
        sizes = torch.tensor([[float(n) for n in models[0].conditioner.sizes_of(*models[0].conditioner.image_size)]])
        extra["added_cond_kwargs"] = {"text_embeds": condition["vector"][:, :-1536], "time_ids": sizes}
    with torch.no_grad():
        theirs = pipe.unet(x, torch.tensor([500]), condition["context"], **extra).sample
    assert_close(expected, theirs, 5e-5)


def test_shards_and_variants_are_the_same_model():
    plain = answers(load_model(sd_cases.folder("sd1")))
    assert torch.equal(answers(load_model(sd_cases.folder("sd1", max_shard_size="1MB"))), plain)
    half = load_model(sd_cases.folder("sd1", dtype="float16", variant="fp16"))
    assert {p.dtype for p in half.net.parameters()} == {torch.float16}
    wide = load_model(sd_cases.folder("sd1", dtype="float16", variant="fp16"), dtype=torch.float32)
    assert_close(answers(wide), plain, 2e-2)


def test_a_ckpt_is_the_same_model(tmp_path):
    single = sd_cases.single_file("sd1")
    torch.save({"state_dict": load_file(single), "global_step": 7}, tmp_path / "model.ckpt")
    assert torch.equal(answers(load_model(tmp_path / "model.ckpt")), answers(load_model(single)))


def test_the_kind_of_a_file_is_told_by_what_is_in_it(tmp_path):
    from tiny import save_tiny

    assert is_ours(save_tiny(tmp_path / "model.safetensors"))
    assert not is_ours(sd_cases.single_file("sd1")) and not is_ours(sd_cases.folder("sd1"))
    assert not is_ours(sd_cases.folder("sd1") / "vae") and is_ours(tmp_path)


@pytest.mark.parametrize(("name", "kind"), [("sd1", TextConditioner), ("sdxl-refiner", XLConditioner)])
def test_conditioners_are_the_families(name, kind):
    assert type(load_model(sd_cases.folder(name)).conditioner) is kind


# --- memory ----------------------------------------------------------------------------------------------------------


def test_weights_are_as_ours_are_kept_and_the_file_is_not_written_to(tmp_path):
    path = tmp_path / "model.safetensors"
    shutil.copy(sd_cases.single_file("sd1"), path)
    before = path.read_bytes()
    model = load_model(path)
    expected = answers(model)
    assert all(p.data_ptr() % 64 == 0 for p in model.net.parameters())
    assert model.net.down[0].blocks[0].residual.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    path.unlink()
    assert torch.equal(answers(model), expected)
    with torch.no_grad():
        for parameter in model.net.parameters():
            parameter.add_(1.0)
    path.write_bytes(before)
    assert torch.equal(answers(load_model(path)), expected)


def test_an_odd_address_in_the_file_changes_no_answer(tmp_path):
    state = load_file(sd_cases.single_file("sd1"))
    for count in (1, 3):
        save_file(state, tmp_path / f"{count}.safetensors", metadata={"padding": "x" * 8 * count})
    first, second = (answers(load_model(tmp_path / f"{count}.safetensors")) for count in (1, 3))
    assert torch.equal(first, second)


def test_precision_and_place_are_the_callers(tmp_path):
    model = load_foreign(sd_cases.single_file("sd1"), dtype=torch.bfloat16)
    for part in (model.net, model.autoencoder, model.conditioner):
        assert {p.dtype for p in part.parameters()} == {torch.bfloat16}
    meta = load_foreign(sd_cases.single_file("sd1"), dtype=torch.float64)
    assert next(meta.net.parameters()).dtype == torch.float64


# --- parts from elsewhere --------------------------------------------------------------------------------------------


def test_missing_parts_are_named_at_once_with_how_to_give_them(tmp_path):
    path = without(("first_stage_model.", "cond_stage_model."), tmp_path / "unet.safetensors")
    with pytest.raises(ValueError, match=r"has no autoencoder and no text encoder.*vae=FILE text_encoder=FILE"):
        load_model(path)
    folder = tmp_path / "folder"
    shutil.copytree(sd_cases.folder("sd1"), folder, ignore=shutil.ignore_patterns("vae"))
    with pytest.raises(ValueError, match=r"has no autoencoder; .*vae=FILE"):
        load_model(folder)
    with pytest.raises(ValueError, match="has no text encoder"):
        load_model(path, autoencoder=sd_cases.folder("sd1") / "vae")


def test_parts_given_beside_a_file_complete_it(tmp_path, vae):
    whole = load_model(sd_cases.single_file("sd1"))
    path = without(("first_stage_model.", "cond_stage_model."), tmp_path / "unet.safetensors")
    given = {"autoencoder": vae, "text_encoder": sd_cases.folder("sd1") / "text_encoder"}
    model = load_model(path, **given)
    assert torch.equal(answers(model), answers(whole))
    assert weights_hash(model.autoencoder) == weights_hash(whole.autoencoder)
    assert model.autoencoder.scale_factor == 0.18215
    assert model.parts["autoencoder"]["source"] == str(vae) and not model.parts["autoencoder"]["bundled"]
    from_whole = load_model(path, autoencoder=sd_cases.single_file("sd1"), text_encoder=sd_cases.single_file("sd1"))
    assert torch.equal(answers(from_whole), answers(whole))


def test_two_text_encoders_are_given_in_order(tmp_path):
    path = without("conditioner.", tmp_path / "unet.safetensors", "sdxl-base")
    folder = sd_cases.folder("sdxl-base")
    both = [folder / "text_encoder", folder / "text_encoder_2"]
    model, whole = load_model(path, text_encoder=both), load_model(folder)
    model.conditioner.image_size = whole.conditioner.image_size  # a single file does not tell its own
    assert torch.equal(answers(model), answers(whole))
    with pytest.raises(ValueError, match=r"through 2 encoder\(s\), but .* holds 1"):
        load_model(path, text_encoder=both[0])
    with pytest.raises(ValueError, match="the one with text_projection last"):
        load_model(path, text_encoder=both[::-1])
    path = without("cond_stage_model.", tmp_path / "sd1.safetensors")
    with pytest.raises(ValueError, match=r"contexts of 128 channels, but .* was trained on 64"):
        load_model(path, text_encoder=both[1])


def test_another_autoencoder_keeps_the_scale_that_the_model_was_trained_with(vae):
    with pytest.warns(UserWarning, match=r"scale_factor=0\.18215; 0\.13025 is used"):
        model = load_model(sd_cases.single_file("sdxl-base"), autoencoder=vae)
    assert model.autoencoder.scale_factor == 0.13025
    assert model.parts["autoencoder"]["config"]["scale_factor"] == 0.13025


def test_an_autoencoder_is_read_from_whatever_holds_one(vae, tmp_path):
    single, folder = sd_cases.single_file("sd1"), sd_cases.folder("sd1")
    ours = convert(vae, tmp_path / "vae.safetensors", layout="ours", say=lambda line: None)
    found = [load_autoencoder(path) for path in (single, vae, folder, folder / "vae", ours)]
    assert len({weights_hash(module) for module in found}) == 1
    for module in found:
        assert not any(p.requires_grad for p in module.parameters()) and not module.training
        assert module.origin.config["latent_channels"] == 4
        with torch.no_grad():
            assert module.decode(torch.zeros(1, 4, 8, 8)).shape == (1, 3, 64, 64)


def test_the_users_word_is_taken_for_what_the_network_predicts(tmp_path):
    model = load_model(sd_cases.single_file("sd1"), parameterization="v")
    assert model.diffusion.parameterization == "v" and model.config["diffusion"]["parameterization"] == "v"
    with pytest.raises(ValueError, match="parameterization must be one of"):
        load_model(sd_cases.single_file("sd1"), parameterization="w")


# --- mistakes --------------------------------------------------------------------------------------------------------


def lora(path: Path) -> Path:
    save_file({f"lora_unet_x.lora_{way}.weight": torch.zeros(2, 2) for way in ("up", "down")}, path)
    return path


def embedding(path: Path) -> Path:
    save_file({"emb_params": torch.zeros(4, 768)}, path)
    return path


def text_encoder(path: Path) -> Path:
    shutil.copy(sd_cases.folder("sd1") / "text_encoder" / "model.safetensors", path)
    return path


def autoencoder(path: Path) -> Path:
    shutil.copy(sd_cases.folder("sd1") / "vae" / "diffusion_pytorch_model.safetensors", path)
    return path


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lora, "is a LoRA.*no model"),
        (embedding, "is a textual inversion.*no model"),
        (text_encoder, "a text encoder alone.*text_encoder=FILE"),
        (autoencoder, "an autoencoder alone.*vae=FILE"),
    ],
)
def test_what_is_no_model_is_named_with_its_use(make, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        load_model(make(tmp_path / "file.safetensors"))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"autoencoder": "unet"}, "holds no autoencoder"),
        ({"text_encoder": "vae"}, "holds no text encoder"),
        ({"tokenizer": "vae"}, "vocabulary is there already"),
        ({"weights": "ema"}, "no averaged weights"),
        ({"weights": "best"}, "choose one of auto, ema, raw"),
    ],
)
def test_a_part_that_does_not_fit_is_named(setting, message, vae, tmp_path):
    files = {"vae": vae, "unet": without(("first_stage_model.", "cond_stage"), tmp_path / "unet.safetensors")}
    with pytest.raises(ValueError, match=message):
        load_model(sd_cases.single_file("sd1"), **{name: files.get(value, value) for name, value in setting.items()})


def test_an_autoencoder_of_other_latents_is_refused(tmp_path):
    from tiny import facts

    from diffusion.checkpoint import build
    from diffusion.model_file import save_model

    node = {"_target_": "diffusion.models.autoencoder.AutoencoderKL", "latent_channels": 8, "channels": 32}
    node |= {"stages": [{"depth": 1}, {"depth": 1}]}
    path = tmp_path / "vae.safetensors"
    save_model(path, build(node), {"autoencoder": node}, weights="raw", step=0, facts=facts())
    with pytest.raises(ValueError, match=r"latents of 8 channels, but .* trained on 4"):
        load_model(sd_cases.single_file("sd1"), autoencoder=path)


def test_settings_of_published_files_are_refused_for_our_own(tmp_path):
    from tiny import save_tiny

    with pytest.raises(ValueError, match=r"parameterization=v: .* is a model of this package"):
        load_model(save_tiny(tmp_path / "model.safetensors"), parameterization="v", weights="auto")


def test_decisions_are_told_one_line_each(tmp_path, capsys):
    told = []
    path = tmp_path / "v-pred.safetensors"
    shutil.copy(without("diffusion.", tmp_path / "plain.safetensors", "sd2-v"), path)
    assert load_foreign(path, say=told.append).diffusion.parameterization == "v"
    assert told and all("\n" not in line for line in told)
    load_foreign(path)
    assert capsys.readouterr().err.splitlines() == told


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_weights_that_lie_as_in_the_file_settle_into_those_that_are_loaded_settled(dtype):
    path, how = sd_cases.single_file("sd1"), {"dtype": dtype, "say": lambda line: None}
    settled, lying = (load_foreign(path, settled=choice, **how) for choice in (True, False))
    for name in ("net", "autoencoder", "conditioner"):
        wanted = getattr(settled, name).state_dict(keep_vars=True)
        before = {key: tensor.stride() for key, tensor in getattr(lying, name).state_dict().items()}
        assert name == "conditioner" or before != {key: tensor.stride() for key, tensor in wanted.items()}
        found = settle(getattr(lying, name), "cpu").state_dict(keep_vars=True)
        for key, tensor in wanted.items():
            assert found[key].stride() == tensor.stride() and torch.equal(found[key], tensor)
            assert found[key].data_ptr() % ALIGNED == 0


def test_loading_leaves_the_collection_of_garbage_as_it_was():
    load_foreign(sd_cases.single_file("sd1"), say=lambda line: None)
    assert gc.isenabled()


def test_every_setting_of_the_modules_is_that_of_their_config(tmp_path):
    """What the names and shapes of a file do not tell, as the scale of latents, is the family's."""
    model = load_foreign(without("diffusion.", tmp_path / "plain.safetensors", "sd1"), say=lambda line: None)
    assert model.autoencoder.scale_factor == model.config["autoencoder"]["scale_factor"] == 0.18215
    for name in ("net", "autoencoder"):
        assert not differences(getattr(model, name), build_empty(model.config[name]))
