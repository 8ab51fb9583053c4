"""ADM's ablations: each composes with any recipe, builds, and differs from the baseline in what it is named after."""

from functools import cache

import pytest
import torch
from tiny import ROOT, run

from diffusion.checkpoint import build, load_model
from diffusion.cli import composed, diagnose, help_text
from diffusion.models.stages import CHANNEL_MULTS, Stage, equal_stages

FOLDER = ROOT / "configs" / "net" / "ablation"
NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml") if path.stem != "baseline")
PAPERS, SMALL = "experiment=adm_imagenet128", "experiment=digits_ablation"
# What each may change, beside the stages that `STAGES` tells of.
CHANGES = {
    "depth": {"channels": (160, 128)},
    "heads": {"num_heads": (1, 4)},
    "head_width": {"num_heads": (1, None), "head_channels": (None, 32)},
    "attention_resolutions": {},
    "biggan_updown": {"resample": ("conv", "residual")},
    "rescale_residual": {"residual_scale": (1.0, 0.5**0.5)},
    "additive_embedding": {"modulation": ("scale_shift", "shift")},
    "adm": {"num_heads": (1, 4), "resample": ("conv", "residual")},
}
STAGES = {
    "depth": {"depth": (2, 4)},
    "attention_resolutions": {"attention": ([-2], [-3, -2, -1])},
    "adm": {"attention": ([-2], [-3, -2, -1])},
}


@cache
def recipe(name: str, experiment: str) -> dict:
    return composed("train", [experiment, f"net=ablation/{name}"])


def net(name: str, experiment: str) -> dict:
    return recipe(name, experiment)["net"]


def meta(node: dict) -> torch.nn.Module:
    with torch.device("meta"):
        return build(node)


def parameters(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def different(one: dict, other: dict) -> dict:
    assert one.keys() == other.keys()
    return {key: (one[key], other[key]) for key in one if one[key] != other[key]}


def test_every_ablation_of_the_paper_is_there_and_says_its_figure():
    assert sorted(CHANGES) == NAMES
    for name in NAMES:
        text = (FOLDER / f"{name}.yaml").read_text()
        assert "FID" in text and "table" in text
        assert len(text.splitlines()) <= 8


@pytest.mark.parametrize("name", NAMES)
def test_each_ablation_changes_one_thing_of_the_baseline(name):
    changed = different(net("baseline", PAPERS), net(name, PAPERS))
    stages = changed.pop("stages", None)
    assert {key: pytest.approx(value) for key, value in CHANGES[name].items()} == changed
    assert (different(*stages) if stages else {}) == STAGES.get(name, {})


@pytest.mark.parametrize("experiment", [PAPERS, SMALL, "experiment=digits"])
@pytest.mark.parametrize("name", ["baseline", *NAMES])
def test_each_ablation_fits_the_recipes_images(name, experiment):
    config = recipe(name, experiment)
    built = meta(config["net"])
    assert config["data"]["image_size"] % built.size_factor == 0
    assert built.out_channels == config["out_channels"] and built.num_classes == config["data"]["num_classes"]


def test_parameter_counts_move_as_the_changes_say():
    count = {name: parameters(meta(net(name, PAPERS))) for name in ("baseline", *NAMES)}
    base = count["baseline"]
    # Heads share one projection, and a factor has no parameters.
    assert count["heads"] == count["head_width"] == count["rescale_residual"] == base
    assert count["depth"] == pytest.approx(base, rel=0.05)  # deeper and narrower, about as large
    assert count["attention_resolutions"] > base
    assert count["biggan_updown"] > base
    # AdaGN's projection gives scale and shift, the additive one a shift alone: a weight row and a bias a channel less.
    widths = [m.embedding.out_features for m in meta(net("additive_embedding", PAPERS)).modules() if embeds(m)]
    assert base - count["additive_embedding"] == sum(widths) * (4 * 160 + 1)


def embeds(module: torch.nn.Module) -> bool:
    return getattr(module, "embedding", None).__class__ is torch.nn.Linear


def test_attention_stands_where_the_paper_says():
    def sizes(name: str) -> list[int]:
        spec = build(net(name, PAPERS)["stages"])
        return [128 >> number for number, stage in enumerate(spec) if stage.attention == "self"]

    assert sizes("baseline") == [16]
    assert sizes("attention_resolutions") == [32, 16, 8]


def test_small_data_get_small_networks_of_the_same_kinds():
    assert different(net("baseline", SMALL), net("head_width", SMALL)) == {
        "num_heads": (1, None),
        "head_channels": (None, 4),
    }
    base, deep = (parameters(meta(net(name, SMALL))) for name in ("baseline", "depth"))
    assert base < 1e6 and deep == pytest.approx(base, rel=0.1)


def test_equal_stages_are_adms_tables():
    assert equal_stages(64, depth=3, attention=(-1,)) == [
        *(Stage(depth=3, channel_mult=mult) for mult in (1, 2, 3)),
        Stage(depth=3, channel_mult=4, attention="self"),
    ]
    for image_size, mults in CHANNEL_MULTS.items():
        assert [stage.channel_mult for stage in equal_stages(image_size)] == list(mults)
        assert image_size % 2 ** (len(mults) - 1) == 0
    assert [stage.attention for stage in equal_stages(48, channel_mults=[1, 2], attention=[-3, -2])] == ["self", "none"]


def test_impossible_stages_are_refused():
    with pytest.raises(ValueError, match=r"image_size=48 has no channel_mults of its own; .*known sizes: 8,"):
        equal_stages(48)
    with pytest.raises(ValueError, match=r"attention=\[0, -1\] counts stages from the lowest, -1; \[0\] are not"):
        equal_stages(8, attention=[0, -1])


def test_the_command_line_knows_options_in_folders(monkeypatch, capsys):
    assert "ablation/depth" in help_text("train", "")
    assert diagnose(["net=ablation/depth", "net.chanels=3"], "train") == (
        "there is no key 'net.chanels'; did you mean net.channels or net.in_channels?"
    )
    assert "did you mean ablation/depth" in diagnose(["net=ablation/dept"], "train")
    assert diagnose(["net/ablation=depth"], "train").endswith("did you mean net=ablation/depth?")


def test_a_sweep_of_ablations_trains_and_its_models_can_be_read(tmp_path, monkeypatch, capsys):
    common = ["trainer.max_steps=1", "data.batch_size=8", "callbacks=quiet", f"sweep_dir={tmp_path / 'sweep'}"]
    line = ["-m", SMALL, "net=ablation/biggan_updown,ablation/rescale_residual", *common]
    status, _, err = run("train", line, monkeypatch, capsys)
    assert status == 0, err
    models = sorted((tmp_path / "sweep").glob("*/model.safetensors"))
    assert [name in str(path) for name, path in zip(("biggan", "rescale"), models, strict=True)] == [True, True]
    assert load_model(models[0]).net.size_factor == 2
