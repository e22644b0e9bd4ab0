"""liquiddiff: attention-free, liquid (CfC) image generators, and the controlled comparison that tests them."""

from typing import TYPE_CHECKING, Any

from liquiddiff.config import Run

if TYPE_CHECKING:
    from liquiddiff.loop import train
    from liquiddiff.trainer import RectifiedFlowTrainer
    from liquiddiff.unet import (
        LiquidDiffusionUNet,
        liquid_diffusion_base,
        liquid_diffusion_large,
        liquid_diffusion_small,
        liquid_diffusion_tiny,
    )

__all__ = [
    "LiquidDiffusionUNet",
    "RectifiedFlowTrainer",
    "Run",
    "liquid_diffusion_base",
    "liquid_diffusion_large",
    "liquid_diffusion_small",
    "liquid_diffusion_tiny",
    "train",
]


def __getattr__(name: str) -> Any:
    """Import torch only when a name needs it: `run.py --help` and a typo's error must not wait for it."""
    if name not in __all__:
        raise AttributeError(f"module 'liquiddiff' has no attribute '{name}'")
    from liquiddiff import loop, trainer, unet

    return next(getattr(module, name) for module in (loop, trainer, unet) if hasattr(module, name))
