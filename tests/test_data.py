"""Images: decoded once and rightly, and served in an order that nothing but (seed, position) decides."""

import errno
import io
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import liquiddiff.data as data_module
from liquiddiff import sources
from liquiddiff.config import DATA_SETS, BadInput, Data
from liquiddiff.data import decode, open_data, to_uint8

SHARED = Path(__file__).parents[2] / "shared" / "data"
RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def solid(value, size=(8, 8), mode="RGB"):
    return Image.new(mode, size, value)


def encoded(image, kind="png", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(seed, size=(8, 8)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))


def fill(folder, count, size=(8, 8)):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        noise(i, size).save(folder / f"{i:03}.png")
    return folder


def of(folder, **changes):
    return Data(**{"name": "folder", "resolution": 8, "channels": 3, "flip": False, "path": str(folder), **changes})


def write_parquet(path, images, column="image", label=None, names=None):
    """As on the hub: one struct {bytes, path} a row, and the feature types in the schema."""
    import datasets

    path.parent.mkdir(parents=True, exist_ok=True)
    features = {column: datasets.Image()}
    rows = {column: [{"bytes": encoded(image), "path": f"{i}.png"} for i, image in enumerate(images)]}
    if label is not None:
        rows["label"] = label
        features["label"] = datasets.ClassLabel(names=names) if names else datasets.Value("int64")
    datasets.Dataset.from_dict(rows, features=datasets.Features(features)).to_parquet(str(path))


@pytest.fixture(scope="module", autouse=True)
def hushed():
    import datasets

    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return open_data(Data(), tmp_path_factory.mktemp("cache"))


@pytest.fixture
def flipping(tmp_path):
    return open_data(of(fill(tmp_path / "in", 40), flip=True), tmp_path / "cache")


# --- the stream -------------------------------------------------------------------------------------------------------


def test_every_set_of_the_config_has_a_source():
    assert set(DATA_SETS) == set(sources.NAMED)


def test_digits_are_the_real_ones(digits):
    from sklearn.datasets import load_digits

    assert digits.images_NCHW.shape == (1797, 1, 8, 8) and digits.images_NCHW.dtype == np.uint8
    assert np.array_equal(np.round(digits.images_NCHW[:, 0] / (255 / 16)), load_digits().images)
    assert isinstance(digits.images_NCHW, np.memmap) and not digits.images_NCHW.flags.writeable


def test_scaling_round_trips_all_256_values():
    values = np.arange(256, dtype=np.uint8)
    x = data_module._to_float(values)
    assert x.dtype == torch.float32 and x[0] == -1 and x[255] == 1
    assert torch.equal(to_uint8(x), torch.from_numpy(values))
    assert to_uint8(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]


def test_stream_does_not_depend_on_batch_size_or_history(flipping, tmp_path):
    whole = flipping.batch(3, 0, 200)  # more than five epochs of 36
    for size in (1, 7, 36, 64):
        pieces = [flipping.batch(3, start, min(size, 200 - start)) for start in range(0, 200, size)]
        assert torch.equal(torch.cat(pieces), whole)
    assert torch.equal(flipping.batch(3, 100, 20), whole[100:120])  # resumed in the middle
    assert torch.equal(open_data(of(tmp_path / "in", flip=True), tmp_path / "cache").batch(3, 90, 9), whole[90:99])
    assert flipping.batch(3, 5, 0).shape == (0, 3, 8, 8)


def test_every_epoch_is_another_permutation(digits):
    n, epochs = len(digits.train), []
    everything = digits.images_NCHW[digits.train].reshape(n, -1)
    for epoch in range(2):
        x = digits.batch(0, epoch * n, n)
        assert x.dtype == torch.float32 and x.shape == (n, 1, 8, 8) and x.min() == -1 and x.max() == 1
        epochs.append(to_uint8(x).numpy().reshape(n, -1))
        assert np.array_equal(np.unique(epochs[-1], axis=0), np.unique(everything, axis=0))
        assert not np.array_equal(epochs[-1], everything)
    assert not np.array_equal(*epochs)
    assert not torch.equal(digits.batch(0, 0, 64), digits.batch(1, 0, 64))


