"""from=PICTURE makes the same picture again, bit for bit, with any value overridden; what it cannot do it says."""

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from picture_cases import custom_graph, default_graph, node, picture_of, save_with_texts
from PIL import Image
from tiny import ROOT, run, save_tiny

import diffusion.sample_folder
from diffusion.cli.composing import compose
from diffusion.files import file_hash
from diffusion.images import read_text, save_png
from diffusion.pictures.from_picture import with_picture, word
from diffusion.pictures.parameters import parse
from diffusion.pictures.picture_text import picture_texts
from diffusion.pictures.verify import check_comparable, difference, verified
from diffusion.sample_settings import read_prompts, with_counts, with_prompts


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model") / "model.safetensors")


@pytest.fixture(autouse=True)
def one_commit(monkeypatch):
    """What two runs of a test say of the code is the same, whatever is committed between them."""
    monkeypatch.setattr(diffusion.sample_folder, "git_commit", lambda: "0" * 40)


@pytest.fixture(scope="module")
def drawn(checkpoint, tmp_path_factory):
    """The pictures of twenty samples, made with settings that are not the defaults."""
    out_dir = tmp_path_factory.mktemp("drawn") / "first"
    words = [f"checkpoint={checkpoint}", f"out_dir={out_dir}", "num_samples=20", "labels=[3,7]", "seed=5"]
    words += ["sampler=ddpm", "sampler.num_steps=3", "guidance.guidance_scale=4"]
    silent = SimpleNamespace(readouterr=lambda: SimpleNamespace(out="", err=""))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(diffusion.sample_folder, "git_commit", lambda: "0" * 40)
        assert run("sample", words, patch, silent)[0] == 0
    return out_dir / "images"


def again(picture, tmp_path, monkeypatch, capsys, *arguments, status=0):
    words = [f"from={picture}", f"out_dir={tmp_path / 'again'}", "verify=true", "overwrite=true", *arguments]
    found, out, err = run("sample", words, monkeypatch, capsys)
    assert found == status, err
    return out, err


@pytest.mark.parametrize("number", [0, 13])
def test_a_picture_makes_itself_again_bit_for_bit(drawn, number, tmp_path, monkeypatch, capsys):
    picture = drawn / f"{number:06d}.png"
    out, err = again(picture, tmp_path, monkeypatch, capsys)
    assert "identical: largest pixel difference 0 in 64 values" in out
    assert " was " not in err  # nothing differs
    copy = tmp_path / "again" / "images" / "000000.png"
    assert np.array_equal(np.asarray(Image.open(copy)), np.asarray(Image.open(picture)))
    before, after = read_text(picture), read_text(copy)
    assert {name for name in before if before[name] != after[name]} <= {"pad_to"}


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("seed=6", None),
        ("labels=[1]", None),
        ("sampler.num_steps=4", "sampler.num_steps was 3 and is 4"),
        ("guidance.guidance_scale=1.5", "guidance.guidance_scale was 4 and is 1.5"),
        ("guidance=none", "guidance._target_ was diffusion.guidance.ClassifierFreeGuidance and is diffusion.gui"),
        ("sampler=ddim", "sampler.num_steps=3 is kept, with another sampler"),
        ("dtype=float64", "dtype was float32 and is float64"),
    ],
)
def test_what_is_typed_wins_over_the_picture(drawn, argument, said, tmp_path, monkeypatch, capsys):
    words = [f"from={drawn / '000013.png'}", f"out_dir={tmp_path / 'x'}", "verify=true", argument]
    status, out, err = run("sample", words, monkeypatch, capsys)
    assert status == int("identical" not in out), err
    assert "largest pixel difference" in out and (said is None or said in err)
    made = OmegaConf.load(tmp_path / "x" / "config.yaml")
    key, _, value = argument.partition("=")
    if key not in ("guidance", "sampler"):
        assert OmegaConf.select(made, key) == OmegaConf.create({"x": yaml.safe_load(value)})["x"]


def test_more_samples_go_on_from_the_picture_s_seed(drawn, tmp_path, monkeypatch, capsys):
    again(drawn / "000012.png", tmp_path, monkeypatch, capsys, "num_samples=3")
    ours = [np.asarray(Image.open(tmp_path / "again" / "images" / f"{i:06d}.png")) for i in (0, 2)]
    theirs = [np.asarray(Image.open(drawn / f"{i:06d}.png")) for i in (12, 14)]
    assert all(map(np.array_equal, ours, theirs))


