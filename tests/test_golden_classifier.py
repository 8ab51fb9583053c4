"""The classifier against guided-diffusion's: logits, log-probabilities and the gradient that guides, and every name."""

import pytest
import torch
from golden_cases import assert_bijection, assert_close, key_configs, key_list, key_lists, load, names

from diffusion.models.classifier import POOLS, Classifier
from diffusion.pretrained.guided_diffusion_classifier import (
    classifier_config,
    classifier_flags,
    classifier_table,
    export_classifier,
    load_classifier,
)

OUTPUT, GRADIENT = 5e-5, 3e-4  # of the tensor's scale
CASES = names("adm/classifier_*")
SMALL = {
    "image_size": 16,
    "in_channels": 3,
    "model_channels": 32,
    "out_channels": 10,
    "num_res_blocks": 1,
    "attention_resolutions": [2],
    "channel_mult": [1, 2],
}
# Every argument of EncoderUNetModel's constructor that changes the network, each away from its default.
VARIANTS = {
    "fractional widths": {"channel_mult": [0.5, 1, 2], "model_channels": 64},
    "no convolution in resampling": {"conv_resample": False},
    "biggan blocks": {"resblock_updown": True},
    "additive embedding": {"use_scale_shift_norm": False},
    "scale and shift": {"use_scale_shift_norm": True},
    "new order": {"use_new_attention_order": True, "num_heads": 4},
    "dropout and harmless settings": {"dropout": 0.1, "use_fp16": True, "num_heads_upsample": 2},
    "checkpointing": {"use_checkpoint": True},
    "five resolutions": {"channel_mult": [1, 1, 1, 1, 1], "attention_resolutions": [1, 4]},
}


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("name", CASES)
def test_logits_log_probabilities_and_the_guidance_gradient_are_the_peers(name, trained):
    case = load(name)
    net = load_classifier(case.config, case.group("weights")).eval().requires_grad_(trained)
    x, t, y = case["in.x"].clone().requires_grad_(), case["in.timesteps"], case["in.y"]
    with torch.no_grad():
        assert_close(net(x, t), case["out.logits"], OUTPUT, "logits without gradients")
    logits = net(x, t)
    logp = logits.log_softmax(-1)[torch.arange(len(y)), y]
    assert_close(logits, case["out.logits"], OUTPUT, "logits")
    assert_close(logp, case["out.logp"], OUTPUT, "log p")
    (gradient,) = torch.autograd.grad(logp.sum(), x)
    # The bound of `assert_close` never falls below the tolerance itself; these gradients are small.
    scale = case["out.grad_logp_x"].abs().max()
    assert_close(gradient / scale, case["out.grad_logp_x"] / scale, GRADIENT, "gradient")


@pytest.mark.parametrize("name", CASES)
def test_the_table_is_a_bijection_bit_for_bit(name):
    case = load(name)
    weights = case.group("weights")
    assert_bijection(classifier_table(case.config), weights)
    back = export_classifier(case.config, load_classifier(case.config, weights).state_dict())
    assert back.keys() == weights.keys() and all(torch.equal(back[key], weights[key]) for key in weights)


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_setting_of_the_constructor_makes_a_network_whose_names_have_a_table(variant, pool):
    config = {**SMALL, "pool": pool, **VARIANTS[variant]}
    if pool == "attention":
        config["num_head_channels"] = 8
    table = classifier_table(config)
    theirs = {key: torch.zeros(shape) for key, shape in table.foreign_shapes.items()}
    net = load_classifier(config, theirs)
    assert net(torch.zeros(2, 3, 16, 16), torch.tensor([3, 500])).shape == (2, 10)
    assert net.checkpointing == (variant == "checkpointing")


@pytest.mark.parametrize("name", [stem for stem in key_lists() if stem.startswith("adm_classifier")])
def test_full_size_names_and_shapes_match_one_to_one_both_ways(name):
    config = classifier_flags(key_configs()[name])
    expected = {key: tuple(entry[:-1]) for key, entry in key_list(name).items()}
    table = classifier_table(config)
    assert table.foreign_shapes == expected
    theirs = {key: torch.empty(shape, device="meta") for key, shape in expected.items()}
    ours = table.to_ours(theirs)
    with torch.device("meta"):
        net = Classifier(**classifier_config(config))
    assert {key: tensor.shape for key, tensor in net.state_dict().items()} == {k: v.shape for k, v in ours.items()}
    assert {key: tuple(tensor.shape) for key, tensor in table.to_foreign(ours).items()} == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dims": 3}, "dims=3 is not supported"),
        ({"pool": "max"}, "pool='max' is not supported"),
        ({"pool": "attention"}, "needs num_head_channels"),
        ({"num_classes": 10}, "takes no num_classes"),
        ({"image_size": 15}, "not a multiple of 2"),
    ],
)
def test_settings_that_cannot_be_honoured_are_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        classifier_table({**SMALL, **changes})


def test_a_config_without_its_image_size_is_refused():
    with pytest.raises(ValueError, match="lacks image_size"):
        classifier_config({key: value for key, value in SMALL.items() if key != "image_size"})


def test_flags_for_a_size_without_widths_are_refused():
    with pytest.raises(ValueError, match="image_size=48"):
        classifier_flags({"image_size": 48})


def test_weights_that_do_not_fit_are_one_report():
    weights = load("adm/classifier_adaptive").group("weights")
    config = load("adm/classifier_adaptive").config
    weights["extra"] = weights.pop("out.0.bias")
    with pytest.raises(ValueError, match=r"1 missing, 1 unexpected(.|\n)*out\.0\.bias(.|\n)*extra"):
        load_classifier(config, weights)
