"""Which images, or which statistics of images, are compared? From a data set, a folder, or a file of arrays.

Images are read in batches, as often as they are asked for, so that sets larger than memory can be measured.
"""

import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from PIL import Image

from diffusion.images import to_pil, to_uint8

SPLITS = ("train", "val")
GREY_MODES = ("1", "L", "LA", "La", "F")
LAYOUTS = (
    "arr_0 (uint8 images, N x H x W x C: guided-diffusion's samples), or mu (D,) and sigma (D, D) (statistics of "
    "Inception features: guided-diffusion's references, pytorch-fid)"
)


@dataclass(frozen=True, kw_only=True)
class Images:
    """`count` images of `shape` (H, W, C), grey (C = 1) or RGB (3): `read(batch_size)` yields them, uint8 (B, H, W, C).

    `source` says where they come from, `resize` what was done to their size (None: nothing).
    """

    source: str
    count: int
    shape: tuple[int, int, int]
    read: Callable[[int], Iterator[np.ndarray]]
    resize: int | None = None

    @property
    def described(self) -> str:
        """Say how many there are, of which size and kind, and from where."""
        height, width, channels = self.shape
        return f"{self.count} {'grey' if channels == 1 else 'RGB'} images of {height}x{width} from {self.source}"


class Statistics(NamedTuple):
    """Mean (D,) and covariance (D, D) of features, float64."""

    mu: np.ndarray
    sigma: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Reference:
    """What samples are compared with: images, statistics of features (`spatial` for sFID), or both."""

    source: str
    images: Images | None = None
    statistics: Statistics | None = None
    spatial: Statistics | None = None


def open_reference(
    reference: str | Path,
    *,
    split: str | None = None,
    settings: Mapping[str, Any] | None = None,
    resize: int | None = None,
) -> Reference:
    """Open a data set by its config's name, a folder of images, or an .npz of images or statistics.

    `split` ("train", as without, or "val") and `settings` are those of a data set. `resize` N makes every image NxN:
    shorter side resized by Lanczos, centre cut out. Raises ValueError, and says what was found, for anything else.
    """
    from diffusion.data.named import data_names, open_data

    if str(reference) in data_names():
        data = open_data(str(reference), settings)
        return of_data(data, split or "train", name=str(reference), resize=resize)
    if settings:
        raise ValueError(f"reference_data={dict(settings)} is for data sets, but reference={reference} is none")
    path = Path(reference).expanduser()
    if path.suffix == ".npz" and path.is_file():
        return of_npz(path, resize=resize)
    if not path.exists():
        raise ValueError(
            f"there is no reference {str(reference)!r}; give a folder of images, an .npz file, or one of the data sets "
            + ", ".join(data_names())
        )
    images = open_images(path, resize=resize)
    return Reference(source=images.source, images=images)


def open_images(path: str | Path, *, resize: int | None = None) -> Images:
    """Open the images of an .npz file, of a folder with its folders, or of a folder that sample.py wrote."""
    path = Path(path).expanduser()
    if path.is_dir():
        inside = path / "samples.npz"
        return open_images(inside, resize=resize) if inside.is_file() else of_folder(path, resize=resize)
    if not path.exists():
        raise ValueError(f"there is no file or folder {path}; give an .npz file or a folder of images")
    if path.suffix != ".npz":
        raise ValueError(f"{path} is neither an .npz file nor a folder of images")
    found = of_npz(path, resize=resize)
    if found.images is None:
        raise ValueError(f"{path} holds statistics and no images (arr_0); it can be a reference, but not samples")
    return found.images


# ---------------------------------------------------------------------------------------------------------------------
# the kinds


def of_array(images: np.ndarray, source: str, *, resize: int | None = None) -> Images:
    """Take uint8 images (N, H, W, C) that are in memory."""
    shape = _checked(images.shape, images.dtype, source)

    def read(batch_size: int) -> Iterator[np.ndarray]:
        for start in range(0, len(images), batch_size):
            yield images[start : start + batch_size]

    return resized(Images(source=source, count=len(images), shape=shape, read=read), resize)


