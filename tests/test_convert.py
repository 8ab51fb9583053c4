"""Models in other layouts: there and back is the same bytes, diffusers loads what we write, memory stays small."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import sd_cases
import torch
from foreign_cases import full_size, write_header
from golden_cases import assert_close, key_list, load, names
from safetensors.torch import load_file, save_file
from tiny import DIFFUSION, NET, config, facts, random_net, save_tiny
from torch import nn

from diffusion.checkpoint import build, load_model, read_header, save_model
from diffusion.conversion.convert import convert, read_source, save_foreign
from diffusion.conversion.layouts import PLANS, plan_compvis, plan_diffusers
from diffusion.conversion.tensor_stream import Slot, write_stream
from diffusion.model_file import Part, weights_hash
from diffusion.models.text import TextTransformer
from diffusion.pretrained import export_compvis, open_clip
from diffusion.pretrained.weight_files import open_weights
from diffusion.schedule import cosine, scaled_linear


def quiet(line: str) -> None:
    """Decisions are not printed in tests."""


def assert_same_file(one: Path, other: Path) -> None:
    """Assert that two files hold the same names, types, shapes and bytes."""
    first, second = open_weights(one), open_weights(other)
    assert dict(first) == dict(second)
    assert all(torch.equal(bits(first.read(name)), bits(second.read(name))) for name in first)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


def assert_same_folder(one: Path, other: Path, *, except_for: tuple[str, ...] = ()) -> None:
    files = [p.relative_to(one) for p in sorted(one.rglob("*.safetensors")) if p.name not in except_for]
    assert files
    for file in files:
        assert_same_file(one / file, other / file)


# --- there and back --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["sd1", *(pytest.param(name, marks=pytest.mark.slow) for name in ("sd2-v", "sdxl-base", "sdxl-refiner"))]
)
def test_there_and_back_through_every_layout_is_the_same_bytes(name, tmp_path):
    folder, single = sd_cases.folder(name), sd_cases.single_file(name)
    ours = convert(single, tmp_path / "ours.safetensors", layout="ours", say=quiet)
    assert_same_file(single, convert(ours, tmp_path / "again.safetensors", layout="compvis", say=quiet))
    exported = convert(ours, tmp_path / "exported", layout="diffusers", say=quiet)
    assert_same_folder(folder, exported)
    assert_same_file(single, convert(exported, tmp_path / "third.safetensors", layout="compvis", say=quiet))


def test_a_model_in_memory_is_written_as_its_file_would_be(tmp_path):
    single = sd_cases.single_file("sd1")
    written = save_foreign(load_model(single), tmp_path / "again.safetensors", layout="compvis", say=quiet)
    assert_same_file(single, written)
    folder = save_foreign(load_model(single), tmp_path / "folder", layout="diffusers", say=quiet)
    assert_same_folder(sd_cases.folder("sd1"), folder)


def test_our_own_file_of_a_published_model_rebuilds_itself_and_knows_its_parts(tmp_path):
    single = sd_cases.single_file("sdxl-base")
    ours = convert(single, tmp_path / "ours.safetensors", layout="ours", say=quiet)
    model, published = load_model(ours), load_model(single)
    header = read_header(ours)
    assert header.facts["task"] == "text-to-image" and model.autoencoder.scale_factor == 0.13025
    for name in ("autoencoder", "conditioner"):
        assert header.parts[name]["sha256"] == weights_hash(getattr(model, name))
    assert weights_hash(model.net) == weights_hash(published.net)


def test_keys_that_no_network_has_travel_along(tmp_path):
    state = load_file(sd_cases.single_file("sd1"))
    state["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    state["model_ema.decay"], state["model_ema.num_updates"] = torch.tensor(0.9999), torch.tensor(7, dtype=torch.int32)
    state["cond_stage_model.logit_scale"] = torch.tensor(4.6)
    save_file(state, tmp_path / "file.safetensors")
    source, told = tmp_path / "file.safetensors", []
    for layout, out in (("ours", "ours.safetensors"), ("diffusers", "folder")):
        there = convert(source, tmp_path / out, layout=layout, say=told.append)
        back = convert(there, tmp_path / f"from_{layout}.safetensors", layout="compvis", say=quiet)
        assert_same_file(source, back)
    load_model(tmp_path / "ours.safetensors")  # is as strict as ever
    assert not told


def test_a_file_without_a_schedules_buffers_comes_back_without_them(tmp_path):
    state = {k: v for k, v in load_file(sd_cases.single_file("sd1")).items() if "." in k}
    source = tmp_path / "file.safetensors"
    save_file(state, source)
    for layout, out in (("compvis", "c.safetensors"), ("ours", "ours.safetensors"), ("diffusers", "folder")):
        there = convert(source, tmp_path / out, layout=layout, say=quiet)
        back = convert(there, tmp_path / f"from_{layout}.safetensors", layout="compvis", say=quiet)
        assert_same_file(source, back)


@pytest.mark.parametrize("linear", [True, False])
def test_how_transformers_project_is_remembered_and_not_guessed(linear):
    content = read_source(sd_cases.single_file("sd1")).content
    content = replace(content, facts=content.facts | {"linear_projections": linear})
    assert plan_diffusers(content).json["unet/config.json"]["use_linear_projection"] is linear
    table = next(target.table for target in plan_compvis(content).targets if target.part == "net")
    shapes = [shape for name, shape in table.foreign_shapes.items() if name.endswith("proj_in.weight")]
    assert {len(shape) for shape in shapes} == {2 if linear else 4}


def test_keys_of_diffusers_that_compvis_lacks_travel_along(tmp_path):
    exported = convert(sd_cases.single_file("sd2-v"), tmp_path / "folder", layout="diffusers", say=quiet)
    text = exported / "text_encoder" / "model.safetensors"
    ids = {"text_model.embeddings.position_ids": torch.arange(77)[None]}
    save_file(load_file(text) | ids, text, metadata={"format": "pt"})
    single = convert(exported, tmp_path / "single.safetensors", layout="compvis", say=quiet)
    assert_same_folder(exported, convert(single, tmp_path / "again", layout="diffusers", say=quiet))
    load_model(single)


def test_a_layer_that_stable_diffusion_2_never_reads_is_put_aside_and_back(tmp_path):
    state = load_file(sd_cases.single_file("sd2-v"))
    depth, prefix = 2, "cond_stage_model.model."
    text = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    settings = {"channels": 64, "num_heads": 1, "activation": "gelu", "projection_channels": 32}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        whole = TextTransformer(num_layers=depth + 1, **settings)
    extra = {k: t for k, t in whole.state_dict().items() if k.startswith((f"blocks.{depth}.", "proj"))}
    names = {r.ours: r.foreign[0] for r in open_clip.text_rules(whole)}
    for name, tensor in extra.items():
        state[prefix + names[name]] = (tensor.T if name.startswith("proj") else tensor).contiguous()
    save_file(state, tmp_path / "v-pred.safetensors", metadata={"modelspec.prediction_type": "v"})
    source, told = tmp_path / "v-pred.safetensors", []
    assert len(text) + len(extra) == len([k for k in state if k.startswith(prefix)])

    folder = convert(source, tmp_path / "folder", layout="diffusers", say=told.append)
    assert any("last layer" in line for line in told)
    encoder = json.loads((folder / "text_encoder/config.json").read_text())
    assert encoder["num_hidden_layers"] == depth
    back = convert(folder, tmp_path / "back.safetensors", layout="compvis", say=quiet)
    assert_same_file(source, back)
    models = [load_model(path) for path in (source, folder, back)]
    contexts = [m.conditioner(m.conditioner.prepare(["a cat"]))["context"] for m in models]
    assert torch.equal(contexts[0], contexts[1]) and torch.equal(contexts[0], contexts[2])
    assert {m.diffusion.parameterization for m in models} == {"v"}


def test_averages_and_losses_of_training_are_left_out_and_said_so(tmp_path):
    state = load_file(sd_cases.single_file("sd1"))
    averages = {k: v * 0.5 for k, v in state.items() if k.startswith("model.diffusion_model.")}
    dotless = {f"model_ema.{k.removeprefix('model.').replace('.', '')}": v for k, v in averages.items()}
    save_file(state | dotless | {"loss.weight": torch.ones(2)}, tmp_path / "both.safetensors")
    for weights, scale in (("raw", 1.0), ("ema", 0.5)):
        told = []
        out = tmp_path / f"{weights}.safetensors"
        convert(tmp_path / "both.safetensors", out, layout="compvis", weights=weights, say=told.append)
        written = load_file(out)
        assert written.keys() == state.keys()
        key = "model.diffusion_model.out.2.weight"
        assert torch.equal(written[key], state[key] * scale)
        assert any(f"{len(averages) + 1} tensors of its training" in line for line in told)


# --- precision -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_are_cast_and_whole_numbers_are_not(dtype, tmp_path):
    name = str(dtype).removeprefix("torch.")
    state = load_file(sd_cases.single_file("sd1"))
    ids = "cond_stage_model.transformer.text_model.embeddings.position_ids"
    save_file(state | {ids: torch.arange(77)[None]}, tmp_path / "file.safetensors")
    convert(tmp_path / "file.safetensors", tmp_path / "half.safetensors", layout="compvis", dtype=name, say=quiet)
    half = load_file(tmp_path / "half.safetensors")
    assert half[ids].dtype == torch.int64
    weights = [key for key in state if key.startswith(("model.", "first_", "cond_"))]
    assert all(torch.equal(half[key], state[key].to(dtype)) for key in weights)
    model = load_model(tmp_path / "half.safetensors")
    assert {p.dtype for p in model.net.parameters()} == {dtype}
    ours = convert(tmp_path / "half.safetensors", tmp_path / "ours.safetensors", layout="ours", say=quiet)
    assert {p.dtype for p in load_model(ours).conditioner.parameters()} == {dtype}


# --- diffusers loads it ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["sd1", *(pytest.param(name, marks=pytest.mark.slow) for name in ("sd2-v", "sdxl-base"))]
)
def test_diffusers_draws_the_same_from_what_is_exported(name, tmp_path):
    import diffusers

    exported = convert(sd_cases.single_file(name), tmp_path / "folder", layout="diffusers", say=quiet)
    pipelines = [sd_cases.peer(name), diffusers.DiffusionPipeline.from_pretrained(exported)]
    assert type(pipelines[1]) is type(pipelines[0])
    pictures = []
    for pipeline in pipelines:
        pipeline.set_progress_bar_config(disable=True)
        pipeline.scheduler = pipelines[0].scheduler
        asked = {"prompt": "a cat in a café, 100%", "negative_prompt": "dogs", "latents": sd_cases.starts().clone()}
        pictures.append(pipeline(**asked, num_inference_steps=2, output_type="pt").images)
    assert torch.equal(*pictures)
    for tokenizer in ("tokenizer", "tokenizer_2"):
        if getattr(pipelines[0], tokenizer, None) is not None:
            texts = ["", "Hello,  WORLD's café 1999?", "word " * 100, "日本 🎉"]
            how = {"padding": "max_length", "max_length": 77, "truncation": True}
            ids = [getattr(pipeline, tokenizer)(texts, **how).input_ids for pipeline in pipelines]
            assert ids[0] == ids[1]


def test_diffusers_reads_the_exported_scheduler_as_the_process_is(tmp_path):
    from diffusers import DDIMScheduler

    exported = convert(sd_cases.single_file("sd2-v"), tmp_path / "folder", layout="diffusers", say=quiet)
    scheduler = DDIMScheduler.from_pretrained(exported, subfolder="scheduler")
    diffusion = load_model(exported).diffusion
    assert scheduler.config.prediction_type == "v_prediction" and scheduler.config.steps_offset == 1
    assert_close(scheduler.alphas_cumprod, diffusion.schedule.alphas_cumprod, 1e-6)


def test_an_exported_pixel_model_is_diffusers_own_network(tmp_path):
    from diffusers import DDIMPipeline, UNet2DModel

    settings = {"net": {**NET, "num_classes": None}, "diffusion": DIFFUSION}
    about = facts(num_classes=None, class_names=None)
    net = random_net(settings)
    save_model(tmp_path / "ours.safetensors", net, settings, weights="ema", step=7, facts=about)
    exported = convert(tmp_path / "ours.safetensors", tmp_path / "folder", layout="diffusers", say=quiet)
    theirs = UNet2DModel.from_pretrained(exported, subfolder="unet")
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([3, 70])
    with torch.no_grad():
        assert_close(net.eval()(x, t), theirs(x, t).sample, 5e-5)
    pipeline = DDIMPipeline.from_pretrained(exported)
    betas = build(DIFFUSION["schedule"]).betas
    assert_close(pipeline.scheduler.betas, betas, 1e-6)
    again = load_model(exported)
    with torch.no_grad():
        assert torch.equal(again.net(x, t), net(x, t))
    assert again.diffusion.parameterization == "v"


def test_a_model_of_ours_keeps_what_weights_do_not_tell(tmp_path):
    settings = config(out_channels=2) | {"diffusion": DIFFUSION | {"variance": "learned", "parameterization": "eps"}}
    source = tmp_path / "m.safetensors"
    save_model(source, random_net(settings), settings, weights="ema", step=7, ema_decay=0.99, facts=facts())
    exported = convert(source, tmp_path / "folder", layout="diffusers", say=quiet)
    back = convert(exported, tmp_path / "back.safetensors", layout="ours", say=quiet)
    assert_same_file(source, back)
    models = [load_model(path) for path in (source, exported, back)]
    for model in models:
        assert model.diffusion.variance == "learned" and model.facts["class_names"] == facts()["class_names"]
        assert torch.equal(model.diffusion.schedule.betas, models[0].diffusion.schedule.betas)


def test_a_model_with_classes_comes_as_parts_where_diffusers_has_no_pipeline(tmp_path):
    from diffusers import UNet2DModel

    told = []
    exported = convert(save_tiny(tmp_path / "m.safetensors"), tmp_path / "folder", layout="diffusers", say=told.append)
    assert not (exported / "model_index.json").exists() and any("no pipeline" in line for line in told)
    theirs = UNet2DModel.from_pretrained(exported, subfolder="unet")
    x, t, label = torch.randn(2, 1, 8, 8), torch.tensor([3, 70]), torch.tensor([1, 9])
    with torch.no_grad():
        assert_close(random_net(config()).eval()(x, t, label=label), theirs(x, t, class_labels=label).sample, 5e-5)


# --- what a layout cannot hold ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("net", "layout", "message"),
    [
        ({}, "compvis", "cannot be split into 32|num_groups=8, there 32"),
        ({"resample": "pool"}, "diffusers", "down.0.resample"),
        ({"channels": 32, "residual_scale": 0.7}, "compvis", "residual_scale"),
        ({"_target_": "diffusion.models.unet.SuperResolutionUNet", "in_channels": 2}, "diffusers", "SuperResolution"),
    ],
)
def test_what_a_layout_would_compute_otherwise_is_refused_by_name(net, layout, message, tmp_path):
    source = save_tiny(tmp_path / "m.safetensors", **net)
    out = tmp_path / ("out.safetensors" if layout == "compvis" else "out")
    with pytest.raises(ValueError, match=message):
        convert(source, out, layout=layout, say=quiet)
    assert not out.exists() and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"masked": True}, "masked=True"),
        ({"pooled": True}, "pooled=True"),
        ({"encoder": {"vocab_size": 100}}, "100 tokens"),
        ({"encoder": {"causal": False}}, "causal"),
        ({"layer": -2}, "layer=-2"),
    ],
)
def test_ways_of_reading_text_that_others_lack_are_refused_by_name(changes, message, tmp_path):
    encoder = {"_target_": "diffusion.models.text.TextTransformer", "channels": 64, "num_layers": 2, "num_heads": 1}
    node = {"_target_": "diffusion.conditioning.TextConditioner", "encoder": encoder | changes.pop("encoder", {})}
    node |= changes
    net = {"channels": 32, "norm_groups": 32, "num_classes": None, "context_channels": 64}
    net["vector_channels"] = 64 if changes.get("pooled") else None
    settings = config(**net, stages=[{"depth": 1, "attention": "cross"}])
    part = Part(module=build(node), config=node)
    about = facts(num_classes=None, class_names=None)
    source = tmp_path / "m.safetensors"
    save_model(source, random_net(settings), settings, weights="raw", step=0, facts=about, parts={"conditioner": part})
    with pytest.raises(ValueError, match=message):
        convert(source, tmp_path / "out.safetensors", layout="compvis", say=quiet)


def test_mistakes_are_named_before_anything_is_written(tmp_path):
    source = save_tiny(tmp_path / "m.safetensors")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for arguments, message in (
        ({"out": tmp_path / "x.safetensors", "layout": "webui"}, "layout=webui is unknown; choose one of compvis"),
        ({"out": tmp_path / "x.safetensors", "layout": "ours", "dtype": "int4"}, "dtype=int4 is unknown"),
        ({"out": tmp_path / "x.ckpt", "layout": "compvis"}, r"ends in \.safetensors"),
        ({"out": tmp_path / "full", "layout": "diffusers"}, "is there already"),
        ({"out": source, "layout": "ours"}, "written over the file that is read"),
    ):
        with pytest.raises(ValueError, match=message):
            convert(source, say=quiet, **arguments)
    save_file(
        {"lora_unet_x.lora_up.weight": torch.zeros(4, 2), "lora_unet_x.lora_down.weight": torch.zeros(2, 4)},
        tmp_path / "lora.safetensors",
    )
    with pytest.raises(ValueError, match="LoRA"):
        convert(tmp_path / "lora.safetensors", tmp_path / "x.safetensors", layout="compvis", say=quiet)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["full", "lora.safetensors", "m.safetensors"]


def test_a_file_that_lacks_tensors_is_refused_with_their_names(tmp_path):
    state = load_file(sd_cases.single_file("sd1"))
    del state["cond_stage_model.transformer.text_model.final_layer_norm.weight"]
    save_file(state, tmp_path / "file.safetensors")
    with pytest.raises(ValueError, match=r"missing +cond_stage_model\..*final_layer_norm\.weight"):
        convert(tmp_path / "file.safetensors", tmp_path / "x.safetensors", layout="ours", say=quiet)


# --- parts -----------------------------------------------------------------------------------------------------------


def test_an_autoencoder_alone_goes_both_ways(tmp_path):
    alone = sd_cases.folder("sd1") / "vae"
    single = convert(alone, tmp_path / "vae.safetensors", layout="compvis", say=quiet)
    assert "encoder.down.0.block.0.conv1.weight" in open_weights(single)
    folder = convert(single, tmp_path / "folder", layout="diffusers", say=quiet)
    assert_same_folder(alone, folder)
    ours = convert(single, tmp_path / "ours.safetensors", layout="ours", say=quiet)
    assert_same_file(single, convert(ours, tmp_path / "again.safetensors", layout="compvis", say=quiet))


def test_a_file_without_its_text_encoder_is_converted_as_far_as_it_goes(tmp_path):
    state = {k: v for k, v in load_file(sd_cases.single_file("sd1")).items() if not k.startswith("cond_stage")}
    save_file(state, tmp_path / "file.safetensors")
    told = []
    out = convert(tmp_path / "file.safetensors", tmp_path / "half.safetensors", layout="compvis", say=told.append)
    assert_same_file(tmp_path / "file.safetensors", out)
    assert any("conditioner" in line for line in told)


def test_guided_diffusions_files_go_both_ways(tmp_path):
    net = {"channels": 32, "norm_groups": 32, "num_classes": None, "in_channels": 3, "out_channels": 3}
    source = save_tiny(tmp_path / "m.safetensors", about=facts(shape=[3, 8, 8], num_classes=None), **net)
    out = convert(source, tmp_path / "model.pt", layout="guided-diffusion", say=quiet)
    state = torch.load(out, weights_only=True)
    assert "input_blocks.0.0.weight" in state and state["out.2.weight"].shape == (3, 32, 3, 3)
    with pytest.raises(ValueError, match="in float32"):
        convert(source, tmp_path / "half.pt", layout="guided-diffusion", dtype="float16", say=quiet)


# --- the buffers and the stream --------------------------------------------------------------------------------------


def test_the_schedules_buffers_are_those_that_ldm_registers():
    case = load(names("ldm_samplers/register_schedule")[0])
    found = export_compvis.schedule_buffers(scaled_linear(1000, beta_start=0.00085, beta_end=0.012).betas)
    expected = case.group("out.sd")
    assert found.keys() == {name for name in expected if not name.startswith("lvlb")}
    for name, values in found.items():
        assert_close(values, expected[name], 2e-6, name)
    listed = {name for name in key_list("sd15_checkpoint") if "." not in name}
    assert set(found) == listed
    assert export_compvis.schedule_buffers(cosine(100).betas)["betas"].shape == (100,)


def test_a_stream_is_what_safetensors_reads(tmp_path):
    tensors = {
        "a": torch.randn(3, 5),
        "b": torch.randn(6).bfloat16(),
        "c": torch.arange(6).view(2, 3),
        "d": torch.zeros(0, 4),
        "e": torch.tensor(1.5),
        "f": torch.randn(16, 4),
    }
    slots = {name: Slot(tuple(t.shape), t.dtype) for name, t in tensors.items()}
    write_stream(
        tmp_path / "x.safetensors",
        slots,
        ((name, tensors[name].flatten().split(4)) for name in reversed(tensors)),
        {"format": "pt", "wörd": "ü"},
    )
    read = load_file(tmp_path / "x.safetensors")
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensors[name]) and read[name].dtype == tensors[name].dtype for name in tensors)
    file = open_weights(tmp_path / "x.safetensors")
    assert file.metadata["wörd"] == "ü" and file.read("f").data_ptr() % 64 == 0
    for wrong, message in (
        ({"a": [torch.randn(3, 4)]}, "60 were announced"),
        ({"z": []}, "not announced"),
        ({}, "never came"),
    ):
        with pytest.raises(ValueError, match=message):
            write_stream(tmp_path / "y.safetensors", slots, wrong.items())
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def test_tensors_are_read_in_portions(tmp_path):
    save_file({"x": torch.arange(10.0).view(5, 2), "y": torch.zeros(0)}, tmp_path / "x.safetensors")
    file = open_weights(tmp_path / "x.safetensors")
    assert [part.tolist() for part in file.portions("x", 4)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert list(file.portions("y", 4)) == []


MEASURED = """
import sys
from diffusion.conversion.convert import convert, read_source
import diffusion.conversion.published, diffusion.pretrained.guided_diffusion_files
def peak(): return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmHWM")) / 1024
before = peak()
convert(sys.argv[1], sys.argv[2], layout=sys.argv[3], dtype=sys.argv[4], say=lambda line: None)
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "dtype"), [("ours", "keep"), ("compvis", "bfloat16")])
def test_converting_takes_little_memory_whatever_the_files_size(layout, dtype, tmp_path):
    rows = {k: r for k, r in key_list("sd15_checkpoint").items() if not k.startswith("model.diffusion_model.")}
    unet = {k: v for k, v in load_file(sd_cases.single_file("sd1")).items() if k.startswith("model.diffusion_model.")}
    state = {
        k: torch.zeros(r[:-1], dtype=getattr(torch, r[-1])) for k, r in rows.items() if k.startswith("first_stage")
    }
    text = {k: v for k, v in load_file(sd_cases.single_file("sd1")).items() if k.startswith("cond_stage_model.")}
    save_file(unet | state | text, tmp_path / "file.safetensors")
    size = (tmp_path / "file.safetensors").stat().st_size / 2**20
    command = [sys.executable, "-c", MEASURED, tmp_path / "file.safetensors", tmp_path / "x.safetensors", layout, dtype]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert size > 330 and float(done.stdout) < 90