def test_the_size_of_a_batch_is_kept_where_it_could_tell(checkpoint, drawn, tmp_path, monkeypatch, capsys):
    words = [f"checkpoint={checkpoint}", f"out_dir={tmp_path / 'x'}", "num_samples=10", "sampler.num_steps=2"]
    assert run("sample", [*words, "batch_size=6", "pad_to=1"], monkeypatch, capsys)[0] == 0
    for number, batch in ((3, 6), (9, 4)):
        picture = tmp_path / "x" / "images" / f"{number:06d}.png"
        assert read_text(picture)["batch"] == batch
        again(picture, tmp_path, monkeypatch, capsys)
        assert read_text(tmp_path / "again" / "images" / "000000.png")["pad_to"] == batch
    assert "batch" not in read_text(drawn / "000013.png")  # it was filled up


def test_another_checkpoint_of_the_same_path_is_noticed(drawn, checkpoint, tmp_path, monkeypatch, capsys):
    other = save_tiny(tmp_path / "other.safetensors", channels=8)
    _, err = again(drawn / "000000.png", tmp_path, monkeypatch, capsys, f"checkpoint={other}", status=1)
    assert re.search(r"checkpoint_sha256 was \w{12} and is \w{12}", err)


def test_a_file_that_moved_is_found_by_its_hash(drawn, checkpoint, tmp_path, monkeypatch, capsys):
    away = tmp_path / "away"
    (away / "checkpoints" / "zoo").mkdir(parents=True)
    save_tiny(away / "checkpoints" / "model.safetensors", channels=8)  # the same name, other weights
    moved = checkpoint.rename(away / "checkpoints" / "zoo" / "model.safetensors")
    monkeypatch.chdir(away)
    try:
        again(drawn / "000000.png", tmp_path, monkeypatch, capsys)
    finally:
        moved.rename(checkpoint)
    monkeypatch.chdir(tmp_path)
    text = {**read_text(drawn / "000000.png"), "checkpoint": "gone.safetensors"}
    save_png(np.zeros((8, 8, 1), dtype=np.uint8), tmp_path / "x.png", text)
    _, err = again(tmp_path / "x.png", tmp_path, monkeypatch, capsys, status=2)
    assert "was made with checkpoint=gone.safetensors (SHA-256 " in err and "add checkpoint=FILE" in err


def test_a_picture_builds_nothing_of_its_own(drawn, tmp_path, monkeypatch, capsys):
    text = read_text(drawn / "000000.png")
    for change in (
        {"sampler": {"_target_": "os.system", "command": "true"}},
        {"sampler": {**text["sampler"], "solver": {"_target_": "builtins.eval", "_args_": ["1"]}}},
        {"guidance": {**text["guidance"], "interval": [{"_target_": "subprocess.run"}]}},
        {"sampler": {**text["sampler"], "_target_": "diffusion.sampling.torch.load"}},
        {"sampler": {**text["sampler"], "solver": {"_target_": "diffusion.solvers.torch.load"}}},
    ):
        save_png(np.zeros((8, 8, 1), dtype=np.uint8), tmp_path / "x.png", {**text, **change})
        _, err = again(tmp_path / "x.png", tmp_path, monkeypatch, capsys, status=2)
        assert "which a picture may not build" in err
    save_png(np.zeros((8, 8, 1), dtype=np.uint8), tmp_path / "x.png", {**text, "buildable": ["os.system"]})
    assert not any("buildable" in argument for argument in with_picture([f"from={tmp_path / 'x.png'}"]))


def test_a_picture_from_before_there_were_as_many_settings_is_read(drawn, tmp_path, monkeypatch, capsys):
    text = read_text(drawn / "000013.png")
    kept = ("_target_", "num_steps", "spacing", "eta", "variance", "clip", "dynamic_quantile", "final", "offset")
    old = {name: text[name] for name in ("seed", "label", "checkpoint", "dtype", "pad_to", "tile", "guidance")}
    old |= {"sampler": {name: text["sampler"][name] for name in kept}, "checkpoint_sha256": text["checkpoint_sha256"]}
    image = np.asarray(Image.open(drawn / "000013.png"))[..., None]
    save_png(image, tmp_path / "old.png", old)
    again(tmp_path / "old.png", tmp_path, monkeypatch, capsys)


def test_a_sweep_over_a_picture_names_its_folders_by_what_was_typed(drawn, tmp_path, monkeypatch, capsys):
    words = ["-m", f"from={drawn / '000013.png'}", f"sweep_dir={tmp_path / 'sweep'}", "seed=18,19"]
    status, _, err = run("sample", words, monkeypatch, capsys)
    assert status == 0, err
    folders = sorted(path.parent for path in (tmp_path / "sweep").rglob("samples.npz"))
    assert [folder.name.rpartition(",")[2] for folder in folders] == ["seed=18", "seed=19"]
    assert "sampler" not in folders[0].name
    first = np.load(folders[0] / "samples.npz")["arr_0"][0, :, :, 0]
    assert np.array_equal(first, np.asarray(Image.open(drawn / "000013.png")))


