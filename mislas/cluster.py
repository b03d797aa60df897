"""A sweep as jobs of a Slurm cluster, by submitit: each trains its own runs into the common store.

Jobs are independent: no two of them need the same Stage-1. submitit submits them, keeps their logs, and queues a job
again that was preempted or reached its time limit; it goes on from its last checkpoint. Nothing here schedules.
"""

from __future__ import annotations

import math
import os
import re
import shlex
import shutil
import signal
import sys
import sysconfig
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from . import distributed
from .config import RunConfig
from .data import available
from .errors import DataError, MislasError
from .registries import REGISTRIES, entries_of
from .runs import Store, run
from .together import check_together
from .train import Options

if TYPE_CHECKING:
    import submitit

TIMEOUTS = 20  # how often a job that reaches its time limit is queued again; preemptions do not count


@dataclass(frozen=True)
class Resources:
    """What each job asks for.

    Attributes:
        gpus: GPUs of a job, >= 0. With more than one, as many processes train together, each on a GPU.
        nodes: machines of a job, >= 1; they share its GPUs evenly.
        hours: time limit, > 0; what takes longer is queued again.
        partition: of the cluster; None is its default.
        processors: of each process, >= 1; None is the cluster's default.

    Raises:
        MislasError: numbers out of these bounds.
    """

    gpus: int = 1
    nodes: int = 1
    hours: float = 24.0
    partition: str | None = None
    processors: int | None = None

    def __post_init__(self) -> None:
        if self.gpus < 0:
            raise MislasError(f"--gpus must be at least 0, got {self.gpus}")
        if self.nodes < 1:
            raise MislasError(f"--nodes must be at least 1, got {self.nodes}")
        if self.processors is not None and self.processors < 1:
            raise MislasError(f"processors must be at least 1, got {self.processors}")
        if self.tasks % self.nodes:
            raise MislasError(
                f"--gpus is of the whole job, and {self.gpus} cannot be shared by {self.nodes} nodes evenly"
            )
        if not 0 < self.hours < math.inf:
            raise MislasError(f"--hours must be above 0, got {self.hours:g}")

    @property
    def tasks(self) -> int:
        """Processes of a job."""
        return max(1, self.gpus)

    def __str__(self) -> str:
        gpus = f"{self.gpus} GPU{'s' * (self.gpus != 1)}"
        nodes = f" on {self.nodes} nodes" if self.nodes > 1 else ""
        partition = f", partition {self.partition}" if self.partition else ""
        return f"{gpus}{nodes}, {self.hours:g} h at a time{partition}"


