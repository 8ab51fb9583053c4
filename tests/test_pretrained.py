"""Foreign weights: live diffusers networks as oracle for unusual configs, complete reports, refusals by name."""

import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from golden_cases import assert_close
from torch import nn

from diffusion.models.layers import timestep_embedding
from diffusion.models.unet import UNet
from diffusion.pretrained import compvis, diffusers, export_compvis, export_diffusers, guided_diffusion
from diffusion.pretrained.compare import differences
from diffusion.pretrained.keymap import CONV1D, CONV2D, SAME, STACKED, SWAPPED_HALVES, KeyMap, Rule, heads_outermost

CROSS = {
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 12,
    "attention_head_dim": 4,
}
CONDITIONED = {
    "plain": {},
    "linear projections, heads a level": {"use_linear_projection": True, "attention_head_dim": (2, 4)},
    "heads that leave a rest": {"attention_head_dim": (5, 3)},
    "scale and shift, other norms": {
        "resnet_time_scale_shift": "scale_shift",
        "norm_num_groups": 16,
        "norm_eps": 1e-6,
        "mid_block_scale_factor": 2**0.5,
    },
    "sine first, shifted frequencies, asymmetric padding": {
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "downsample_padding": 0,
        "time_embedding_dim": 96,
    },
    "depth a block, another way up": {
        "layers_per_block": (2, 1),
        "transformer_layers_per_block": ((1, 2), 2),
        "reverse_transformer_layers_per_block": (1, (2, 1, 1)),
    },
    "only cross-attention": {"only_cross_attention": (True, False)},
    "self-attention, residual resampling, one middle block": {
        "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
        "mid_block_type": "UNetMidBlock2D",
        "attention_head_dim": (8, 16),
    },
    "other attention on the way up, no middle": {
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "mid_block_type": None,
    },
    "classes": {"num_class_embeds": 7},
    "class timestep": {"class_embed_type": "timestep"},
    "class identity": {"class_embed_type": "identity"},
    "class projection": {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 10},
    "class linear": {"class_embed_type": "simple_projection", "projection_class_embeddings_input_dim": 10},
    "dropout and harmless settings": {"dropout": 0.1, "upcast_attention": True, "sample_size": (8, 8)},
}
SMALL = {
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "norm_num_groups": 16,
}
UNCONDITIONED = {
    "plain": {},
    "residual resampling": {"downsample_type": "resnet", "upsample_type": "resnet"},
    "ddpm's settings": {"freq_shift": 1, "flip_sin_to_cos": False, "downsample_padding": 0, "norm_eps": 1e-6},
    "one head": {"attention_head_dim": None},
    "scale and shift": {"resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 16},
    "no attention in the middle": {"add_attention": False, "num_class_embeds": 5},
    "no middle": {"mid_block_type": None, "mid_block_scale_factor": 2.0},
    "rescaled middle": {"mid_block_scale_factor": 2.0},
}


def randomised(net: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    for parameter in net.parameters():
        nn.init.normal_(parameter, 1.0 if parameter.ndim == 1 else 0.0, 0.08, generator=generator)
    return net.eval()


def agree(peer: nn.Module, config: dict, ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert_close(ours, theirs, 5e-5)
    table, weights = diffusers.unet_table(config), peer.state_dict()
    back = table.to_foreign(table.to_ours(weights))
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[key], weights[key]) for key in weights)


@pytest.mark.parametrize("name", CONDITIONED)
def test_conditioned_diffusers_networks_give_the_same_output(name):
    settings = CROSS | CONDITIONED[name]
    peer = randomised(UNet2DConditionModel(**settings))
    config = dict(peer.config)
    net = diffusers.load_unet(config, peer.state_dict()).eval()
    x, t, context = torch.randn(2, 4, 8, 12), torch.tensor([3, 801]), torch.randn(2, 5, 12)
    labels, condition = None, {}
    if net.num_classes:
        labels = torch.tensor([0, 6])
        condition = {"label": labels}
    elif config["class_embed_type"] == "timestep":
        labels = torch.tensor([5.0, 90.0])
        condition = {"vector": timestep_embedding(labels, 32)}
    elif net.vector_channels:
        labels = torch.randn(2, net.vector_channels)
        condition = {"vector": labels}
    with torch.no_grad():
        theirs = peer(x, t, context, class_labels=labels).sample
        agree(peer, config, net(x, t, context=context, **condition), theirs)


@pytest.mark.parametrize("name", UNCONDITIONED)
def test_unconditioned_diffusers_networks_give_the_same_output(name):
    settings = SMALL | UNCONDITIONED[name]
    peer = randomised(UNet2DModel(**settings))
    config = {**peer.config, "_class_name": "UNet2DModel"}
    net = diffusers.load_unet(config, peer.state_dict()).eval()
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([3, 801])
    labels = torch.tensor([0, 4]) if net.num_classes else None
    with torch.no_grad():
        agree(peer, config, net(x, t, label=labels), peer(x, t, class_labels=labels).sample)


def test_export_gives_weights_that_diffusers_loads_strictly():
    peer = UNet2DConditionModel(**CROSS)
    net = diffusers.load_unet(CROSS, randomised(peer).state_dict())
    with torch.no_grad():
        net.conv_in.bias += 1
    fresh = UNet2DConditionModel(**CROSS)
    fresh.load_state_dict(diffusers.export_unet(CROSS, net.state_dict()), strict=True)
    assert torch.equal(fresh.conv_in.bias, net.conv_in.bias)


def test_report_names_every_missing_unexpected_and_misshaped_key_at_once():
    weights = UNet2DConditionModel(**CROSS).state_dict()
    weights["stray.weight"] = weights.pop("conv_in.weight")
    weights["conv_out.bias"] = torch.zeros(5)
    with pytest.raises(ValueError, match="1 missing, 1 unexpected, 1 mis-shaped") as report:
        diffusers.load_unet(CROSS, weights)
    for line in (
        "missing     conv_in.weight [32, 4, 3, 3]",
        "unexpected  stray.weight",
        "conv_out.bias [5], expected [4]",
    ):
        assert line in str(report.value)
    table = diffusers.unet_table(CROSS)
    with pytest.raises(ValueError, match=r"our weights do not fit.*1 missing"):
        table.to_foreign(
            {k: v for k, v in table.to_ours(UNet2DConditionModel(**CROSS).state_dict()).items() if k != "conv_in.bias"}
        )


@pytest.mark.parametrize(
    "setting",
    [
        {"dual_cross_attention": True},
        {"time_cond_proj_dim": 32},
        {"encoder_hid_dim": 8},
        {"addition_embed_type": "image"},
        {"act_fn": "gelu"},
        {"time_embedding_type": "fourier"},
        {"class_embeddings_concat": True},
        {"conv_in_kernel": 5},
        {"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"},
        {"down_block_types": ("KDownBlock2D", "DownBlock2D")},
        {"cross_attention_dim": (12, 16)},
        {"resnet_skip_time_act": True},
        {"attention_type": "gated"},
        {"center_input_sample": True},
        {"num_attention_heads": 4},
        {"some_new_setting": 1},
    ],
)
def test_diffusers_settings_that_we_cannot_honour_are_named(setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        diffusers.unet_config(CROSS | setting)


def test_unconditioned_scale_shift_without_norm_groups_in_its_attention_is_refused():
    config = {"_class_name": "UNet2DModel", "resnet_time_scale_shift": "scale_shift"}
    with pytest.raises(ValueError, match="attn_norm_num_groups=None"):
        diffusers.unet_config(config)


LDM = {
    "image_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 32,
    "num_res_blocks": 1,
    "attention_resolutions": [1],
    "channel_mult": [1, 2],
    "num_heads": 4,
    "use_spatial_transformer": True,
    "context_dim": 12,
}


@pytest.mark.parametrize(
    ("module", "setting", "name"),
    [
        (compvis, {"n_embed": 100}, "n_embed"),
        (compvis, {"dims": 3}, "dims"),
        (compvis, {"num_classes": "words"}, "num_classes"),
        (compvis, {"context_dim": [12, 16]}, "context_dim"),
        (compvis, {"num_heads": -1}, "num_heads or num_head_channels"),
        (compvis, {"use_spatial_transformer": False}, "context_dim"),
        (compvis, {"use_video": True}, "use_video"),
        (compvis, {"channel_mult": [1, 1.5]}, r"channel_mult=\[1, 1.5\]: its entries must be whole"),
        (guided_diffusion, {"dims": 1}, "dims"),
        (guided_diffusion, {"context_dim": 4}, "context_dim"),
    ],
)
def test_openai_style_settings_that_we_cannot_honour_are_named(module, setting, name):
    config = (
        LDM if module is compvis else {k: v for k, v in LDM.items() if "transformer" not in k and k != "context_dim"}
    )
    with pytest.raises(ValueError, match=name):
        module.unet_config(config | setting)


def test_a_config_that_lacks_a_required_setting_says_which():
    with pytest.raises(ValueError, match="lacks model_channels"):
        guided_diffusion.unet_config(
            {k: v for k, v in LDM.items() if k != "model_channels" and "context" not in k and "transformer" not in k}
        )


SGM = {
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 32,
    "num_res_blocks": [1, 2],
    "attention_resolutions": [1, 2],
    "channel_mult": [1, 2],
    "num_head_channels": 16,
    "transformer_depth": [0, 2],
    "context_dim": [12, 12],
    "use_linear_in_transformer": True,
    "spatial_transformer_attn_type": "softmax-xformers",
}


@pytest.mark.parametrize(
    ("setting", "present", "absent"),
    [
        ({}, "input_blocks.2.0.op.weight", "input_blocks.1.1.transformer_blocks.0.norm1.weight"),
        ({"num_attention_blocks": [0, 1]}, "output_blocks.0.1.norm.weight", "output_blocks.1.1.norm.weight"),
        ({"disable_middle_transformer": True}, "middle_block.2.in_layers.0.weight", "middle_block.1.norm.weight"),
        ({"transformer_depth_middle": 3}, "middle_block.1.transformer_blocks.2.norm1.weight", "label_emb.weight"),
        ({"num_classes": "continuous"}, "label_emb.bias", "label_emb.0.0.weight"),
        ({"num_classes": "timestep"}, "label_emb.1.2.weight", "label_emb.weight"),
        ({"num_classes": "sequential", "adm_in_channels": 9}, "label_emb.0.2.weight", "label_emb.weight"),
        ({"num_classes": 9}, "label_emb.weight", "label_emb.0.0.weight"),
        ({"resblock_updown": True}, "output_blocks.2.2.in_layers.2.weight", "output_blocks.2.2.conv.weight"),
        ({"conv_resample": False}, "output_blocks.2.1.norm.weight", "output_blocks.2.2.conv.weight"),
    ],
)
def test_sgm_settings_appear_in_the_names(setting, present, absent):
    shapes = compvis.unet_table(SGM | setting).foreign_shapes
    assert present in shapes and absent not in shapes


def test_attention_without_self_attention_takes_keys_from_the_context():
    settings = {"disable_self_attentions": [False, True], "disable_middle_self_attn": True}
    shapes = compvis.unet_table(SGM | settings).foreign_shapes
    assert shapes["input_blocks.3.1.transformer_blocks.0.attn1.to_k.weight"] == (64, 12)
    assert shapes["middle_block.1.transformer_blocks.0.attn1.to_k.weight"] == (64, 12)


@pytest.mark.parametrize(("legacy", "upsample", "heads"), [(True, -1, (4, 4)), (True, 2, (4, 2)), (False, 2, (4, 4))])
def test_ldm_counts_heads_of_the_way_up_as_its_legacy_flag_says(legacy, upsample, heads):
    config = {k: v for k, v in LDM.items() if k not in ("use_spatial_transformer", "context_dim")}
    config |= {"legacy": legacy, "num_heads_upsample": upsample}
    with torch.device("meta"):
        net = compvis.UNet(**compvis.unet_config(config))
    assert (net.down[0].blocks[0].attention.num_heads, net.up[0].blocks[0].attention.num_heads) == heads


@pytest.mark.parametrize(
    "transform", [SAME, CONV1D, CONV2D, STACKED, SWAPPED_HALVES, heads_outermost(2), heads_outermost(3, CONV1D)]
)
def test_transforms_are_reversible_in_both_directions(transform):
    ours = torch.randn(18, 6)
    theirs = transform.save(ours)
    assert torch.equal(transform.load(*theirs), ours)
    assert all(torch.equal(a, b) for a, b in zip(transform.save(transform.load(*theirs)), theirs, strict=True))


def test_older_attention_order_is_the_newer_one_with_heads_outermost():
    rows = torch.arange(12)[:, None]  # [3, heads 2, width 2]
    (older,) = heads_outermost(2).save(rows)
    assert older.flatten().tolist() == [0, 1, 4, 5, 8, 9, 2, 3, 6, 7, 10, 11]


def test_a_table_that_is_no_bijection_is_a_programming_error():
    layer = nn.Linear(2, 2)
    for rules in ([Rule("weight", ("w",))], [Rule("weight", ("w",)), Rule("bias", ("w",))]):
        with pytest.raises(AssertionError):
            KeyMap(layer, rules)


def test_flags_of_the_readme_give_the_constructors_arguments():
    flags = {"image_size": 64, "attention_resolutions": "32,8", "channel_mult": "0.5,1,2", "diffusion_steps": 4000}
    config = guided_diffusion.kwargs_from_flags(flags)
    assert config["channel_mult"] == (0.5, 1, 2)
    assert config["attention_resolutions"] == (2, 8)
    assert guided_diffusion.unet_config(config)["stages"][1]["attention"] == "self"
    with pytest.raises(ValueError, match="image_size=48 has no default channel_mult"):
        guided_diffusion.kwargs_from_flags({"image_size": 48})


@pytest.mark.parametrize(
    ("peer", "config"),
    [
        *(pytest.param(UNet2DConditionModel, CROSS | changes, id=name) for name, changes in CONDITIONED.items()),
        *(pytest.param(UNet2DModel, SMALL | changes, id=f"plain, {name}") for name, changes in UNCONDITIONED.items()),
    ],
)
def test_a_network_is_described_to_diffusers_in_settings_that_build_it_there(peer, config):
    with torch.device("meta"):
        net = UNet(**diffusers.unet_config({"_class_name": peer.__name__, **config}))
        described = export_diffusers.unet_json(net, linear_projections=config.get("use_linear_projection", False))
        theirs = peer(**{name: value for name, value in described.items() if name != "_class_name"})
    shapes = {name: tuple(tensor.shape) for name, tensor in theirs.state_dict().items()}
    assert described["_class_name"] == peer.__name__
    assert diffusers.unet_table(described).foreign_shapes == shapes


@pytest.mark.parametrize(
    "setting",
    [
        {},
        {"num_head_channels": 8, "num_heads": -1},
        {"num_classes": 5},
        {"num_classes": "sequential", "adm_in_channels": 9},
        {"num_classes": "continuous"},
        {"transformer_depth": [1, 2], "attention_resolutions": [1, 2], "disable_middle_transformer": False},
    ],
)
def test_a_network_is_described_to_ldm_in_its_own_settings(setting):
    with torch.device("meta"):
        net = UNet(**compvis.unet_config(LDM | setting))
    table = export_compvis.unet_table(net, linear_projections=False)
    assert table.foreign_shapes == compvis.unet_table(LDM | setting).foreign_shapes


def test_what_two_networks_compute_otherwise_is_told_setting_by_setting():
    with torch.device("meta"):
        one, other = (UNet(**compvis.unet_config(LDM | {"num_heads": heads})) for heads in (4, 2))
    found = differences(one, other)
    assert found and all("num_heads=4, there 2" in line for line in found)
    assert differences(one, one) == []