def test_to_go_on_it_is_enough_to_name_the_picture(monkeypatch):
    words = ["sample.py", "sampler=ddim", "++sampler.eta=1.0", "~sampler.rho", '++from="x.png"', "from=x.png", "seed=3"]
    monkeypatch.setattr("sys.argv", words)
    assert diffusion.sample_folder._same_command(Path("out")) == "sample.py from=x.png seed=3 out_dir=out"
    monkeypatch.setattr("sys.argv", ["sample.py", "seed=3", "out_dir=out"])
    assert diffusion.sample_folder._same_command(Path("out")) == "sample.py seed=3 out_dir=out"


def test_what_a_picture_means_is_shown_without_torch(drawn):
    arguments = ["sample.py", f"from={drawn / '000013.png'}", "--cfg", "job"]
    code = (
        f"import runpy, sys; sys.argv = {arguments!r}; sys.path.insert(0, '.')\n"
        "try: runpy.run_path('sample.py', run_name='__main__')\n"
        "except SystemExit: pass\n"
        "print('loaded', sorted({'torch', 'numpy', 'lightning'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code]
    output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "seed: 18" in output and "num_steps: 3" in output
    assert output.rstrip().endswith("loaded []")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.with_name("missing.png"), "missing.png does not exist"),
        (lambda path: path.parent, "is a folder; name one picture of it"),
        (lambda path: path.write_bytes(b"no picture") and path, "cannot be read as a picture"),
        (lambda path: save_with_texts(path), "and no text|does not say how it was made"),
        (lambda path: save_with_texts(path, Comment="x"), "but Comment"),
        (lambda path: save_with_texts(path, diffusion="{"), "has a damaged text"),
        (lambda path: save_with_texts(path, diffusion="[]"), "is not of sample.py"),
        (lambda path: save_with_texts(path, diffusion='{"sampler": {}, "guidance": {}}'), "shows many samples"),
        (lambda path: save_with_texts(path, parameters="a prompt alone"), "no line of settings"),
        (lambda path: save_with_texts(path, prompt="{}"), "none of the samplers"),
    ],
)
def test_a_picture_that_does_not_say_is_one_clear_error(make, message, tmp_path, monkeypatch, capsys):
    picture = make(tmp_path / "x.png")
    status, _, err = run("sample", [f"from={picture}", f"out_dir={tmp_path / 'out'}"], monkeypatch, capsys)
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert status == 2 and len(errors) == 1 and re.search(message, errors[0]), err
    assert "Traceback" not in err and not (tmp_path / "out").exists()


def test_a_grid_and_verify_alone_are_refused(drawn, checkpoint, tmp_path, monkeypatch, capsys):
    _, err = again(drawn.parent / "grid.png", tmp_path, monkeypatch, capsys, status=2)
    assert "shows many samples; name one of them, in the folder images" in err
    status, _, err = run("sample", [f"checkpoint={checkpoint}", "verify=true"], monkeypatch, capsys)
    assert status == 2 and "add from=PICTURE.png" in err


def test_pictures_of_other_sizes_are_not_compared(tmp_path):
    save_png(np.zeros((4, 8, 1), dtype=np.uint8), tmp_path / "x.png")
    with pytest.raises(ValueError, match="is 8x4 with 1 channels, but what is to be drawn is 8x8 with 3 channels"):
        difference(tmp_path / "x.png", np.zeros((8, 8, 3), dtype=np.uint8))
    with pytest.raises(ValueError, match="is 8x4 with 1 channels, but what is to be drawn is 8x8 with 1 channels"):
        check_comparable({"verify": True, "from": str(tmp_path / "x.png")}, (1, 8, 8))
    check_comparable({"verify": True, "from": str(tmp_path / "x.png")}, (1, 4, 8))
    check_comparable({"verify": False, "from": None}, (1, 8, 8))
    image = np.zeros((4, 8, 1), dtype=np.uint8)
    image[0, 0], image[1, 1] = 255, 1
    assert difference(tmp_path / "x.png", image) == (255, 2, 32)


@pytest.mark.parametrize(("value", "status"), [(7, 0), (8, 1), (255, 1)])
def test_the_exit_status_says_whether_anything_differs(value, status, tmp_path, capsys):
    save_png(np.full((4, 4, 1), 7, dtype=np.uint8), tmp_path / "x.png")
    image = np.full((1, 4, 4, 1), 7, dtype=np.uint8)
    image[0, 1, 2] = value
    np.savez(tmp_path / "samples.npz", image)
    assert verified(str(tmp_path / "x.png"), tmp_path) == status
    assert f"largest pixel difference {value - 7}" in capsys.readouterr().out