def of_data(data: Any, split: str, *, name: str, resize: int | None = None) -> Reference:
    """Take the train or val images of a datamodule that is set up: without mirrors, in the 256 levels of samples."""
    if split not in SPLITS:
        raise ValueError(f"reference_split must be one of {', '.join(SPLITS)}, got {split!r}")
    dataset = data.train_set if split == "train" else data.val_set

    def read(batch_size: int) -> Iterator[np.ndarray]:
        for start in range(0, len(dataset), batch_size):
            yield to_uint8(dataset.samples(range(start, min(start + batch_size, len(dataset))))["image"])

    channels, height, width = data.shape
    source = f"data set {name} ({split})"
    images = Images(source=source, count=len(dataset), shape=(height, width, channels), read=read)
    return Reference(source=source, images=resized(images, resize))


def of_folder(root: Path, *, resize: int | None = None) -> Images:
    """Take all images of a folder and below, in the order of their names; all grey ones are grey, else all are RGB.

    Every file is read once before: ValueError lists those that cannot be read, and sizes that differ (without
    `resize`). A file of 16 bits or with transparency becomes what training would make of it.
    """
    from diffusion.data.image_folder import flattened, squared
    from diffusion.data.listing import decode, image_names

    names = sorted(image_names(root))
    if not names:
        raise ValueError(f"there are no images in {root.absolute()}, nor in the folders below")
    size, channels = _surveyed(root, names, resize)

    def load(name: str) -> np.ndarray:
        image = flattened(decode(root / name), channels)
        return np.array(image if resize is None else squared(image, resize)).reshape(*size, channels)

    def read(batch_size: int) -> Iterator[np.ndarray]:
        with ThreadPoolExecutor() as pool:
            for start in range(0, len(names), batch_size):
                yield np.stack(list(pool.map(load, names[start : start + batch_size])))

    return Images(source=str(root), count=len(names), shape=(*size, channels), read=read, resize=resize)


class _Seen(NamedTuple):
    """What reading a file showed: its (height, width) and mode, or why it cannot be read."""

    size: tuple[int, int] | None = None
    mode: str = ""
    reason: str = ""


def _surveyed(root: Path, names: Sequence[str], resize: int | None) -> tuple[tuple[int, int], int]:
    """Read every image once; return the (height, width) and the channels that all will have."""
    from rich.progress import track

    from diffusion.data.listing import UNREADABLE, decode, some

    def look(name: str) -> _Seen:
        try:
            image = decode(root / name)
        except UNREADABLE as error:
            return _Seen(reason=f"{type(error).__name__}: {error}")
        return _Seen((image.height, image.width), image.mode)

    with ThreadPoolExecutor() as pool:
        few = len(names) < 1000
        seen = list(track(pool.map(look, names), f"checking {len(names)} images", total=len(names), disable=few))
    if broken := [f"{name} ({one.reason})" for name, one in zip(names, seen, strict=True) if one.reason]:
        raise ValueError(
            f"{len(broken)} of {len(names)} images in {root} cannot be read: {some(broken, 20)}; scores of the others "
            "would be those of another set, so repair or remove them"
        )
    sizes: dict[tuple[int, int], str] = {}
    for name, one in zip(names, seen, strict=True):
        sizes.setdefault(one.size, name)
    if len(sizes) > 1 and resize is None:
        examples = some([f"{width}x{height} ({name})" for (height, width), name in sizes.items()])
        raise ValueError(
            f"the images in {root} have {len(sizes)} sizes: {examples}; give resize=N, which makes every image NxN "
            "(shorter side resized, centre cut out), samples and reference alike"
        )
    channels = 1 if all(one.mode in GREY_MODES or one.mode.startswith("I") for one in seen) else 3
    return (next(iter(sizes)) if resize is None else (resize, resize)), channels


def of_npz(path: Path, *, resize: int | None = None) -> Reference:
    """Take the images (arr_0) and the statistics (mu, sigma, mu_s, sigma_s) of a file; objects are never unpickled."""
    try:
        with zipfile.ZipFile(path) as file:
            arrays = {name.removesuffix(".npy"): _header(file, name) for name in file.namelist()}
    except (zipfile.BadZipFile, ValueError, EOFError) as error:
        raise ValueError(f"{path} is damaged or no .npz file ({error}); expected are {LAYOUTS}") from error
    if "arr_0" not in arrays and not {"mu", "sigma"} <= arrays.keys():
        found = ", ".join(f"{name} {_worded(*about)}" for name, about in arrays.items()) or "nothing"
        raise ValueError(f"{path} has an unknown layout: it holds {found}; expected are {LAYOUTS}")
    images = None
    if "arr_0" in arrays:
        shape, dtype, fortran = arrays["arr_0"]
        if fortran:
            raise ValueError(f"arr_0 of {path} lies in Fortran's order; save it as np.ascontiguousarray(images)")
        size = _checked(shape, dtype, f"arr_0 of {path}")
        images = Images(source=str(path), count=shape[0], shape=size, read=_npz_reader(path, shape))
        images = resized(images, resize)
    return Reference(
        source=str(path),
        images=images,
        statistics=_statistics(path, arrays, "mu", "sigma"),
        spatial=_statistics(path, arrays, "mu_s", "sigma_s"),
    )


