"""How long and how large is a training step of a 30 M-parameter UNet at 32x32, ours against diffusers, same weights?

Time interleaved in one process; peak memory in one fresh process each: `python benchmarks/train_step.py [--small]`.
"""

import argparse
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import UNet2DModel
from harness import interleaved, report

from diffusion.pretrained import diffusers

WIDTHS = {"full": (128, 192, 256, 256), "small": (32, 64, 64, 64)}


def peer_config(size: str) -> dict:
    """A DDPM-like UNet with self-attention at 16x16, as both sides build it."""
    return {
        "_class_name": "UNet2DModel",
        "block_out_channels": WIDTHS[size],
        "layers_per_block": 2,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": 32,
    }


def step(side: str, size: str, batch: int) -> tuple[Callable[[], None], int]:
    """A function that makes one AdamW step on random data, and the number of parameters."""
    torch.manual_seed(0)
    config = peer_config(size)
    peer = UNet2DModel(**{k: v for k, v in config.items() if k != "_class_name"})
    if side == "ours":
        net = diffusers.load_unet(config, peer.state_dict())
        predict = net
        del peer
    else:
        net, predict = peer, lambda x, t: peer(x, t).sample
    net.train()
    optimizer = torch.optim.AdamW(net.parameters(), 1e-4)
    x, t, target = torch.randn(batch, 3, 32, 32), torch.arange(batch) * 10, torch.randn(batch, 3, 32, 32)

    def call() -> None:
        optimizer.zero_grad(set_to_none=True)
        F.mse_loss(predict(x, t), target).backward()
        optimizer.step()

    return call, sum(parameter.numel() for parameter in net.parameters())


def peak_memory(side: str, size: str, batch: int) -> float:
    """Peak resident memory in MiB of a fresh process that makes three steps, beyond what it held before building."""
    command = [sys.executable, __file__, "--memory", side, "--batch", str(batch)] + ["--small"] * (size == "small")
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def measure_memory(side: str, size: str, batch: int) -> None:
    before = resident("VmRSS")
    call, _ = step(side, size, batch)
    for _ in range(3):
        call()
    print(resident("VmHWM") - before)


def resident(field: str) -> float:
    """VmRSS (now) or VmHWM (peak) of this process in MiB; getrusage would inherit the parent's peak over exec."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(field + ":")) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="narrow, for a trial of the script")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--memory", choices=("ours", "diffusers"), help="print the peak memory of one side and stop")
    arguments = parser.parse_args()
    size = "small" if arguments.small else "full"
    if arguments.memory:
        return measure_memory(arguments.memory, size, arguments.batch)
    (ours, count), (theirs, _) = (step(side, size, arguments.batch) for side in ("ours", "diffusers"))
    seconds = interleaved({"ours": ours, "diffusers": theirs}, rounds=arguments.rounds)
    memory = {side: peak_memory(side, size, arguments.batch) for side in ("ours", "diffusers")}
    rows = {side: f"{seconds[side]:8.3f} s, {memory[side]:7.0f} MiB" for side in seconds}
    rows["ours / diffusers, time"] = f"{seconds['ours'] / seconds['diffusers']:8.3f}"
    rows["ours / diffusers, peak memory"] = f"{memory['ours'] / memory['diffusers']:8.3f}"
    report(f"Training step, {count / 1e6:.1f} M parameters, 32x32, batch {arguments.batch}, float32", rows)
    return None


if __name__ == "__main__":
    main()
