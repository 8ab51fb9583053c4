"""Whatever is wrong with a file, a folder or a number: one clear error, and nothing is lost."""

import errno
import json
import pickle
import struct

import pytest
import torch
from safetensors.torch import save_file
from tiny import DIFFUSION, NET, facts, run, save_tiny
from torch import nn

import diffusion.checkpoint
import diffusion.model_file
from diffusion.checkpoint import load_model, read_header, save_model


@pytest.fixture
def good(tmp_path):
    return save_tiny(tmp_path / "model.safetensors")


def truncated(path):
    path.write_bytes(path.read_bytes()[:-100])


def cut_in_the_header(path):
    path.write_bytes(path.read_bytes()[:200])


def empty(path):
    path.write_bytes(b"")


def four_bytes(path):
    path.write_bytes(b"\x01\x02\x03\x04")


def longer(path):
    path.write_bytes(path.read_bytes() + b"more")


def raw_pickle(path):
    path.write_bytes(pickle.dumps({"net": [1, 2, 3], "filler": "x" * 300}))


def torch_save(path):
    torch.save({"weight": torch.zeros(3)}, path)


def foreign_safetensors(path):
    save_file({"model.diffusion_model.weight": torch.zeros(2)}, path)


def huge_header(path):
    path.write_bytes(struct.pack("<Q", 2**62) + b'{"a":1}' + b" " * 100)


def html(path):
    path.write_text("<!DOCTYPE html><html>" + "404" * 100)


def lfs_pointer(path):
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64)


def no_json(path):
    path.write_bytes(struct.pack("<Q", 50) + b"{" + b"x" * 49)


def deep_json(path):
    text = b'{"a":' * 50_000
    path.write_bytes(struct.pack("<Q", len(text)) + text)


def newer_format(path):
    rewrite(path, format_version="2")


def damaged_step(path):
    rewrite(path, step="seven")


def lost_config(path):
    rewrite(path, config=None)


def rewrite(path, **changes):
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    for key, value in changes.items():
        header["__metadata__"][key] = value
    header["__metadata__"] = {key: value for key, value in header["__metadata__"].items() if value is not None}
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncated, "is truncated"),
        (cut_in_the_header, "truncated or damaged: its header claims"),
        (empty, "it is empty"),
        (four_bytes, "only 4 bytes"),
        (longer, "longer than its header says"),
        (raw_pickle, "looks like a pickle"),
        (torch_save, "looks like a file of torch.save"),
        (foreign_safetensors, "not one of ours|is no model that is known here"),
        (huge_header, "truncated or damaged: its header claims 4611686018427387904 bytes"),
        (html, "looks like a web page"),
        (lfs_pointer, "git lfs pull"),
        (no_json, "header of .* is damaged"),
        (deep_json, "header of .* is damaged"),
        (newer_format, "has format 2"),
        (damaged_step, "header of .* is damaged"),
        (lost_config, "header of .* is damaged"),
    ],
)
def test_a_bad_checkpoint_is_one_clear_error(good, damage, message, monkeypatch, capsys):
    damage(good)
    for read in (read_header, load_model):
        with pytest.raises(ValueError, match=message) as error:
            read(good)
        assert str(good) in str(error.value)
    status, _, err = run("sample", [f"checkpoint={good}", f"out_dir={good.parent / 'out'}"], monkeypatch, capsys)
    assert status == 2 and "Traceback" not in err
    assert len([line for line in err.splitlines() if line.startswith("error: ")]) == 1


def test_a_missing_checkpoint_names_the_ones_beside_it(good):
    with pytest.raises(
        FileNotFoundError, match=r"there is no file .*modle\.safetensors; did you mean .*model\.safetensors"
    ):
        load_model(good.with_name("modle.safetensors"))
    with pytest.raises(FileNotFoundError, match="there is no file"):
        load_model(good / "under_a_file")


def test_a_folder_in_place_of_a_checkpoint_names_the_file_in_it(good):
    with pytest.raises(ValueError, match=r"is a folder; name the file: .*model\.safetensors"):
        load_model(good.parent)


def test_a_pickle_is_never_executed(tmp_path):
    class Bomb:
        def __reduce__(self):
            return exec, (f"open({str(tmp_path / 'pwned')!r}, 'w')",)

    for name, write in (
        ("raw", lambda p: p.write_bytes(pickle.dumps(Bomb()))),
        ("zip", lambda p: torch.save(Bomb(), p)),
    ):
        path = tmp_path / f"{name}.safetensors"
        write(path)
        with pytest.raises(ValueError):
            load_model(path)
    assert not (tmp_path / "pwned").exists()


def test_a_foreign_class_is_named_on_the_command_line(tmp_path, monkeypatch, capsys):
    path = tmp_path / "model.safetensors"
    settings = {"net": {"_target_": "os.system", "command": "true"}, "diffusion": DIFFUSION}
    save_model(path, nn.Linear(1, 1), settings, weights="raw", step=0, facts=facts())
    status, _, err = run("sample", [f"checkpoint={path}"], monkeypatch, capsys)
    assert status == 2 and "os.system" in err and "buildable" in err


