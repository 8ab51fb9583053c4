"""Whatever cannot be measured honestly is one clear error, and before anything is drawn."""

import json
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from latent_cases import NODE as AUTOENCODER
from latent_cases import autoencoder
from metric_cases import images, random_images, reference
from PIL import Image
from test_guided_sampling import save_judge
from tiny import run, save_tiny

from diffusion.checkpoint import Part
from diffusion.data.named import open_data
from diffusion.evaluation.features import POOLED, check_inception, choose_features, inception, inception_file, pixels
from diffusion.evaluation.metrics import Evaluation, check_metrics
from diffusion.evaluation.reference import Reference, of_array, open_images, open_reference
from diffusion.images import save_npz, save_png

# ---------------------------------------------------------------------------------------------------------------------
# metrics and what they need


@pytest.mark.parametrize("metrics", [["fid", "ssim"], "ssim", ["bogus"]])
def test_an_unknown_metric_is_refused_with_the_list_of_those_there_are(metrics):
    with pytest.raises(ValueError, match=r"there is no (ssim|bogus); there are fid, sfid, kid, is, precision, recall"):
        check_metrics(metrics)


def test_no_metric_is_refused_and_one_may_be_named_twice():
    with pytest.raises(ValueError, match=r"metrics=\[\] measures nothing"):
        check_metrics([])
    assert check_metrics(["kid", "fid", "kid"]) == ("kid", "fid")


@pytest.mark.parametrize("metric", ["fid", "kid", "precision", "recall"])
def test_what_compares_needs_a_reference(metric):
    with pytest.raises(ValueError, match=f"{metric}: compared with what.*without one there is only is"):
        Evaluation([metric], pixels())


@pytest.mark.parametrize(("metric", "lacking"), [("is", "class probabilities"), ("sfid", "spatial features")])
def test_features_that_cannot_give_a_metric_are_refused(metric, lacking):
    with pytest.raises(ValueError, match=f"{metric} needs {lacking}, which features=pixels do not have.*fid, kid"):
        Evaluation([metric], pixels(), reference(10))


@pytest.mark.parametrize(("metrics", "count", "least"), [(["kid"], 1, 2), (["fid"], 1, 2), (["fid", "recall"], 3, 4)])
@pytest.mark.parametrize("side", ["samples", "real"])
def test_too_few_images_are_refused_by_number(metrics, count, least, side):
    counts = {"samples": 10, "real": 10, side: count}
    with pytest.raises(ValueError, match=f"{side}: {count} images are too few.*at least {least}"):
        Evaluation(metrics, pixels(), reference(counts["real"]))(images(counts["samples"]))


def test_fewer_images_than_features_are_warned_about_with_the_numbers():
    evaluation = Evaluation(["fid"], pixels(), reference(16))
    with pytest.warns(UserWarning, match="real: 16 images for 16 features; a covariance needs at least 17"):
        result = evaluation(images(30))
    assert len(result["warnings"]) == 1 and "too high" in result["warnings"][0]


def test_enough_images_and_metrics_without_a_covariance_are_not_warned_about(recwarn):
    Evaluation(["fid"], pixels(), reference(17))(images(17))
    Evaluation(["kid", "recall"], pixels(), reference(5))(images(6))
    assert not recwarn.list


def test_features_that_are_not_numbers_are_refused_by_image():
    def broken(x):
        values = x.flatten(1).float()
        values[x.flatten(1)[:, 0] == 77] = float("nan")
        return {POOLED: values}

    array = random_images(30)
    array[:, 0, 0, 0] = 0
    array[[20, 25], 0, 0, 0] = 77
    evaluation = Evaluation(["kid"], replace(pixels(), extract=broken), reference(10), batch_size=8)
    with pytest.raises(
        ValueError, match=r"features \(pixels\) of 1 images of samples are not finite, first of image 20"
    ):
        evaluation(of_array(array, "samples"))


def test_sides_of_different_sizes_are_refused_with_the_way_out():
    with pytest.raises(ValueError, match=r"4x4 \(samples\) and 6x6 \(real\); give resize=N"):
        Evaluation(["kid"], pixels(), reference(10, size=6))(images(10))


def test_a_covariance_of_too_many_pixels_is_refused():
    large = {"size": 40, "channels": 3}
    with pytest.raises(ValueError, match=r"fid on 4800 raw pixels.*resize=32"):
        Evaluation(["fid"], pixels(), reference(10, **large))(images(10, **large))
    assert Evaluation(["kid"], pixels(), reference(10, **large))(images(10, **large))["scores"]