def test_split_is_disjoint_complete_and_fixed(digits):
    both = np.concatenate([digits.train, digits.heldout])
    assert np.array_equal(np.sort(both), np.arange(1797)) and both.dtype == np.int64
    assert len(digits.heldout) == 180
    assert not np.array_equal(digits.heldout, np.sort(digits.heldout)), "its head must be a fair sample"


@pytest.mark.parametrize(("share", "held"), [(0.001, 1), (0.5, 2), (0.999, 3)])
def test_split_never_takes_none_or_all(tmp_path, share, held):
    data = open_data(of(fill(tmp_path / "in", 4), heldout=share), tmp_path / "cache")
    assert (len(data.heldout), len(data.train)) == (held, 4 - held)


def test_flips_are_half_and_only_in_training(flipping, tmp_path):
    plain = open_data(of(tmp_path / "in", flip=False), tmp_path / "cache")
    a, b = flipping.batch(0, 0, 720), plain.batch(0, 0, 720)  # the order is the same with and without
    same = (a == b).flatten(1).all(1)
    mirrored = (a == b.flip(-1)).flatten(1).all(1)
    assert (same | mirrored).all() and 0.4 < mirrored.float().mean() < 0.6
    assert torch.equal(to_uint8(flipping.tensor(flipping.heldout)), torch.from_numpy(plain.images_NCHW[plain.heldout]))


def test_tensor_takes_any_kind_of_index(digits):
    expected = torch.from_numpy(digits.images_NCHW[[5, 2]].astype(np.float32)) / 127.5 - 1
    for indices in ([5, 2], np.array([5, 2]), torch.tensor([5, 2])):
        assert torch.equal(digits.tensor(indices), expected)


# --- decoding ---------------------------------------------------------------------------------------------------------


def grey16(value):
    return Image.fromarray(np.full((8, 8), value, np.uint16))


def gif():
    return encoded(solid(RED), "gif", save_all=True, append_images=[solid(BLUE)])


def palette_with_hole():
    image = solid(0, mode="P")
    image.putpalette([*BLUE, *RED])
    image.paste(1, (0, 0, 8, 4))
    return encoded(image, transparency=0)


ODD = {
    "grey": (encoded(solid(100, mode="L")), (100, 100, 100)),
    "bilevel": (encoded(solid(1, mode="1")), WHITE),
    "palette": (encoded(solid(GREEN).convert("P", palette=Image.Palette.ADAPTIVE)), GREEN),
    "cmyk": (encoded(solid((0, 255, 255, 0), mode="CMYK"), "tiff"), RED),
    "rgba, clear": (encoded(solid((9, 9, 9, 0), mode="RGBA")), WHITE),
    "rgba, half": (encoded(solid((255, 0, 0, 128), mode="RGBA")), (255, 127, 127)),
    "rgb with a clear colour": (encoded(solid(BLUE), transparency=BLUE), WHITE),
    "grey with alpha": (encoded(solid((0, 0), mode="LA")), WHITE),
    "16 bits": (encoded(grey16(128 * 257)), (128, 128, 128)),
    "16 bits, white": (encoded(grey16(65535)), WHITE),
    "16 bits, below 256": (encoded(grey16(255)), (1, 1, 1)),
    "16 bits, tiff": (encoded(grey16(51 * 257), "tiff"), (51, 51, 51)),
    "32 bits": (encoded(solid(77 * 257, mode="I"), "tiff"), (77, 77, 77)),
    "animated": (gif(), RED),
    "webp": (encoded(solid(BLUE), "webp", lossless=True), BLUE),
    "bmp": (encoded(solid(BLUE), "bmp"), BLUE),
}


