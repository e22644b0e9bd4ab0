"""Training: it learns, it repeats to the bit, it survives any kill, and nothing depends on history."""

import hashlib
import io
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from experiments import compose, grid
from liquiddiff import RectifiedFlowTrainer, batches, checkpoint, flow, liquid_diffusion_tiny, loop, reflow, trainer
from liquiddiff.adamw import Update
from liquiddiff.config import BadInput, Model, Optim
from liquiddiff.device import deferred_interrupt
from liquiddiff.ema import EMA
from liquiddiff.record import Record, set_aside
from liquiddiff.seeding import initialise
from liquiddiff.unet import LiquidDiffusionUNet


def net_of(seed=0):
    net = LiquidDiffusionUNet(Model("test", [8, 16], [1, 1]), in_channels=1, resolution=8)
    initialise(net, seed)
    return net


def fresh(seed=0, **optim):
    return RectifiedFlowTrainer(net_of(seed), seed=seed, optim=Optim(images=512, batch=16, warmup=64, **optim))


def weights(fitted):
    return {**fitted.model.state_dict(), **{f"ema.{k}": v for k, v in fitted.ema.net.state_dict().items()}}


def assert_same(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_quick_start_of_the_seed():
    model = liquid_diffusion_tiny()
    fitted = RectifiedFlowTrainer(model, lr=1e-4, device="cpu")
    metrics = fitted.train_step(torch.rand(1, 3, 32, 32) * 2 - 1)
    assert float(f"{metrics['loss']:.4f}") > 0
    samples = fitted.sample(batch_size=2, image_size=32, num_steps=2)
    assert samples.shape == (2, 3, 32, 32)
    assert samples.isfinite().all()


def test_path_runs_from_data_to_noise():
    x, noise = torch.randn(2, 1, 2, 2), torch.randn(2, 1, 2, 2)
    torch.testing.assert_close(flow.interpolate(x, noise, torch.zeros(2)), x)
    torch.testing.assert_close(flow.interpolate(x, noise, torch.ones(2)), noise)
    t = torch.full((2,), 0.25)
    slope = (flow.interpolate(x, noise, t + 0.5) - flow.interpolate(x, noise, t)) / 0.5
    torch.testing.assert_close(slope, noise - x)


def test_draws_hang_on_the_position_alone():
    noise, t = flow.draw(0, 10, 8, (1, 2, 2))
    first, second = flow.draw(0, 10, 3, (1, 2, 2)), flow.draw(0, 13, 5, (1, 2, 2))
    assert torch.equal(noise, torch.cat([first[0], second[0]]))
    assert torch.equal(t, torch.cat([first[1], second[1]]))
    assert not torch.equal(noise, flow.draw(1, 10, 8, (1, 2, 2))[0])


def test_loss_is_the_mean_square_of_the_velocity_s_error():
    fitted, x = fresh(), torch.randn(4, 1, 8, 8)
    noise, t = flow.draw(0, 0, 4, (1, 8, 8))
    loss = fitted.losses(lambda x, t: torch.zeros_like(x), x, noise, t)
    torch.testing.assert_close(loss, ((noise - x) ** 2).mean((1, 2, 3)))


@pytest.mark.slow
def test_overfits_eight_images():
    # With eight images and t = 1 excluded by few steps, samples must be (nearly) those images.
    images = torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(0)).round() * 2 - 1
    fitted = RectifiedFlowTrainer(net_of(), seed=0, optim=Optim(images=12_000, batch=32, lr=5e-3, warmup=500, ema=1000))
    while fitted.images < 12_000:
        fitted.train_step(images.repeat(4, 1, 1, 1))
    samples = fitted.sample(16, 8, 20, channels=1)
    nearest = torch.cdist(samples.flatten(1), images.flatten(1)).min(1).values / 8  # root mean square error
    assert nearest.median() < 0.7  # half of what two random images are apart; blind guesses are at 1


def test_warm_up_then_cosine_to_zero():
    fitted = fresh(lr=1.0)
    rates = []
    for images in (0, 32, 64, 288, 512):
        fitted.images = images
        rates.append(fitted.learning_rate())
    assert rates == pytest.approx([1 / 64, 33 / 64, 1.0, 0.5, 0.0], abs=1e-9)


