"""Are the averages right? Against the code of three peers, and for what a training run needs of them."""

import ast
import re

import pytest
import torch
from golden_cases import GOLDEN
from safetensors import safe_open
from torch import nn

from diffusion.training.ema import EMA, ConstantDecay, DiffusersDecay, LdmDecay

CASES = sorted((GOLDEN / "ema").glob("*.safetensors"))
VALUE = r"(True|False|None|-?[0-9.]+(?:e-?[0-9]+)?)"


def runs(path):
    """Names of the recorded averages of a file: out.<run>.<parameter>."""
    with safe_open(path, "pt") as file:
        keys = list(file.keys())
    parameters = [key.removeprefix("in.") for key in keys if key.startswith("in.")]
    endings = tuple(f".{name}" for name in parameters)
    recorded = [key.removeprefix("out.") for key in keys if key.startswith("out.") and key.endswith(endings)]
    return sorted({key.removesuffix(max((e for e in endings if key.endswith(e)), key=len)) for key in recorded})


def rule_of(run):
    """Read the decay and its rule from a name such as `diffusers_ema.decay0.95_min_decay0.3_update_after_step5`."""
    kind, _, settings = run.partition(".")
    names = ("min_decay", "update_after_step", "use_ema_warmup", "inv_gamma", "power")
    options = {name: re.search(rf"_{name}{VALUE}", settings) for name in names}
    parsed = {name: ast.literal_eval(match[1]) for name, match in options.items() if match}
    decay = float(re.match(r"(?:rate|decay)([0-9.]*[0-9])", settings)[1])
    if kind == "update_ema":
        return decay, ConstantDecay()
    if kind == "litema":
        return decay, ConstantDecay() if settings.endswith(".plain") else LdmDecay()
    assert kind == "diffusers_ema"
    return decay, DiffusersDecay(**parsed)


def network(values):
    """A module whose parameters have the given dotted names."""
    net = nn.Module()
    for name, value in values.items():
        *path, leaf = name.split(".")
        module = net
        for part in path:
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module._modules[part]
        module.register_parameter(leaf, nn.Parameter(value.clone()))
    return net


@pytest.mark.parametrize(("path", "run"), [(path, run) for path in CASES for run in runs(path)])
def test_averages_follow_the_peers_step_by_step(path, run):
    with safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    history = {key.removeprefix("in."): value for key, value in tensors.items() if key.startswith("in.")}
    decay, rule = rule_of(run)
    net = network({name: values[0] for name, values in history.items()})
    ema = EMA([decay], rule)
    ema.start(net)
    for k in range(len(next(iter(history.values()))) - 1):
        for name, parameter in net.named_parameters():
            parameter.data.copy_(history[name][k + 1])
        ema.update()
        for name, average in ema.average().items():
            expected = tensors[f"out.{run}.{name}"][k]
            torch.testing.assert_close(average, expected, rtol=0, atol=1e-6 * max(1.0, float(expected.abs().max())))
        if f"out.{run}.decay_used" in tensors:
            assert rule(decay, k + 1) == pytest.approx(float(tensors[f"out.{run}.decay_used"][k]), abs=1e-12)


def test_there_are_recorded_cases():
    assert CASES, "tests/golden/ema is empty"


@pytest.mark.parametrize(
    "settings",
    [{}, {"use_ema_warmup": True}, {"use_ema_warmup": True, "inv_gamma": 5.0, "power": 0.5, "min_decay": 0.2}],
)
@pytest.mark.parametrize("update_after_step", [0, 7])
def test_the_rule_of_diffusers_is_that_of_diffusers(settings, update_after_step):
    from diffusers.training_utils import EMAModel

    peer = EMAModel([nn.Parameter(torch.zeros(1))], decay=0.98, update_after_step=update_after_step, **settings)
    for n in range(1, 60):
        ours = DiffusersDecay(update_after_step=update_after_step, **settings)(0.98, n)
        assert ours == pytest.approx(peer.get_decay(n), abs=1e-15)


@pytest.fixture
def net():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    net[0].weight.requires_grad_(False)
    return net


def moved(net, by=1.0):
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += by
    return net


def test_only_trainable_parameters_are_averaged(net):
    ema = EMA([0.5], ConstantDecay())
    ema.start(net)
    assert set(ema.average()) == {name for name, p in net.named_parameters() if p.requires_grad}
    assert "0.weight" not in ema.average()


def test_several_decays_are_kept_at_once(net):
    ema = EMA([0.5, 0.9], ConstantDecay())
    ema.start(net)
    before = net[2].bias.detach().clone()
    moved(net)
    ema.update()
    torch.testing.assert_close(ema.average(0.5)["2.bias"], before + 0.5)
    torch.testing.assert_close(ema.average(0.9)["2.bias"], before + 0.1)


def test_swapped_lends_the_average_and_gives_the_weights_back_bit_for_bit(net):
    ema = EMA([0.5], ConstantDecay())
    ema.start(net)
    moved(net)
    ema.update()
    raw = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(RuntimeError, match="inside"), ema.swapped(net):
        assert torch.equal(net[2].bias, ema.average()["2.bias"])
        assert torch.equal(net[0].weight, raw["0.weight"])
        raise RuntimeError("inside")
    assert all(torch.equal(value, raw[name]) for name, value in net.state_dict().items())


def test_half_precision_weights_are_averaged_in_float32():
    net = nn.Linear(2, 2).to(torch.bfloat16)
    ema = EMA([0.9999], ConstantDecay())
    ema.start(net)
    before = ema.average()["bias"].clone()
    moved(net)
    ema.update()
    assert ema.average()["bias"].dtype == torch.float32
    assert not torch.equal(ema.average()["bias"], before)
    with ema.swapped(net):
        assert net.bias.dtype == torch.bfloat16


def test_the_state_goes_there_and_back(net):
    ema = EMA([0.5, 0.9])
    ema.start(net)
    moved(net)
    ema.update()
    back = EMA([0.9, 0.5])
    back.load_state_dict(ema.state_dict())
    back.start(moved(net))
    ema.update()
    back.update()
    for decay in (0.5, 0.9):
        assert all(torch.equal(value, back.average(decay)[name]) for name, value in ema.average(decay).items())


def test_averages_of_other_parameters_are_refused(net):
    ema = EMA([0.5])
    ema.start(net)
    with pytest.raises(ValueError, match="other parameters"), ema.swapped(nn.Linear(2, 2)):
        pass
    with pytest.raises(ValueError, match=r"no average with decay 0\.7"), ema.swapped(net, 0.7):
        pass


@pytest.mark.parametrize("decays", [[], [1.0], [-0.1], [0.9, 0.9]])
def test_decays_that_make_no_average_are_refused(decays):
    with pytest.raises(ValueError, match="decays"):
        EMA(decays)
