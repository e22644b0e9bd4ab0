"""Reflow: pairs that hang on (seed, k) alone, a teacher that is found or trained, and straightness in closed form."""

import math
import shutil
import threading

import pytest
import torch

from experiments import compose
from liquiddiff import checkpoint, flow, loop, reflow, trainer
from liquiddiff.config import BadInput
from liquiddiff.record import Record
from liquiddiff.solvers import integrate

TINY = ["optim.images=96", "flow.reflow=40"]


def run_of(small, *more):
    return compose.as_run(compose.one([*small, *TINY, "ablation=reflow", *more]))


def lines(record, key):
    return [row for row in record.rows() if key in row]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(reflow, "NFE", 8)
    monkeypatch.setattr(reflow, "PART", 16)
    monkeypatch.setattr(reflow, "SAMPLES", 16)
    monkeypatch.setattr(reflow, "STEPS", 4)


def weights(fitted):
    return {**fitted.model.state_dict(), **{f"ema.{k}": v for k, v in fitted.ema.net.state_dict().items()}}


def test_a_straight_path_has_straightness_zero():
    x, noise = torch.randn(3, 1, 4, 4), torch.randn(3, 1, 4, 4)
    assert not reflow.straightness(lambda x_t, t: noise - x, noise).any()


@pytest.mark.parametrize("omega", [0.5, math.pi])
def test_straightness_of_a_rotation_is_its_closed_form(omega):
    # v = omega J x: |v| = omega r all along, and x_1 - x_0 is a chord, so S = r² (omega² - 4 sin²(omega / 2)).
    def rotate(x, t):
        return omega * torch.stack([-x[:, :, 1], x[:, :, 0]], 2)

    noise = torch.randn(5, 1, 2, 1, dtype=torch.float64)
    r2 = noise.square().flatten(1).sum(1)
    exact = r2 * (omega**2 - 4 * math.sin(omega / 2) ** 2)
    errors = [(reflow.straightness(rotate, noise, n) / exact - 1).abs().max().item() for n in (32, 64, 128)]
    assert errors[1] < 2e-3 and errors[2] < errors[1] / 3  # second order


def test_the_teacher_is_trained_once_and_found(small):
    run = run_of(small)
    baseline = compose.as_run(compose.one([*small, "optim.images=96"]))
    assert reflow.teacher_of(run) == baseline
    fitted, images = loop.train(run)
    home = Record(baseline)
    assert (home.folder / "run.yaml").exists() and not home.done
    written = (home.folder / "checkpoint.pt").stat().st_mtime_ns
    assert [row["images"] for row in lines(home, "loss")][-1] == 96
    # The baseline's own run takes the teacher's weights up; another reflow arm finds teacher and pairs.
    again = loop.train(baseline)[0]
    plus = run_of(small, "flow.times=u_shaped", "flow.loss=pseudo_huber")
    loop.train(plus)
    assert (home.folder / "checkpoint.pt").stat().st_mtime_ns == written
    names = {path.name for path in (Record(run).folder / "pairs").iterdir()}
    assert names == {"0-16.safetensors", "16-32.safetensors", "32-40.safetensors"}
    for name in names:
        files = [Record(r).folder / "pairs" / name for r in (run, plus)]
        assert files[0].samefile(files[1])
    # The pairs are what the teacher's ODE makes of the noise of its own stream.
    pairs = reflow.open_pairs(run, Record(run), images.fingerprint)
    noise = flow.initial_noise(0, 0, 40, (1, 8, 8), "reflow")
    with torch.inference_mode():
        expected, _ = integrate(again.velocity, noise, 8, "rk4")
    torch.testing.assert_close(pairs.images_NCHW, expected, rtol=1e-3, atol=1e-4)
    assert not torch.equal(noise, flow.initial_noise(0, 0, 40, (1, 8, 8)))
    (row,) = lines(Record(run), "straightness")
    assert row["teacher_straightness"] == pytest.approx(reflow.straightness_of(again, run), rel=1e-3)
    assert row["straightness"] == pytest.approx(reflow.straightness_of(fitted, run), rel=1e-3)


