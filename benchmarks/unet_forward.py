"""How long does a Stable-Diffusion-1.5-sized UNet take, ours against diffusers with the same weights?

A classifier-free guidance batch of 2 at 64x64 latents on the CPU: `python benchmarks/unet_forward.py [--small]`.
"""

import argparse

import torch
from diffusers import UNet2DConditionModel
from harness import interleaved, report

from diffusion.pretrained import diffusers

WIDTHS = {"full": (320, 640, 1280, 1280), "small": (64, 128, 256, 256)}


def compare(size: str, dtype: torch.dtype, *, latents: int, rounds: int) -> dict[str, str]:
    """Seconds of ours, of diffusers as it comes (NCHW) and of diffusers in channels_last, and the ratios."""
    torch.manual_seed(0)
    config = {"block_out_channels": WIDTHS[size], "cross_attention_dim": 768, "attention_head_dim": 8}
    peer = UNet2DConditionModel(**config).eval()
    ours = diffusers.load_unet(config, peer.state_dict()).eval().to(dtype)
    # Converting the dtype first and the layout of a second copy later: both peers hold the same numbers.
    peer = peer.to(dtype)
    peer_last = UNet2DConditionModel(**config).eval().to(dtype)
    peer_last.load_state_dict(peer.state_dict())
    peer_last = peer_last.to(memory_format=torch.channels_last)

    x = torch.randn(2, 4, latents, latents, dtype=dtype)
    x_last, t = x.contiguous(memory_format=torch.channels_last), torch.tensor([500, 500])
    context = torch.randn(2, 77, 768, dtype=dtype)
    with torch.inference_mode():
        error = (ours(x, t, context=context) - peer(x, t, context).sample).abs().max().item()
        seconds = interleaved(
            {
                "ours": lambda: ours(x, t, context=context),
                "diffusers": lambda: peer(x, t, context).sample,
                "diffusers, channels_last": lambda: peer_last(x_last, t, context).sample,
            },
            rounds=rounds,
        )
    rows = {name: f"{value:8.3f} s" for name, value in seconds.items()}
    for name in list(seconds)[1:]:
        rows[f"ours / {name}"] = f"{seconds['ours'] / seconds[name]:8.3f}"
    return rows | {"largest difference of the outputs": f"{error:.1e}"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--small", action="store_true", help="a fifth of the width, 32x32 latents: a trial of the script"
    )
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    size, latents = ("small", 32) if arguments.small else ("full", 64)
    for dtype in (torch.float32, torch.bfloat16):
        title = f"UNet forward, Stable Diffusion 1.5 ({size}), batch 2, {latents}x{latents}, {str(dtype)[6:]}"
        report(title, compare(size, dtype, latents=latents, rounds=arguments.rounds))


if __name__ == "__main__":
    main()