@pytest.mark.parametrize("kind", ODD)
def test_odd_files_come_out_in_their_colours(kind):
    content, colour = ODD[kind]
    assert decode(content, 8, 3).dtype == np.uint8
    assert np.array_equal(decode(content, 8, 3), np.broadcast_to(np.array(colour)[:, None, None], (3, 8, 8)))
    grey = np.asarray(solid(colour).convert("L"))[0, 0]
    assert np.array_equal(decode(content, 8, 1), np.full((1, 8, 8), grey))


def test_a_hole_in_a_palette_is_white():
    out = decode(palette_with_hole(), 8, 3).transpose(1, 2, 0)
    assert (out[:4] == RED).all() and (out[4:] == WHITE).all()


def test_jpeg_cmyk_is_not_inverted():
    out = decode(encoded(solid((0, 255, 255, 0), mode="CMYK"), "jpeg", quality=95), 8, 3)
    assert np.abs(out.astype(int) - np.array(RED)[:, None, None]).max() < 8


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_undone(orientation):
    upright = solid(WHITE)
    for colour, corner in ((RED, (0, 0, 4, 4)), (GREEN, (4, 0, 8, 4)), (BLUE, (0, 4, 4, 8))):
        upright.paste(colour, corner)
    methods = Image.Transpose
    stored = {  # what a camera that was held so writes down
        1: [], 2: [methods.FLIP_LEFT_RIGHT], 3: [methods.ROTATE_180], 4: [methods.FLIP_TOP_BOTTOM],
        5: [methods.TRANSPOSE], 6: [methods.ROTATE_90], 7: [methods.TRANSVERSE], 8: [methods.ROTATE_270],
    }[orientation]  # fmt: skip
    image = upright
    for method in stored:
        image = image.transpose(method)
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert np.array_equal(decode(encoded(image, exif=exif), 8, 3), np.asarray(upright).transpose(2, 0, 1))


@pytest.mark.parametrize("size", [(24, 8), (8, 24)])
def test_crop_is_the_centre(size):
    image = solid(RED, size)
    image.paste(GREEN, (8, 0, 16, 8) if size[0] > 8 else (0, 8, 8, 16))
    assert np.array_equal(decode(encoded(image), 8, 3), np.asarray(solid(GREEN)).transpose(2, 0, 1))


@pytest.mark.parametrize("resolution", [8, 24, 50])
def test_resize_is_pillows_antialiased_bicubic(resolution):
    image = noise(0, (24, 24))
    expected = image.resize((resolution, resolution), Image.Resampling.BICUBIC)
    assert np.array_equal(decode(encoded(image), resolution, 3), np.asarray(expected).transpose(2, 0, 1))


def test_shrinking_averages_instead_of_picking():
    checks = Image.fromarray((np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8))
    assert np.abs(decode(encoded(checks), 8, 1).astype(int) - 127.5).max() < 2


def test_digits_can_be_had_larger_and_in_rgb(tmp_path, digits):
    large = open_data(Data(resolution=16, channels=3), tmp_path)
    assert large.images_NCHW.shape == (1797, 3, 16, 16)
    expected = Image.fromarray(digits.images_NCHW[0, 0]).convert("RGB").resize((16, 16), Image.Resampling.BICUBIC)
    assert np.array_equal(large.images_NCHW[0], np.asarray(expected).transpose(2, 0, 1))


# --- broken and missing input -----------------------------------------------------------------------------------------


def test_a_broken_file_is_left_out_and_named(tmp_path, capsys):
    folder = fill(tmp_path / "in", 199)
    (folder / "050x.png").write_bytes((folder / "050.png").read_bytes()[:100])
    for again in (False, True):  # said at every opening, counted once
        data = open_data(of(folder), tmp_path / "cache")
        assert data.skipped == ["050x.png"] and len(data.images_NCHW) == 199
        err = capsys.readouterr().err
        assert "skipped 1 undecodable image(s): 050x.png" in err and again == ("images/s" not in err)
    assert np.array_equal(data.images_NCHW[51], np.asarray(noise(51)).transpose(2, 0, 1)), "no hole where it was"