@dataclass(frozen=True)
class ClusterJob:
    """What runs on the cluster: a call trains the runs into the store.

    Attributes:
        configs: the runs, of one dataset, imbalance factor and seed.
        results_root, data_root: absolute, since a job may start in another folder.
        options: how to train.
        tasks: processes that are started with this job and train together.
        threads: processors that each of them computes on; None is PyTorch's choice.
        gpus: names of the GPUs that it sees, such as ``"2,3"``; None is what submitit gives it.
        entries: what a script registered for the runs (:func:`mislas.registries.entries_of`): the job's process has not
            run it.
    """

    configs: tuple[RunConfig, ...]
    results_root: Path
    data_root: Path | None
    options: Options
    tasks: int = 1
    threads: int | None = None
    gpus: str | None = None
    entries: tuple[tuple[str, str, Any], ...] = ()

    def __call__(self) -> None:
        for registry, name, entry in self.entries:
            REGISTRIES[registry][name] = entry
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        if self.gpus is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = self.gpus
        if self.tasks == 1:
            self._train()
            return
        import submitit

        environment = submitit.helpers.TorchDistributedEnvironment()
        environment.export(set_cuda_visible_devices=False, overwrite=True)
        with distributed.started(self.options.device):
            self._train()

    def _train(self) -> None:
        run(self.configs, Store(self.results_root), self.data_root, self.options)

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """What submitit queues in place of a job that has to stop: the same; what is trained is in the store."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)

    def __str__(self) -> str:
        first = self.configs[0]
        methods = ", ".join(dict.fromkeys(config.method for config in self.configs))
        return f"{first.data_title} seed {first.seed}: {methods}"


def independent(configs: Iterable[RunConfig]) -> list[list[RunConfig]]:
    """Runs in groups, such that no two groups build on the same Stage-1 or on the same expert."""
    groups: list[tuple[set[str], list[RunConfig]]] = []
    for config in configs:
        needs, runs = config.needs, [config]
        touching = [group for group in groups if group[0] & needs]
        if not touching:
            groups.append((needs, runs))
            continue
        for group in touching[1:]:
            groups.remove(group)
        for more_needs, more_runs in (*touching[1:], (needs, runs)):
            touching[0][0].update(more_needs)
            touching[0][1].extend(more_runs)
    return [runs for _, runs in groups]


def cluster_jobs(
    configs: Iterable[RunConfig], store: Store, data_root: str | None, options: Options, tasks: int = 1
) -> list[ClusterJob]:
    """The jobs that train what the store lacks of these runs.

    Raises:
        MislasError: a batch that ``tasks`` processes cannot share evenly, or runs that are to train at once in them.
    """
    check_together(options, tasks)
    missing = {config.id: config for config in configs if store.get(config) is None}
    for config in missing.values():
        for stage in (config.stage1, config.stage2):
            distributed.check_batch_size(getattr(stage, "batch_size", tasks), tasks)
    root = None if data_root is None else Path(data_root).resolve()
    return [
        ClusterJob(tuple(group), store.root.resolve(), root, options, tasks, entries=entries_of(group))
        for group in independent(missing.values())
    ]


def executor(folder: str | Path, resources: Resources, local: bool = False) -> submitit.AutoExecutor:
    """submitit's executor: Slurm, or this machine. Its jobs import what this process can, from wherever they start: a
    script may register what is in a module beside it.

    Args:
        folder: for logs and what submitit needs to start a job; every node must see it.

    Raises:
        MislasError: submitit or Slurm is not there, or the resources cannot be asked for.
    """
    try:
        import submitit
    except ImportError:
        raise MislasError("jobs are submitted by submitit, which is missing: pip install 'mislas[cluster]'") from None
    if not local and shutil.which("srun") is None:
        raise MislasError("there is no Slurm here (no srun on the PATH); --local runs the jobs on this machine")
    if local and resources.nodes > 1:
        raise MislasError(f"--local is this machine alone: --nodes must be 1, got {resources.nodes}")
    processors = resources.processors
    standard = sysconfig.get_path("stdlib"), sysconfig.get_path("purelib")
    own = [os.path.abspath(path) for path in sys.path if not path.startswith(standard)]
    python = shlex.join(["env", f"PYTHONPATH={os.pathsep.join(own)}", sys.executable])
    try:
        made = submitit.AutoExecutor(
            folder,
            cluster="local" if local else "slurm",
            slurm_max_num_timeout=TIMEOUTS,
            local_max_num_timeout=TIMEOUTS,
            slurm_python=python,
            local_python=python,
        )
    except OSError as error:
        raise MislasError(f"the folder for logs cannot be made ({error}); name another with --folder") from error
    made.update_parameters(
        name="mislas",
        timeout_min=math.ceil(resources.hours * 60),
        nodes=resources.nodes,
        tasks_per_node=resources.tasks // resources.nodes,
        gpus_per_node=resources.gpus // resources.nodes or None,
        cpus_per_task=processors,
        slurm_partition=resources.partition,
        slurm_srun_args=processors and [f"--cpus-per-task={processors}"],  # srun does not take it over from sbatch
    )
    return made


def check_data(jobs: Sequence[ClusterJob]) -> None:
    """Raise :class:`DataError` if a dataset's files are not where jobs would look, before they wait in a queue."""
    for job in jobs:
        name = job.configs[0].dataset
        if not available(name, job.data_root or os.devnull):
            where = "no --data-root is given" if job.data_root is None else f"they are not under {job.data_root}"
            raise DataError(f"jobs would look for the files of {name!r} in vain: {where}")


def check_entries(jobs: Sequence[ClusterJob]) -> None:
    """Raise :class:`MislasError` if something that a script registered cannot be sent to the process of a job."""
    import cloudpickle  # submitit's

    entries = {(registry, name): entry for job in jobs for registry, name, entry in job.entries}  # each once
    for (registry, name), entry in entries.items():
        try:
            cloudpickle.dumps(entry)
        except Exception as error:  # each kind of object has its own
            raise MislasError(
                f"{name!r} of {registry} cannot be sent to a job ({_last_line(str(error))}); functions and plain "
                "data can: open files, make locks and the like where they are called"
            ) from error


def submit(jobs: Sequence[ClusterJob], executor: submitit.AutoExecutor) -> list[submitit.Job]:
    """Hand jobs over to Slurm, as one array; returns at once.

    Raises:
        MislasError: Slurm does not take them.
    """
    try:
        return executor.submit_array(jobs)
    except (RuntimeError, OSError) as error:
        raise MislasError(f"Slurm does not take the jobs: {_last_line(str(error))}") from error


