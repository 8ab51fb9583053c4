"""Digits and torchvision's sets: the numbers that the datamodules promise, and every config builds."""

import gzip
import hashlib
import pickle
import subprocess
import sys
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from sklearn.datasets import load_digits

from diffusion.data.digits import Digits
from diffusion.data.torchvision_sets import CIFAR10, MNIST, FashionMNIST

CONFIGS = Path(__file__).parents[1] / "configs" / "data"


def test_digits_are_sklearns_first_1200_and_last_597_and_invertible():
    data = Digits(batch_size=1200)
    data.setup("fit")
    assert data.shape == (1, 8, 8) and data.num_classes == 10 and data.class_names == tuple("0123456789")
    digits = load_digits()
    pixels = torch.from_numpy(digits.images)[:, None]
    for dataset, rows in ((data.train_set, slice(None, 1200)), (data.val_set, slice(1200, None))):
        batch = dataset.__getitems__([(0, index) for index in range(len(dataset))])
        assert batch["image"].dtype == torch.float32
        assert torch.equal((batch["image"] + 1) * 8, pixels[rows].float())
        assert batch["label"].tolist() == digits.target[rows].tolist()
        stored = ((batch["image"] + 1) * 127.5).round()  # as uint8 0..255
        assert torch.equal((stored * 16 / 255).round(), pixels[rows].float())


def test_digits_come_writer_by_writer_as_documented():
    """The same sequence of labels (two writers' have a flaw) begins anew where the docstring says, and at no other."""
    text = "".join(map(str, load_digits().target))
    starts = [0, 130, 256, 386, 516, 646, 776, 1029, 1157, 1287, 1415, 1667]
    assert [k for k in range(len(text)) if text.startswith("0123456789" * 3, k)] == starts
    counts = [[text[:1200].count(digit), text[1200:].count(digit)] for digit in "0123456789"]
    assert np.min(counts, 0).tolist() == [117, 55] and np.max(counts, 0).tolist() == [123, 62]


@pytest.mark.parametrize(("key", "value", "fact"), [("channels", 3, 1), ("image_size", 16, 8), ("num_classes", 2, 10)])
def test_digits_settings_must_be_true(key, value, fact):
    with pytest.raises(
        ValueError, match=rf"data\.{key} is {value}, but the digits have {fact}; set data\.{key}={fact}"
    ):
        Digits(**{key: value})


# -- torchvision's sets, in their own formats on disk ------------------------------------------------------------------


def write_idx(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    header = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    path.write_bytes(header + array.tobytes())


@pytest.fixture(params=[MNIST, FashionMNIST])
def grey(request, tmp_path):
    """A class and a folder with six training images and three test images of it."""
    folder = tmp_path / request.param.__name__ / "raw"
    for part, number in (("train", 6), ("t10k", 3)):
        images = np.arange(number, dtype=np.uint8)[:, None, None] + np.full((1, 28, 28), 100, np.uint8)
        write_idx(folder / f"{part}-images-idx3-ubyte", images)
        write_idx(folder / f"{part}-labels-idx1-ubyte", np.arange(number, dtype=np.uint8))
    return request.param, tmp_path


def test_grey_sets_load_from_disk_without_a_network(grey, no_network):
    make, root = grey
    data = make(root, batch_size=6)
    assert data.shape == (1, 28, 28) and len(data.class_names) == data.num_classes == 10
    batch = next(iter(data.train_dataloader()))
    assert sorted(batch["label"].tolist()) == list(range(6))
    assert torch.equal(((batch["image"][:, 0, 5, 5] + 1) * 127.5).round(), 100.0 + batch["label"])
    assert len(data.val_set) == 3


def test_a_black_frame_enlarges_grey_sets(grey, no_network):
    make, root = grey
    data = make(root, image_size=32, batch_size=6)
    image = next(iter(data.train_dataloader()))["image"]
    assert image.shape == (6, 1, 32, 32)
    assert (image[:, :, [0, 1, 30, 31]] == -1).all() and (image[:, :, 2:30, 2:30] > -1).all()


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    from torchvision import datasets

    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    rng = np.random.default_rng(0)
    sums = {}
    for name in ["data_batch_1", "data_batch_2", "test_batch"]:
        entry = {"data": rng.integers(0, 256, (4, 3072), np.uint8), "labels": [3, 1, 2, 0]}
        (folder / name).write_bytes(pickle.dumps(entry))
        sums[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [str(k) for k in range(10)]}))
    meta_sum = hashlib.md5((folder / "batches.meta").read_bytes()).hexdigest()
    monkeypatch.setattr(datasets.CIFAR10, "train_list", [[n, s] for n, s in sums.items() if n != "test_batch"])
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(datasets.CIFAR10, "meta", datasets.CIFAR10.meta | {"md5": meta_sum})
    return tmp_path