def test_more_than_one_percent_broken_is_refused(tmp_path):
    folder = fill(tmp_path / "in", 20)
    for i in range(7):
        (folder / f"bad{i}.jpg").write_bytes(encoded(noise(i, (64, 64)), "jpeg")[:400])
    with pytest.raises(BadInput, match="7 of 27 .*bad0.jpg, .*bad4.jpg and 2 more .*repair") as caught:
        open_data(of(folder), tmp_path / "cache")
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "cache").iterdir()) == []
    (folder / "bad0.jpg").write_bytes(b"no image at all")  # the first, whose reason is told
    with pytest.raises(BadInput, match="bad0.jpg, .*: no image, or of a kind that Pillow does not know"):
        open_data(of(folder), tmp_path / "cache")


def test_decompression_bombs_are_undecodable(tmp_path, monkeypatch):
    folder = fill(tmp_path / "in", 120)
    solid(0, (100, 100), "1").save(folder / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert open_data(of(folder), tmp_path / "cache").skipped == ["bomb.png"]


def test_folder_is_read_deep_sorted_and_without_the_rest(tmp_path):
    folder = tmp_path / "in"
    for i, name in enumerate(["b/2.PNG", "a/1.png", "c.bmp", ".hidden/no.png", "a/.no.png"]):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        solid((i, i, i)).save(folder / name)
    (folder / "notes.txt").write_text("not an image")
    (folder / "a" / "loop").symlink_to(folder)
    assert open_data(of(folder), tmp_path / "cache").images_NCHW[:, 0, 0, 0].tolist() == [1, 0, 2]


def bad_empty(folder):
    folder.mkdir()
    return of(folder)


def bad_single(folder):
    return of(fill(folder, 1))


def bad_mixed(folder):
    (fill(folder, 3) / "a.parquet").write_bytes(b"")
    return of(folder)


def bad_parquet(folder):
    folder.mkdir()
    (folder / "a.parquet").write_bytes(b"PAR1 cut off")
    return of(folder)


def bad_columns(folder):
    import datasets

    folder.mkdir()
    datasets.Dataset.from_dict({"text": ["a"], "n": [1]}).to_parquet(str(folder / "a.parquet"))
    return of(folder)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda folder: of(folder), "cannot be read .No such file.*give a"),
        (lambda folder: of(fill(folder, 1) / "000.png"), "cannot be read .Not a directory.*give a"),
        (bad_empty, "holds no images: give"),
        (bad_single, "holds 1 image.*at least 2"),
        (bad_mixed, "both parquet files and images: give"),
        (bad_parquet, "not a whole parquet file .*fetch it again"),
        (bad_columns, "no image column; its columns: text, n"),
        (lambda folder: Data(name="folder"), "needs data.path=DIR"),
        (lambda folder: Data(name="flower"), "Did you mean flowers"),
        (lambda folder: Data(channels=4), "must be 1"),
    ],
)
def test_bad_input_is_one_line_with_the_way_out(tmp_path, make, says):
    with pytest.raises(BadInput, match=says) as caught:
        open_data(make(tmp_path / "in"), tmp_path / "cache")
    assert "\n" not in str(caught.value)


