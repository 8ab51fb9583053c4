"""Scores against the papers' formulas, against torch-fidelity run by hand, and against what is known in advance."""

import ast
import json

import numpy as np
import pytest
import torch
from metric_cases import features, images, random_images, reference, save_random_inception, score
from scipy.linalg import sqrtm
from test_guided_sampling import save_judge
from tiny import ROOT, run, save_tiny
from torch_fidelity import FeatureExtractorBase, calculate_metrics, register_feature_extractor
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from diffusion.checkpoint import load_classifier, load_model
from diffusion.data.named import open_data
from diffusion.evaluation import metrics as measured
from diffusion.evaluation.bits_per_dim import bits_per_dim
from diffusion.evaluation.features import LOGITS, POOLED, SPATIAL, choose_features, extracted, inception, pixels
from diffusion.evaluation.metrics import Evaluation, frechet_distance, statistics_of
from diffusion.evaluation.reference import Reference, Statistics, of_array, open_reference

ALL_PIXELS = ["fid", "kid", "precision", "recall"]


# ---------------------------------------------------------------------------------------------------------------------
# the papers' formulas


def frechet(x, y):
    """1706.08500, equation 6, with scipy's matrix square root."""
    a, b = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    return ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(a + b - 2 * sqrtm(a @ b).real)


def unbiased_mmd(x, y):
    """1801.01401, equation 4 and section 4: the kernel (x y / D + 1)^3, sums without the diagonals."""
    kernel = lambda a, b: (a @ b.T / a.shape[1] + 1) ** 3  # noqa: E731
    m, n = len(x), len(y)
    xx, yy = (kernel(a, a) for a in (x, y))
    within = (xx.sum() - np.trace(xx)) / (m * (m - 1)) + (yy.sum() - np.trace(yy)) / (n * (n - 1))
    return within - 2 * kernel(x, y).mean()


def inception_score(logits):
    """1606.03498: exp(E KL(p(y|x) || p(y)))."""
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    return np.exp((p * (np.log(p) - np.log(p.mean(0)))).sum(1).mean())


def share_inside(points, manifold, k=3):
    """1904.06991, equation 2: the share of points in a ball around a member that reaches to its k-th neighbour."""
    inside = 0
    radii = [np.sort(np.linalg.norm(manifold - centre, axis=1))[k] for centre in manifold]  # 0 is the centre itself
    for point in points:
        distances = np.linalg.norm(manifold - point, axis=1)
        inside += any(distance <= radius for distance, radius in zip(distances, radii, strict=True))
    return inside / len(points)


@pytest.mark.parametrize(("count", "dimensions"), [(200, 5), (400, 24), (30, 40)], ids=["few", "more", "singular"])
def test_fid_is_the_frechet_distance_of_the_papers(count, dimensions):
    x, y = features(count, dimensions, seed=1), features(count + 7, dimensions, seed=2, shift=0.5, scale=1.5)
    assert frechet_distance(statistics_of(x), statistics_of(y)) == pytest.approx(
        frechet(x.numpy(), y.numpy()), rel=1e-5
    )


@pytest.mark.parametrize("count", [50, 1000])
def test_kid_of_whole_sets_is_the_unbiased_mmd(count):
    x, y = features(count, 12, seed=1, scale=0.2), features(count, 12, seed=2, shift=0.3, scale=0.2)
    mean, std = measured.kernel_distance(x, y)
    assert mean == pytest.approx(unbiased_mmd(x.numpy(), y.numpy()), rel=1e-9) and std == 0


def test_kid_of_larger_sets_is_the_mean_over_subsets_that_a_seed_draws(monkeypatch):
    monkeypatch.setattr(measured, "KID_SUBSET_SIZE", 60)
    x, y = features(400, 6, seed=1, scale=0.2), features(300, 6, seed=2, shift=0.3, scale=0.2)
    mean, std = measured.kernel_distance(x, y)
    assert abs(mean - unbiased_mmd(x.numpy(), y.numpy())) < 3 * std / measured.KID_SUBSETS**0.5
    assert (mean, std) == measured.kernel_distance(x, y)


@pytest.mark.parametrize("count", [7, 500])
def test_the_inception_score_is_the_papers(count):
    logits = features(count, 10, seed=3)
    assert measured.inception_score(logits)[0] == pytest.approx(inception_score(logits.numpy()), rel=1e-9)


def test_the_inception_score_of_sure_and_even_answers_is_the_number_of_classes():
    sure = 50.0 * torch.eye(10, dtype=torch.float64).repeat(20, 1)
    assert measured.inception_score(sure) == (pytest.approx(10), 0)
    assert measured.inception_score(torch.zeros(9, 4)) == (pytest.approx(1), 0)