def test_a_config_that_the_network_does_not_understand_is_a_clear_error(good):
    raw = json.loads(json.dumps({"net": {**NET, "chanels": 3}, "diffusion": DIFFUSION}))
    rewrite(good, config=json.dumps(raw))
    with pytest.raises(ValueError, match="chanels"):
        load_model(good)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("sampler.num_steps=101", "num_steps must be 1..100"),
        ("sampler.num_steps=0", "num_steps must be 1..100"),
        ("sampler.num_steps=-3", "num_steps must be 1..100"),
        ("sampler.num_steps=2.5", "sampler.num_steps=2.5 does not fit"),
        ("sampler.num_steps=ddim33", "ddim33|33 of 100"),
        ("guidance.guidance_scale=-1", "guidance_scale must be a finite number >= 0"),
        ("guidance.guidance_scale=nan", "guidance_scale must be a finite number >= 0"),
        ("guidance.guidance_scale=inf", "guidance_scale must be a finite number >= 0"),
        ("guidance.rescale=2", "rescale must be in"),
        ("labels=[3,10]", "whole numbers from 0 to 9"),
        ("labels=[-1]", "whole numbers from 0 to 9"),
        ("labels=[1.5]", "whole numbers from 0 to 9"),
        ("labels=[cat]", "whole numbers from 0 to 9"),
        ("labels=[]", "the list is empty"),
        ("num_samples=0", "num_samples must be at least 1"),
        ("batch_size=0", "batch_size must be at least 1"),
        ("pad_to=0", "pad_to must be at least 1"),
        ("dtype=int8", "dtype must be auto or one of float32"),
        ("device=cuda:99", "device=cuda:99 cannot be used here"),
        ("device=toaster", "device=toaster cannot be used here"),
        ("sampler.eta=-1", "eta must be in"),
        ("sampler.spacing=even", "spacing must be one of"),
    ],
)
def test_a_bad_setting_is_refused_before_the_first_step_and_writes_nothing(
    good, argument, message, monkeypatch, capsys
):
    out_dir = good.parent / "out"
    status, _, err = run("sample", [f"checkpoint={good}", f"out_dir={out_dir}", argument], monkeypatch, capsys)
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert status == 2 and len(errors) == 1 and "Traceback" not in err
    assert any(part in errors[0] for part in message.split("|"))
    assert not out_dir.exists()


def test_labels_for_a_model_without_classes_are_refused(tmp_path, monkeypatch, capsys):
    about = facts(num_classes=None, class_names=None)
    path = save_tiny(tmp_path / "model.safetensors", about=about, num_classes=None)
    status, _, err = run("sample", [f"checkpoint={path}", "labels=[1]"], monkeypatch, capsys)
    assert status == 2 and "not trained with classes; it takes no condition" in err


def test_an_image_size_that_the_network_cannot_halve_names_the_nearest(tmp_path, monkeypatch, capsys):
    path = save_tiny(tmp_path / "model.safetensors", about=facts(shape=[1, 9, 9]))
    line = [f"checkpoint={path}", f"out_dir={tmp_path / 'out'}"]
    status, _, err = run("sample", line, monkeypatch, capsys)
    assert status == 2 and "9 is not a multiple of 2" in err and "8 or 10" in err


def test_an_out_dir_under_a_file_is_refused_before_the_first_step(good, monkeypatch, capsys):
    status, _, err = run("sample", [f"checkpoint={good}", f"out_dir={good}/out"], monkeypatch, capsys)
    assert status == 2 and f"cannot write {good}/out/parts: Not a directory" in err
    assert "sampling" not in err
    load_model(good)  # untouched


def test_an_out_dir_that_holds_samples_is_not_written_into(good, monkeypatch, capsys):
    line = [f"checkpoint={good}", f"out_dir={good.parent / 'out'}", "num_samples=2", "sampler.num_steps=1"]
    assert run("sample", line, monkeypatch, capsys)[0] == 0
    before = (good.parent / "out" / "samples.npz").read_bytes()
    status, _, err = run("sample", [*line, "seed=9"], monkeypatch, capsys)
    assert status == 2 and "already holds samples" in err
    assert (good.parent / "out" / "samples.npz").read_bytes() == before
    assert run("sample", [*line, "seed=9", "overwrite=true"], monkeypatch, capsys)[0] == 0


def test_a_full_disk_while_saving_keeps_the_previous_checkpoint(good, monkeypatch):
    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    before = good.read_bytes()
    monkeypatch.setattr(diffusion.model_file, "save_file", full)
    with pytest.raises(
        OSError, match=r"cannot write .*: No space left on device; the file that was there is untouched"
    ):
        save_tiny(good)
    assert good.read_bytes() == before
    assert [path.name for path in good.parent.iterdir()] == ["model.safetensors"]


def test_a_full_disk_while_sampling_is_one_error_that_names_the_file(good, monkeypatch, capsys):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("zipfile.ZipFile.open", full)
    line = [f"checkpoint={good}", f"out_dir={good.parent / 'out'}", "num_samples=2", "sampler.num_steps=1"]
    status, _, err = run("sample", line, monkeypatch, capsys)
    assert status == 2 and "samples.npz: No space left on device" in err and "Traceback" not in err
    assert len(list((good.parent / "out" / "images").glob("*.png"))) == 2  # what was finished is kept


def test_samples_that_are_not_finite_are_reported_not_saved(tmp_path, monkeypatch, capsys):
    settings = {"net": NET, "diffusion": DIFFUSION}
    net = diffusion.checkpoint.build(NET)
    nn.init.constant_(net.conv_out.bias, float("nan"))
    path = tmp_path / "model.safetensors"
    save_model(path, net, settings, weights="raw", step=1, facts=facts())
    line = [f"checkpoint={path}", f"out_dir={tmp_path / 'out'}", "num_samples=2", "sampler.num_steps=1"]
    status, _, err = run("sample", line, monkeypatch, capsys)
    assert status == 2 and "2 of 2 samples are not finite" in err
    assert not (tmp_path / "out" / "samples.npz").exists()
