"""The parameters text of A1111, as its many versions wrote it, is read and written as A1111 reads and writes it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffusion.image_tasks import tail
from diffusion.pictures.foreign_pictures import from_parameters
from diffusion.pictures.parameters import Parameters, number_text, parse, quoted, unquoted, written

TYPICAL = """a (red:1.2) star, <lora:add_detail:0.8> [blue] sky,
on two lines
Negative prompt: (worst quality:1.4), blurry,
again two lines
Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7, Seed: 1234567890, Size: 512x768, \
Model hash: 6ce0161689, Model: v1-5-pruned-emaonly, VAE hash: 735e4c3a44, VAE: vae-ft-mse-840000.safetensors, \
Clip skip: 2, Lora hashes: "add_detail: 7c6bad76eb54, other: 1", Version: v1.9.4"""


def test_a_typical_text_is_taken_apart():
    found = parse(TYPICAL)
    assert found.prompt == "a (red:1.2) star, <lora:add_detail:0.8> [blue] sky,\non two lines"
    assert found.negative_prompt == "(worst quality:1.4), blurry,\nagain two lines"
    assert found.fields["Sampler"] == "DPM++ 2M" and found.fields["Schedule type"] == "Karras"
    assert found.fields["Lora hashes"] == "add_detail: 7c6bad76eb54, other: 1"
    assert found.size == (768, 512)
    assert found.number("Seed", int) == 1234567890 and found.number("CFG scale") == 7.0
    assert found.number("Denoising strength") is None


@pytest.mark.parametrize(
    ("text", "prompt", "negative", "steps"),
    [
        ("x\nSteps: 3, Sampler: Euler a, Seed: 1", "x", "", "3"),
        ("Steps: 3, Sampler: Euler a, Seed: 1", "", "", "3"),
        ("Negative prompt: bad\nSteps: 3, Sampler: Euler a, Seed: 1", "", "bad", "3"),
        ("x\nNegative prompt:\nSteps: 3, Sampler: Euler a, Seed: 1", "x", "", "3"),
        ("\n  x  \n\nSteps: 3, Sampler: Euler a, Seed: 1\n", "x", "", "3"),
        ("a: b, c", "a: b, c", "", None),  # too few fields: it is the prompt
        ("only a prompt", "only a prompt", "", None),
        ("", "", "", None),
    ],
)
def test_any_part_of_it_may_be_missing(text, prompt, negative, steps):
    found = parse(text)
    assert (found.prompt, found.negative_prompt, found.fields.get("Steps")) == (prompt, negative, steps)


def test_a_number_that_is_none_is_named():
    for text in ("many", "nan", "1e999", "3.5"):
        with pytest.raises(ValueError, match=f"Seed: {text}, which is no number"):
            parse(f"x\nSteps: 3, Seed: {text}, Size: 5x5").number("Seed", int)
    with pytest.raises(ValueError, match="CFG scale: inf, which is no number"):
        parse("x\nSteps: 3, CFG scale: inf, Size: 5x5").number("CFG scale")


@pytest.mark.parametrize(
    "value", ["plain", "a, b", "a: b", 'say "x"', "two\nlines", " spaced ", "", "back\\slash, too"]
)
def test_values_are_quoted_only_where_they_must_be(value):
    assert unquoted(quoted(value)) == value
    assert (quoted(value) == value) == (value in ("plain", ""))


TEXT = st.text(st.characters(blacklist_categories=("Cs", "Cc"), blacklist_characters="\u2028\u2029\x85")).map(str.strip)
NAMES = st.from_regex(r"[A-Za-z][A-Za-z ]{0,8}[A-Za-z]", fullmatch=True)


@given(TEXT.filter(lambda x: not x.startswith("Negative")), TEXT, st.dictionaries(NAMES, TEXT, min_size=3, max_size=6))
def test_what_is_written_is_read_back(prompt, negative, fields):
    fields = {name: value for name, value in fields.items() if value}
    if len(fields) >= 3:
        expected = Parameters(prompt, negative, fields)
        assert parse(written(expected)) == expected


def test_numbers_are_written_as_a1111_does():
    assert [number_text(x) for x in (7, 7.0, 7.5, 0.75)] == ["7", "7", "7.5", "0.75"]


def test_a_typical_text_becomes_settings_and_says_what_is_lost():
    found = from_parameters(parse(TYPICAL))
    assert found.sampler == ("DPM++ 2M", "Karras")
    assert (found.model, found.model_hash) == ("v1-5-pruned-emaonly", "6ce0161689")
    assert found.vae == "vae-ft-mse-840000.safetensors" and not found.from_image
    assert found.settings == {
        "sampler.num_steps": 20,
        "guidance.guidance_scale": 7.0,
        "seed": 1234567890,
        "clip_skip": 2,
        "height": 768,
        "width": 512,
        "prompt": "a (red:1.2) star,  [blue] sky,\non two lines",
        "negative_prompt": "(worst quality:1.4), blurry,\nagain two lines",
        "long_prompt": "chunk",
        "emphasis": True,
    }
    assert "<lora:add_detail:0.8>" in found.notes and any("Lora hashes" in note for note in found.notes)
    assert any("starting noise (drawn on its GPU)" in note for note in found.notes)


@pytest.mark.parametrize(
    ("more", "settings", "from_image", "masked", "note"),
    [
        ("Denoising strength: 0.6", {"strength": 0.9}, True, False, None),
        ("Denoising strength: 0.6, Mask blur: 4", {"strength": 0.9}, True, True, "Mask blur: 4"),
        ("Denoising strength: 0.6, Hires upscale: 2", {}, False, False, "Hires upscale: 2"),
        ("Image CFG scale: 1.5", {"image_guidance_scale": 1.5}, True, False, None),
        ("Eta: 0.5, Sigma noise: 1.01", {"sampler.eta": 0.5, "sampler.s_noise": 1.01}, False, False, None),
        ("Schedule rho: 5", {"sampler.rho": 5.0}, False, False, None),
        ("RNG: CPU", {}, False, False, "its starting noise (RNG: CPU)"),
        ("Variation seed: 3", {}, False, False, "Variation seed: 3"),
        ("Emphasis: None", {}, False, False, None),
    ],
)
def test_single_fields_mean_what_they_say(more, settings, from_image, masked, note):
    found = from_parameters(parse(f"x (y)\nSteps: 5, CFG scale: 7, Seed: 1, {more}"))
    usual = {"sampler.num_steps", "guidance.guidance_scale", "seed", "prompt", "long_prompt", "emphasis"}
    assert {key: value for key, value in found.settings.items() if key not in usual} == settings
    assert (found.from_image, found.masked) == (from_image, masked)
    assert note is None or note in found.notes
    assert found.settings.get("emphasis", False) != ("Emphasis" in more)


@pytest.mark.parametrize(
    ("prompt", "note"),
    [
        ("a [cat:dog:0.5]", "changes during sampling"),
        ("a [cat|dog]", "changes during sampling"),
        ("a cat AND a dog", "joined by AND"),
        ("a cat BREAK a dog", "BREAK"),
        ("embedding:easynegative", "textual inversion"),
    ],
)
def test_what_a_prompt_asks_besides_is_named(prompt, note):
    found = from_parameters(parse(f"{prompt}\nSteps: 5, CFG scale: 7, Seed: 1"))
    assert any(note in text for text in found.notes)


@pytest.mark.parametrize(
    ("fields", "sampler"),
    [
        ("Sampler: DPM++ 2M, Schedule type: Karras", ("DPM++ 2M", "Karras")),
        ("Sampler: DPM++ 2M Karras", ("DPM++ 2M Karras", None)),  # before 1.9
        ("Sampler: DPM++ 2M", ("DPM++ 2M", "Uniform")),  # none is written where it is k-diffusion's own
        ("Sampler: Euler a", ("Euler a", "Uniform")),
        ("Sampler: DDIM", ("DDIM", None)),
        ("Hires upscale: 2", None),
    ],
)
def test_a_schedule_that_is_not_written_is_the_uniform_one(fields, sampler):
    assert from_parameters(parse(f"x\nSteps: 5, CFG scale: 7, Seed: 1, {fields}")).sampler == sampler


def test_a_plain_prompt_needs_no_emphasis():
    found = from_parameters(parse("a cat, \\(not weighed\\)\nSteps: 5, CFG scale: 7, Seed: 1"))
    assert found.settings["emphasis"] is True  # the backslashes are grammar, too
    assert "emphasis" not in from_parameters(parse("a cat\nSteps: 5, CFG scale: 7, Seed: 1")).settings


@pytest.mark.parametrize("steps", [4, 7, 20, 33])
@pytest.mark.parametrize("strength", ["0.1", "0.3", "0.75", "1"])
@pytest.mark.parametrize(("sampler", "more"), [("Euler a", 1), ("DPM++ 2M", 1), ("DDIM", 0)])
def test_a_strength_walks_as_many_steps_as_it_did_there(steps, strength, sampler, more):
    text = f"x\nSteps: {steps}, Sampler: {sampler}, Seed: 1, Denoising strength: {strength}"
    found = from_parameters(parse(text)).settings["strength"]
    moves = int(min(float(strength), 0.999) * steps) + more
    assert len(tail(range(steps, -1, -1), found)) == (moves + 1 if moves else 0)


@given(st.text(max_size=60), st.lists(st.sampled_from(TYPICAL.split(", ")) | st.text(max_size=9), max_size=12))
def test_any_text_is_read_or_refused(prompt, fields):
    text = f"{prompt}\n{', '.join(fields)}"
    try:
        assert all(isinstance(note, str) for note in from_parameters(parse(text)).notes)
    except ValueError as error:
        assert str(error)


def test_a_text_without_settings_is_refused():
    with pytest.raises(ValueError, match="no line of settings"):
        from_parameters(parse("a prompt alone"))
