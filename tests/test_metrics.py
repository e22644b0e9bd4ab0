"""Metrics: they are torch-fidelity's own numbers, and they mean what their names say."""

import io
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from analysis import features as features_module
from analysis import metrics
from analysis.digits_classifier import WEIGHTS, accuracy, load_net, split
from liquiddiff.config import BadInput, Data, Eval, Run, check
from liquiddiff.data import ImageData, open_data

ROOT = Path(__file__).parents[1]
CATS = ROOT.parent / "shared/data/afhq_cat_128/train.parquet"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return open_data(Data(), tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def extractor():
    return metrics.load_extractor("digits", None, CPU)


@pytest.fixture(scope="module")
def real(digits, extractor):
    """Features of 1,796 real digits, in two disjoint halves."""
    features_ND = extractor(pixels(digits))
    return [features_ND[half] for half in metrics.halves(1797, 898)]


def pixels(images):
    return torch.from_numpy(np.array(images.images_NCHW))


def noisy(images, sd, seed=0):
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))
    return (images + sd * noise).round().clamp(0, 255).to(torch.uint8)


def gaussian(n, mean, sd, seed):
    """n points whose SAMPLE mean and covariance are exactly `mean` and diag(sd²)."""
    x = torch.randn(n, len(mean), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x -= x.mean(0)
    x = torch.linalg.solve_triangular(torch.linalg.cholesky(x.T.cov()), x.T, upper=False).T
    return (x * torch.tensor(sd) + torch.tensor(mean)).float()


# --- meaning -----------------------------------------------------------------------------------------------------


def test_distance_of_a_set_to_itself_is_zero(real):
    row = metrics.compare(real[0], real[0])
    assert abs(row["fd"]) < 1e-3
    assert row["kid"] <= 0  # unbiased: below zero on the same points
    assert row["precision"] == row["recall"] == 1


def test_fd_of_gaussians_is_the_closed_form():
    a = gaussian(500, [0.0, 0.0, 0.0], [1.0, 2.0, 0.5], seed=1)
    b = gaussian(400, [1.0, -2.0, 0.5], [1.5, 1.0, 0.5], seed=2)
    expected = (1 + 4 + 0.25) + (0.5**2 + 1 + 0)  # |m1 - m2|² + sum (s1 - s2)²
    assert metrics.compare(a, b)["fd"] == pytest.approx(expected, rel=1e-5)


def test_kid_is_zero_on_one_distribution_and_grows_with_a_shift():
    rng = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 600, 16, generator=rng)
    kids = [metrics.compare(a + shift, b)["kid"] for shift in (0, 0.3, 1.0)]
    assert abs(kids[0]) < 0.01 < kids[1] < kids[2]


def test_precision_and_recall_are_not_swapped():
    rng = torch.Generator().manual_seed(0)
    modes = torch.cat([torch.randn(200, 2, generator=rng), torch.randn(200, 2, generator=rng) + 50])
    dropped = torch.randn(400, 2, generator=rng)  # one mode of two: all of it real, half of the real missing
    row = metrics.compare(dropped, modes)
    assert row["precision"] > 0.9 and row["recall"] == pytest.approx(0.5, abs=0.05)
    # Both modes, but 40 % of what is generated is junk, far off and apart from each other, and covers nothing real.
    junk = torch.stack([torch.arange(160) * 100.0 + 1e3, torch.zeros(160)], dim=1)
    spread = torch.cat([modes[::2] + 0.05, modes[::5] - 0.05, junk])[:440]
    row = metrics.compare(spread, modes)
    assert row["precision"] == pytest.approx(280 / 440, abs=0.05)
    modes_and_junk = torch.cat([modes[::2] + 0.05, junk[:2]])
    assert metrics.compare(modes_and_junk, modes)["recall"] > 0.9


def test_compare_is_deterministic(real):
    before = torch.get_rng_state()
    assert metrics.compare(*real) == metrics.compare(*real)
    assert torch.equal(before, torch.get_rng_state())


def test_compare_takes_few_images():
    rng = torch.Generator().manual_seed(0)
    row = metrics.compare(torch.randn(4, 3, generator=rng), torch.randn(9, 3, generator=rng))
    assert all(np.isfinite(value) for value in row.values())


def test_only_inception_has_an_fid():
    assert metrics.metric_name("inception", "fd") == "fid"
    assert metrics.metric_name("effnet_lite0", "fd") == "fd_effnet_lite0"
    assert metrics.metric_name("digits", "fd_pixel") == "fd_pixel"
    assert {metrics.metric_name(name, "fd") for name in metrics.EXTRACTORS if name != "inception"}.isdisjoint({"fid"})