# ---------------------------------------------------------------------------------------------------------------------
# features


def test_features_that_are_no_file_are_refused_with_the_choices():
    with pytest.raises(ValueError, match="features=clip is neither inception nor pixels, and there is no such file"):
        choose_features("clip")
    with pytest.raises(ValueError, match="is for features=inception"):
        choose_features("pixels", inception_weights="weights.pth")


def test_a_denoiser_is_no_classifier(tmp_path):
    with pytest.raises(ValueError, match="denoiser"):
        choose_features(str(save_tiny(tmp_path / "model.safetensors")))


def test_a_classifier_of_latents_is_refused(tmp_path):
    part = Part(module=autoencoder(), config=AUTOENCODER, bundled=False)
    path = save_judge(tmp_path / "judge.safetensors", parts={"autoencoder": part})
    with pytest.raises(ValueError, match="classifies latents"):
        choose_features(str(path))


def test_images_of_another_size_or_kind_than_the_classifiers_are_refused(tmp_path):
    extractor = choose_features(str(save_judge(tmp_path / "judge.safetensors")))
    with pytest.raises(ValueError, match=r"images are 4x4, but features=classifier_\w+ read 8x8; give resize=8"):
        Evaluation(["kid"], extractor, reference(10))(images(10))
    with pytest.raises(ValueError, match=r"images are RGB, but features=classifier_.* read grey ones"):
        Evaluation(["kid"], extractor, reference(10, size=8))(images(10, size=8, channels=3))


def no_network(*args, **kwargs):
    raise OSError("Name or service not known")


def test_inception_without_weights_is_one_error_that_says_what_to_put_where(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    with pytest.raises(ValueError, match="Name or service not known") as caught:
        choose_features("inception")
    text = str(caught.value)
    assert str(tmp_path / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth") in text
    assert "https://" in text and "features=pixels" in text and "inception_weights=FILE" in text


def test_a_download_goes_where_torch_keeps_its_files_and_is_checked(tmp_path, monkeypatch):
    asked = []

    def download(url, path, hash_prefix):
        asked.append((url, hash_prefix))
        open(path, "wb").close()

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    path = inception_file()
    assert path.is_file() and path.parent == tmp_path / "checkpoints"
    assert inception_file() == path and len(asked) == 1  # the second time it is there
    assert asked[0][1] == "6726825d"


def test_inception_weights_that_are_not_there_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"inception_weights=.*nowhere\.pth: there is no such file"):
        inception_file(tmp_path / "nowhere.pth")


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("a file of weights ran code",))


def test_a_file_that_could_run_code_is_not_unpickled(tmp_path):
    torch.save({"fc.weight": Bomb()}, tmp_path / "bomb.pth")
    with pytest.raises(ValueError, match="damaged or holds more than weights"):
        inception(tmp_path / "bomb.pth")


def test_files_that_are_no_weights_of_inception_are_refused(tmp_path):
    (tmp_path / "text.pth").write_text("hello")
    with pytest.raises(ValueError, match="damaged or holds more than weights"):
        check_inception(tmp_path / "text.pth")
    torch.save({"conv1.weight": torch.zeros(1)}, tmp_path / "resnet.pth")
    with pytest.raises(ValueError, match=r"holds no weights of torch-fidelity's InceptionV3 \(but conv1.weight\)"):
        check_inception(tmp_path / "resnet.pth")
    state = {"fc.weight": torch.zeros(3, 3), "Mixed_7c.branch1x1.conv.weight": torch.zeros(1)}
    torch.save(state, tmp_path / "half.pth")
    with pytest.raises(ValueError, match="does not fit torch-fidelity's InceptionV3"):
        inception(tmp_path / "half.pth")


# ---------------------------------------------------------------------------------------------------------------------
# folders


def test_a_folder_of_mixed_sizes_is_refused_with_examples_and_the_way_out(tmp_path):
    for number, size in enumerate([(8, 8), (8, 8), (6, 9), (12, 12)]):
        save_png(np.zeros((*size, 3), np.uint8), tmp_path / f"{number}.png")
    with pytest.raises(ValueError, match=r"3 sizes: 8x8 \(0.png\), 9x6 \(2.png\), 12x12 \(3.png\); give resize=N"):
        open_images(tmp_path)