def test_many_images_are_scored_in_splits_of_five_thousand():
    assert [measured.is_splits(n) for n in (10, 5000, 9999, 10_000, 50_000)] == [1, 1, 1, 2, 10]
    logits = torch.cat([features(5000, 4, seed=1), features(5000, 4, seed=2, shift=1.0)])
    mean, std = measured.inception_score(logits)
    assert std > 0 and mean == pytest.approx(inception_score(logits.numpy()), rel=0.05)


@pytest.mark.parametrize(("count", "others"), [(4, 6), (60, 90)])
def test_precision_and_recall_are_the_shares_inside_the_other_sides_balls(count, others, monkeypatch):
    x, y = features(count, 3, seed=1, shift=0.5), features(others, 3, seed=2)
    expected = {"precision": share_inside(x.numpy(), y.numpy()), "recall": share_inside(y.numpy(), x.numpy())}
    assert measured.precision_recall(x, y) == pytest.approx(expected)
    monkeypatch.setattr(measured, "DISTANCES", 300)  # a few rows at a time
    assert measured.precision_recall(x, y) == pytest.approx(expected)


# ---------------------------------------------------------------------------------------------------------------------
# what is known in advance


def test_a_set_is_at_distance_zero_of_itself():
    same = random_images(300, size=8)
    result = Evaluation(ALL_PIXELS, pixels(), Reference(source="real", images=of_array(same, "real")))(
        of_array(same, "samples")
    )
    scale = np.var(same / 127.5 - 1, axis=0).sum()
    assert abs(score(result, "fid")) < 1e-6 * scale
    assert (score(result, "precision"), score(result, "recall")) == (1, 1)


def test_a_set_of_fewer_images_than_features_is_at_distance_zero_of_itself():
    x = features(40, 200, seed=0)
    assert abs(frechet_distance(statistics_of(x), statistics_of(x))) < 1e-6 * x.var(0).sum()


def test_fid_of_gaussian_samples_approaches_the_closed_form():
    draws = np.random.default_rng(0)
    a, b = draws.normal(size=(2, 4, 4))
    mu = np.array([[1.0, 0, -1, 2], [0.5, 0.5, 0, 1]])
    sigma = [a @ a.T, b @ b.T]
    truth = ((mu[0] - mu[1]) ** 2).sum() + np.trace(sigma[0] + sigma[1] - 2 * sqrtm(sigma[0] @ sigma[1]).real)
    assert frechet_distance(*(Statistics(m, s) for m, s in zip(mu, sigma, strict=True))) == pytest.approx(truth)
    errors = []
    for count in (100, 1000, 10_000, 100_000):
        x, y = (torch.from_numpy(draws.multivariate_normal(m, s, count)) for m, s in zip(mu, sigma, strict=True))
        errors.append(abs(frechet_distance(statistics_of(x), statistics_of(y)) / truth - 1))
    assert errors[-1] < 0.01 and errors[-1] < errors[0] / 5


def test_statistics_keep_their_digits_in_sums_of_many_images():
    many = torch.full((100_000, 1), 0.1)
    assert statistics_of(many).mu[0] == pytest.approx(float(torch.tensor(0.1)), rel=1e-9)


# ---------------------------------------------------------------------------------------------------------------------
# torch-fidelity by hand


class FlatPixels(FeatureExtractorBase):
    """Raw pixels in [-1, 1], as an extractor that torch-fidelity can be told of."""

    def __init__(self, name, features_list, **kwargs):
        super().__init__(name, features_list)

    @staticmethod
    def get_provided_features_list():
        return ("pixels",)

    @staticmethod
    def get_default_feature_layer_for_metric(metric):
        return "pixels"

    def forward(self, x):
        return (x.flatten(1).float() / 127.5 - 1,)


class Listed(torch.utils.data.Dataset):
    def __init__(self, array):
        self.array = array

    def __len__(self):
        return len(self.array)

    def __getitem__(self, index):
        return torch.from_numpy(self.array[index]).permute(2, 0, 1)


def by_hand(x, y, **settings):
    """What torch-fidelity makes of two arrays of images, under our names."""
    common = {"cuda": False, "cache": False, "verbose": False, "save_cpu_ram": True, "isc_splits": 1}
    found = calculate_metrics(input1=Listed(x), input2=Listed(y), fid=True, kid=True, prc=True, **common, **settings)
    names = {"frechet_inception_distance": "fid", "kernel_inception_distance_mean": "kid"}
    names |= {"inception_score_mean": "is", "precision": "precision", "recall": "recall"}
    return {names[name]: value for name, value in found.items() if name in names}


