"""Pictures of published models make themselves again: texts, pictures to start from, sizes, several of each."""

import json
import shutil

import numpy as np
import pytest
import sd_cases
from picture_cases import default_graph, node, picture_of, save_with_texts
from PIL import Image
from tiny import run

import diffusion.sample_folder
from diffusion.images import read_text
from diffusion.pictures.parameters import parse
from diffusion.pictures.picture_text import picture_texts

SLOW = pytest.mark.slow


@pytest.fixture(autouse=True)
def one_commit(monkeypatch):
    """What two runs of a test say of the code is the same, whatever is committed between them."""
    monkeypatch.setattr(diffusion.sample_folder, "git_commit", lambda: "0" * 40)


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """Two pictures of different sizes and a mask."""
    folder = tmp_path_factory.mktemp("given")
    random = np.random.default_rng(0)
    for name, size in (("a", (64, 64, 3)), ("b", (64, 96, 3))):
        Image.fromarray(random.integers(0, 256, size, dtype=np.uint8)).save(folder / f"{name}.png")
    mask = np.zeros((64, 64), dtype=np.uint8)
    mask[16:48, 16:48] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    return folder


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:this model is sampled as predicting")  # random weights answer noise with noise
@pytest.mark.parametrize(
    ("kind", "words", "number", "fields"),
    [
        ("sd1", ["prompt=[one,two]", "negative_prompt=[bad,worse]", "clip_skip=2"], 1, {"Clip skip": "2"}),
        ("sd1", ["prompt=a (red:1.3) star", "emphasis=true", "sampler=dpmpp_2m_karras", "width=96"], 0,
         {"Sampler": "DPM++ 2M", "Schedule type": "Karras", "Size": "96x64"}),
        ("sd1", ["prompt=x", "image=[A,B]", "height=64", "width=64", "num_samples=3"], 1,
         {"Denoising strength": "0.75"}),
        ("sd1", ["prompt=x", "image=A", "mask=M", "strength=0.5", "sampler=euler_ancestral"], 0,
         {"Denoising strength": "0.5", "Sampler": "Euler a"}),
        pytest.param("sd1-inpainting", ["prompt=x", "image=A", "mask=M", "sampler=dpmpp_2m_sde"], 0, {}, marks=SLOW),
        pytest.param("instruct-pix2pix", ["prompt=x", "image=A", "image_guidance_scale=1.2"], 0,
                     {"Image CFG scale": "1.2"}, marks=SLOW),
        ("sdxl-base", ["prompt=x", "original_size=[32,48]", "crop=[1,2]"], 0, {"CFG scale": "5"}),
        pytest.param("sd2-v", ["prompt=x", "guidance.rescale=0.7"], 0, {}, marks=SLOW),
    ],
)  # fmt: skip
def test_a_published_model_s_picture_makes_itself_again(
    given, tmp_path, monkeypatch, capsys, kind, words, number, fields
):
    places = {"A": given / "a.png", "B": given / "b.png", "M": given / "mask.png"}
    for short, place in places.items():
        words = [word.replace(f"={short}", f"={place}").replace(f"[{short}", f"[{place}") for word in words]
        words = [word.replace(f",{short}]", f",{place}]") for word in words]
    line = [f"checkpoint={sd_cases.folder(kind)}", f"out_dir={tmp_path / 'a'}", "sampler.num_steps=3", *words]
    status, _, err = run("sample", line, monkeypatch, capsys)
    assert status == 0, err
    assert len(list((tmp_path / "a" / "images").iterdir())) == max(number + 1, 1 + 2 * ("num_samples=3" in words))
    picture = tmp_path / "a" / "images" / f"{number:06d}.png"
    line = [f"from={picture}", f"out_dir={tmp_path / 'b'}", "verify=true"]
    status, out, err = run("sample", line, monkeypatch, capsys)
    assert status == 0 and "identical" in out, out + err
    assert " was " not in err
    assert fields.items() <= parse(picture_texts(picture)["parameters"]).fields.items()


@pytest.mark.filterwarnings("ignore:this model is sampled as predicting")
def test_a_picture_says_what_was_decided_for_the_user(given, tmp_path, monkeypatch, capsys):
    line = [f"checkpoint={sd_cases.folder('sd1')}", f"out_dir={tmp_path / 'a'}", "sampler.num_steps=2", "prompt=x"]
    line += ["negative_prompt=y", f"image={given / 'b.png'}", "dtype=auto"]
    status, _, err = run("sample", line, monkeypatch, capsys)
    assert status == 0, err
    assert "this model's own settings: sampler=" in err and "strength=0.75" in err
    text = read_text(tmp_path / "a" / "images" / "000000.png")
    decided = {"dtype": "float32", "strength": 0.75, "height": 64, "width": 96, "parameterization": "eps", "batch": 1}
    assert decided.items() <= text.items()
    assert text["sampler"]["solver"] == "plms" and text["guidance"]["guidance_scale"] == 7.5  # the model's own
    assert len(text["image_sha256"]) == 64 and text["image"] == str(given / "b.png")
    found = parse(picture_texts(tmp_path / "a" / "images" / "000000.png")["parameters"])
    assert (found.prompt, found.negative_prompt, found.size) == ("x", "y", (64, 96))
    json.dumps(text, allow_nan=True)


