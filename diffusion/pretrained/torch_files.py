"""How are the tensors of torch.save's files read when nothing in them may run?

PyTorch's restricted unpickler builds tensors and plain containers; classes of training frameworks that old checkpoints
mention become inert stand-ins, by an explicit list, and anything else is refused.
"""

import contextlib
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class Inert:
    """What stands for an object of a training framework: it takes whatever it is given and does nothing."""

    def __new__(cls, *_: Any, **__: Any) -> "Inert":
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __hash__(self) -> int:
        return id(self)


# What published checkpoints mention beside tensors: callbacks and settings of their training. None is imported.
HARMLESS_GLOBALS = (
    *(
        f"{lightning}.callbacks.{name}"
        for lightning in ("pytorch_lightning", "lightning.pytorch")
        for name in (
            "model_checkpoint.ModelCheckpoint",
            "early_stopping.EarlyStopping",
            "lr_monitor.LearningRateMonitor",
            "progress.tqdm_progress.TQDMProgressBar",
            "timer.Timer",
        )
    ),
    *("pytorch_lightning.utilities.enums.LightningEnum", "pytorch_lightning.trainer.states.TrainerFn"),
    *("omegaconf.dictconfig.DictConfig", "omegaconf.listconfig.ListConfig", "omegaconf.base.ContainerMetadata"),
    *("omegaconf.base.Metadata", "omegaconf.nodes.AnyNode", "typing.Any"),
    *("torch.nn.modules.container.ParameterDict", "torch.nn.modules.container.ParameterList"),
    *("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar", "numpy.dtype"),
    *("numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct", "numpy.ndarray"),
    *("pathlib.PosixPath", "pathlib.WindowsPath", "pathlib.Path", "argparse.Namespace"),
    *("torch.optim.adamw.AdamW", "torch.optim.adam.Adam", "torch.optim.lr_scheduler.LambdaLR"),
)
# These are dictionaries by another name, and the restricted unpickler fills dictionaries only.
DICTIONARIES = (
    "pytorch_lightning.utilities.parsing.AttributeDict",
    "lightning.fabric.utilities.data.AttributeDict",
    "lightning_fabric.utilities.data.AttributeDict",
    "collections.defaultdict",
    "builtins.dict",
)
NESTS = ("state_dict", "model_state_dict", "model", "module", "params_ema", "params", "weights", "net")
LONGEST_PICKLE = 64_000_000  # bytes of names and shapes; Stable Diffusion has 0.3 MB
FAILURES = (
    *(RuntimeError, EOFError, ValueError, OSError, KeyError, IndexError, AttributeError, TypeError, AssertionError),
    *(MemoryError, OverflowError, RecursionError, ImportError, zipfile.BadZipFile, SyntaxError),
)


def read_torch_file(path: Path) -> tuple[dict[str, Tensor], dict[str, str], tuple[str, ...]]:
    """The weights of a .ckpt, .pt, .pth or .bin file, mapped where it is a zip; its plain facts; what else it holds.

    The weights are found in a `state_dict` or the like where the file has one. Raises ValueError for a damaged file
    and for one that asks for anything but tensors, plain data and `HARMLESS_GLOBALS`.
    """
    zipped = zipfile.is_zipfile(path)
    if zipped:
        _check_zip(path)
    try:
        with _stand_ins():
            stored = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path} {_refusal(error)}") from error
    except FAILURES as error:
        raise ValueError(
            f"{path} cannot be read as a file of torch.save ({_reason(error)}); copy or download it again"
        ) from error
    return _weights(path, stored)


@contextlib.contextmanager
def _stand_ins() -> Iterator[None]:
    allowed = [(type("Inert", (Inert,), {"name": name}), name) for name in HARMLESS_GLOBALS]
    allowed += [(OrderedDict, name) for name in DICTIONARIES]
    with torch.serialization.safe_globals(allowed):
        yield


def _check_zip(path: Path) -> None:
    """torch.save does not compress, and what is compressed could unfold to any size; it leaves checksums unchecked."""
    try:
        with zipfile.ZipFile(path) as archive:
            packed = [info.filename for info in archive.infolist() if info.compress_type != zipfile.ZIP_STORED]
            if not packed:
                for info in archive.infolist():
                    if info.filename.endswith("data.pkl") and info.file_size < LONGEST_PICKLE:
                        archive.read(info)  # raises BadZipFile for a wrong checksum
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, EOFError, RuntimeError) as error:
        raise ValueError(f"{path} is a damaged zip ({_reason(error)}); copy or download it again") from error
    if packed:
        raise ValueError(f"{path} is a compressed zip ({packed[0][:60]}), which torch.save never writes; unpack it")


def _refusal(error: Exception) -> str:
    text = str(error)
    if "GLOBAL" in text:
        name = text.split("GLOBAL ", 1)[1].split()[0]
        return (
            f"asks for {name[:80]}, which is not on the list of harmless names; it was not looked up, and nothing was "
            "run. A file of weights needs no code: take a .safetensors copy"
        )
    return f"holds more than tensors or is damaged ({_reason(error)}); nothing was run. Take a .safetensors copy"


def _reason(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:100]}" if text else type(error).__name__


def _weights(path: Path, stored: Any) -> tuple[dict[str, Tensor], dict[str, str], tuple[str, ...]]:
    if not isinstance(stored, Mapping):
        raise ValueError(f"{path} holds a {type(stored).__name__} and not tensors by name; give a state dict")
    nest = next((n for n in NESTS if isinstance(stored.get(n), Mapping) and _tensors(stored[n])), None)
    state = stored if nest is None else stored[nest]
    weights = _tensors(state)
    if not weights and (nested := _nested(stored)):
        weights = nested
    if not weights:
        kinds = ", ".join(str(key)[:30] for key in list(stored)[:6])
        raise ValueError(f"{path} holds no tensors by name (it has {kinds or 'nothing'}); give a file of weights")
    for name, tensor in weights.items():
        _check_tensor(path, name, tensor)
    facts = {**(stored if nest else {}), **state}
    plain = {str(key): str(value) for key, value in facts.items() if isinstance(value, (str, int, float, bool))}
    extras = tuple(str(key) for key in stored if key != nest and str(key) not in plain) if nest else ()
    return weights, {key: value for key, value in plain.items() if len(value) < 10_000}, extras


def _tensors(state: Mapping[Any, Any]) -> dict[str, Tensor]:
    return {key: value.detach() for key, value in state.items() if isinstance(key, str) and isinstance(value, Tensor)}


def _nested(stored: Mapping[Any, Any]) -> dict[str, Tensor]:
    """Tensors one level down, as textual inversions have them: string_to_param.* and the like."""
    found = {}
    for key, value in stored.items():
        inner = value.state if isinstance(value, Inert) else value
        inner = inner.get("_parameters", inner) if isinstance(inner, Mapping) else {}
        found |= {f"{key}.{name}": tensor for name, tensor in _tensors(inner).items()}
    return found


def _check_tensor(path: Path, name: str, tensor: Tensor) -> None:
    """A dense tensor that its own bytes hold: strides of 0 would let a small file fill the memory."""
    dense = tensor.layout is torch.strided and not tensor.is_quantized and tensor.device.type == "cpu"
    if not dense or tensor.numel() * tensor.itemsize > tensor.untyped_storage().nbytes():
        raise ValueError(f"{path} holds {name[:80]!r} as no plain tensor; take another copy of the file")