def test_cifar_loads_from_disk_without_a_network(cifar, no_network):
    data = CIFAR10(cifar, batch_size=8)
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].shape == (8, 3, 32, 32)
    stored = pickle.loads((cifar / "cifar-10-batches-py" / "data_batch_1").read_bytes())["data"][0].reshape(3, 32, 32)
    assert np.array_equal(((data.train_set[0]["image"] + 1) * 127.5).round().numpy(), stored)
    assert (len(data.train_set), len(data.val_set)) == (8, 4)
    assert data.train_set[0]["label"] == 3 and data.class_names[3] == "cat"


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr("urllib.request.urlopen", refuse)


@pytest.mark.parametrize(
    ("make", "file", "folder"),
    [
        (MNIST, "train-images-idx3-ubyte.gz", "MNIST/raw"),
        (FashionMNIST, "t10k-labels-idx1-ubyte.gz", "FashionMNIST/raw"),
        (CIFAR10, "cifar-10-python.tar.gz", ""),
    ],
)
def test_without_files_and_network_the_error_says_what_goes_where(tmp_path, no_network, make, file, folder):
    with pytest.raises(ValueError) as caught:
        make(tmp_path).prepare_data()
    message = str(caught.value)
    assert f"/{file}\n" in message and f"into {tmp_path / folder}," in message and "could not be downloaded" in message
    with pytest.raises(ValueError, match="is not there or damaged"):
        make(tmp_path, download=False).train_dataloader()


def test_packed_files_put_there_by_hand_are_unpacked(grey, no_network, monkeypatch):
    """What the error above tells people to do works."""
    from torchvision import datasets

    make, root = grey
    resources = []
    for path in sorted((root / make.__name__ / "raw").iterdir()):
        packed = gzip.compress(path.read_bytes())
        path.with_name(path.name + ".gz").write_bytes(packed)
        path.unlink()
        resources.append((path.name + ".gz", hashlib.md5(packed).hexdigest()))
    monkeypatch.setattr(getattr(datasets, make.__name__), "resources", resources)
    data = make(root, batch_size=6)
    data.prepare_data()
    assert len(next(iter(data.train_dataloader()))["label"]) == 6


def test_a_damaged_file_is_an_error_that_says_what_to_do(grey, no_network):
    make, root = grey
    path = root / make.__name__ / "raw" / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"(?s)damaged.*Get these files"):
        make(root, download=False).setup()


@pytest.mark.parametrize(
    ("make", "wrong", "message"),
    [
        (CIFAR10, {"image_size": 64}, r"data\.image_size is 64, but CIFAR10 is 32x32; allowed: 32\."),
        (MNIST, {"image_size": 16}, r"allowed: 28 or more \(a black frame"),
        (MNIST, {"channels": 3}, r"set data\.channels=1"),
        (CIFAR10, {"num_classes": 100}, r"set data\.num_classes=10"),
    ],
)
def test_settings_must_fit_the_set(make, wrong, message):
    with pytest.raises(ValueError, match=message):
        make(**wrong)


# -- configs -----------------------------------------------------------------------------------------------------------


# Shards and latents take what they are from their files: test_shards.py, test_latent_cache_task.py.
SETS = [path for path in sorted(CONFIGS.glob("*.yaml")) if path.stem not in ("shards", "latents")]


@pytest.mark.parametrize("path", SETS, ids=lambda path: path.stem)
def test_every_data_config_builds_what_it_says(path, tmp_path):
    config = OmegaConf.create({"seed": 7, "data": OmegaConf.load(path)})
    if OmegaConf.is_missing(config.data, "root"):
        config.data.root = str(tmp_path)
    data = instantiate(config.data, _convert_="all")
    assert data.seed == 7
    assert data.shape == (config.data.channels, config.data.image_size, config.data.image_size)
    assert data.num_classes == config.data.num_classes
    assert len(data.class_names or ()) == (data.num_classes or 0)


def test_importing_the_package_loads_neither_torch_nor_torchvision():
    code = "import sys, diffusion.data; print({'torch', 'lightning', 'torchvision', 'PIL'} & sys.modules.keys())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


def test_the_public_names_exist():
    import diffusion.data

    for name in diffusion.data.__all__:
        assert getattr(diffusion.data, name).__name__ == name