def test_ema_half_life_is_in_images():
    for batch in (10, 100):
        net = torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.zeros_(net.weight)
        ema = EMA(net, half_life=1000)
        torch.nn.init.ones_(net.weight)
        for step in range(1000 // batch):
            ema.update(ema.decay(100_000 + step * batch, batch))
        assert ema.net.weight.item() == pytest.approx(0.5)


def test_gradients_are_clipped():
    """All by one factor; were two to share memory, clipping in place would scale them twice."""
    seen = []
    for clip in (1e-3, 1e6):
        fitted = fresh(clip=clip)
        with torch.no_grad():  # from the start, all but the head's are zero
            fitted.model.head[2].weight.fill_(0.1)
        fitted.optimizer.register_step_pre_hook(
            lambda *_, fitted=fitted: seen.append([p.grad.clone() for p in fitted.model.parameters()])
        )
        fitted.train_step(torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)))
    clipped, whole = seen
    norm = torch.stack([g.norm() for g in whole]).norm()
    assert norm > 1e-3
    for a, b in zip(clipped, whole, strict=True):
        torch.testing.assert_close(a, b * 1e-3 / norm, rtol=1e-3, atol=1e-12)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_follows_fp32(precision):
    losses = {}
    for kind in ("fp32", precision):
        fitted = fresh(precision=kind)
        losses[kind] = [
            fitted.train_step(torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(1)))["loss"]
            for _ in range(3)
        ]
    torch.testing.assert_close(torch.stack(losses[precision]), torch.stack(losses["fp32"]), rtol=0.02, atol=0.02)