def test_what_is_in_a_source_is_known_before_it_is_read():
    source = read_source(sd_cases.single_file("sd1"))
    assert source.layout == "compvis" and set(source.content.modules) == {"net", "autoencoder", "conditioner"}
    assert all(
        isinstance(module, nn.Module) and next(module.parameters()).is_meta
        for module in source.content.modules.values()
    )
    assert source.content.linear_projections is False


@pytest.mark.parametrize("name", ["sd15", "sd21", "sdxl_base"])
def test_full_size_models_get_every_published_name_and_shape_in_both_layouts(name, tmp_path):
    single = write_header(tmp_path / "model.safetensors", full_size(f"{name}_checkpoint"))
    content = read_source(single).content
    extra = {"cond_stage_model.model.logit_scale", "conditioner.embedders.1.model.logit_scale"}
    ids = "transformer.text_model.embeddings.position_ids"
    extra |= {f"cond_stage_model.{ids}", f"conditioner.embedders.0.{ids}"}
    for layout, listed in (("compvis", f"{name}_checkpoint"), ("diffusers", f"{name}_diffusers")):
        plan = PLANS[layout](content)
        found = {buffer: tuple(tensor.shape) for buffer, tensor in plan.buffers.items()}
        for target in plan.targets:
            folder = f"{target.file.partition('/')[0]}/" if target.file else ""
            found |= {folder + target.prefix + key: shape for key, shape in target.table.foreign_shapes.items()}
        expected = {key: tuple(row[:-1]) for key, row in key_list(listed).items()}
        assert found == {key: shape for key, shape in expected.items() if key not in extra}
