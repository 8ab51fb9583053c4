"""The graph in a picture of ComfyUI becomes settings, as ComfyUI would run it; what is lost is said."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from picture_cases import custom_graph, default_graph, node

from diffusion.image_tasks import tail
from diffusion.pictures.comfy_graph import from_graph


def read(graph):
    return from_graph(json.dumps(graph))


def test_the_default_workflow_becomes_settings():
    found = read(default_graph())
    assert found.sampler == ("euler", "normal") and found.model == "v1-5-pruned-emaonly.safetensors"
    assert found.settings == {
        "seed": 156680208700286,
        "sampler.num_steps": 20,
        "guidance.guidance_scale": 8.0,
        "prompt": "beautiful scenery, purple galaxy bottle",
        "negative_prompt": "text, watermark",
        "long_prompt": "chunk",
        "height": 768,
        "width": 512,
    }
    assert not found.from_image and found.vae is None
    assert found.notes == ["its starting noise (drawn on the CPU)"]


def test_a_sampler_of_separate_nodes_is_put_together():
    found = read(custom_graph())
    assert found.sampler == ("dpmpp_2m", "karras") and found.model == "v1-5-pruned-emaonly.safetensors"
    wanted = {"seed": 7, "sampler.num_steps": 12, "guidance.guidance_scale": 5.5, "sampler.rho": 6.5}
    wanted |= {"sampler.sigma_max": 14.6, "sampler.sigma_min": 0.03}
    assert wanted.items() <= found.settings.items()
    assert "LoraLoader detail.safetensors" in found.notes


def test_a_part_of_the_way_from_an_image_keeps_all_its_steps():
    graph = default_graph(denoise=0.5, latent_image=["11", 0])
    graph |= {"11": node("VAEEncode", pixels=["12", 0], vae=["4", 2]), "12": node("LoadImage", image="cat.png")}
    found = read(graph)
    assert found.from_image and not found.masked
    assert found.settings["strength"] == 0.5 and found.settings["sampler.num_steps"] == 40


@pytest.mark.parametrize("steps", [4, 7, 20, 33])
@pytest.mark.parametrize("strength", [0.1, 0.3, 0.75, 0.99])
def test_all_steps_are_walked_at_any_strength(steps, strength):
    found = read(default_graph(steps=steps, denoise=strength)).settings
    assert found["sampler.num_steps"] == int(steps / strength)
    assert len(tail(range(found["sampler.num_steps"], -1, -1), found["strength"])) == steps + 1


def test_a_mask_is_noticed():
    graph = default_graph(latent_image=["13", 0])
    graph |= {"11": node("VAEEncode", pixels=["12", 0]), "13": node("SetLatentNoiseMask", samples=["11", 0])}
    found = read(graph)
    assert found.from_image and found.masked


def test_values_come_through_primitive_nodes():
    graph = default_graph(seed=["50", 0], steps=["51", 0])
    graph |= {"50": node("PrimitiveNode", value=11), "51": node("SomeInt", int=4)}
    graph["6"]["inputs"]["text"] = ["52", 0]
    graph["52"] = node("StringConstant", string="from elsewhere")
    found = read(graph)
    assert (found.settings["seed"], found.settings["sampler.num_steps"]) == (11, 4)
    assert found.settings["prompt"] == "from elsewhere"


def test_a_second_pass_is_named_and_the_first_is_taken():
    graph = default_graph()
    graph["15"] = node("LatentUpscale", samples=["3", 0], width=1024, height=1024)
    refined = {**graph["3"]["inputs"], "seed": 2, "denoise": 0.4, "latent_image": ["15", 0]}
    graph["16"] = node("KSampler", **refined)
    graph["8"]["inputs"]["samples"] = ["16", 0]
    found = read(graph)
    assert found.settings["seed"] == 156680208700286 and "strength" not in found.settings
    assert any("second pass" in note for note in found.notes)


@pytest.mark.parametrize(
    ("change", "settings", "note"),
    [
        ({"40": ("CLIPSetLastLayer", "clip", {"stop_at_clip_layer": -2})}, {"clip_skip": 2}, None),
        ({"40": ("ModelSamplingDiscrete", "model", {"sampling": "v_prediction", "zsnr": False})},
         {"parameterization": "v"}, None),
        ({"40": ("RescaleCFG", "model", {"multiplier": 0.7})}, {"guidance.rescale": 0.7}, None),
        ({"40": ("FreeU_V2", "model", {"b1": 1.3})}, {}, "FreeU_V2"),
    ],
)  # fmt: skip
def test_nodes_between_the_loader_and_the_sampler_are_read_or_named(change, settings, note):
    graph = default_graph()
    for name, (kind, what, inputs) in change.items():
        slot = 0 if what == "model" else 1
        graph[name] = node(kind, **{what: ["4", slot]}, **inputs)
        if what == "model":
            graph["3"]["inputs"]["model"] = [name, 0]
        else:
            graph["6"]["inputs"]["clip"] = graph["7"]["inputs"]["clip"] = [name, 0]
    found = read(graph)
    assert settings.items() <= found.settings.items()
    assert note is None or note in found.notes
    assert found.model == "v1-5-pruned-emaonly.safetensors"


def test_sizes_and_texts_of_xl_are_read():
    graph = default_graph()
    sizes = {"width": 1024, "height": 512, "crop_w": 8, "crop_h": 16, "target_width": 1024, "target_height": 512}
    graph["6"] = node("CLIPTextEncodeSDXL", **sizes, text_g="a cat", text_l="a cat", clip=["4", 1])
    found = read(graph)
    assert found.settings["prompt"] == "a cat"
    assert (found.settings["original_size"], found.settings["crop"]) == ([512, 1024], [16, 8])
    graph["6"]["inputs"]["text_l"] = "another"
    assert any("text_l" in note for note in read(graph).notes)


def test_another_vae_and_other_conditionings_are_named():
    graph = default_graph()
    graph["41"] = node("VAELoader", vae_name="mse.safetensors")
    graph["8"]["inputs"]["vae"] = ["41", 0]
    graph["42"] = node("ConditioningSetArea", conditioning=["6", 0], width=64)
    graph["3"]["inputs"]["positive"] = ["42", 0]
    graph["5"]["inputs"]["batch_size"] = 4
    found = read(graph)
    assert found.vae == "mse.safetensors" and "ConditioningSetArea" in found.notes
    assert found.settings["prompt"].startswith("beautiful") and any("4 pictures" in note for note in found.notes)


def test_the_sampler_behind_the_saved_picture_is_the_one():
    graph = default_graph()
    other = {**graph["3"]["inputs"], "seed": 99}
    found = read({"2": node("KSampler", **other), **graph, "99": node("KSampler", **other)})
    assert found.settings["seed"] == 156680208700286


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "no JSON"),
        ("[1, 2]", "no mapping of nodes"),
        ("{}", "none of the samplers"),
        ('{"1": {"class_type": "SaveImage", "inputs": {}}}', "its nodes are SaveImage"),
        ("[" * 100000, "no JSON|nested too deeply"),
        ('{"1": {"class_type": "KSampler", "inputs": {"denoise": -1}}}', "its denoise is -1"),
    ],
)
def test_what_is_no_graph_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        from_graph(text)


def test_circles_and_broken_links_end():
    graph = default_graph()
    graph["15"] = node("LatentUpscale", samples=["3", 0])
    graph["3"]["inputs"]["latent_image"] = ["15", 0]
    graph["4"] = node("LoraLoader", model=["4", 0])
    graph["6"]["inputs"] |= {"text": ["6", 0], "clip": ["nowhere", 0]}
    found = read(graph)
    assert found.model is None and found.sampler == ("euler", "normal")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from([["3", 0], ["9"]]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_value_anywhere_is_read_or_refused(data):
    graph = custom_graph() if data.draw(st.booleans()) else default_graph()
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.sampled_from(sorted(graph)))
        inputs = graph[place].get("inputs") if isinstance(graph[place], dict) else None
        if isinstance(inputs, dict) and inputs and data.draw(st.integers(0, 4)):
            inputs[data.draw(st.sampled_from(sorted(inputs)))] = data.draw(JSON)
        else:
            graph[place] = data.draw(JSON)
    try:
        found = read(graph)
        assert all(isinstance(note, str) for note in found.notes)
        assert all(isinstance(name, str | None) for name in (found.model, found.vae, *(found.sampler or ())))
        kinds = {"seed": int, "clip_skip": int, "height": int, "prompt": str, "strength": float}
        assert all(type(found.settings.get(key)) in (kind, type(None)) for key, kind in kinds.items())
    except ValueError as error:
        assert str(error)
