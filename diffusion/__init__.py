"""Diffusion models for researchers. The public names, imported on first use: `import diffusion` costs nothing."""

from importlib import import_module

__version__ = "0.1.0"

_PUBLIC = {
    "brownian": ("BrownianNoise",),
    "checkpoint": ("LoadedModel", "load_autoencoder", "load_classifier", "load_model", "read_header", "save_model"),
    "conditioning": (
        *("ClassConditioner", "Conditioner", "ImageConditioner", "JointConditioner", "LowResolutionConditioner"),
    ),
    "denoiser": ("Denoiser", "denoiser_pair"),
    "guidance": (
        *("ClassifierFreeGuidance", "ClassifierGuidance", "NoGuidance", "TwoScaleGuidance"),
        *("classifier_score", "clip_x0", "threshold_x0"),
    ),
    "likelihood": ("bits_per_dim", "vlb_term"),
    "losses": ("P2", "DenoisingLoss", "MinSNR", "TruncatedSNR"),
    "models.autoencoder": ("AutoencoderKL",),
    "models.classifier": ("Classifier",),
    "models.conv_vae": ("ConvVAE",),
    "models.text": ("TextTransformer",),
    "models.unet": ("Stage", "UNet"),
    "models.vq": ("VQAutoencoder",),
    "pipeline": ("LatentDiffusion",),
    "process": ("GaussianDiffusion", "Prediction", "posterior_mean", "q_sample", "target", "transition"),
    "sampling": ("SampleNoise", "Sampler", "State", "sample", "step"),
    "schedule": ("CLEAN", "Level", "Schedule"),
    "solvers": ("SOLVERS", "Solver", "euler"),
    "text_conditioning": ("TextConditioner", "XLConditioner"),
    "timestep_samplers": ("ImportanceTimesteps", "StratifiedTimesteps", "UniformTimesteps"),
}
_HOME = {name: module for module, names in _PUBLIC.items() for name in names}

__all__ = sorted(_HOME)


def __getattr__(name: str):
    if name in _HOME:
        return getattr(import_module(f".{_HOME[name]}", __name__), name)
    raise AttributeError(f"module 'diffusion' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