def test_a_folder_without_permission(tmp_path, monkeypatch):
    fill(tmp_path / "in" / "locked", 3)
    real = os.scandir

    def scandir(path):  # root may read all, so the refusal is played
        if str(path).endswith("locked"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(BadInput, match="Permission denied: .*locked.*give a readable folder"):
        open_data(of(tmp_path / "in"), tmp_path / "cache")


# --- the cache --------------------------------------------------------------------------------------------------------


def test_second_opening_does_not_decode(tmp_path, monkeypatch):
    first = open_data(of(fill(tmp_path / "in", 5)), tmp_path / "cache")
    monkeypatch.setattr(data_module, "decode", None)
    second = open_data(of(tmp_path / "in"), tmp_path / "cache")
    assert second.fingerprint == first.fingerprint and np.array_equal(second.images_NCHW, first.images_NCHW)


def test_fingerprint_is_of_the_pixels(tmp_path):
    folder = fill(tmp_path / "in", 5)
    first = open_data(of(folder), tmp_path / "a").fingerprint
    assert len(first) == 16 and int(first, 16) >= 0
    assert open_data(of(folder), tmp_path / "b").fingerprint == first  # decoded again
    noise(2).save(folder / "002.png", compress_level=0)  # the same pixels in another file
    assert open_data(of(folder), tmp_path / "a").fingerprint == first
    image = noise(2)
    image.putpixel((3, 3), tuple(255 - v for v in image.getpixel((3, 3))))
    image.save(folder / "002.png")
    assert open_data(of(folder), tmp_path / "a").fingerprint != first
    assert open_data(of(folder, resolution=4), tmp_path / "a").fingerprint != first


@pytest.mark.parametrize("damage", ["cut", "empty", "json", "no json", "json list", "other json"])
def test_a_damaged_cache_is_rebuilt(tmp_path, damage):
    first = open_data(of(fill(tmp_path / "in", 5)), tmp_path / "cache")
    pixels, (array,), (note,) = (
        first.images_NCHW.copy(),
        *(list((tmp_path / "cache").glob(e)) for e in ("*.npy", "*.json")),
    )
    match damage:
        case "cut":
            os.truncate(array, array.stat().st_size - 1)
        case "empty":
            os.truncate(array, 0)
        case "json":
            note.write_text('{"count": 5, "finger')
        case "no json":
            note.unlink()
        case "json list":
            note.write_text("[5]")
        case "other json":
            note.write_text('{"count": 4, "fingerprint": "", "skipped": []}')
    again = open_data(of(tmp_path / "in"), tmp_path / "cache")
    assert np.array_equal(again.images_NCHW, pixels) and again.fingerprint == first.fingerprint


def test_two_at_once(tmp_path):
    folder = fill(tmp_path / "in", 40)
    with ThreadPoolExecutor(4) as pool:
        opened = list(pool.map(lambda _: open_data(of(folder), tmp_path / "cache"), range(4)))
    assert len({d.fingerprint for d in opened}) == 1
    assert all(np.array_equal(d.images_NCHW, opened[0].images_NCHW) for d in opened)
    assert len(list((tmp_path / "cache").iterdir())) == 2, "one array, one sidecar, no temporary file"


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, monkeypatch):
    folder = fill(tmp_path / "in", 5)

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(BadInput, match="No space left on device.*cache=DIR"):
        open_data(of(folder), tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_a_write_that_fails_is_an_error_and_not_a_signal(tmp_path, monkeypatch):
    monkeypatch.setattr(data_module, "open", lambda path, mode: open("/dev/full", "wb"), raising=False)
    with pytest.raises(BadInput, match="No space left on device.*cache=DIR"):
        open_data(of(fill(tmp_path / "in", 200, (32, 32)), resolution=32), tmp_path / "cache")


def test_a_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(BadInput, match="cannot write to .*file/cache .*cache=DIR"):
        open_data(of(fill(tmp_path / "in", 3)), tmp_path / "file" / "cache")


def test_the_cache_may_start_with_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    data = open_data(of(fill(tmp_path / "in", 3), path="~/in"), "~/deep/cache")
    assert Path(data.images_NCHW.filename).parent == tmp_path / "deep" / "cache"


# --- named sets -------------------------------------------------------------------------------------------------------

HUB_LAYOUTS = [  # name, file in the set's repository, image column, has labels
    ("flowers", "data/train-00000-of-00001.parquet", "image", False),
    ("celebahq", "data/train-00000-of-00006.parquet", "image", False),
    ("cifar10", "plain_text/train-00000-of-00001.parquet", "img", True),
    ("afhq", "data/train-00000-of-00014.parquet", "image", True),
]


@pytest.mark.parametrize(("name", "file", "column", "labelled"), HUB_LAYOUTS)
def test_local_copy_in_the_hubs_own_layout(tmp_path, name, file, column, labelled):
    images = [noise(i) for i in range(6)]
    write_parquet(tmp_path / "in" / file, images, column, [0, 1, 2, 0, 1, 2] if labelled else None)
    (tmp_path / "in" / "README.md").write_text("a dataset card")
    data = open_data(of(tmp_path / "in", name=name), tmp_path / "cache")
    assert np.array_equal(data.images_NCHW, np.stack([np.asarray(i).transpose(2, 0, 1) for i in images]))
    assert Path(data.images_NCHW.filename).name.startswith(f"{name}-8x3-")


@pytest.mark.parametrize("names", [["cat", "dog", "wild"], ["wild", "cat", "dog"], None])
def test_afhq_cat_takes_only_the_cats(tmp_path, names):
    label = [(names or ["cat"]).index("cat") if i % 2 else 2 for i in range(6)]
    write_parquet(tmp_path / "in" / "data" / "train-0.parquet", [noise(i) for i in range(6)], label=label, names=names)
    cats = open_data(of(tmp_path / "in", name="afhq_cat"), tmp_path / "cache").images_NCHW
    expected = np.stack([np.asarray(noise(i)).transpose(2, 0, 1) for i in range(6) if label[i] == label[1]])
    assert np.array_equal(cats, expected)
    assert len(open_data(of(tmp_path / "in", name="afhq"), tmp_path / "cache").images_NCHW) == 6


def test_afhq_cat_in_the_authors_folders(tmp_path):
    for kind, count in (("cat", 3), ("dog", 2), ("wild", 2)):
        fill(tmp_path / "in" / "train" / kind, count)
    assert len(open_data(of(tmp_path / "in", name="afhq_cat"), tmp_path / "cache").images_NCHW) == 3
    assert len(open_data(of(tmp_path / "in" / "train" / "cat", name="afhq_cat"), tmp_path / "cache").images_NCHW) == 3


def test_all_splits_are_read_in_order_though_their_columns_differ(tmp_path):
    write_parquet(tmp_path / "in" / "train.parquet", [solid((i, 0, 0)) for i in (3, 4)])
    write_parquet(tmp_path / "in" / "test.parquet", [solid((i, 0, 0)) for i in (1, 2)], label=[0, 1])
    assert open_data(of(tmp_path / "in"), tmp_path / "cache").images_NCHW[:, 0, 0, 0].tolist() == [1, 2, 3, 4]
    single = open_data(of(tmp_path / "in" / "train.parquet"), tmp_path / "cache")
    assert single.images_NCHW[:, 0, 0, 0].tolist() == [3, 4]


def test_parquet_without_feature_types_or_without_bytes(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    fill(tmp_path / "in" / "sub", 2)
    rows = [{"bytes": None, "path": "sub/000.png"}, {"bytes": encoded(noise(1)), "path": None}]
    pq.write_table(pa.table({"picture": rows, "id": [1, 2]}), tmp_path / "in" / "a.parquet")
    pq.write_table(pa.table({"id": [1, 2], "img": [encoded(noise(i)) for i in (2, 3)]}), tmp_path / "in" / "b.parquet")
    pq.write_table(pa.table({"image": ["sub/000.png", "sub/001.png"]}), tmp_path / "in" / "c.parquet")
    for name, first in (("a", 0), ("b", 2), ("c", 0)):
        images = open_data(of(tmp_path / "in" / f"{name}.parquet"), tmp_path / "cache").images_NCHW
        assert np.array_equal(images, np.stack([np.asarray(noise(first + i)).transpose(2, 0, 1) for i in range(2)]))


def test_a_broken_row_of_a_parquet_file_is_named(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"bytes": encoded(noise(i)), "path": f"{i}.jpg"} for i in range(200)]
    rows[7]["bytes"] = rows[7]["bytes"][:60]
    pq.write_table(pa.table({"image": rows}), tmp_path / "a.parquet")
    assert open_data(of(tmp_path / "a.parquet"), tmp_path / "cache").skipped == ["7.jpg"]


REAL = {
    "cifar10": "cifar10/test.parquet",
    "flowers": "flowers102_64/train.parquet",
    "afhq_cat": "afhq_cat_128/train.parquet",
}


@pytest.mark.parametrize("name", REAL)
def test_real_images(tmp_path, name):
    """The first row group of each, which is enough to meet the real schema and codec."""
    import pyarrow.parquet as pq

    if not (SHARED / REAL[name]).exists():
        pytest.skip(f"the real images of {REAL[name]} are not beside this checkout")
    table = pq.ParquetFile(SHARED / REAL[name]).read_row_group(0)
    pq.write_table(table, tmp_path / "train.parquet")
    resolution = DATA_SETS[name]["resolution"]
    data = open_data(Data(name, resolution, 3, True, path=str(tmp_path)), tmp_path / "cache")
    assert data.images_NCHW.shape == (len(table), 3, resolution, resolution) and data.skipped == []
    image = Image.open(io.BytesIO(table["image"][7].as_py()["bytes"])).convert("RGB").resize((resolution, resolution))
    assert np.array_equal(data.images_NCHW[7], np.asarray(image).transpose(2, 0, 1))


def test_no_network_is_one_line_within_seconds(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", "http://127.0.0.1:9")  # nobody answers there
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    start = time.monotonic()
    with pytest.raises(BadInput, match="huggan/flowers-102-categories .*no answer.*connect.*data.path=DIR") as caught:
        open_data(Data("flowers", 64, 3), tmp_path)
    assert time.monotonic() - start < 5 and "\n" not in str(caught.value)
    assert datasets.config.HF_HUB_OFFLINE is False, "a later attempt may find the network back"


def test_a_silent_name_server_does_not_hold_it_up(tmp_path, monkeypatch):
    import datasets

    def silent(*_, **__):
        time.sleep(20)
        raise OSError("nobody heard")

    monkeypatch.setattr(sources, "urlopen", silent)
    monkeypatch.setattr(sources, "PATIENCE", 0.3)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    start = time.monotonic()
    with pytest.raises(BadInput, match="no answer"):
        open_data(Data("celebahq", 8, 3), tmp_path)
    assert time.monotonic() - start < 15


def test_a_set_from_the_hub_reads_every_split(tmp_path, monkeypatch):
    """Played: the hub answers with a set of two splits. Afterwards the cache serves it without the hub."""
    import datasets

    features = datasets.Features({"img": datasets.Image(), "label": datasets.Value("int64")})
    splits = datasets.DatasetDict()
    for split, values in (("train", (3, 4, 5)), ("test", (1, 2))):
        rows = {"img": [{"bytes": encoded(solid((v, 0, 0))), "path": None} for v in values], "label": [0] * len(values)}
        splits[split] = datasets.Dataset.from_dict(rows, features=features)
    asked = []
    monkeypatch.setattr(sources, "urlopen", lambda *_, **__: io.BytesIO())
    monkeypatch.setattr(datasets, "load_dataset", lambda name: asked.append(name) or splits)
    for _ in range(2):
        data = open_data(Data("cifar10", 8, 3), tmp_path)
        assert data.images_NCHW[:, 0, 0, 0].tolist() == [1, 2, 3, 4, 5]
    assert asked == ["uoft-cs/cifar10"]