def test_state_continues_to_the_bit():
    images = torch.randn(12, 16, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    whole, first, second = fresh(), fresh(), fresh(seed=0)
    for k, batch in enumerate(images):
        whole.train_step(batch)
        if k < 5:
            first.train_step(batch)
    second.load_state(first.state())
    for batch in images[5:]:
        second.train_step(batch)
    assert_same(weights(whole), weights(second))


def test_two_runs_are_equal_to_the_bit_and_seeds_differ(small, tmp_path):
    a, b, c = (
        loop.train(compose.as_run(compose.one([*small, f"out={tmp_path}/{k}", f"seed={seed}", "optim.images=96"])))[0]
        for k, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert_same(weights(a), weights(b))
    assert not torch.equal(a.model.stem[0].weight, c.model.stem[0].weight)


@pytest.mark.slow
def test_killed_runs_resume_to_the_bit(small, tmp_path):
    overrides = [*small, "optim.images=1600"]
    whole = loop.train(compose.as_run(compose.one([*overrides, f"out={tmp_path}/whole"])))[0]
    killed = compose.as_run(compose.one([*overrides, f"out={tmp_path}/killed"]))
    record = Record(killed)
    code = (
        "import sys; from experiments import compose; from liquiddiff import train; "
        "train(compose.plan(sys.argv[1:])[1][0])"
    )
    for _ in range(2):  # dies wherever it happens to be, twice
        process = subprocess.Popen([sys.executable, "-W", "error", "-c", code, *overrides, f"out={tmp_path}/killed"])
        seen = len(record.rows())
        deadline = time.monotonic() + 60
        while len(record.rows()) < seen + 12 and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "the run ended before it could be killed"
    resumed = loop.train(killed)[0]
    assert_same(weights(whole), weights(resumed))
    images = [row["images"] for row in record.rows() if "loss" in row]
    assert images == sorted(set(images)), "no line is written twice"


@pytest.mark.parametrize("reflowed", [False, True])
def test_batches_made_ahead_change_no_bit(small, monkeypatch, tmp_path, reflowed):
    monkeypatch.setattr(reflow, "SAMPLES", 16)
    overrides = [*small, "optim.images=170", *(["flow.reflow=32", "flow.times=u_shaped"] if reflowed else [])]
    runs = [compose.as_run(compose.one([*overrides, f"out={tmp_path}/{name}"])) for name in ("now", "ahead")]
    now = loop.train(runs[0])[0]
    made, real = [], loop.flow.draw

    def seen(seed, start, *more):
        made.append((threading.current_thread() is threading.main_thread(), start))
        return real(seed, start, *more)

    with monkeypatch.context() as patch:
        patch.setattr(batches, "ahead", lambda device: True)
        patch.setattr(reflow if reflowed else loop.flow, "draw", seen)
        assert_same(weights(now), weights(loop.train(runs[1])[0]))
    assert made == [(False, start) for start in (0, 32, 64, 96, 128, 160)], "each once, none by the main thread"
    lines = [[row["loss"] for row in Record(run).rows() if "loss" in row] for run in runs]
    assert lines[0] == lines[1]


def test_what_a_batch_meets_in_its_thread_is_raised_where_it_is_wanted(small, monkeypatch, tmp_path):
    run = compose.plan([*small, f"out={tmp_path}"])[1][0]

    def broken(seed, start, *more):
        if start == 64:
            raise OSError("the disk is gone")
        return draw(seed, start, *more)

    draw = loop.flow.draw
    monkeypatch.setattr(batches, "ahead", lambda device: True)
    monkeypatch.setattr(loop.flow, "draw", broken)
    with pytest.raises(OSError, match="the disk is gone"):
        loop.train(run)
    monkeypatch.undo()
    assert checkpoint.load(Record(run).folder)["images"] == 64


def test_a_signal_waits_for_the_end_of_the_step(small, monkeypatch, tmp_path):
    # Between the optimizer's update and the EMA's a step is half done; what is saved there could not resume to the bit.
    overrides = [*small, "optim.images=320", "eval.val_every=320"]
    whole = loop.train(compose.plan([*overrides, f"out={tmp_path}/whole"])[1][0])[0]
    run = compose.plan(overrides)[1][0]
    real, handler = EMA.update, signal.getsignal(signal.SIGINT)

    seen = []

    def interrupted(ema, decay, weights):
        seen.append(decay)
        if len(seen) == 3:  # steps of 32 images
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)
        real(ema, decay, weights)

    with monkeypatch.context() as patch:
        patch.setattr(EMA, "update", interrupted)
        with pytest.raises(KeyboardInterrupt):
            loop.train(run)
    assert checkpoint.load(Record(run).folder)["images"] == 96
    assert_same(weights(whole), weights(loop.train(run)[0]))
    assert signal.getsignal(signal.SIGINT) is handler


def test_an_error_after_a_signal_is_not_hidden(small, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    def interrupted(*_, **__):
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(checkpoint, "save", full)
    monkeypatch.setattr(EMA, "update", interrupted)
    with pytest.raises(OSError, match="No space left"):
        loop.train(compose.plan(small)[1][0])


@pytest.mark.parametrize(("number", "processes"), [(signal.SIGINT, 2), (signal.SIGUSR2, 1)])
def test_an_error_after_a_signal_is_an_interruption_where_the_run_is_resumed(monkeypatch, number, processes):
    handlers = {signal.SIGUSR2: lambda *_: None, signal.SIGINT: signal.default_int_handler}
    # as a scheduler's job has the first, and a shell's background job, where this may run, has not the second
    before = {signum: signal.signal(signum, handler) for signum, handler in handlers.items()}
    monkeypatch.setattr("liquiddiff.distributed.size", lambda: processes)
    try:
        with pytest.raises(KeyboardInterrupt) as caught, deferred_interrupt():
            signal.raise_signal(number)
            raise OSError(28, "No space left on device")
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
    assert caught.value.args == (number,) and isinstance(caught.value.__cause__, OSError)


def test_a_signal_in_the_last_step_is_not_lost(small):
    """Whoever waits for the run to stop, a scheduler or a grid, would wait for its evaluation, or for good."""
    run, before = compose.as_run(compose.one([*small, "optim.images=96"])), signal.getsignal(signal.SIGINT)
    record, saved = Record(run), []

    def last():
        saved.append(checkpoint.load(record.folder)["images"])
        if saved[-1] == 96:
            signal.raise_signal(signal.SIGINT)

    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        record.create()
        with record.lock(), pytest.raises(KeyboardInterrupt) as caught:
            loop.fit(run, record, on_checkpoint=last)
        assert caught.value.args == (signal.SIGINT,) and saved[-1] == 96
        with pytest.raises(KeyboardInterrupt), deferred_interrupt():  # nor between the last look and the end
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_finished_run_keeps_its_evaluation(small):
    run = compose.plan([*small, "optim.images=96"])[1][0]
    loop.train(run)
    record = Record(run)
    record.write({"nfe": 1, "fd": 2.0})
    record.finish(seconds=1.0)
    loop.train(run)
    assert len(record.evaluations()) == 1


def test_force_is_refused_while_another_process_holds_the_run(small):
    record = Record(compose.plan(small)[1][0])
    record.create()
    with record.lock(), pytest.raises(BadInput, match="another process"):
        set_aside(Record(record.run))
    set_aside(record)
    assert not record.folder.exists() and record.folder.with_name(f"{record.folder.name}.old1").exists()


def test_an_infinite_gradient_does_not_reach_a_checkpoint(small, monkeypatch):
    run = compose.plan(small)[1][0]
    real = Update.__call__
    calls = []

    def spoiled(update, *args):
        calls.append(1)
        if len(calls) == 7:
            update.optimizer.param_groups[0]["params"][0].grad[:] = math.inf
        return real(update, *args)

    monkeypatch.setattr(Update, "__call__", spoiled)
    with pytest.raises(trainer.NonFinite):
        loop.train(run)
    state = checkpoint.load(Record(run).folder)
    assert 0 < state["images"] <= 192
    assert all(v.isfinite().all() for v in state["model"].values())


def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path, capsys):
    checkpoint.save({"images": 1}, tmp_path)
    checkpoint.save({"images": 2}, tmp_path)
    assert checkpoint.load(tmp_path)["images"] == 2
    content = bytearray((tmp_path / "checkpoint.pt").read_bytes())
    content[-1] ^= 1
    (tmp_path / "checkpoint.pt").write_bytes(content)
    assert checkpoint.load(tmp_path)["images"] == 1
    assert "damaged" in capsys.readouterr().out
    assert checkpoint.load(tmp_path, mine=True)["images"] == 1
    assert (tmp_path / "checkpoint.damaged").read_bytes() == content  # not in the place of the sound one, by a save
    checkpoint.save({"images": 3}, tmp_path)
    assert checkpoint.load(tmp_path)["images"] == 3
    (tmp_path / "checkpoint.pt").unlink()
    assert checkpoint.load(tmp_path)["images"] == 1
    (tmp_path / "checkpoint.prev.pt").write_bytes(b"")
    with pytest.raises(checkpoint.Damaged, match="force=true"):
        checkpoint.load(tmp_path)


def test_a_checkpoint_keeps_every_bit_and_layout_and_an_older_one_is_read(tmp_path):
    weights = {
        "weight": torch.randn(8, 4, 3, 3).to(memory_format=torch.channels_last),
        "large": torch.randn(checkpoint.SMALL + 1),
        "odd": torch.tensor([math.nan, -0.0, math.inf]),
        "bf16": torch.randn(3).bfloat16(),
        "count": torch.tensor(7),
        "none": torch.empty(0, 3),
    }
    optimizer = {"state": {0: {"step": torch.tensor(2.0)}}, "param_groups": [{"betas": (0.9, 0.99), "params": [0]}]}
    state = {"images": 3, "commits": ["a"], "model": weights, "optimizer": optimizer}
    payload = io.BytesIO()
    torch.save(state, payload)
    older = tmp_path / "older"
    older.mkdir()
    content = payload.getvalue()
    (older / "checkpoint.pt").write_bytes(hashlib.sha256(content).hexdigest().encode() + content)
    checkpoint.save(state, tmp_path)
    for found in (checkpoint.load(tmp_path), checkpoint.load(older)):
        assert found["images"] == 3 and found["commits"] == ["a"]
        assert found["optimizer"]["param_groups"] == optimizer["param_groups"]
        assert found["optimizer"]["state"][0]["step"].equal(torch.tensor(2.0))
        assert found["model"].keys() == weights.keys()
        for name, weight in weights.items():
            mine = found["model"][name]
            assert (mine.dtype, mine.shape, mine.stride()) == (weight.dtype, weight.shape, weight.stride())
            assert mine.flatten().view(torch.uint8).equal(weight.flatten().view(torch.uint8))
            assert mine.untyped_storage().nbytes() == mine.numel() * mine.element_size()  # no other's memory is kept


def test_a_checkpoint_never_executes_code(tmp_path):
    import pickle

    class Evil:
        def __reduce__(self):
            return (os.system, (f"touch {tmp_path}/executed",))

    payload = pickle.dumps(Evil())
    (tmp_path / "checkpoint.pt").write_bytes(hashlib.sha256(payload).hexdigest().encode() + payload)
    with pytest.raises(Exception, match=r"[Ww]eights"):
        checkpoint.load(tmp_path)
    assert not (tmp_path / "executed").exists()


def test_a_full_disk_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    checkpoint.save({"images": 1}, tmp_path)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        checkpoint.save({"images": 2}, tmp_path)
    monkeypatch.undo()
    assert checkpoint.load(tmp_path)["images"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_non_finite_loss_stops_and_keeps_the_last_good_checkpoint(small, monkeypatch):
    run = compose.as_run(compose.one(small))
    real = flow.interpolate
    calls = []

    def poisoned(x, noise, t):
        calls.append(1)
        return real(x, noise, t) * (math.nan if len(calls) > 7 else 1)

    monkeypatch.setattr(trainer.flow, "interpolate", poisoned)
    with pytest.raises(trainer.NonFinite, match=r"at \d+ images"):
        loop.train(run)
    state = checkpoint.load(Record(run).folder)
    assert 0 < state["images"] < 320
    assert all(v.isfinite().all() for v in state["model"].values())


def test_another_configuration_s_checkpoint_is_refused(small):
    run = compose.as_run(compose.one([*small, "optim.images=96"]))
    loop.train(run)
    folder = Record(run).folder
    state = checkpoint.load(folder)
    for key in ("training", "fingerprint", "precision"):
        checkpoint.save(state | {key: "0" * 8}, folder)
        with pytest.raises(BadInput, match=key):
            loop.train(run)


def test_one_process_per_run(small):
    record = Record(compose.as_run(compose.one(small)))
    record.create()
    with record.lock(), pytest.raises(BadInput, match="another process"):
        loop.train(record.run)
    path = record.folder / "lock"
    code = f"import fcntl, os; f = open('{path}', 'a'); fcntl.flock(f, fcntl.LOCK_EX); os.kill(os.getpid(), 9)"
    subprocess.run([sys.executable, "-c", code], check=False)
    with record.lock():
        pass  # the dead process does not hold it


def test_validation_is_the_same_for_every_seed_and_batch(small):
    run = compose.as_run(compose.one(small))
    images = loop.open_data(run.data, run.cache)
    a, b = fresh(0), fresh(7)
    b.ema.net.load_state_dict(a.ema.net.state_dict())
    one, two = trainer.validate(a, images, 32, 32), trainer.validate(b, images, 32, 5)
    assert one == pytest.approx(two, rel=1e-5)
    quarters = [one[f"val_loss_t{k}"] for k in range(4)]
    assert one["val_loss"] == pytest.approx(sum(quarters) / 4, rel=1e-5)


def test_runs_that_differ_in_their_evaluation_share_their_weights(small):
    run = compose.as_run(compose.one([*small, "optim.images=96"]))
    first = loop.train(run)[0]
    other = compose.as_run(compose.one([*small, "optim.images=96", "eval.solver=heun", "eval.nfe=[2,4]"]))
    assert other.signature() != run.signature()
    second = loop.prepare(other, torch.device("cpu"))
    record = Record(other)
    assert grid.state_of(record) == ("trained", 96)
    record.create()
    loop.restore(second, record, loop.open_data(run.data, run.cache).fingerprint)
    assert second.images == 96
    assert [row for row in record.rows() if "nfe" in row] == []
    assert_same(weights(first), weights(second))
    assert [row["images"] for row in record.rows() if "loss" in row] == [
        row["images"] for row in Record(run).rows() if "loss" in row
    ]
    reseeded = Record(compose.as_run(compose.one([*small, "optim.images=96", "seed=1"])))
    assert reseeded.twin() is None and grid.state_of(reseeded) == ("new", 0)


GOLDEN = Path(__file__).parent / "golden_loss.json"


def test_golden_losses(small):
    """The first losses of the baseline and of no_relaxation: what changes them changes every committed table."""
    losses = {}
    for arm in ("baseline", "no_relaxation", "conv"):
        run = compose.as_run(compose.one([f"ablation={arm}", "optim.warmup=0", "optim.lr=4e-3"]))
        fitted = loop.prepare(run, torch.device("cpu"))
        images = loop.open_data(run.data, small[-1].removeprefix("cache="))
        losses[arm] = [fitted.train_step(images.batch(0, 32 * k, 32))["loss"].item() for k in range(8)]
    assert losses == {
        arm: pytest.approx(expected, rel=1e-4) for arm, expected in json.loads(GOLDEN.read_text()).items()
    }
