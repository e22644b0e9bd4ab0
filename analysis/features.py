"""Feature extractors by name, their weights, and the cached features of the reference. analysis/metrics.py uses them.

torch_fidelity is imported late: it costs 3 to 6 s. Shapes: N images, M reference images, D features.
"""

import hashlib
import os
import socket
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any, BinaryIO
from urllib.error import HTTPError
from urllib.request import Request, urlopen
from uuid import uuid4

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from liquiddiff import distributed
from liquiddiff.config import BadInput, choose
from liquiddiff.data import ImageData

GITHUB = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
CLIP = "https://openaipublic.azureedge.net/clip/models/"
CLIP_HASH = "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af"


class MissingWeights(BadInput):
    """The extractor's weights are not on this machine and cannot be downloaded. One line, with the ways out."""


@dataclass(frozen=True)
class Extractor:
    """What torch-fidelity calls it, and where its weights come from."""

    registered: str
    layer: str = "features"
    rgb: bool = True  # grey images are given as three equal channels
    files: tuple[str, ...] = ()  # below torch.hub's folder: where they all are, nothing is downloaded
    url: str = ""  # downloaded from
    takes_weights: bool = True  # eval.weights=PATH
    head: str = ""  # parameter that makes unbiased logits of the features, for the Inception Score


INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
EXTRACTORS = {
    "inception": Extractor(
        "inception-v3-compat",
        "2048",
        files=(f"checkpoints/{INCEPTION_FILE}",),
        url=GITHUB + INCEPTION_FILE,
        head="fc.weight",
    ),
    "dinov2": Extractor(  # the size of Stein et al. 2023, who proposed it
        "dinov2-vit-l-14",
        "dinov2",
        files=("facebookresearch_dinov2_main", "checkpoints/dinov2_vitl14_pretrain.pth"),
        url="https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth",
        takes_weights=False,
    ),
    "clip": Extractor(  # the size of Kynkäänniemi et al. 2023
        "clip-vit-b-32",
        "clip",
        files=(f"checkpoints/clip-vit-b-32-{CLIP_HASH}.pt",),
        url=f"{CLIP}{CLIP_HASH}/ViT-B-32.pt",
    ),
    "effnet_lite0": Extractor("effnet_lite0"),
    "digits": Extractor("digits", rgb=False),
    "pixel": Extractor("pixel", rgb=False, takes_weights=False),
}


def check_extractor(name: str, weights: str | None) -> None:
    """Raises BadInput for a name or file that is not there, MissingWeights (within 4 s) where a download will fail.

    Loads nothing, so that a run can tell at its start.
    """
    choose("extractor", name, EXTRACTORS)
    spec, hub = EXTRACTORS[name], Path(torch.hub.get_dir())
    if weights and not spec.takes_weights:
        hint = f"fill {hub} on a machine with a network" if spec.url else "it has none"
        raise BadInput(f"eval.extractor={name} takes no eval.weights ({hint}): leave eval.weights out")
    if weights and not Path(weights).expanduser().is_file():
        raise BadInput(f"eval.weights={weights} is not a file: give the weights of {name}, or leave eval.weights out")
    if not weights and spec.url and not all((hub / file).exists() for file in spec.files) and not _answers(spec.url):
        raise MissingWeights(_missing(name, f"neither in {hub} nor reachable"))


def _missing(name: str, why: str) -> str:
    supply = "give eval.weights=PATH, " if EXTRACTORS[name].takes_weights else ""
    return f"no weights for eval.extractor={name} ({why}): {supply}connect once, or use eval.extractor=effnet_lite0"


def _answers(url: str) -> bool:
    answered = []

    def probe() -> None:
        try:
            urlopen(Request(url, method="HEAD"), timeout=3).close()
        except HTTPError as error:  # an answer too
            error.close()
        except OSError:
            return
        answered.append(True)

    thread = Thread(target=probe, daemon=True)  # no timeout of urlopen's covers a name server that is silent
    thread.start()
    thread.join(4)
    return bool(answered)


