"""How is a network trained that does not fit one device? Weights, gradients, optimizer and averages in shards (FSDP).

PyTorch's `fully_shard` (FSDP2) under Lightning's ModelParallelStrategy: each rank holds a share of every weight, and
the blocks of a network are put together one after the other while they compute. Checkpoints are folders of shards.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor, zeros

from diffusion.models.attention import SelfAttention, TransformerBlock
from diffusion.models.layers import ResidualBlock
from diffusion.models.text import EncoderBlock
from diffusion.training.checkpoint_files import META

BLOCKS = (ResidualBlock, TransformerBlock, SelfAttention, EncoderBlock)
CALLBACKS = "callbacks"  # of a checkpoint, and what the shards of their tensors are kept under


class Sharded(ModelParallelStrategy):
    """Train a task whose `configure_model` shards its networks over all ranks: `trainer=fsdp`.

    A checkpoint is a folder: a file of shards a rank, .metadata, and meta.pt with all that is no tensor of network,
    optimizer or averages. Another number of ranks can go on from it. On CPUs ranks talk over gloo.
    """

    def setup_environment(self) -> None:
        """Let all ranks hold one copy of the weights together."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        self._tensor_parallel_size = 1
        super().setup_environment()

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """Write the folder `filepath`; every rank its own shards."""
        path = Path(self.broadcast(str(filepath)))
        state = {"state_dict": checkpoint.pop("state_dict")}
        state |= {f"optimizer_{i}": found for i, found in enumerate(checkpoint.pop("optimizer_states", []))}
        tensors: dict[str, DTensor] = {}
        checkpoint[CALLBACKS] = without_shards(checkpoint.get(CALLBACKS, {}), tensors)
        if tensors:
            state[CALLBACKS] = tensors
        path.mkdir(parents=True, exist_ok=True)
        dcp.save(state, storage_writer=dcp.FileSystemWriter(path, single_file_per_rank=True))
        if self.is_global_zero:
            torch.save(checkpoint, path / META)

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Fill network and optimizer with a checkpoint of shards, or of one device, and return the rest of it."""
        path = Path(self.broadcast(str(checkpoint_path)))
        checkpoint = super().load_checkpoint(path, weights_only=weights_only)
        if path.is_dir():
            found = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
            wanted = {key.removeprefix(f"{CALLBACKS}."): of for key, of in found.items() if key.startswith(CALLBACKS)}
            shards = {
                key: zeros(of.size, dtype=of.properties.dtype, device_mesh=mesh_of(self), placements=[Shard(0)])
                for key, of in wanted.items()
            }
            if shards:
                dcp.load({CALLBACKS: shards}, storage_reader=dcp.FileSystemReader(path))
            checkpoint[CALLBACKS] = with_shards(checkpoint[CALLBACKS], shards)
        return checkpoint


def mesh_of(strategy: ModelParallelStrategy) -> DeviceMesh:
    """Return the ranks that hold the weights together."""
    return strategy.device_mesh["data_parallel"]


def shard(network: nn.Module, mesh: DeviceMesh) -> None:
    """Spread a network's weights over the ranks of a mesh, block by block; its `forward` puts them together.

    What is freed after a block's forward pass comes back for its backward pass. Also the outermost part is freed, so
    that averages can be lent to it at any time.
    """
    for parameter in network.parameters():  # our networks keep channels_last, which `fully_shard` refuses
        parameter.data = parameter.data.contiguous()
    for module in reversed(list(network.modules())):  # inner blocks first
        if isinstance(module, BLOCKS) and module is not network:
            fully_shard(module, mesh=mesh, reshard_after_forward=True)
    fully_shard(network, mesh=mesh, reshard_after_forward=True)


def is_sharded(module: nn.Module) -> bool:
    """Say whether a network's weights are spread over ranks, which all must take part when it computes."""
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


def local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a tensor in shards, sharing its memory; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor in shards as one, on every rank; all of them must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def spread_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """Return a tensor on a parameter's device, and in shards where that is; all ranks then take part."""
    if isinstance(parameter, DTensor) and not isinstance(tensor, DTensor):
        return distribute_tensor(tensor.to(parameter.device), parameter.device_mesh, parameter.placements)
    return tensor.to(parameter.device)


def norm_of(tensors: Iterable[Tensor]) -> Tensor:
    """Return the 2-norm of all tensors together, on every rank that of the whole."""
    tensors = list(tensors)
    norm = nn.utils.get_total_norm([local(tensor) for tensor in tensors])
    meshes = {tensor.device_mesh for tensor in tensors if isinstance(tensor, DTensor)}
    for mesh in meshes:  # one, as long as nothing else is parallel
        square = norm.float().square()
        dist.all_reduce(square, group=mesh.get_group())
        norm = square.sqrt()
    return norm


def clip(parameters: list[nn.Parameter], max_norm: float) -> Tensor:
    """Scale all gradients down where their norm exceeds `max_norm`, and return the norm from before."""
    if not any(isinstance(parameter, DTensor) for parameter in parameters):
        return nn.utils.clip_grad_norm_(parameters, max_norm)
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = norm_of(gradients)
    torch._foreach_mul_([local(gradient) for gradient in gradients], (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm


# ---------------------------------------------------------------------------------------------------------------------
# tensors in shards within a checkpoint's nested data


def without_shards(value: Any, found: dict[str, DTensor], path: str = "") -> Any:
    """Return nested data with None for each tensor in shards, which goes into `found` by its path "ema/0.999/..."."""
    if isinstance(value, DTensor):
        found[path] = value
        return None
    if isinstance(value, Mapping):
        return {
            key: without_shards(child, found, f"{path}/{key}" if path else str(key)) for key, child in value.items()
        }
    return value


def with_shards(value: Any, shards: Mapping[str, Tensor], path: str = "") -> Any:
    """Put tensors back into the nested data that `without_shards` made."""
    if value is None and path in shards:
        return shards[path]
    if isinstance(value, Mapping):
        return {key: with_shards(child, shards, f"{path}/{key}" if path else str(key)) for key, child in value.items()}
    return value