def test_every_broken_file_of_a_folder_is_listed(tmp_path):
    for number in range(6):
        save_png(random_images(1, size=8)[0], tmp_path / f"{number}.png")
    whole = (tmp_path / "3.png").read_bytes()
    (tmp_path / "3.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "5.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"2 of 6 images in .* cannot be read: 3\.png \(.*\), 5\.png \(.*repair or"):
        open_images(tmp_path)


def test_folders_without_images_and_paths_that_are_not_there_are_refused(tmp_path):
    with pytest.raises(ValueError, match="there are no images in"):
        open_images(tmp_path)
    with pytest.raises(ValueError, match="there is no file or folder"):
        open_images(tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(ValueError, match=r"notes\.txt is neither an \.npz file nor a folder"):
        open_images(tmp_path / "notes.txt")


def test_a_folder_of_grey_and_colour_files_is_read_as_rgb_and_transparency_lies_on_white(tmp_path):
    Image.new("L", (4, 4), 80).save(tmp_path / "a.png")
    Image.new("RGB", (4, 4), (255, 0, 0)).save(tmp_path / "b.png")
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(tmp_path / "c.png")
    found = open_images(tmp_path)
    assert found.shape == (4, 4, 3)
    assert next(found.read(3))[:, 0, 0].tolist() == [[80, 80, 80], [255, 0, 0], [255, 255, 255]]


# ---------------------------------------------------------------------------------------------------------------------
# files


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"images": np.zeros((3, 8, 8, 3), np.uint8)}, r"it holds images uint8 \(3, 8, 8, 3\); expected are arr_0"),
        ({"mu": np.zeros(4), "sigmas": np.eye(4)}, r"it holds mu float64 \(4\), sigmas float64 \(4, 4\)"),
        ({"arr_0": np.zeros((3, 3, 8, 8), np.uint8)}, r"arr_0 of .* is uint8 \(3, 3, 8, 8\); the channels come last"),
        ({"arr_0": np.zeros((3, 8, 8, 3), np.float32)}, r"is float32 \(3, 8, 8, 3\); write values 0..255"),
        ({"arr_0": np.zeros((3, 64), np.uint8)}, r"is uint8 \(3, 64\)"),
        ({"arr_0": np.asfortranarray(np.zeros((3, 8, 8, 3), np.uint8))}, "Fortran's order"),
        ({"mu": np.zeros((4, 1)), "sigma": np.eye(4)}, r"mu float64 \(4, 1\).*expected are \(D,\)"),
        ({"mu": np.zeros(4), "sigma": np.eye(5)}, r"sigma float64 \(5, 5\); expected are"),
        ({"mu": np.full(4, np.nan), "sigma": np.eye(4)}, "not all finite"),
    ],
)
def test_a_file_of_unknown_layout_says_what_was_found(arrays, said, tmp_path):
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(ValueError, match=said):
        open_reference(tmp_path / "x.npz")


def test_a_file_with_objects_is_not_unpickled(tmp_path):
    np.savez(tmp_path / "x.npz", arr_0=np.array([Bomb()], dtype=object))
    with pytest.raises(ValueError, match=r"arr_0 of .* is object \(1\)"):
        open_reference(tmp_path / "x.npz")
    (tmp_path / "y.npz").write_bytes(pickle.dumps(Bomb))
    with pytest.raises(ValueError, match=r"damaged or no \.npz file"):
        open_reference(tmp_path / "y.npz")


def test_a_truncated_file_is_refused(tmp_path):
    save_npz(tmp_path / "x.npz", random_images(50, size=8))
    whole = (tmp_path / "x.npz").read_bytes()
    (tmp_path / "x.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"damaged or no \.npz file"):
        open_images(tmp_path / "x.npz")


def test_statistics_serve_where_they_can_and_are_refused_where_they_cannot(tmp_path):
    np.savez(tmp_path / "s.npz", mu=np.zeros(16), sigma=np.eye(16))
    stored = open_reference(tmp_path / "s.npz")
    with pytest.raises(ValueError, match=r"kid, recall need images, but .*s\.npz holds statistics only"):
        Evaluation(["fid", "kid", "recall"], pixels(), stored)
    with pytest.raises(ValueError, match=r"statistics of .* are of 16 features, but features=pixels are 64"):
        Evaluation(["fid"], pixels(), stored)(images(70, size=8))
    with pytest.raises(ValueError, match="holds statistics and no images"):
        open_images(tmp_path / "s.npz")


def test_statistics_of_inception_are_not_taken_for_those_of_other_features(tmp_path):
    """The images beside them are there for that."""
    array = random_images(40)
    np.savez(tmp_path / "both.npz", arr_0=array, mu=np.full(16, 9.0), sigma=np.eye(16))
    result = Evaluation(["fid"], pixels(), open_reference(tmp_path / "both.npz"))(of_array(array, "samples"))
    assert abs(result["scores"]["fid_40_pixels"]) < 1e-6 and "stored" not in result["reference"]


# ---------------------------------------------------------------------------------------------------------------------
# references


def test_a_reference_that_is_nothing_is_refused_with_the_data_sets_there_are(tmp_path):
    with pytest.raises(ValueError, match=r"no reference '.*nothing'; give a folder.*cifar10, digits"):
        open_reference(str(tmp_path / "nothing"))


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("image_folder", None, r"the data set image_folder needs its root: reference_data=\{root: \.\.\.\}"),
        ("digits", {"image_sise": 8}, "the data set digits has no setting image_sise; it has channels, image_size"),
        ("numbers", None, "there is no data set 'numbers'; there are cifar10"),
    ],
)
def test_data_sets_and_their_settings_are_checked(name, settings, said):
    with pytest.raises(ValueError, match=said):
        open_data(name, settings)