def test_an_interrupted_run_resumes_to_the_bit_and_needs_no_teacher(small, tmp_path, monkeypatch):
    whole_run, run = run_of(small, f"out={tmp_path}/whole"), run_of(small, f"out={tmp_path}/part")
    whole = loop.train(whole_run)[0]
    generate, made = reflow._generate, []

    def torn(fitted, run, start, stop):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(start)
        return generate(fitted, run, start, stop)

    monkeypatch.setattr(reflow, "_generate", torn)
    with pytest.raises(KeyboardInterrupt):
        loop.train(run)
    monkeypatch.setattr(reflow, "_generate", lambda *a: made.append(a[2]) or generate(*a))
    record, steps = Record(run), []

    def stop(images, loss):
        steps.append(images)
        if images == 64:
            raise KeyboardInterrupt

    with record.lock(), pytest.raises(KeyboardInterrupt):
        loop.fit(run, record, stop)
    assert made == [0, 16, 32], "a part is made once"
    shutil.rmtree(Record(reflow.teacher_of(run)).folder)
    resumed = loop.train(run)[0]
    for one, two in [(Record(whole_run), record)]:
        for path in (one.folder / "pairs").iterdir():
            assert path.read_bytes() == (two.folder / "pairs" / path.name).read_bytes()
    a, b = weights(whole), weights(resumed)
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert len(lines(record, "straightness")) == 1


def test_the_stream_of_pairs_does_not_know_the_batch_size():
    pairs = reflow.Pairs(torch.randn(7, 1, 2, 2), 0.0, seed=3, times="uniform")
    whole = pairs.batch(0, 20)
    split = [pairs.batch(*span) for span in ((0, 3), (3, 9), (12, 8))]
    for k, part in enumerate(whole):
        assert torch.equal(part, torch.cat([each[k] for each in split]))
    x, noise, t = whole
    assert torch.equal(t, flow.draw(3, 0, 20, (1, 2, 2))[1]), "t is the baseline's at that position"
    first = {row.numpy().tobytes() for row in x[:7]}
    assert first == {row.numpy().tobytes() for row in pairs.images_NCHW}, "an epoch sees every pair once"
    assert not torch.equal(x[:7], x[7:14])
    k = next(k for k in range(7) if torch.equal(pairs.images_NCHW[k], x[0]))
    assert torch.equal(noise[0], flow.initial_noise(3, k, 1, (1, 2, 2), "reflow")[0])


def test_a_teacher_that_another_process_trains_is_waited_for(small):
    run = run_of(small)
    images = loop.open_data(run.data, run.cache)
    own = Record(reflow.teacher_of(run))
    own.create()
    found = []
    with own.lock():
        own.describe()
        waiting = threading.Thread(target=lambda: found.append(reflow.teach(run, own.out, images.fingerprint)))
        waiting.start()
        loop.fit(reflow.teacher_of(run), own)
        assert waiting.is_alive() and not found
    waiting.join(60)
    ((fitted, folder),) = found
    assert folder == own.folder and fitted.images == 96


def test_a_teacher_of_other_data_is_refused(small):
    run = run_of(small)
    loop.train(reflow.teacher_of(run))
    with pytest.raises(BadInput, match="was trained on data"):
        reflow.teach(run, Record(run).out, "0" * 16)


def test_a_teacher_of_other_arithmetic_and_pairs_of_other_data_are_refused(small):
    run = run_of(small)
    images = loop.open_data(run.data, run.cache)
    loop.train(run)
    home = Record(reflow.teacher_of(run))
    record = Record(run)
    with pytest.raises(BadInput, match=r"0-16\.safetensors is of a teacher of data .*, this run has 0000"):
        reflow.open_pairs(run, record, "0" * 16)
    assert len(reflow.open_pairs(run, record, images.fingerprint).images_NCHW) == 40
    shutil.rmtree(record.folder / "pairs")
    checkpoint.save(checkpoint.load(home.folder) | {"precision": "fp16"}, home.folder)
    with pytest.raises(BadInput, match="was trained in fp16, here it would compute in fp32"):
        reflow.open_pairs(run, record, images.fingerprint)


def test_three_runs_that_differ_in_their_evaluation_train_once(small, monkeypatch):
    first, second, third = (
        compose.as_run(compose.one([*small, "optim.images=96", f"eval.nfe=[{k}]"])) for k in (1, 2, 3)
    )
    fitted = loop.train(first)[0]
    monkeypatch.setattr(trainer.RectifiedFlowTrainer, "train_step", None)
    for run in (second, third):
        a, b = weights(fitted), weights(loop.train(run)[0])
        assert all(torch.equal(a[k], b[k]) for k in a)