# --- torch-fidelity as the outside reference -----------------------------------------------------------------------


class AsDataset(torch.utils.data.Dataset):
    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.images[i]


def outside(name, a, b, **options):
    """The same by torch-fidelity's own front door."""
    from torch_fidelity import calculate_metrics

    return calculate_metrics(
        input1=AsDataset(a), input2=AsDataset(b), feature_extractor=metrics.EXTRACTORS[name].registered,
        fid=True, kid=True, prc=True, cuda=False, cache=False, verbose=False, save_cpu_ram=True,
        **metrics.kid_subset(len(a), len(b)), **options,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["digits", "pixel"])
def test_same_numbers_as_calculate_metrics(digits, name):
    images = pixels(digits)
    a, b = noisy(images[:300], 60), images[500:900]
    extract = metrics.load_extractor(name, None, CPU)
    row, theirs = metrics.compare(extract(a), extract(b)), outside(name, a, b)
    # features are of batches of another size, so that they differ in their last float32 digits
    assert row["fd"] == pytest.approx(theirs["frechet_inception_distance"], rel=1e-5)
    assert row["kid"] == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-5)
    assert (row["precision"], row["recall"]) == (theirs["precision"], theirs["recall"])
    assert 0 < row["precision"] < 1


def test_inception_from_a_file_has_logits_of_the_same_pass(monkeypatch, tmp_path):
    """Random weights in the true architecture: the way from the file to the logits needs no download."""
    import torch_fidelity.feature_extractor_inceptionv3 as inception

    with monkeypatch.context() as patch:
        patch.setattr(inception, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(nn.Module, "load_state_dict", lambda *_, **__: None)
        torch.manual_seed(0)
        net = inception.FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"], verbose=False)
    torch.save(net.state_dict(), path := tmp_path / "weights.pth")
    extract = metrics.load_extractor("inception", str(path), CPU)
    images = torch.randint(256, (3, 1, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    features_ND, (theirs, logits) = extract(images), net(images.expand(-1, 3, -1, -1))
    assert features_ND.shape == (3, 2048)
    torch.testing.assert_close(features_ND, theirs, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(extract.logits(features_ND), logits, rtol=1e-3, atol=1e-5)


def test_inception_score_counts_sure_and_even_classes(extractor):
    labels = torch.arange(2000) % 4
    score = metrics.inception_score(100 * nn.functional.one_hot(labels, 10).float())
    assert score["isc"] == pytest.approx(4, rel=0.02)  # Salimans et al. 2016
    assert metrics.inception_score(torch.zeros(50, 10))["isc"] == pytest.approx(1)
    assert metrics.inception_score(extractor.logits(torch.zeros(2, 64))) == {}


def test_addresses_are_torch_fidelitys():
    from torch_fidelity.feature_extractor_clip import MODEL_URLS
    from torch_fidelity.feature_extractor_dinov2 import MODEL_METADATA
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
    from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

    import analysis.extractors  # noqa: F401

    specs = metrics.EXTRACTORS
    assert specs["inception"].url == URL_INCEPTION_V3
    assert specs["clip"].url == MODEL_URLS[specs["clip"].registered]
    assert MODEL_METADATA[specs["dinov2"].registered] in specs["dinov2"].url
    for spec in specs.values():
        assert spec.layer in FEATURE_EXTRACTORS_REGISTRY[spec.registered].get_provided_features_list()


# --- extractors ----------------------------------------------------------------------------------------------------


def test_digits_classifier_is_accurate_on_heldout_digits():
    _, _, images, labels = split()
    assert len(images) == 360
    assert accuracy(load_net(), images, labels) > 0.98
    assert WEIGHTS.stat().st_size < 300_000


def test_digits_features_have_no_collapsed_direction(digits, extractor):
    features_ND = extractor(pixels(digits))
    eigenvalues = np.linalg.eigvalsh(np.cov(features_ND.numpy().T))
    assert features_ND.shape == (1797, 64) and features_ND.dtype == torch.float32
    assert eigenvalues[-1] / eigenvalues[0] < 200


def test_digits_fd_tells_halves_from_noise_and_from_a_missing_digit(digits, extractor, real):
    first, _ = metrics.halves(1797, 898)
    distances = [metrics.frechet(*real)]
    for sd in (20, 40, 80):
        distances.append(metrics.frechet(extractor(noisy(pixels(digits)[first], sd)), real[1]))
    assert distances == sorted(distances)
    assert distances[2] > 2 * distances[0] and distances[3] > 8 * distances[0]
    labels = load_net().head(real[0]).argmax(1)
    assert metrics.frechet(real[0][labels != 3], real[1]) > 1.5 * distances[0]


def test_effnet_fd_grows_with_noise_on_real_images():
    if not CATS.exists():
        pytest.skip(f"{CATS} is absent")
    import pyarrow.parquet as pq
    from PIL import Image

    batch = next(pq.ParquetFile(CATS).iter_batches(12, columns=["image"])).to_pylist()
    images = np.stack([np.asarray(Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB")) for row in batch])
    cats = torch.from_numpy(images).permute(0, 3, 1, 2)
    extract = metrics.load_extractor("effnet_lite0", None, CPU)
    reference = extract(cats)
    assert reference.shape == (12, 1280)
    distances = [metrics.frechet(extract(noisy(cats, sd)), reference) for sd in (5, 15, 40)]
    assert 0 < distances[0] < distances[1] < distances[2]
    torch.testing.assert_close(extract(cats[:1, :1, :9, :9]), extract(cats[:1, :1, :9, :9].expand(-1, 3, -1, -1)))


def test_pixel_features_are_the_training_scale(digits):
    features_ND = metrics.load_extractor("pixel", None, CPU)(pixels(digits))
    torch.testing.assert_close(features_ND, digits.tensor(range(1797)).flatten(1))


def test_names_are_known_without_torch_fidelity():
    code = (
        "import sys, analysis.metrics as m\n"
        "try: m.check_extractor('effnet', None)\n"
        "except m.BadInput as error: print(error)\n"
        "assert 'torch_fidelity' not in sys.modules and 'sklearn' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Did you mean effnet_lite0?" in done.stdout and "inception" in done.stdout


# --- weights -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["inception", "clip", "dinov2"])
def test_missing_weights_offline_fail_soon_in_one_line(monkeypatch, tmp_path, name):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # refuses
    start = time.monotonic()
    with pytest.raises(metrics.MissingWeights, match=f"{name}.*connect once.*effnet_lite0") as caught:
        metrics.load_extractor(name, None, CPU)
    assert time.monotonic() - start < 5 and "\n" not in str(caught.value)
    assert ("eval.weights=PATH" in str(caught.value)) == metrics.EXTRACTORS[name].takes_weights


def test_a_silent_network_is_given_up_soon(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(features_module, "urlopen", lambda *_, **__: time.sleep(30) or io.BytesIO())
    start = time.monotonic()
    with pytest.raises(metrics.MissingWeights):
        metrics.check_extractor("inception", None)
    assert time.monotonic() - start < 20


def test_weights_already_downloaded_need_no_network(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(features_module, "_answers", lambda url: False)
    (folder := tmp_path / "hub/checkpoints").mkdir(parents=True)
    (folder / features_module.INCEPTION_FILE).touch()
    metrics.check_extractor("inception", None)


def test_bad_weights_are_refused_in_one_line(tmp_path):
    with pytest.raises(BadInput, match="eval.weights=/nowhere is not a file"):
        metrics.check_extractor("inception", "/nowhere")
    with pytest.raises(BadInput, match="takes no eval.weights"):
        metrics.check_extractor("pixel", __file__)
    (junk := tmp_path / "junk.pth").write_bytes(b"not weights")
    with pytest.raises(BadInput, match="does not hold the weights of inception") as caught:
        metrics.load_extractor("inception", str(junk), CPU)
    assert "\n" not in str(caught.value) and not isinstance(caught.value, metrics.MissingWeights)


# --- caches --------------------------------------------------------------------------------------------------------


class Counted:
    """An extractor that counts what it was asked for."""

    name, weights_hash = "counted", "0" * 8

    def __init__(self):
        self.seen = 0

    def __call__(self, images):
        self.seen += len(images)
        return images.float().flatten(1)

    def logits(self, features_ND):
        return None


def tiny(n=20, fingerprint="0123456789abcdef"):
    rng = np.random.default_rng(n)
    images = rng.integers(0, 256, (n, 1, 4, 4)).astype(np.uint8)
    images.flags.writeable = False  # as a memmap
    return ImageData(images, fingerprint, np.arange(n - 2), np.arange(n - 2, n), [], False)


def test_reference_features_are_computed_once(tmp_path):
    extract, images = Counted(), tiny()
    first = metrics.reference_features(extract, images, tmp_path)
    assert first.shape == (20, 16) and extract.seen == 20  # train and held-out
    assert torch.equal(first, metrics.reference_features(extract, images, tmp_path)) and extract.seen == 20
    others = [tiny(fingerprint="f" * 16), tiny(n=21)]
    for k, other in enumerate(others, start=1):
        metrics.reference_features(extract, other, tmp_path)
        assert len(list((tmp_path / "features").iterdir())) == 1 + k
    extract.weights_hash = "1" * 8
    metrics.reference_features(extract, images, tmp_path)
    assert extract.seen == 20 + 20 + 21 + 20


def test_a_torn_cache_is_computed_again(tmp_path):
    extract, images = Counted(), tiny()
    whole = metrics.reference_features(extract, images, tmp_path)
    (file,) = (tmp_path / "features").iterdir()
    file.write_bytes(file.read_bytes()[:-7])
    assert torch.equal(whole, metrics.reference_features(extract, images, tmp_path)) and extract.seen == 40


def test_weights_hash_is_of_the_values(extractor):
    assert metrics.load_extractor("digits", str(WEIGHTS), CPU).weights_hash == extractor.weights_hash
    net = load_net()
    before = metrics.Features("digits", net, CPU).weights_hash
    next(net.parameters()).data[0] += 1e-3
    assert metrics.Features("digits", net, CPU).weights_hash != before


def test_floor_is_deterministic_and_its_halves_disjoint(tmp_path, digits, extractor, monkeypatch):
    a, b = metrics.halves(1797, 898)
    assert len(set(a.tolist()) | set(b.tolist())) == 1796
    row = metrics.floor(extractor, digits, 1797, tmp_path / "a")
    assert row == metrics.floor(extractor, digits, 5000, tmp_path / "b")
    assert row["n"] == row["reference_n"] == 898
    assert 0.2 < row["fd_pixel"] < 0.4 and 0 < row["fd"] < 1.5
    monkeypatch.setattr(metrics, "compare", None)
    assert row == metrics.floor(extractor, digits, 1797, tmp_path / "a")  # from the cache


# --- evaluate ------------------------------------------------------------------------------------------------------


def test_evaluate_gives_a_row_per_nfe_as_soon_as_it_is_known(tmp_path, digits):
    run = Run(eval=Eval(n=300, nfe=[1, 4], batch=128), cache=str(tmp_path))
    images, calls, rows = pixels(digits)[torch.randperm(1797, generator=torch.Generator().manual_seed(0))], [], []

    def sample(start, count, nfe):
        calls.append((start, count, nfe, len(rows)))
        return noisy(images[start : start + count], 100 / nfe, seed=start), 2 * nfe

    assert metrics.evaluate(run, digits, sample, CPU, rows.append) == rows
    assert [call[:2] for call in calls] == 2 * [(0, 128), (128, 128), (256, 44)]
    assert [call[2:] for call in calls] == 3 * [(1, 0)] + 3 * [(4, 1)]
    assert [row["nfe"] for row in rows] == [2, 8]
    for row in rows:
        assert (row["solver"], row["extractor"], row["n"]) == ("euler", "digits", 300)
        assert row["reference"] == f"{digits.fingerprint}/1797"
    for key in ("fd", "kid", "fd_pixel"):
        assert rows[0][key] > rows[1][key]
    assert rows[0]["precision"] < rows[1]["precision"]
    fewer = replace(run, eval=replace(run.eval, batch=300))
    assert metrics.evaluate(fewer, digits, lambda s, c, k: (images[:c], k), CPU, rows.append)[0]["fd"] < rows[1]["fd"]


@pytest.mark.parametrize("n, hint", [(1798, "the set has 1797 images: set eval.n=1797"), (3, "set eval.n=4 or more")])
def test_evaluate_refuses_an_impossible_n_before_any_work(digits, n, hint, monkeypatch):
    monkeypatch.setattr(metrics, "load_extractor", None)
    with pytest.raises(BadInput, match=hint):
        metrics.evaluate(Run(eval=Eval(n=n)), digits, None, CPU, None)


def test_a_set_that_has_no_halves_to_compare_is_refused_before_any_work():
    with pytest.raises(BadInput, match="has 6 images.*it needs 8 or more"):
        metrics.check_count(5, 6)
    metrics.check_count(5, 8)
    with pytest.raises(BadInput, match="pixel means 12288 features"):
        check(Run(data=Data("folder", path="/x", resolution=64, channels=3), eval=Eval(extractor="pixel")))


def test_an_extractor_that_cannot_read_the_images_is_refused_before_sampling(tmp_path):
    run = Run(eval=Eval(n=10), cache=str(tmp_path))
    with pytest.raises(BadInput, match="digits reads 8x8 digits, not 1x4x4"):
        metrics.evaluate(run, tiny(), None, CPU, None)