def test_pixel_scores_are_those_of_torch_fidelity_by_hand():
    register_feature_extractor("flat-pixels", FlatPixels)
    x, y = random_images(150), random_images(150, seed=1, level=140)
    result = Evaluation(ALL_PIXELS, pixels(), Reference(source="real", images=of_array(y, "real")), batch_size=40)(
        of_array(x, "samples")
    )
    theirs = by_hand(x, y, feature_extractor="flat-pixels", kid_subset_size=150)
    assert {name: score(result, name) for name in theirs} == pytest.approx(theirs, rel=1e-4)


@pytest.fixture(scope="module")
def inception_weights(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        return save_random_inception(tmp_path_factory.mktemp("inception") / "weights.pth", patch)


@pytest.mark.slow  # two square roots of 2048x2048 matrices
def test_inception_scores_are_those_of_torch_fidelity_by_hand(inception_weights):
    x, y = random_images(6, size=8, channels=3), random_images(6, size=8, channels=3, seed=1, level=140)
    extractor = choose_features("inception", inception_weights=inception_weights)
    result = Evaluation([*ALL_PIXELS, "is"], extractor, Reference(source="real", images=of_array(y, "real")))(
        of_array(x, "samples")
    )
    weights = {"feature_extractor": "inception-v3-compat", "feature_extractor_weights_path": str(inception_weights)}
    theirs = by_hand(x, y, isc=True, kid_subset_size=6, **weights)
    assert theirs["fid"] > 1e-3 and theirs["is"] > 1
    assert {name: score(result, name) for name in theirs} == pytest.approx(theirs, rel=1e-4)


def test_weights_that_are_not_the_published_ones_are_named_and_the_result_says_so(inception_weights):
    extractor = inception(inception_weights)
    assert extractor.name.startswith("inception_") and not extractor.published
    assert "not the published ones" in extractor.about and "299x299" in extractor.about


def test_spatial_features_are_the_first_channels_of_the_block_in_tensorflows_order(inception_weights):
    extractor = inception(inception_weights)
    grey = images(2, size=8)
    found = extracted(grey, extractor, layers=(POOLED, LOGITS, SPATIAL), channels=3)
    assert [found[layer].shape[1] for layer in (POOLED, LOGITS, SPATIAL)] == [2048, 1008, 17 * 17 * 7]
    net, branch = FeatureExtractorInceptionV3("x", ["2048"], feature_extractor_weights_path=inception_weights), []
    net.Mixed_6d.branch1x1.register_forward_hook(lambda module, inputs, output: branch.append(output))
    net(torch.from_numpy(random_images(2, size=8)).permute(0, 3, 1, 2).expand(-1, 3, -1, -1))
    maps = found[SPATIAL].reshape(2, 17, 17, 7)
    for channel in range(7):
        assert torch.allclose(maps[..., channel], branch[0][:, channel], rtol=1e-4, atol=1e-5)
    assert maps.std() > 0


@pytest.mark.slow
def test_published_weights_take_the_statistics_stored_beside_reference_images(inception_weights, tmp_path, monkeypatch):
    """guided-diffusion's VIRTUAL files: statistics of the whole set, and 10,000 images for precision and recall."""
    monkeypatch.setattr("diffusion.evaluation.features.INCEPTION_HASH", "")
    extractor = inception(inception_weights)
    assert extractor.name == "inception" and extractor.published
    real = random_images(5, size=8, channels=3, seed=1)
    moments = {
        layer: statistics_of(
            extracted(of_array(real, "real"), extractor, layers=(layer,), channels=3, batch_size=5)[layer]
        )
        for layer in (POOLED, SPATIAL)
    }
    arrays = {"arr_0": random_images(4, size=8, channels=3, seed=2), "mu": moments[POOLED].mu}
    arrays |= {"sigma": moments[POOLED].sigma, "mu_s": moments[SPATIAL].mu, "sigma_s": moments[SPATIAL].sigma}
    np.savez(tmp_path / "virtual.npz", **arrays)
    result = Evaluation(["fid", "sfid", "recall"], extractor, open_reference(tmp_path / "virtual.npz"))(
        of_array(real, "samples")
    )
    for metric, layer in (("fid", POOLED), ("sfid", SPATIAL)):  # of the stored set with itself, of rank 4 only
        assert abs(result["scores"][f"{metric}_5_inception"]) < 1e-5 * np.trace(moments[layer].sigma)
    assert "statistics stored in" in result["reference"] and "4 RGB images" in result["reference"]
    assert "same number of samples" in result["comparable"]


# ---------------------------------------------------------------------------------------------------------------------
# features


def test_a_classifiers_features_are_what_its_last_layer_reads(tmp_path):
    path = save_judge(tmp_path / "judge.safetensors")
    extractor = choose_features(str(path))
    loaded = load_classifier(path)
    found = extracted(images(20, size=8), extractor, layers=(POOLED, LOGITS), channels=1, batch_size=7)
    x = torch.from_numpy(random_images(20, size=8)).permute(0, 3, 1, 2) / 127.5 - 1
    assert torch.allclose(found[LOGITS], loaded.net(x, torch.zeros(20)), atol=1e-5)
    assert torch.allclose(loaded.net.head.out(found[POOLED]), found[LOGITS], atol=1e-5)
    assert extractor.name.startswith("classifier_") and str(path) in extractor.about
    result = Evaluation(["fid", "is"], extractor, reference(40, size=8))(images(50, size=8))
    assert score(result, "is") == pytest.approx(inception_score(found_logits(extractor)), rel=1e-6)


def found_logits(extractor):
    return extracted(images(50, size=8), extractor, layers=(LOGITS,), channels=1)[LOGITS].double().numpy()


def test_every_head_of_a_classifier_gives_features(tmp_path):
    for pool in ("adaptive", "attention", "spatial", "spatial_v2"):
        path = save_judge(tmp_path / f"{pool}.safetensors", pool=pool, pool_channels=32)
        found = extracted(images(3, size=8), choose_features(str(path)), layers=(POOLED, LOGITS), channels=1)
        assert found[POOLED].shape[0] == 3 and found[LOGITS].shape == (3, 10)


def test_features_do_not_depend_on_the_batch_size():
    whole = extracted(images(50), pixels(), layers=(POOLED,), channels=1, batch_size=64)[POOLED]
    parts = extracted(images(50), pixels(), layers=(POOLED,), channels=1, batch_size=7)[POOLED]
    assert torch.equal(whole, parts) and whole.shape == (50, 16)


# ---------------------------------------------------------------------------------------------------------------------
# what the result says


def test_the_result_says_what_was_measured_by_what_and_against_what():
    result = Evaluation(ALL_PIXELS, pixels(), reference(60))(images(50))
    assert set(result["scores"]) == {
        *("fid_50_pixels", "kid_50_pixels", "kid_std_50_pixels", "precision_50_pixels", "recall_50_pixels")
    }
    assert (result["num_samples"], result["num_reference"]) == (50, 60)
    assert result["samples"] == "50 grey images of 4x4 from samples" and "60 grey images" in result["reference"]
    assert result["features"] == "raw pixels in [-1, 1]" and result["resize"] == "none"
    assert "not with published ones" in result["comparable"]
    assert result["settings"]["precision, recall"] == "3 nearest neighbours"
    assert result["settings"]["kid"] == "100 subsets of 50, seed 2020"
    json.dumps(result)


def test_thousands_are_named_by_k():
    result = Evaluation(["precision"], pixels(), reference(8))(images(2000))
    assert list(result["scores"]) == ["precision_2k_pixels"]


def test_the_references_features_are_extracted_once():
    evaluation = Evaluation(["kid"], pixels(), reference(8))
    first = evaluation(images(10))
    evaluation.reference = None  # would fail if it were read again
    evaluation.reference = reference(8, seed=9)
    assert evaluation(images(10))["scores"] == first["scores"]


def test_torch_fidelity_is_imported_in_this_package_alone_and_on_use_only():
    for path in (ROOT / "diffusion").rglob("*.py"):
        tree = ast.parse(path.read_text())
        anywhere, on_top = ({ast.unparse(node) for node in nodes if isinstance(node, ast.Import | ast.ImportFrom)}
                            for nodes in (ast.walk(tree), tree.body))  # fmt: skip
        assert not any("torch_fidelity" in line for line in on_top), path
        assert path.parent.name == "evaluation" or not any("torch_fidelity" in line for line in anywhere), path


def test_measuring_leaves_the_random_states_alone(inception_weights):
    before, before_numpy = torch.get_rng_state(), np.random.get_state()[1].copy()
    inception(inception_weights)
    Evaluation(ALL_PIXELS, pixels(), reference(60))(images(50))
    measured.inception_score(features(50, 4, seed=0))
    assert torch.equal(before, torch.get_rng_state()) and np.array_equal(before_numpy, np.random.get_state()[1])


# ---------------------------------------------------------------------------------------------------------------------
# the command


def test_sample_py_measures_what_it_draws_and_what_is_there(tmp_path, monkeypatch, capsys):
    checkpoint = save_tiny(tmp_path / "model.safetensors")
    asked = ["metrics=[fid,kid]", "reference=digits", "features=pixels"]
    line = [f"checkpoint={checkpoint}", f"out_dir={tmp_path / 'out'}", "sampler.num_steps=2", "num_samples=70", *asked]
    status, out, err = run("sample", line, monkeypatch, capsys)
    assert status == 0, err
    written = json.loads((tmp_path / "out" / "metrics.json").read_text())
    value = written["scores"]["fid_70_pixels"]
    assert f"fid_70_pixels      {value:.6g}" in out and "not with published ones" in out
    status, out, err = run("sample", [f"samples={tmp_path / 'out' / 'images'}", *asked], monkeypatch, capsys)
    assert status == 0, err
    again = json.loads((tmp_path / "out" / "images" / "metrics.json").read_text())
    assert again["scores"] == written["scores"]


def test_bits_per_dim_are_those_of_the_checkpoint_and_nothing_is_drawn_for_them_alone(tmp_path, monkeypatch, capsys):
    path = save_tiny(tmp_path / "model.safetensors")
    line = [f"checkpoint={path}", f"out_dir={tmp_path / 'out'}", "sampler.num_steps=2", "num_samples=6", "seed=3"]
    status, out, err = run("sample", [*line, "metrics=[bits_per_dim]", "reference=digits"], monkeypatch, capsys)
    assert status == 0, err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["metrics.json"]
    alone = json.loads((tmp_path / "out" / "metrics.json").read_text())
    expected = bits_per_dim(load_model(path), open_data("digits").val_set, 3, num_images=6)
    assert alone["scores"] == {"bits_per_dim_6": pytest.approx(expected["bits_per_dim"], rel=1e-5)}
    assert "6 of the 597 images of data set digits (val), 100 steps" in out
    both = [*line, "metrics=[kid,bits_per_dim]", "reference=digits", "features=pixels"]
    status, out, err = run("sample", both, monkeypatch, capsys)
    assert status == 0, err
    scores = json.loads((tmp_path / "out" / "metrics.json").read_text())["scores"]
    assert list(scores) == ["kid_6_pixels", "kid_std_6_pixels", "bits_per_dim_6"]
    assert scores["bits_per_dim_6"] == alone["scores"]["bits_per_dim_6"]


def test_scores_of_former_samples_do_not_stay_beside_new_ones(tmp_path, monkeypatch, capsys):
    line = [f"checkpoint={save_tiny(tmp_path / 'model.safetensors')}", f"out_dir={tmp_path / 'out'}"]
    line += ["sampler.num_steps=2", "num_samples=4"]
    scored = [*line, "metrics=[kid]", "reference=digits", "features=pixels"]
    assert run("sample", scored, monkeypatch, capsys)[0] == 0
    assert (tmp_path / "out" / "metrics.json").exists()
    assert run("sample", [*line, "seed=5", "overwrite=true"], monkeypatch, capsys)[0] == 0
    assert not (tmp_path / "out" / "metrics.json").exists()


def test_real_users_name_inceptions_weights(inception_weights, tmp_path, monkeypatch, capsys):
    np.savez(tmp_path / "mine.npz", arr_0=random_images(4, size=8, channels=3))
    np.savez(tmp_path / "statistics.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    line = [f"samples={tmp_path / 'mine.npz'}", f"inception_weights={inception_weights}", "metrics=[is]"]
    status, out, err = run("sample", line, monkeypatch, capsys)
    assert status == 0, err
    result = json.loads((tmp_path / "mine.metrics.json").read_text())
    (name, _) = result["scores"]
    assert name.startswith("is_4_inception_") and result["reference"] is None
    assert "1 splits" in result["settings"]["is"] and name in out


def test_stored_statistics_are_the_other_side_of_fid(tmp_path):
    x, y = images(300), images(200, seed=1, level=140)
    flat = statistics_of(extracted(y, pixels(), layers=(POOLED,), channels=1)[POOLED])
    np.savez(tmp_path / "pytorch_fid.npz", mu=flat.mu, sigma=flat.sigma)
    stored = Evaluation(["fid"], pixels(), open_reference(tmp_path / "pytorch_fid.npz"))(x)
    compared = Evaluation(["fid"], pixels(), Reference(source="real", images=y))(x)
    assert stored["scores"] == pytest.approx(compared["scores"])
    assert "statistics stored in" in stored["reference"] and "unknown number" in stored["reference"]
