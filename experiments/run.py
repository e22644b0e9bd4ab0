"""Train, sample, measure and record: `python experiments/run.py ablation=no_relaxation`.

    ablation=ARM  tier=laptop|hour|paper  data=SET  model=SIZE  seed=N  and any dotted key, e.g. optim.lr=1e-3
    experiment=ROOM|all  jobs=N     a room's whole grid; ablation=a,b and seed=0,1,2 make a grid too
    data=folder data.path=DIR eval.extractor=effnet_lite0       your own images
    device=cpu|cuda|auto  threads=N  out=DIR (runs/)
    dry=true  print, run nothing    force=true  start again; the old folder is kept

The same command again skips finished runs and resumes unfinished ones, bit for bit.
Exit status: 0 done, 1 a run failed, 2 bad input, 130 interrupted and resumable.
"""

import os
import shlex
import signal
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from experiments import compose
from liquiddiff.config import BadInput, Run, flatten

if TYPE_CHECKING:
    from torch import Tensor

    from liquiddiff.record import Record

# Idle OpenMP threads spin for some 10 us, then sleep: one process is 1.6 times as fast as without, and two on the same
# cores lose a third, where those that spin for longer crawl (docs/performance.md).
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch asks for huge pages for tensors of 2 MB and more


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    overrides = sys.argv[1:] if argv is None else argv
    if {"-h", "--help"} & set(overrides):
        print(help_text())
        return 0
    try:
        launch, runs = compose.plan(overrides)
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # a scheduler's polite stop is an interrupt too
        if (len(runs) > 1 or launch.experiment) and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise BadInput(
                "torchrun trains one run; for a grid give slurm/launch.py gpus=N, or jobs=N without torchrun"
            )
        if len(runs) > 1 or launch.experiment:
            from experiments.grid import run_grid

            return run_grid(launch, runs)
        return run_one(launch, runs[0], overrides)
    except BadInput as error:
        if not int(os.environ.get("RANK", "0")):  # of several processes all meet it
            print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # a full disk, above all
        where = f" ({error.filename})" if error.filename else ""
        print(f"error: {error.strerror or error}{where}: nothing is lost; mend it and give the same command again",
              file=sys.stderr)  # fmt: skip
        return 2
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError" and "can't allocate memory" not in str(error):  # torch's, late
            raise
        print(f"error: {str(error).splitlines()[0]} Nothing is lost. Give optim.checkpointing=true, a smaller "
              "optim.batch or, for the evaluation, eval.batch", file=sys.stderr)  # fmt: skip
        return 1
    except KeyboardInterrupt:
        forced = " without force=true" if any(o.partition("=")[0] == "force" for o in overrides) else ""
        print(f"interrupted; the same command{forced} resumes", file=sys.stderr)
        return 130


def help_text() -> str:
    """The head of this file, and what can be chosen."""
    lines = [
        __doc__ or "",
        *(f"{group:9} {', '.join(names)}" for group, names in compose.groups().items()),
        "",
        "Keys:",
    ]
    return "\n".join([*lines, *(f"  {key}={value}" for key, value in flatten(compose.Launch()).items())])


def run_one(launch: compose.Launch, run: Run, overrides: list[str]) -> int:
    """One run on this terminal, from its header to its closing table."""
    from experiments import screen
    from liquiddiff.record import Record, set_aside

    record = Record(run)
    if int(os.environ.get("RANK", "0")):  # of several processes the first alone has the terminal
        if launch.dry or (record.done and not launch.force):
            return 0
        status = compute(run, record, lambda images, loss: None, lambda evaluations: None)
        part()
        return status
    if record.done and not launch.dry and not launch.force:
        check_same(run, record)
        print(f"already done: {record.folder} (force=true starts again)")
        screen.results(record)
        return 0
    given = [o for o in overrides if not o.startswith("ablation=")]
    try:
        baseline: Run | None = compose.plan(given)[1][0]
    except BadInput:  # what is given fits the arm alone, as model.blocks does another size's
        baseline = None
    screen.header(run, baseline, record.folder, [o for o in given if "." in o.partition("=")[0]])
    if launch.dry:
        return 0
    if launch.force:
        set_aside(record)
    training = screen.Training(run)
    sampling = screen.Sampling(run, after=training)
    try:
        status = compute(run, record, training, sampling)
    finally:
        training.close()
        sampling.close()
    part()
    if status == 0:
        screen.results(record)
        print(f"mlflow     mlflow ui --backend-store-uri {shlex.quote(record.tracking_uri())}")
    return status


def part() -> None:
    """Leave the other processes of the run, if there are any."""
    from liquiddiff import distributed

    distributed.stop()