@pytest.mark.filterwarnings("ignore:this model is sampled as predicting")
def test_a_prompt_a_line_draws_each_once(tmp_path, monkeypatch, capsys):
    (tmp_path / "prompts.txt").write_text("# three\na cat, sleeping\n\na (small) dog\na bird\n", encoding="utf-8")
    line = [f"checkpoint={sd_cases.folder('sd1')}", f"out_dir={tmp_path / 'a'}", "sampler.num_steps=1"]
    status, _, err = run("sample", [*line, f"prompts={tmp_path / 'prompts.txt'}"], monkeypatch, capsys)
    assert status == 0, err
    texts = [read_text(path) for path in sorted((tmp_path / "a" / "images").iterdir())]
    assert [text["prompt"] for text in texts] == ["a cat, sleeping", "a (small) dog", "a bird"]
    assert [text["seed"] for text in texts] == [0, 1, 2]
    words = [*line[2:], f"from={tmp_path / 'a' / 'images' / '000001.png'}", f"out_dir={tmp_path / 'b'}", "verify=true"]
    assert run("sample", words, monkeypatch, capsys)[0] == 0


@pytest.mark.filterwarnings("ignore:this model is sampled as predicting")
def test_a_moved_or_changed_image_is_found_or_said(given, tmp_path, monkeypatch, capsys):
    start = tmp_path / "start.png"
    shutil.copy(given / "a.png", start)
    line = [f"checkpoint={sd_cases.folder('sd1')}", f"out_dir={tmp_path / 'a'}", "sampler.num_steps=2", "prompt=x"]
    assert run("sample", [*line, f"image={start}"], monkeypatch, capsys)[0] == 0
    picture = tmp_path / "a" / "images" / "000000.png"
    start.rename(picture.with_name("start.png"))  # beside the picture it is found
    words = [f"from={picture}", f"out_dir={tmp_path / 'b'}", "verify=true", "overwrite=true"]
    assert run("sample", words, monkeypatch, capsys)[0] == 0
    shutil.copy(given / "b.png", start)  # another picture of that name is taken, and said
    status, _, err = run("sample", words, monkeypatch, capsys)
    assert status == 1 and "image_sha256 was" in err
    start.unlink()
    picture.with_name("start.png").unlink()
    status, _, err = run("sample", words, monkeypatch, capsys)
    assert status == 2 and f"was made with image={start}" in err and "add image=FILE" in err


@pytest.mark.filterwarnings("ignore:this model is sampled as predicting")
@pytest.mark.parametrize("program", ["A1111", "ComfyUI"])
def test_a_picture_of_another_program_draws_what_its_settings_draw(given, program, tmp_path, monkeypatch, capsys):
    """Of text to image for A1111, of half the way from an image for ComfyUI, whose steps are those that it takes."""
    words = [f"checkpoint={sd_cases.folder('sd1')}"]
    if program == "A1111":
        fields = (
            "Steps: 3, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 3.5, Seed: 9, Size: 96x64, Clip skip: 2"
        )
        save_with_texts(tmp_path / "x.png", parameters=f"a (red:1.3) cat\nNegative prompt: a dog\n{fields}")
        asked = ["prompt=a (red:1.3) cat", "negative_prompt=a dog", "sampler=dpmpp_2m_karras", "sampler.num_steps=3"]
        asked += ["guidance.guidance_scale=3.5", "seed=9", "height=64", "width=96", "clip_skip=2", "emphasis=true"]
        asked += ["long_prompt=chunk"]
    else:
        settings = {"steps": 2, "cfg": 3.5, "seed": 2**63 + 5, "sampler_name": "euler", "denoise": 0.5}
        graph = default_graph(**settings, latent_image=["11", 0])
        graph["11"] = node("VAEEncode", pixels=["12", 0], vae=["4", 2])
        picture_of(tmp_path / "x.png", graph)
        words.append(f"image={given / 'a.png'}")
        asked = ["prompt=beautiful scenery, purple galaxy bottle", "negative_prompt=text, watermark", "strength=0.5"]
        asked += ["sampler=euler", "sampler.num_steps=4", "guidance.guidance_scale=3.5", f"seed={2**63 + 5}"]
        asked += ["long_prompt=chunk"]
    pixels = []
    for name, line in (("a", [f"from={tmp_path / 'x.png'}", *words]), ("b", [*words, *asked])):
        status, _, err = run("sample", [*line, f"out_dir={tmp_path / name}"], monkeypatch, capsys)
        assert status == 0, err
        assert (f"from={tmp_path / 'x.png'}: {program}: " in err) == (name == "a")
        pixels.append(np.load(tmp_path / name / "samples.npz")["arr_0"])
    assert np.array_equal(*pixels)