class Features:
    """A loaded extractor: uint8 (N, C, H, W), C 1 or 3 -> float32 (N, D) on the CPU. `load_extractor` makes it."""

    def __init__(self, name: str, net: nn.Module, device: torch.device) -> None:
        self.name, self.spec, self.device = name, EXTRACTORS[name], device
        digest = hashlib.sha256(name.encode())
        for key, value in sorted(net.state_dict().items()):  # the values, wherever the file came from
            digest.update(key.encode() + value.cpu().contiguous().numpy().tobytes())
        self.weights_hash = digest.hexdigest()[:8]
        self.net = net.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    @torch.no_grad()
    def __call__(self, images_NCHW: Tensor) -> Tensor:
        """The features, batch by batch."""
        features = []
        # Of ImageNet's size few: what is above 32 MB glibc gives back at each free, and faults in again.
        few = 16 if self.spec.rgb else 64
        for batch in images_NCHW.split(few if self.device.type == "cpu" else 256):
            batch = batch.to(self.device)
            batch = batch.expand(-1, 3, -1, -1) if self.spec.rgb and batch.shape[1] == 1 else batch
            features.append(self.net(batch)[0].float().cpu())
        return torch.cat(features)

    def logits(self, features_ND: Tensor) -> Tensor | None:
        """Unbiased logits (N, K), linear in the features and so of the same pass; None for an extractor without."""
        if not self.spec.head:
            return None
        return features_ND @ self.net.get_parameter(self.spec.head).T.float().cpu()


def load_extractor(name: str, weights: str | None, device: torch.device) -> Features:
    """Load an extractor of EXTRACTORS, downloading its weights if it must. Raises what `check_extractor` raises."""
    check_extractor(name, weights)
    spec, before = EXTRACTORS[name], socket.getdefaulttimeout()
    from torch_fidelity.utils import create_feature_extractor

    import analysis.extractors  # noqa: F401  registers ours

    path = str(Path(weights).expanduser()) if weights else None
    options = {"cuda": False, "verbose": False, "feature_extractor_weights_path": path}
    socket.setdefaulttimeout(30)  # torch.hub sets none: a stalled download would wait for ever
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch.hub and torch.jit about themselves
            net = create_feature_extractor(spec.registered, [spec.layer], **options)
    except Exception as error:  # whatever pickle, zip, jit, the hub or the network raise: the way out is the same
        why = " ".join(f"{type(error).__name__}: {error}".split())[:160]
        if weights:
            raise BadInput(f"eval.weights={weights} does not hold the weights of {name} ({why})") from error
        if spec.url:
            raise MissingWeights(_missing(name, why)) from error
        raise
    finally:
        socket.setdefaulttimeout(before)
    return Features(name, net, device)


def reference_features(extractor: Features, images: ImageData, cache: str | Path, together: bool = False) -> Tensor:
    """(M, D): every image of the set, train and held-out, never augmented; computed once for each cache.

    `together`, every process of a run calls it, each computes its part, and process 0 alone gets the features.
    """
    path, total = cache_path(extractor, images, cache, ".npy"), len(images.images_NCHW)
    stored = None
    with suppress(OSError, ValueError, EOFError):
        stored = np.load(path)
    known = stored is not None and len(stored) == total
    if distributed.agreed(known) if together else known:
        return torch.from_numpy(stored) if known else torch.empty(0)
    starts = range(0, total, 1024)
    parts = []
    for start in tqdm(
        distributed.mine(starts) if together else starts, f"{extractor.name} reference", disable=None, leave=False
    ):
        parts.append(extractor(torch.from_numpy(np.array(images.images_NCHW[start : start + 1024]))))
    parts = distributed.collect(parts) if together else parts
    if not parts:
        return torch.empty(0)
    features = torch.cat(parts)
    write_atomic(path, lambda file: np.save(file, features.numpy()))
    return features


def cache_path(extractor: Features, images: ImageData, cache: str | Path, suffix: str) -> Path:
    """A file whose name holds all that its content depends on: images, their number, extractor, weights."""
    stem = f"{images.fingerprint}-{extractor.name}-{extractor.weights_hash}-n{len(images.images_NCHW)}"
    return Path(cache).expanduser() / "features" / (stem + suffix)


def write_atomic(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Whole or not at all, whoever else writes the same file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid4().hex}.tmp")
    try:
        with open(temporary, "xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())  # or after a loss of power other numbers could have the name
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