def share(slot: int, at_once: int, tasks: int, gpus: int) -> tuple[int | None, str | None]:
    """What of this machine a job gets while ``at_once`` run here: threads of each process, and GPUs.

    The threads that PyTorch would use for one process are divided evenly. The GPUs that this process sees are dealt out
    in turn, and shared if there are fewer than the jobs ask for.

    Args:
        slot: which of the jobs that run at once, in ``0 .. at_once - 1``.
        tasks: processes of a job.
        gpus: GPUs that a job asks for.

    Returns:
        Threads, or None for a single process; and names of GPUs, such as ``"2,3"``, or None if there are none.
    """
    threads = max(1, torch.get_num_threads() // (at_once * tasks)) if at_once * tasks > 1 else None
    names = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(torch.cuda.device_count()))))
    have = [name for name in names.split(",") if name]
    dealt = dict.fromkeys(have[(slot * gpus + i) % len(have)] for i in range(gpus)) if have else {}
    return threads, ",".join(dealt) or None


def run_here(
    jobs: Sequence[ClusterJob],
    executor: submitit.AutoExecutor,
    progress: bool = True,
    at_once: int = 1,
    gpus: int = 0,
) -> Iterator[tuple[ClusterJob, submitit.Job, str | None]]:
    """Run jobs on this machine, so many at once, and show the progress of each.

    Args:
        at_once: how many, >= 1; each has its :func:`share` of the machine.
        gpus: GPUs that each job asks for.

    Yields:
        As each ends: the job, submitit's handle of it, and None or the last line that it said when it failed.
    """
    waiting, live, shown = deque(enumerate(jobs, 1)), {}, {}
    switch = {} if progress else {"disable": True}
    bars = [
        tqdm(bar_format="{desc}", position=slot, leave=False, dynamic_ncols=True, **switch)
        for slot in range(min(at_once, len(jobs)))
    ]
    try:
        while waiting or live:
            for slot in range(len(bars)):
                if waiting and slot not in live:
                    number, job = waiting.popleft()
                    threads, dealt = share(slot, len(bars), job.tasks, gpus)
                    live[slot] = number, job, executor.submit(replace(job, threads=threads, gpus=dealt))
            time.sleep(0.2)
            for slot, (number, job, handle) in list(live.items()):
                ended = handle.done()
                line = _last_line(_end_of(handle.paths.stderr)) or job
                said = "" if ended else f"job {number} of {len(jobs)}: {line}"
                if said != shown.get(slot):
                    bars[slot].set_description_str(said)
                    shown[slot] = said
                if ended:
                    del live[slot]
                    failure = handle.exception()
                    line = failure and (_last_line(_end_of(handle.paths.stderr)) or _last_line(str(failure)))
                    yield job, handle, line
    finally:
        for _, _, handle in live.values():
            handle.cancel()
        for bar in bars:
            bar.close()


@contextmanager
def stoppable() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end what is inside as Ctrl-C does; else they end this process and leave its jobs running.

    A signal that is handled or ignored already, as by ``nohup``, stays so. Only SIGINT is let in: it is ignored in what
    a shell script starts in the background, and in all that this starts, but it is how submitit ends a job. Signals
    belong to the main thread: nothing is done in others.

    Raises:
        SystemExit: such a signal came; the exit status is 128 + its number.
    """

    def stop(number: int, _: Any) -> None:
        for each in before:  # once is enough: a second one must not stop the stopping
            signal.signal(each, signal.SIG_IGN)
        raise SystemExit(128 + number)

    changes = {signal.SIGINT: (signal.SIG_IGN, signal.default_int_handler), signal.SIGTERM: (signal.SIG_DFL, stop)}
    if hasattr(signal, "SIGHUP"):
        changes[signal.SIGHUP] = (signal.SIG_DFL, stop)
    here = threading.current_thread() is threading.main_thread()
    before = {number: old for number, (old, _) in changes.items() if here and signal.getsignal(number) == old}
    try:
        for number in before:
            signal.signal(number, changes[number][1])
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def _end_of(path: Path) -> str:
    """The last 2,000 bytes of a file, which may not be there yet."""
    if not path.exists():
        return ""
    with path.open("rb") as handle:
        handle.seek(max(0, path.stat().st_size - 2000))
        return handle.read().decode(errors="replace")


def _last_line(text: str) -> str:
    """The last line that is not blank; a progress bar ends its lines by going back to their beginning."""
    return ([line.strip() for line in re.split(r"[\r\n]+", text) if line.strip()] or [""])[-1]
