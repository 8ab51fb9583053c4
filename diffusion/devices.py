"""Where and how precisely is a model computed: which device, which type, and which of its parts are there at a time?"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from diffusion.guidance import weights_dtype

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}
HALF = (torch.bfloat16, torch.float16)
OFFLOADS = (None, "sequential")


def choose_device(name: str) -> torch.device:
    """Return the named device; "auto" is the best one here. Raises ValueError where this machine has no such device."""
    if name == "auto":
        mps = torch.backends.mps.is_available()
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if mps else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device={name} cannot be used here ({reason}); use device=auto or device=cpu") from error
    return device


def choose_dtype(name: str, device: torch.device | None = None, *, published: bool = False) -> torch.dtype:
    """Return the dtype of this name, one of `DTYPES`.

    "auto" is float32, but for `published` weights on a GPU: those are bfloat16 where it knows that type, else float16.
    """
    if name == "auto":
        if not published or device is None or device.type != "cuda":
            return torch.float32
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if name not in DTYPES:
        raise ValueError(f"dtype must be auto or one of {', '.join(DTYPES)}, got {name!r}")
    return DTYPES[name]


def check_offload(offload: str | None) -> None:
    """Raise ValueError for a way of offloading that there is not."""
    if offload not in OFFLOADS:
        raise ValueError(f"offload must be sequential or null, got {offload!r}")


@contextlib.contextmanager
def resident(module: nn.Module | None, device: torch.device, offload: str | None) -> Iterator[None]:
    """Have a part of a model on the device; with offload="sequential" only for as long as this lasts."""
    moved = offload is not None and module is not None
    if moved:
        module.to(device)
    try:
        yield
    finally:
        if moved:
            module.to("cpu")


def half_weights(module: nn.Module | None) -> torch.dtype | None:
    """Return the type of a module's weights where it is a half-precision one, else None."""
    dtype = None if module is None else weights_dtype(module)
    return dtype if dtype in HALF else None


def in_own_precision(net: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return a network with half-precision weights as one that takes x and conditions of any precision."""
    dtype = half_weights(net) if isinstance(net, nn.Module) else None
    if dtype is None:
        return net

    def call(x: Tensor, t: Tensor, **condition: Any) -> Tensor:
        own = {k: v.to(dtype) if v is not None and v.is_floating_point() else v for k, v in condition.items()}
        return net(x.to(dtype), t, **own)

    return call
