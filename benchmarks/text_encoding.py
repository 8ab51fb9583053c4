"""How long do prompts take to become what a denoiser attends to, ours against transformers with the same weights?

From text to hidden states, tokens included, full-size towers with random weights:
`python benchmarks/text_encoding.py [--device cuda] [--batch 1 8] [--dtype bfloat16] [--compile] [--small]`.
"""

import argparse
from collections.abc import Callable
from itertools import count

import sd_files
import torch
from harness import interleaved, report
from torch import Tensor

from diffusion.conditioning import TextConditioner
from diffusion.pretrained import transformers

OPENCLIP_H = {"hidden_size": 1024, "num_hidden_layers": 23, "num_attention_heads": 16, "hidden_act": "gelu"}
TOWERS = {  # the config, what pads, which hidden state is taken, and whether the last norm is applied to it
    "CLIP ViT-L/14 (SD 1)": (sd_files.CLIP_L, sd_files.sd_cases.END, "last", True),
    "OpenCLIP ViT-H/14 (SD 2)": (OPENCLIP_H, sd_files.sd_cases.ZERO, "last", True),
    "OpenCLIP ViT-bigG/14 (XL)": (sd_files.BIG_G, sd_files.sd_cases.ZERO, "penultimate", False),
}
SMALL = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 1}


def contenders(
    name: str, batch: int, *, device: torch.device, dtype: torch.dtype, small: bool, compiled: bool
) -> dict[str, Callable[[], Tensor]]:
    """Functions that encode a batch of prompts that they have not seen before, to (B, 77, D), on both sides."""
    config, pad, layer, final_norm = TOWERS[name]
    peer = sd_files.sd_cases.text_encoder(config | (SMALL if small else {}))
    state = dict(peer.state_dict())
    if "final_layer_norm.weight" in state:  # transformers 5 leaves a prefix out that released files have
        state = {f"text_model.{name}": tensor for name, tensor in state.items()}
    ours = TextConditioner(
        transformers.load_text(peer.config.to_dict(), state),
        pad="zero" if pad == sd_files.sd_cases.ZERO else "end",
        layer=layer,
        final_norm=final_norm,
        frozen=True,
    )
    ours, peer = ours.eval().to(device, dtype), peer.to(device, dtype)
    if compiled:
        ours.encoder, peer = torch.compile(ours.encoder), torch.compile(peer)
    tokenizer = sd_files.sd_cases.tokenizer(pad)
    prompts = {side: new_prompts(batch) for side in ("ours", "theirs")}

    def theirs() -> Tensor:
        tokens = tokenizer(
            prompts["theirs"](), padding="max_length", max_length=77, truncation=True, return_tensors="pt"
        )
        states = peer(tokens.input_ids.to(device), output_hidden_states=layer != "last")
        return states.last_hidden_state if layer == "last" else states.hidden_states[-2]

    return {"ours": lambda: ours(ours.prepare(prompts["ours"]()))["context"], "transformers": theirs}


def new_prompts(batch: int) -> Callable[[], list[str]]:
    """A function that returns other prompts at every call: tokenizers may remember those that they have read."""
    numbers = count()
    return lambda: [f"{sd_files.sd_cases.PROMPT}, number {next(numbers)}" for _ in range(batch)]


def synchronised(call: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor]:
    """The call, over when the device is done."""

    def wait() -> Tensor:
        result = call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return result

    return wait


@torch.inference_mode()
def compare(name: str, batch: int, *, rounds: int, **settings) -> dict[str, str]:
    """Milliseconds a batch on both sides, the ratio, and how far the results are apart."""
    calls = {side: synchronised(c, settings["device"]) for side, c in contenders(name, batch, **settings).items()}
    ours, theirs = (call().float() for call in calls.values())
    seconds = interleaved(calls, rounds=rounds)
    rows = {side: f"{value * 1e3:9.2f} ms" for side, value in seconds.items()}
    rows["ours / transformers"] = f"{seconds['ours'] / seconds['transformers']:9.3f}"
    error = (ours - theirs).abs().max().item() / theirs.abs().max().item()
    return rows | {"largest difference": f"{error:.1e} of the largest value"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", nargs="+", default=["float32"], choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--compile", action="store_true", help="both sides through torch.compile")
    parser.add_argument("--small", action="store_true", help="tiny towers: a trial of the script")
    parser.add_argument("--rounds", type=int, default=9)
    given = parser.parse_args()
    device, how = torch.device(given.device), ", compiled" if given.compile else ""
    for name in TOWERS:
        for dtype in given.dtype:
            for batch in given.batch:
                title = f"Text encoding, {name}{' (small)' * given.small}, {batch} prompts, {dtype}{how}, {device}"
                settings = {"dtype": getattr(torch, dtype), "small": given.small, "compiled": given.compile}
                report(title, compare(name, batch, rounds=given.rounds, device=device, **settings))


if __name__ == "__main__":
    main()
