"""The text transformer against outputs of transformers and open_clip, and against the full-size lists of names."""

import re

import pytest
import torch
from golden_cases import Case, assert_close, key_configs, key_list, key_lists, load, names
from torch import Tensor

from diffusion.models.text import TextTransformer
from diffusion.pretrained import open_clip, transformers
from diffusion.pretrained.text_files import find_towers

OUTPUT = 5e-5  # of the tensor's scale
CASES = names("clip/*")
KEY_LISTS = [stem for stem in key_lists() if stem.endswith(("_checkpoint", "_diffusers"))]


def module_of(case: Case):
    return open_clip if "text_cfg" in case.config else transformers


def weights_of(case: Case) -> dict[str, Tensor]:
    """Those that are a text transformer's."""
    weights = case.group("weights")
    return {name: tensor for name, tensor in weights.items() if name not in module_of(case).HARMLESS_KEYS}


def table_of(case: Case):
    projected = {} if module_of(case) is open_clip else {"projected": "weights.text_projection.weight" in case.tensors}
    return module_of(case).text_table(case.config, **projected)


def answer(net: TextTransformer, case: Case, name: str) -> Tensor:
    """What `out.<name>` means, in our vocabulary."""
    tokens, mask = case["in.input_ids"], None
    kind, _, about = name.partition("_")
    if kind == "short":
        tokens, name = tokens[:, :-3], about
    elif kind == "masked":
        mask, name = case["in.attention_mask"], about
    if found := re.fullmatch(r"pooler_output_eosV-(\d+)_firstmatch", name):
        tokens = case[f"in.input_ids_eosV-{found[1]}"]
        return net.pool(net.norm_out(net(tokens)[-1]), tokens, end=case.config["vocab_size"] - int(found[1]))
    states = net(tokens, mask)
    if name.startswith("hidden_states."):
        return states[int(name.partition(".")[2])]
    if name.startswith("penultimate"):
        return states[-2] if name.endswith("raw") else net.norm_out(states[-2])
    last = net.norm_out(states[-1])
    if name in ("last_hidden_state", "last_ln_final"):
        return last
    if name.startswith("pooler_output"):
        return net.pool(last, tokens)
    assert name in ("text_embeds", "pooled", "encode_text"), f"{name} is not known"
    return net.projection(net.pool(last, tokens))


@pytest.mark.parametrize("name", CASES)
def test_text_outputs_are_the_peers(name):
    case = load(name)
    net = module_of(case).load_text(case.config, case.group("weights")).eval()
    for gradients in (False, True):
        with torch.set_grad_enabled(gradients):
            for key, theirs in case.group("out").items():
                assert_close(answer(net, case, key), theirs, OUTPUT, f"{key}, gradients {gradients}")


@pytest.mark.parametrize("name", CASES)
def test_stopping_early_gives_the_same_states(name):
    case = load(name)
    net = module_of(case).load_text(case.config, case.group("weights")).eval()
    tokens = case["in.input_ids"]
    with torch.no_grad():
        states = net(tokens)
        for depth in range(len(states)):
            early = net(tokens, num_layers=depth)
            assert len(early) == depth + 1 and torch.equal(early[-1], states[depth])


@pytest.mark.parametrize("name", CASES)
def test_text_table_is_a_bijection_bit_for_bit(name):
    case = load(name)
    weights, table = weights_of(case), table_of(case)
    ours = table.to_ours(weights)
    theirs = table.to_foreign(ours)
    assert theirs.keys() == weights.keys()
    assert all(torch.equal(theirs[key], weights[key]) for key in weights)
    exported = module_of(case).export_text(case.config, ours)
    assert exported.keys() == weights.keys() and all(torch.equal(exported[key], weights[key]) for key in weights)


@pytest.mark.parametrize("name", [name for name in CASES if f"{name}.hf" in CASES])
def test_two_names_of_one_text_tower_become_the_same_network(name):
    one, other = load(name), load(f"{name}.hf")
    first = open_clip.load_text(one.config, one.group("weights")).state_dict()
    second = transformers.load_text(other.config, other.group("weights")).state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


# --- full-size names -------------------------------------------------------------------------------------------------

OPEN_CLIP_MODELS = {1024: "ViT-H-14", 1280: "ViT-bigG-14"}  # by width: Stable Diffusion 2's, SDXL's second


def full_size(name: str) -> dict[str, tuple[int, ...]]:
    keys = key_list(name)
    return {key: tuple(value[:-1]) for key, value in keys.items()}


def table_for(tower, name: str):
    """The table by the peers' own description of the model, not by the sizes that the list shows."""
    if tower.layout == "open_clip":
        from open_clip import get_model_config

        return open_clip.text_table(get_model_config(OPEN_CLIP_MODELS[tower.size[1]]))
    configs = key_configs()
    folders = dict(configs[name]["text"] if "text" in configs[name] else configs["sd15_diffusers"]["text"])
    config = folders.get(tower.prefix, folders["text_encoder/"])
    return transformers.text_table(config, projected="text_projection.weight" in tower.keys)


@pytest.mark.parametrize("name", KEY_LISTS)
def test_full_size_text_names_and_shapes_match_one_to_one(name):
    shapes = full_size(name)
    towers = find_towers(shapes)
    assert len(towers) == (2 if name.startswith("sdxl") else 1)
    for tower in towers:
        table = table_for(tower, name)
        expected = {ours: shapes[key] for ours, key in tower.keys.items() if ours not in tower.harmless}
        assert table.foreign_shapes == expected
        theirs = {key: torch.empty(shape, device="meta") for key, shape in expected.items()}
        back = table.to_foreign(table.to_ours(theirs))
        assert {key: tuple(tensor.shape) for key, tensor in back.items()} == expected


@pytest.mark.parametrize("name", KEY_LISTS)
def test_towers_take_every_text_tensor_of_a_full_size_list(name):
    shapes = full_size(name)
    taken = [key for tower in find_towers(shapes) for key in tower.keys.values()]
    beginnings = ("cond_stage_model.", "conditioner.", "text_encoder")
    assert sorted(taken) == sorted(key for key in shapes if key.startswith(beginnings))