@settings(max_examples=15, deadline=None)
@given(st.text(st.characters(blacklist_categories=("Cs",)), max_size=12).filter(lambda text: text != "???"))
@example("two\nlines and \\")
def test_any_text_goes_through_hydra_as_it_is(text):
    several = [f"${{{text}}}", f'"{text}\\', f"\\${{x}}{text}", 1, None, True, 2.5, 1e-7]
    cfg = compose("sample", [word("prompt", text), word("labels", several)])
    found = OmegaConf.to_container(cfg, resolve=True)
    assert (found["prompt"], found["labels"]) == (text, several)


# ---------------------------------------------------------------------------------------------------------------------
# the text for other programs


def test_our_pictures_say_what_a1111_would(drawn, checkpoint):
    found = parse(picture_texts(drawn / "000013.png")["parameters"])
    sha256 = file_hash(checkpoint)
    expected = {"Steps": "3", "CFG scale": "4", "Seed": "18", "Size": "8x8", "Model hash": sha256[:10]}
    assert {**expected, "Model": "model", "Class": "7"}.items() <= found.fields.items()
    assert found.fields["Version"].startswith("diffusion ")


def test_our_json_is_json_for_every_reader(drawn):
    def refuse(name):
        raise AssertionError(name)

    text = picture_texts(drawn / "000013.png")["diffusion"]
    assert json.loads(text, parse_constant=refuse)["seed"] == 18


# ---------------------------------------------------------------------------------------------------------------------
# pictures of others