def _npz_reader(path: Path, shape: tuple[int, ...]) -> Callable[[int], Iterator[np.ndarray]]:
    """Return what reads arr_0 a batch at a time: `np.load` would take a large file into memory whole."""
    each = int(np.prod(shape[1:]))

    def read(batch_size: int) -> Iterator[np.ndarray]:
        with zipfile.ZipFile(path) as file, file.open("arr_0.npy") as array:
            _npy_header(array)
            for start in range(0, shape[0], batch_size):
                number = min(batch_size, shape[0] - start)
                data = array.read(number * each)
                if len(data) != number * each:
                    raise ValueError(f"{path} is truncated: image {start + len(data) // each} is not there whole")
                yield np.frombuffer(data, np.uint8).reshape(number, *shape[1:])

    return read


_Header = tuple[tuple[int, ...], np.dtype, bool]  # shape, type, Fortran's order


def _header(file: zipfile.ZipFile, name: str) -> _Header:
    with file.open(name) as array:
        return _npy_header(array)


def _npy_header(array: IO[bytes]) -> _Header:
    version = np.lib.format.read_magic(array)
    reader = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = reader(array)
    return shape, dtype, fortran


def _statistics(path: Path, arrays: Mapping[str, _Header], mu: str, sigma: str) -> Statistics | None:
    if not {mu, sigma} <= arrays.keys():
        return None
    with np.load(path, allow_pickle=False) as file:
        found = Statistics(file[mu].astype(np.float64), file[sigma].astype(np.float64))
    if found.mu.ndim != 1 or found.sigma.shape != (len(found.mu), len(found.mu)):
        raise ValueError(
            f"{path} has {mu} {_worded(*arrays[mu])} and {sigma} {_worded(*arrays[sigma])}; "
            "expected are (D,) and (D, D)"
        )
    if not (np.isfinite(found.mu).all() and np.isfinite(found.sigma).all()):
        raise ValueError(f"{mu} and {sigma} of {path} are not all finite; take another copy, or make them anew")
    return found


def _worded(shape: tuple[int, ...], dtype: np.dtype, fortran: bool = False) -> str:
    return f"{dtype} ({', '.join(map(str, shape))})"


def _checked(shape: tuple[int, ...], dtype: np.dtype, source: str) -> tuple[int, int, int]:
    """Return (H, W, C) of uint8 images (N, H, W, C), or raise ValueError that says what was found."""
    if dtype == np.uint8 and len(shape) == 4 and shape[-1] in (1, 3):
        return tuple(shape[1:])
    hint = ""
    if len(shape) == 4 and shape[1] in (1, 3) and shape[-1] not in (1, 3):
        hint = "; the channels come last: images.transpose(0, 2, 3, 1)"
    elif dtype != np.uint8:
        hint = "; write values 0..255: (127.5 * (x + 1)).round().clip(0, 255).astype(np.uint8) for x in [-1, 1]"
    raise ValueError(f"images are uint8 (N, H, W, 1 or 3), but {source} is {_worded(shape, dtype)}{hint}")


def resized(images: Images, size: int | None) -> Images:
    """Return images whose shorter side is resized to `size` and whose centre is cut out; None: as they are."""
    if size is None or images.shape[:2] == (size, size):
        return replace(images, resize=size)

    def read(batch_size: int) -> Iterator[np.ndarray]:
        from diffusion.data.image_folder import squared

        for batch in images.read(batch_size):
            made: list[Image.Image] = [squared(to_pil(image), size) for image in batch]
            yield np.stack([np.array(image) for image in made]).reshape(len(batch), size, size, images.shape[2])

    return replace(images, shape=(size, size, images.shape[2]), read=read, resize=size)