def test_settings_and_splits_of_what_has_none_are_refused(tmp_path):
    save_npz(tmp_path / "x.npz", random_images(3))
    with pytest.raises(ValueError, match="is for data sets"):
        open_reference(tmp_path / "x.npz", settings={"image_size": 8})
    with pytest.raises(ValueError, match="reference_split must be one of train, val, got 'test'"):
        open_reference("digits", split="test")


# ---------------------------------------------------------------------------------------------------------------------
# the command


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["metrics=[fid,ssim]", "reference=digits", "features=pixels"], "there is no ssim"),
        (["metrics=[fid]", "features=pixels"], "compared with what"),
        (["reference=digits"], "reference=digits without metrics"),
        (["metrics=[kid]", "reference=digits", "features=pixels", "resize=big"], "resize=big must be a whole number"),
        (["metrics=[kid]", "reference=shapes", "features=pixels"], "8x8 (the samples) and 32x32"),
        (["metrics=[precision]", "reference=digits", "features=pixels", "num_samples=2"], "2 images are too few"),
        (["metrics=[fid]", "reference=digits", "features=clip"], "neither inception nor pixels"),
        (["metrics=[bits_per_dim]"], "bits_per_dim is of a data set"),
        (["metrics=[bits_per_dim]", "reference=configs"], "reference=image_folder reference_data={root: DIR}"),
        (["metrics=[bits_per_dim]", "reference=shapes"], "data.num_classes is 10"),
        (["metrics=[bits_per_dim]", "reference=digits", "samples=images"], "leave out samples=images"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_drawn(words, said, tmp_path, monkeypatch, capsys):
    checkpoint = save_tiny(tmp_path / "model.safetensors")
    line = [f"checkpoint={checkpoint}", f"out_dir={tmp_path / 'out'}", "sampler.num_steps=2", *words]
    status, _, err = run("sample", line, monkeypatch, capsys)
    assert status == 2 and said in err
    assert not (tmp_path / "out").exists()


def test_images_to_measure_need_a_metric(tmp_path, monkeypatch, capsys):
    status, _, err = run("sample", [f"samples={tmp_path}"], monkeypatch, capsys)
    assert status == 2 and "without metrics" in err


def test_a_failed_measurement_leaves_the_former_result(tmp_path, monkeypatch, capsys):
    save_npz(tmp_path / "samples.npz", random_images(10, size=8))
    line = [f"samples={tmp_path}", "metrics=[kid]", "reference=digits", "features=pixels"]
    assert run("sample", line, monkeypatch, capsys)[0] == 0
    before = (tmp_path / "metrics.json").read_text()
    assert json.loads(before)["num_samples"] == 10
    save_npz(tmp_path / "samples.npz", random_images(1, size=8))
    assert run("sample", line, monkeypatch, capsys)[0] == 2
    assert (tmp_path / "metrics.json").read_text() == before


def test_a_reference_without_images_says_so_where_it_has_no_statistics_of_the_kind(tmp_path):
    np.savez(tmp_path / "s.npz", mu=np.zeros(16), sigma=np.eye(16))
    spatial = replace(pixels(), layers=("pooled", "spatial"))
    with pytest.raises(ValueError, match="sfid needs mu_s and sigma_s"):
        Evaluation(["sfid"], spatial, open_reference(tmp_path / "s.npz"))
    assert isinstance(open_reference(tmp_path / "s.npz"), Reference)