A1111 = """a cat
Negative prompt: a dog
Steps: 7, Sampler: Euler a, CFG scale: 3.5, Seed: 9, Size: 64x32, Model hash: {hash}, Model: {name}, RNG: CPU"""


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A folder with checkpoints/v1-5.safetensors in it, the current one."""
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "v1-5.safetensors").write_bytes(b"some weights")
    (tmp_path / "checkpoints" / "vae.safetensors").write_bytes(b"other weights")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def composed(*arguments):
    words = with_picture(list(arguments))
    return OmegaConf.to_container(compose("sample", words), resolve=True)


@pytest.mark.parametrize("name", ["v1-5", "renamed"])
def test_a_picture_of_a1111_finds_its_model_by_name_or_hash(home, name, capsys):
    text = A1111.format(hash=file_hash(home / "checkpoints" / "v1-5.safetensors")[:10], name=name)
    save_with_texts(home / "x.png", parameters=text)
    found = composed("from=x.png")
    assert found["checkpoint"] == "checkpoints/v1-5.safetensors"
    assert (found["prompt"], found["negative_prompt"], found["seed"]) == ("a cat", "a dog", 9)
    assert (found["height"], found["width"], found["num_samples"]) == (32, 64, 1)
    assert found["guidance"]["guidance_scale"] == 3.5 and found["sampler"]["num_steps"] == 7
    assert found["sampler"]["eta"] == 1.0  # an ancestral sampler
    err = capsys.readouterr().err
    assert "from=x.png: A1111: " in err and "cannot be honoured: its starting noise (RNG: CPU)" in err
    assert ("looking for the model with the hash" in err) == (name == "renamed")


def test_a_model_that_is_not_there_is_named_and_may_be_given(home):
    save_with_texts(home / "x.png", parameters=A1111.format(hash="0123456789", name="other"))
    with pytest.raises(ValueError, match=r"the model 'other' \(hash 0123456789\), which is not in checkpoints/"):
        composed("from=x.png")
    assert composed("from=x.png", "checkpoint=mine.safetensors")["checkpoint"] == "mine.safetensors"


def test_the_same_name_with_another_hash_is_taken_and_said(home, capsys):
    save_with_texts(home / "x.png", parameters=A1111.format(hash="0123456789", name="v1-5"))
    assert composed("from=x.png")["checkpoint"] == "checkpoints/v1-5.safetensors"
    assert "has the name of the picture's model, but not its hash 0123456789" in capsys.readouterr().err


def test_a_picture_of_comfyui_becomes_settings(home, capsys):
    graph = default_graph()
    graph["4"]["inputs"]["ckpt_name"] = "sub\\folder\\v1-5.safetensors"
    graph["41"] = node("VAELoader", vae_name="vae.safetensors")
    graph["8"]["inputs"]["vae"] = ["41", 0]
    picture_of(home / "x.png", graph)
    found = composed("from=x.png", "seed=3")
    assert (found["checkpoint"], found["vae"]) == ("checkpoints/v1-5.safetensors", "checkpoints/vae.safetensors")
    assert (found["seed"], found["height"], found["width"]) == (3, 768, 512)
    assert found["sampler"]["spacing"] == "normal" and found["sampler"]["num_steps"] == 20
    assert "drawn on the CPU" in capsys.readouterr().err


def test_a_grid_of_its_own_numbers_is_taken_over(home):
    graph = custom_graph()
    graph["4"]["inputs"]["ckpt_name"] = "v1-5.safetensors"
    picture_of(home / "x.png", graph)
    sampler = composed("from=x.png")["sampler"]
    assert (sampler["solver"], sampler["spacing"]) == ("dpmpp_2m", "karras")
    assert (sampler["sigma_max"], sampler["sigma_min"], sampler["rho"]) == (14.6, 0.03, 6.5)


def test_an_unknown_sampler_is_replaced_and_said(home, capsys):
    text = A1111.format(hash="", name="v1-5").replace("Euler a", "Restart")
    save_with_texts(home / "x.png", parameters=text)
    composed("from=x.png")
    assert "its sampler Restart" in capsys.readouterr().err


def test_a_picture_made_from_another_image_needs_that_image(home):
    text = A1111.format(hash="", name="v1-5")
    save_with_texts(home / "x.png", parameters=f"{text}, Denoising strength: 0.6, Mask blur: 4")
    with pytest.raises(ValueError, match="add image=FILE and mask=FILE"):
        composed("from=x.png")
    with pytest.raises(ValueError, match="add mask=FILE"):
        composed("from=x.png", "image=a.png")
    found = composed("from=x.png", "image=a.png", "mask=b.png")
    assert (found["strength"], found["image"]) == (0.7857, "a.png")  # five of seven moves, as A1111 makes


@pytest.mark.parametrize("suffix", [".jpg", ".webp"])
def test_a1111_s_other_formats_are_read(suffix, tmp_path):
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9286] = b"UNICODE\0" + "ein Bär\nSteps: 3, Seed: 1, CFG scale: 2".encode("utf-16-be")
    Image.new("RGB", (8, 8)).save(tmp_path / f"x{suffix}", exif=exif)
    assert parse(picture_texts(tmp_path / f"x{suffix}")["parameters"]).prompt == "ein Bär"


# ---------------------------------------------------------------------------------------------------------------------
# prompts and numbers that are filled in


def test_a_file_of_prompts_is_one_a_line(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\ufeff# a comment\na cat, running\n\n  a dog  \n  # another\n", encoding="utf-8")
    assert read_prompts(path) == ["a cat, running", "a dog"]
    config = {"prompts": str(path), "prompt": None, "num_samples": None}
    assert with_prompts(config) == {**config, "prompt": ["a cat, running", "a dog"], "num_samples": 2}
    assert with_prompts({**config, "num_samples": 6})["num_samples"] == 6
    with pytest.raises(ValueError, match="both give texts; leave one out"):
        with_prompts({**config, "prompt": "x"})
    path.write_text("# nothing\n")
    with pytest.raises(ValueError, match="holds no prompt"):
        read_prompts(path)
    path.write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(ValueError, match="no text in UTF-8"):
        read_prompts(path)


@pytest.mark.parametrize(
    ("shape", "prompt", "expected"),
    [
        ((1, 8, 8), None, (64, 64, 16)),
        ((3, 128, 128), "x", (64, 64, 16)),
        ((3, 256, 256), "x", (1, 16, 16)),
        ((3, 256, 256), None, (64, 16, 16)),
        ((3, 512, 512), ["x", "y"], (2, 1, 1)),
        ((3, 512, 768), "x", (1, 1, 1)),
        ((3, 512, 768), None, (64, 1, 1)),
    ],
)
def test_null_numbers_fit_the_size_of_the_images(shape, prompt, expected):
    config = {"prompt": prompt, "num_samples": None, "batch_size": None, "pad_to": None}
    found = with_counts(config, shape)
    assert (found["num_samples"], found["batch_size"], found["pad_to"]) == expected
    published = with_counts(config, shape, published=True)
    assert published["batch_size"] == published["pad_to"] == 1
    assert published["num_samples"] == (64 if prompt is None else len(prompt))
    given = {**config, "num_samples": 3, "batch_size": 5, "pad_to": 2}
    assert with_counts(given, shape) == given
    with pytest.raises(ValueError, match="num_samples=many does not fit; it must be of type int"):
        with_counts({**given, "num_samples": "many"}, shape)