def check_same(run: Run, record: "Record") -> None:
    """Paths are not part of a signature: raises BadInput where a finished run is of other images or weights."""
    from liquiddiff.record import read_run

    known = (record.folder / "run.yaml").read_text()  # parsing that takes 10 ms, and a grid has many
    if not run.data.path and "\n  path: null\n" not in known and (path := read_run(record.folder).data.path):
        print(f"note: its images came from data.path={path}")
    if run.data.path:
        from liquiddiff.data import open_data

        mine, theirs = open_data(run.data, run.cache).fingerprint, record.env().get("data_fingerprint")
        if mine != theirs:
            raise BadInput(
                f"{record.folder} is of other images (fingerprint {theirs}, data.path has {mine}); give another out=DIR"
            )
    measured = {row["weights"] for row in record.evaluations() if row.get("weights")}
    if run.eval.weights and measured:
        import torch

        from analysis.features import load_extractor

        mine = load_extractor(run.eval.extractor, run.eval.weights, torch.device("cpu")).weights_hash
        if mine not in measured:
            other = f"other weights ({', '.join(sorted(measured))}, eval.weights has {mine})"
            raise BadInput(f"{record.folder} was measured with {other}; give another out=DIR")


def compute(
    run: Run,
    record: "Record",
    training: Callable[[int, float | None], None],
    sampling: Callable[[int], None],
    wait: bool = False,
    experiment: str | None = None,
) -> int:
    """Train, sample, measure, plot, record; returns the exit status. Each process of a run on several devices calls it.

    `training(images, loss)` and `sampling(evaluations)` are told of progress. A run that another process holds is
    refused, or with `wait` waited for. `experiment` is the grid that it belongs to, for MLflow. Raises BadInput and
    KeyboardInterrupt.
    """
    import torch

    from analysis import metrics, plots
    from liquiddiff import device, distributed, loop
    from liquiddiff.data import open_data, to_uint8
    from liquiddiff.flow import initial_noise
    from liquiddiff.record import Follower
    from liquiddiff.tracking import Mirror, mirror_to_mlflow

    distributed.start()
    if others := distributed.rank() > 0:
        record = Follower(run, record.out)
    torch.set_num_threads(run.threads or max(1, device.cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    tags = {"arm": run.arm, "tier": run.tier, "room": compose.room_of(run.arm), "signature": run.signature()}
    tags |= {"experiment": experiment} if experiment else {}
    record.create()
    with record.lock(wait):
        if distributed.agreed(record.done):  # by another process, since this one looked
            return 0
        device.reset_peak(device.resolve_device(run.device))
        with distributed.first():
            metrics.check_count(run.eval.n, len(open_data(run.data, run.cache).images_NCHW))
        missing = None
        try:
            if not others:
                metrics.check_extractor(run.eval.extractor, run.eval.weights)
        except metrics.MissingWeights as error:
            missing = error
            print(f"note: {error}\nnote: training goes on; the same command with the weights will only evaluate")
        missing = distributed.agreed(missing)
        mirror = Mirror(record, tags)
        fitted, images = loop.fit(run, record, training, (lambda: None) if others else mirror)
        begin = time.perf_counter()

        sheet: list[Tensor] = []  # the first samples at the last NFE

        def sample(start: int, count: int, nfe: int) -> "tuple[Tensor, int]":
            noise = initial_noise(run.seed, start, count, run.image_shape)
            x, used = fitted.generate(noise, nfe, run.eval.solver, run.eval.shift)
            images_NCHW = to_uint8(x.cpu())
            sheet[:] = [images_NCHW[:64]] if start == 0 else sheet
            sampling(count * nfe)
            return images_NCHW, used

        if missing:
            sample(0, min(64, run.eval.n), max(run.eval.nfe))
        else:
            metrics.evaluate(run, images, sample, fitted.device, record.write)
        if others:
            return 0
        if not missing:
            extractor = metrics.load_extractor(run.eval.extractor, run.eval.weights, fitted.device)
            protocol = {"extractor": extractor.name, "weights": extractor.weights_hash}
            record.write({"floor": True} | protocol | metrics.floor(extractor, images, run.eval.n, run.cache))
            plots.nfe_curve(record.rows(), record.folder / "nfe.png")
        plots.sample_sheet(sheet[0], record.folder / "samples.png")
        plots.loss_curve(record.rows(), record.folder / "loss.png")
        if missing:
            print(f"error: {missing} Everything else is in {record.folder}", file=sys.stderr)
            return 2
        record.finish(seconds=fitted.seconds + time.perf_counter() - begin, peak_mib=device.peak_mib(fitted.device))
        mirror_to_mlflow(record, tags, artifacts=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
