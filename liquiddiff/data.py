"""Images, decoded ONCE to a fingerprinted uint8 memmap, and served in [-1, 1]: x = uint8 / 127.5 - 1.

Batches are indexed by (seed, position in an endless stream of shuffled epochs), so that neither the batch size, nor a
resume, nor another arm can change what is seen when. Where the images come from: sources.py.
"""

import hashlib
import io
import json
import os
import re
import sys
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO
from uuid import uuid4

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from liquiddiff.config import BadInput, Data
from liquiddiff.seeding import generator
from liquiddiff.sources import Content, Items, find, line, some

FORMAT = 1  # part of the cache's key: raise it when a change here would change a pixel


@dataclass(eq=False, repr=False)
class ImageData:
    """A decoded set and its split. All of it is fixed by the source but for `batch`, which the run's seed orders."""

    images_NCHW: np.ndarray  # uint8 memmap, read-only
    fingerprint: str  # first 16 hex digits of the SHA-256 over pixels and shape
    train: np.ndarray  # int64 indices, ascending
    heldout: np.ndarray  # int64 indices in random order, so that its first k are a fair sample of a sorted folder
    skipped: list[str]  # names of undecodable files
    flip: bool
    _epochs: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)

    def batch(self, seed: int, start: int, count: int) -> torch.Tensor:
        """Gather the images at positions start .. start+count-1 of the stream: float32 (count, C, H, W) in [-1, 1].

        Position p is place p % len(train) of epoch p // len(train), whose order and flips hang on (seed, epoch) alone.
        """
        n = len(self.train)
        wanted = range(start // n, (start + count - 1) // n + 1)
        epochs = {(seed, e): self._epochs.get((seed, e)) or self._epoch(seed, e) for e in wanted}
        self._epochs = epochs or self._epochs
        spans = [slice(max(start - e * n, 0), start + count - e * n) for e in wanted]
        parts = [(order[span], flips[span]) for span, (order, flips) in zip(spans, epochs.values(), strict=True)]
        indices_B = np.concatenate([np.zeros(0, np.int64), *(order for order, _ in parts)])
        pixels_BCHW = np.take(self.images_NCHW, indices_B, axis=0)
        if self.flip:
            flips_B = np.concatenate([np.zeros(0, bool), *(flips for _, flips in parts)])
            pixels_BCHW[flips_B] = pixels_BCHW[flips_B, ..., ::-1]
        return _to_float(pixels_BCHW)

    def tensor(self, indices: Any) -> torch.Tensor:
        """Gather the images at `indices`, never flipped: float32 (len(indices), C, H, W) in [-1, 1]."""
        return _to_float(np.take(self.images_NCHW, np.asarray(indices, dtype=np.int64), axis=0))

    def _epoch(self, seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        n = len(self.train)
        order = torch.randperm(n, generator=generator(seed, "order", epoch)).numpy()
        flips = torch.randint(2, (n,), generator=generator(seed, "flip", epoch)).numpy().astype(bool)
        return self.train[order], flips


def _to_float(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.asarray(pixels)).to(torch.float32).div_(127.5).sub_(1)


def to_uint8(x: torch.Tensor) -> torch.Tensor:
    """Round and clamp [-1, 1] to 0 .. 255, the exact inverse of the scaling above. Any shape and float type."""
    return ((x.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def open_data(data: Data, cache: str | Path) -> ImageData:
    """Open the set that `data` names, after decoding it into the folder `cache` if that was not done before.

    Raises BadInput, in one line with the way out: unknown set, unreadable path, no images, more than 1 % of them
    undecodable, no way to the hub, no room in the cache.
    """
    if data.channels not in (1, 3):
        raise BadInput(f"data.channels={data.channels} must be 1 (grey) or 3 (RGB)")
    identity, load = find(data)
    shape = (data.channels, data.resolution, data.resolution)
    key = hashlib.sha256(json.dumps([FORMAT, identity, shape]).encode()).hexdigest()[:16]
    folder = Path(cache).expanduser()
    path = folder / f"{re.sub('[^A-Za-z0-9_-]', '_', data.name)}-{data.resolution}x{data.channels}-{key}.npy"
    if (opened := _open_cached(path, shape)) is None:
        total, items = load()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _decode_all(path, shape, total, items, data)
        except OSError as error:  # of the cache: unreadable images are counted, and never come here
            why = error.strerror or line(error)
            raise BadInput(
                f"cannot write to {folder} ({why}): make room there, or choose a folder: cache=DIR"
            ) from error
        if (opened := _open_cached(path, shape)) is None:
            raise BadInput(f"{path} cannot be read back after writing: choose another folder with cache=DIR")
    images_NCHW, note = opened
    if skipped := note["skipped"]:
        print(f"data: skipped {len(skipped)} undecodable image(s): {some(skipped)}", file=sys.stderr)
    n = len(images_NCHW)
    order = torch.randperm(n, generator=generator(0, "heldout")).numpy()  # the same split whatever the run's seed
    held = min(max(1, round(n * data.heldout)), n - 1)
    return ImageData(images_NCHW, note["fingerprint"], np.sort(order[held:]), order[:held], skipped, data.flip)


def decode(content: Content, resolution: int, channels: int) -> np.ndarray:
    """Decode one image to uint8 (C, resolution, resolution): upright, first frame, centre square, antialiased bicubic.

    Transparency is laid on white; 16 bits are scaled to 8. Raises whatever Pillow raises for a broken file.
    """
    if isinstance(content, np.ndarray):
        image = Image.fromarray(content)
    else:
        try:
            image = Image.open(io.BytesIO(content if isinstance(content, bytes) else Path(content).read_bytes()))
        except UnidentifiedImageError as error:  # which would name the buffer
            raise ValueError("no image, or of a kind that Pillow does not know") from error
    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise ValueError("float pixels, whose range nothing tells")
    if image.mode == "I" or image.mode.startswith("I;16"):  # Pillow's own conversion clips at 255
        wide = np.clip(np.asarray(image), 0, 65535)
        image = Image.fromarray(np.round(wide / 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB" if channels == 3 else "L")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    # Cropped first, so that no pixel from outside the square reaches the filter.
    image = image.crop((left, top, left + side, top + side)).resize((resolution, resolution), Image.Resampling.BICUBIC)
    return np.asarray(image).reshape(resolution, resolution, channels).transpose(2, 0, 1)


def _decode_all(path: Path, shape: tuple[int, int, int], total: int, items: Items, data: Data) -> None:
    """Decode `items` in threads, in order, into `path` and its sidecar. Raises OSError only for what it writes."""

    def attempt(item: tuple[str, Content]) -> tuple[str, np.ndarray | Exception]:
        try:
            return item[0], decode(item[1], data.resolution, data.channels)
        except Exception as error:  # Pillow raises many kinds
            return item[0], error

    source, digest, count = data.path or data.name, hashlib.sha256(), 0
    broken: list[tuple[str, Exception]] = []
    with _atomic(path) as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's remarks about odd metadata
        _write_header(file, (0, *shape))
        # Appended with write(), not through a memmap: on a full disk that would be a SIGBUS instead of an error.
        bar = tqdm(_in_order(attempt, items), f"decode {data.name}", total, unit=" images", mininterval=0.5)
        for name, image in bar:
            if isinstance(image, Exception):
                broken.append((name, image))
                continue
            pixels = image.tobytes()
            digest.update(pixels)
            file.write(pixels)
            count += 1
        names = [name for name, _ in broken]
        if len(broken) > 0.01 * (count + len(broken)):
            share = f"{len(broken)} of {count + len(broken)} images of {source} cannot be decoded"
            raise BadInput(f"{share}: {some(names)} ({line(broken[0][1])}): repair or remove them")
        if count < 2:
            raise BadInput(f"{source} holds {count} image(s): at least 2 are needed, one of them held out")
        file.seek(0)
        _write_header(file, (count, *shape))
        digest.update(repr((count, *shape)).encode())
    with _atomic(path.with_suffix(".json")) as file:  # last, because it vouches for the images
        note = {"count": count, "fingerprint": digest.hexdigest()[:16], "skipped": names}
        file.write(json.dumps(note).encode())


def _in_order(work: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
    """`map` in threads that holds only a few items at a time, however many there are."""
    threads = min(16, os.cpu_count() or 1)  # Pillow decodes without holding the GIL
    pending: deque[Future[Any]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for item in items:
            pending.append(pool.submit(work, item))
            if len(pending) >= 4 * threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def _write_header(file: BinaryIO, shape: tuple[int, ...]) -> None:
    # numpy pads the header so that the first axis can grow in place: only so can the count be written last
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})


def _open_cached(path: Path, shape: tuple[int, int, int]) -> tuple[np.ndarray, dict[str, Any]] | None:
    """Open the memmap and its sidecar; None where either is missing or damaged."""
    try:
        note = json.loads(path.with_suffix(".json").read_bytes())
        images = np.load(path, mmap_mode="r")
        size = images.offset + images.nbytes
        whole = images.shape == (note["count"], *shape) and images.dtype == np.uint8 and path.stat().st_size == size
        return (images, note) if whole and {"fingerprint", "skipped"} <= set(note) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError):
        return None


@contextmanager
def _atomic(path: Path) -> Iterator[BinaryIO]:
    """Write beside `path`, then rename: a reader, or a second writer, sees the whole file or none."""
    temporary = path.with_name(f".{path.name}.{uuid4().hex}.tmp")
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
