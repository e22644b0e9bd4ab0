"""How jobs are started, by submitit: as arrays of Slurm's, or as background processes of this machine."""

import os
import shlex
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import submitit

from liquiddiff.config import BadInput, Run
from slurm.job import Job, compute_run
from slurm.ledger import NAME, Ledger, Submission, ask
from slurm.nodes import Profile

TIMEOUTS = 100  # how often a job may meet its time limit; submitit's 3 would end a long run
FOREVER = 60 * 24 * 365  # minutes of a local job, which has no limit


def submit(
    ledger: Ledger, cluster: str, profile: Profile, packs: list[list[Run]], gpus: int, experiment: str | None
) -> list[Submission]:
    """Start a job for each pack of runs, and note it. Raises BadInput where that cannot be."""
    code, commit, dirty = ledger.snapshot()
    # The jobs import the snapshot, and nothing from the folder that they start in.
    paths = [str(code), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {"PYTHONPATH": ":".join(paths), "PYTHONSAFEPATH": "1"}
    name = f"{time.strftime('%Y%m%d-%H%M%S')}-{uuid4().hex[:6]}"
    start, size = (on_slurm, array_size()) if cluster == "slurm" else (here, len(packs))
    made = []
    for k in range(0, len(packs), size):  # a grid that exceeds what one array may hold becomes several
        part = packs[k : k + size]
        folder = ledger.home / f"{name}-{k // size}"
        threads = profile.cpus_per_task if cluster == "slurm" else max(1, cpus() // (len(part) * gpus))
        submission = Submission(folder.name, cluster, profile.name, str(code), commit, dirty, str(folder), gpus)
        with undisturbed():
            try:
                jobs = start(folder, env, profile, [Job(runs, threads, experiment) for runs in part], gpus)
            except BadInput as error:
                raise BadInput(f"{k} of {len(packs)} jobs were submitted; {error}" if k else str(error)) from error
            submission.jobs = {job: [run.name for run in runs] for job, runs in zip(jobs, part, strict=True)}
            submission.totals = {run.name: run.optim.images for runs in part for run in runs}
            ledger.add(submission)
        made.append(submission)
    return made


@contextmanager
def undisturbed() -> Iterator[None]:
    """A signal waits: a job that is queued but not noted would be queued again.

    Ctrl-C is blocked besides, so that sbatch does not see it either; it may still reach one of torch's threads.
    """
    seen: list[int] = []
    before = {
        number: signal.signal(number, lambda number, frame: seen.append(number))
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    }
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # one that waited is seen now
        for number, handler in before.items():
            signal.signal(number, handler)
    if seen:
        signal.raise_signal(seen[0])


def on_slurm(folder: Path, env: dict[str, str], profile: Profile, jobs: list[Job], gpus: int) -> list[str]:
    """One array. Returns the jobs' numbers."""
    a_node = min(gpus, profile.gpus_per_node or gpus)
    if gpus % a_node:
        raise BadInput(f"gpus={gpus} does not fill nodes of {a_node} GPUs: give a multiple of {a_node}, or fewer")
    executor = submitit.AutoExecutor(folder, cluster="slurm", slurm_max_num_timeout=TIMEOUTS)
    executor.update_parameters(
        name=NAME,
        timeout_min=profile.minutes,
        nodes=gpus // a_node,
        tasks_per_node=a_node,
        cpus_per_task=profile.cpus_per_task,
        mem_gb=profile.mem_gb * a_node,
        slurm_array_parallelism=profile.array_parallelism,
        slurm_signal_delay_s=profile.signal_s,
        slurm_setup=[*profile.setup, *(f"export {key}={shlex.quote(value)}" for key, value in env.items())],
        # One process of a run lost: the others would wait for it.
        slurm_srun_args=["--kill-on-bad-exit=1", f"--cpus-per-task={profile.cpus_per_task}"],
        slurm_additional_parameters={"requeue": True, **profile.sbatch},
        **({"slurm_partition": profile.partition} if profile.partition else {}),
        **({"gpus_per_node": a_node} if profile.gpus_per_node else {}),
    )
    try:
        submitted = executor.submit_array(jobs)
    except submitit.core.utils.FailedJobError as error:
        why = next((line for line in str(error).splitlines() if "error:" in line), str(error).splitlines()[-1])
        raise BadInput(f"sbatch refused the job ({why.strip()}); see profile={profile.name}") from error
    return [job.job_id for job in submitted]


def here(folder: Path, env: dict[str, str], profile: Profile, jobs: list[Job], gpus: int) -> list[str]:
    """Background processes, each with its GPUs where the profile has them, in turn. Returns their numbers."""
    cards = own_gpus() if profile.gpus_per_node else []
    if profile.gpus_per_node and gpus > len(cards):
        raise BadInput(f"profile={profile.name} gives each process a GPU, and this machine shows {len(cards)}: "
                       f"gpus={gpus} is too many; profile=cpu does without")  # fmt: skip
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # inherited: the jobs outlive the terminal
    os.environ.update(env)
    started = []
    for k, job in enumerate(jobs):
        executor = submitit.LocalExecutor(folder, max_num_timeout=TIMEOUTS)
        executor.update_parameters(
            timeout_min=FOREVER,
            tasks_per_node=gpus,
            gpus_per_node=gpus if profile.gpus_per_node else 0,
            visible_gpus=[cards[(k * gpus + i) % len(cards)] for i in range(gpus if cards else 0)],
        )
        started.append(executor.submit(job).job_id)
    return started


def in_this_process(runs: list[Run], experiment: str | None) -> int:
    """One run after another, with the code as it is; an error is raised, for a debugger. Returns the exit status."""
    return int(any([compute_run(run, experiment) for run in runs]))


def own_gpus() -> list[int]:
    """The numbers of the GPUs that this process may use."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        import torch

        return list(range(torch.cuda.device_count()))
    try:
        return [int(number) for number in named.split(",") if number.strip()]
    except ValueError as error:
        raise BadInput(f"CUDA_VISIBLE_DEVICES={named} must name GPUs by number for cluster=local") from error


def cpus() -> int:
    """Of this machine."""
    from liquiddiff.device import cores  # late: torch

    return cores()


def array_size() -> int:
    """How many jobs an array may have here."""
    (line,) = [line for line in ask("scontrol", "show", "config") if line.startswith("MaxArraySize")]
    return int(line.partition("=")[2]) - 1
