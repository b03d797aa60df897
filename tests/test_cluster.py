"""Jobs for a cluster: how a sweep is cut into them, that they run, and what the user is told."""

import json
import pickle
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import cloudpickle
import numpy as np
import pytest
import submitit

from mislas import cluster
from mislas.augment import MIXES
from mislas.cli import main
from mislas.cluster import ClusterJob, Resources, cluster_jobs, independent, share
from mislas.errors import DataError, MislasError
from mislas.losses import LOSSES, LossSpec, cross_entropy
from mislas.methods import configure
from mislas.models import BACKBONES, CLASSIFIERS
from mislas.registries import entries_of
from mislas.rules import RULES, Rule
from mislas.runs import Store
from mislas.train import Options

#: What a user's script registers. On the images of class 0, which the sampler draws alone, its losses sum up to 8.
SCRIPT = """
import sys, threading
from mislas import METHODS, cli
from mislas.data import SPECS
from mislas.losses import LOSSES, LossSpec
from mislas.methods import SETTINGS, Method
from mislas.metric import METRICS
from mislas.samplers import SAMPLERS

def seven(class_counts):
    return lambda logits, targets: 0 * logits.sum(dim=1) + targets + 7

def first(rng, targets):
    return 0 * rng.permutation(len(targets))

LOSSES["seven"] = LossSpec(seven)
METRICS["half"] = lambda features, targets: 0 * features.sum() + 0.5
SAMPLERS["instance_balanced"] = first  # in place of the library's
SPECS["mine"], SETTINGS["mine"] = SPECS["digits"], SETTINGS["digits"]
METHODS["mine"] = Method("Mine", "", "", stage1={"loss": "seven", "metric": "half", "metric_weight": 2.0})
LOSSES["another"] = LossSpec(threading.Lock())  # that of no run here: it need not travel, and could not
if __name__ == "__main__":
    sys.exit(cli.main())
"""

QUICK = {"epochs": 1, "stage2.epochs": 1}
DIGITS = ["--dataset", "digits", "--imbalance", "10", "--set", "epochs=1"]


def digits(method, seed=0, imbalance=10, **changes):
    return configure("digits", method, imbalance, seed, QUICK | changes)


def submit(*arguments, root):
    options = ["--results-root", str(root / "results"), "--folder", str(root / "jobs"), "--quiet", "--device", "cpu"]
    short = ["--set", "stage2.epochs=1"] * ("lws" in arguments)  # without a second stage, that is warned about
    return main(["submit", *DIGITS, *map(str, arguments), *options, *short])


@pytest.fixture
def default_signals():
    """SIGTERM and SIGHUP do what they do by default, also where ``nohup`` runs the tests."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """A cluster that takes every job: ``sbatch`` answers with a number."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, script in {"srun": "exit 1", "sbatch": "echo Submitted batch job 4711"}.items():
        (commands / name).write_text(f"#!/bin/sh\n{script}\n")
        (commands / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(commands), prepend=":")
    return commands


# ---------------------------------------------------------------------------------------------------------- the jobs


def test_runs_that_share_a_stage_1_are_one_job():
    ce, crt, lws, mixup, mislas = map(digits, ("ce", "crt", "lws", "mixup", "mislas"))
    other = digits("lws", seed=1)
    assert independent([crt, mixup, other, lws, ce, mislas]) == [[crt, lws, ce], [mixup, mislas], [other]]


def test_runs_that_share_experts_are_one_job():
    student = digits("oltr+lfme", imbalance=50)
    warmer = student.override({"stage1.distillation": 4.0})
    expert, plain = student.experts[0], digits("ce", imbalance=50)
    assert student.id != warmer.id
    assert independent([student, plain, warmer]) == [[student, warmer], [plain]]
    assert independent([expert, plain, student]) == [[expert, student], [plain]]


def test_a_run_joins_jobs_that_were_apart():
    student = digits("oltr+lfme", imbalance=50)
    many, medium, _ = student.experts
    assert independent([many, medium]) == [[many], [medium]]
    assert independent([many, medium, student]) == [[many, medium, student]]


def test_what_is_stored_or_asked_for_twice_is_submitted_once_or_not_at_all(made_up, options):
    store, ce = Store(made_up.root), made_up("digits", "ce", QUICK, imbalance=10).config
    jobs = cluster_jobs([ce, digits("lws"), digits("lws"), digits("mixup")], store, None, options, tasks=2)
    assert [[config.method for config in job.configs] for job in jobs] == [["lws"], ["mixup"]]
    assert all(job.tasks == 2 and job.results_root == made_up.root.resolve() for job in jobs)
    assert cluster_jobs([ce], store, None, options) == []


def test_a_job_that_has_to_stop_is_queued_again_as_it_was(tmp_path):
    job = ClusterJob((digits("ce"),), tmp_path, None, Options(device="cpu"))
    again = job.checkpoint()
    assert isinstance(again, submitit.helpers.DelayedSubmission)
    assert (again.function, again.args, again.kwargs) == (job, (), {})
    assert pickle.loads(pickle.dumps(job)) == job


# ------------------------------------------------------------------------------------------------------------ running


def test_two_jobs_run_here_and_fill_the_store(tmp_path, capsys):
    assert submit("--method", "ce", "lws", "mixup", "--local", root=tmp_path) == 0
    out = capsys.readouterr().out
    assert "0 of 3 runs are in the store; jobs to do: 2" in out
    assert out.count("is done") == 2
    assert [record.config.method for record in Store(tmp_path / "results")] == ["ce", "lws", "mixup"]
    assert len(list((tmp_path / "jobs").glob("*_0_log.err"))) == 2
    assert submit("--method", "ce", "lws", "mixup", "--local", root=tmp_path) == 0
    assert "3 of 3 runs are in the store; jobs to do: 0" in capsys.readouterr().out


def test_jobs_that_run_here_at_once_divide_the_threads(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cluster.torch, "get_num_threads", lambda: 6)
    asked = ["--method", "ce", "--seed", 0, 1, 2, "--local", "--at-once", 2]
    assert submit(*asked, root=tmp_path) == 0, capsys.readouterr().err
    assert capsys.readouterr().out.count("is done") == 3
    records = list(Store(tmp_path / "results"))
    assert [record.config.seed for record in records] == [0, 1, 2]
    assert [record.provenance["threads"] for record in records] == [3, 3, 3]


def test_a_job_knows_what_the_script_that_submits_it_has_registered(tmp_path):
    script = tmp_path / "mine.py"
    script.write_text(SCRIPT)
    asked = ["--dataset", "mine", "--imbalance", "10", "--method", "mine", "--set", "epochs=1", "--device", "cpu"]
    command = [sys.executable, script, "submit", *asked, "--results-root", "results", "--local"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (record,) = (tmp_path / "results").glob("*/*.json")
    content = json.loads(record.read_text())
    assert [epoch["train_loss"] for epoch in content["history"]] == [8.0]
    names = {("SPECS", "mine"), ("LOSSES", "seven"), ("SAMPLERS", "instance_balanced"), ("METRICS", "half")}
    assert {tuple(name.split(".")) for name in content["provenance"]["registered"]} == names

    (sent,) = (tmp_path / "jobs").glob("*_submitted.pkl")
    job = submitit.core.utils.DelayedSubmission.load(sent).function
    again = pickle.loads(cloudpickle.dumps(job.checkpoint())).function  # as a job that has to stop is queued again
    entries = {(registry, name): entry for registry, name, entry in again.entries}
    assert entries.keys() == names
    drawn = entries["SAMPLERS", "instance_balanced"](np.random.default_rng(0), np.array([0, 1, 1]))
    assert drawn.tolist() == [0, 0, 0]


def test_a_job_brings_the_rule_the_mix_the_classifier_and_the_backbone_that_it_calls(monkeypatch):
    monkeypatch.setitem(RULES, "mine", Rule(lambda known: known.classifier))
    monkeypatch.setitem(MIXES, "blend", lambda images, pairs: (images, pairs.partner, 1.0))
    monkeypatch.setitem(BACKBONES, "own", lambda: None)
    monkeypatch.setitem(CLASSIFIERS, "head", lambda stage1, class_counts: stage1.requires_grad_())
    runs = [digits("ncm+mixup", backbone="own", rule="mine", mix="blend"), digits("lws", classifier="head")]
    entries = entries_of(runs)
    names = {(registry, name) for registry, name, _ in pickle.loads(cloudpickle.dumps(entries))}
    assert names == {("RULES", "mine"), ("MIXES", "blend"), ("CLASSIFIERS", "head"), ("BACKBONES", "own")}


def test_a_job_finds_the_modules_beside_the_script_from_any_folder(tmp_path):
    """The loss, and what it calls, are in modules of which only the script's own folder is known."""
    folder, elsewhere = tmp_path / "my code", tmp_path / "elsewhere"
    folder.mkdir()
    elsewhere.mkdir()
    (folder / "constants.py").write_text("SEVEN = 7\n")
    (folder / "my_losses.py").write_text(
        "import constants\n"
        "def seven(class_counts):\n"
        "    return lambda logits, targets: 0 * logits.sum(dim=1) + constants.SEVEN\n"
    )
    (folder / "mine.py").write_text(
        "import sys, my_losses\n"
        "from mislas import cli\n"
        "from mislas.losses import LOSSES, LossSpec\n"
        "LOSSES['seven'] = LossSpec(my_losses.seven)\n"
        "sys.exit(cli.main())\n"
    )
    asked = [*DIGITS, "--method", "ce", "--set", "loss=seven", "--device", "cpu", "--results-root", "results"]
    command = [sys.executable, folder / "mine.py", "submit", *asked, "--local"]
    done = subprocess.run(command, cwd=elsewhere, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (record,) = (elsewhere / "results").glob("*/*.json")
    assert [epoch["train_loss"] for epoch in json.loads(record.read_text())["history"]] == [7.0]


def test_what_cannot_be_sent_to_a_job_is_one_line_before_any_starts(tmp_path, capsys, monkeypatch):
    lock = threading.Lock()
    monkeypatch.setitem(LOSSES, "locked", LossSpec(lambda class_counts: lock and cross_entropy))
    assert submit("--method", "ce", "--set", "loss=locked", "--local", root=tmp_path) == 2
    error = capsys.readouterr().err
    assert error.startswith("mislas: 'locked' of LOSSES cannot be sent to a job (cannot pickle")
    assert error.count("\n") == 1
    assert not list((tmp_path / "jobs").iterdir())


def test_sigterm_ends_the_jobs_too(tmp_path):
    """Even in the background of a shell script, where SIGINT is ignored, by which submitit ends a job."""
    asked = [*DIGITS, "--method", "ce", "--set", "epochs=300", "--device", "cpu", "--results-root", "results"]
    with subprocess.Popen(
        [sys.executable, "-m", "mislas.cli", "submit", *asked, "--local", "--quiet"],
        cwd=tmp_path,
        stdin=subprocess.PIPE,  # the job's processes have it, too: it ends with the last of them
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    ) as process:
        deadline = time.monotonic() + 240
        while process.poll() is None and not list((tmp_path / "results").glob("*/*.lock")):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 143
        ended = select.poll()
        ended.register(process.stdin, 0)  # no event but the pipe's end
        assert ended.poll(20_000)
    assert not list((tmp_path / "results").glob("*/*.json"))


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_signals_stop_what_is_inside_once_and_are_then_as_before(number, status, default_signals):
    def jobs():
        try:
            signal.raise_signal(number)
        finally:
            signal.raise_signal(signal.SIGTERM)  # passed over: what ends the jobs is not cut short
            ended.append(True)

    ended = []
    with pytest.raises(SystemExit) as stopped, cluster.stoppable():
        jobs()
    assert ended
    assert stopped.value.code == status
    assert signal.getsignal(number) == signal.SIG_DFL


def test_signals_that_somebody_sees_to_are_let_be(default_signals):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    with cluster.stoppable():
        signal.raise_signal(signal.SIGHUP)
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_signals_are_let_be_outside_the_main_thread(default_signals):
    def enter():
        with cluster.stoppable():
            seen.append(signal.getsignal(signal.SIGTERM))

    seen = []
    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [signal.SIG_DFL]


def test_jobs_that_are_left_before_they_end_are_stopped():
    given, stopped = [], []

    def start(job):
        given.append(job.configs)
        return SimpleNamespace(
            done=lambda: job.configs == jobs[0].configs,
            exception=lambda: None,
            cancel=lambda: stopped.append(job.configs),
            paths=SimpleNamespace(stderr=Path("nothing")),
        )

    jobs = [ClusterJob((digits("ce", seed),), Path(), None, Options()) for seed in range(3)]
    ended = cluster.run_here(jobs, SimpleNamespace(submit=start), progress=False, at_once=2)
    assert next(ended)[0] is jobs[0]
    ended.close()
    assert given == [job.configs for job in jobs[:2]]
    assert stopped == given[1:]


@pytest.mark.parametrize(
    ("visible", "gpus", "dealt"),
    [
        ("0,1,2,3", 1, ["0", "1", "2"]),
        ("0,1,2,3", 2, ["0,1", "2,3", "0,1"]),
        ("4,7", 1, ["4", "7", "4"]),
        ("GPU-ab", 2, ["GPU-ab"] * 3),
        ("0,1", 0, [None] * 3),
        ("", 1, [None] * 3),
    ],
)
def test_gpus_are_dealt_out_to_jobs_that_run_at_once(visible, gpus, dealt, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [share(slot, 3, max(1, gpus), gpus)[1] for slot in range(3)] == dealt


@pytest.mark.parametrize(
    ("at_once", "tasks", "threads"), [(1, 1, None), (1, 2, 4), (2, 1, 4), (3, 1, 2), (2, 2, 2), (9, 1, 1)]
)
def test_threads_are_divided_evenly_among_processes(at_once, tasks, threads, monkeypatch):
    monkeypatch.setattr(cluster.torch, "get_num_threads", lambda: 8)
    assert share(0, at_once, tasks, 0)[0] == threads


def test_the_processes_of_a_job_train_together(tmp_path, capsys):
    assert submit("--method", "ce", "--gpus", 2, "--local", root=tmp_path) == 0, capsys.readouterr().err
    record = Store(tmp_path / "results").get(digits("ce"))
    assert record.provenance["device"].startswith("2 x ")


def test_a_job_that_fails_here_is_reported_with_its_log(tmp_path, capsys):
    checkpoint = Store(tmp_path / "results").checkpoint([digits("ce")])
    checkpoint.parent.mkdir(parents=True)
    checkpoint.write_bytes(b"not a checkpoint")
    assert submit("--method", "ce", "--local", root=tmp_path) == 2
    error = capsys.readouterr().err
    (log,) = (tmp_path / "jobs").glob("*_0_log.err")
    assert error.count("\n") == 1
    assert "1 of 1 jobs failed" in error
    assert f"checkpoint {checkpoint} cannot be read" in error
    assert str(log) in error


def test_slurm_is_asked_for_what_the_user_says(slurm, tmp_path, capsys):
    asked = ["--gpus", 4, "--nodes", 2, "--hours", 1.5, "--partition", "long", "--workers", 3]
    assert submit("--method", "ce", "mixup", *asked, root=tmp_path) == 0
    out = capsys.readouterr().out
    for job in ("4711_0  digits IF=10 seed 0: ce", "4711_1  digits IF=10 seed 0: mixup"):
        assert job in out
    assert str(tmp_path / "jobs" / "4711_1_0_log.err") in out
    assert "mislas list" in out
    (script,) = (tmp_path / "jobs").glob("4711_submission.sh")
    lines = script.read_text().splitlines()
    flags = "gpus-per-node=2 ntasks-per-node=2 nodes=2 time=90 partition=long cpus-per-task=4 array=0-1%2"
    for flag in flags.split():
        assert f"#SBATCH --{flag}" in lines
    (command,) = [line for line in lines if line.startswith("srun")]
    assert "--cpus-per-task=4" in command
    assert sys.executable in command
    job = submitit.core.utils.DelayedSubmission.load(tmp_path / "jobs" / "4711_0_submitted.pkl").function
    assert (job.configs, job.tasks, job.options.workers) == ((digits("ce"),), 4, 3)


def test_a_dry_run_prints_the_jobs_and_needs_no_cluster(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    assert submit("--method", "ce", "lws", "mixup", "--gpus", 2, "--dry-run", root=tmp_path) == 0
    out = capsys.readouterr().out
    assert "jobs to do: 2, each with 2 GPUs, 24 h at a time" in out
    assert "stage2: lws" in out
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus", "-1"], "--gpus must be at least 0"),
        (["--nodes", "0"], "--nodes must be at least 1"),
        (["--gpus", "3", "--nodes", "2"], "3 cannot be shared by 2 nodes evenly"),
        (["--gpus", "0", "--nodes", "2"], "0 cannot be shared by 2 nodes evenly"),
        (["--gpus", "3"], "a batch of 32 images cannot be shared evenly by 3 processes"),
        (["--hours", "0"], "--hours must be above 0"),
        (["--hours", "inf"], "--hours must be above 0"),
        (["--eval-every", "0"], "is 1 or more, got 0"),
        (["--workers", "-1"], "are 0 or more, got -1"),
        (["--gpus", "2", "--nodes", "2", "--local"], "--nodes must be 1"),
        (["--at-once", "0", "--local"], "--at-once must be at least 1"),
        (["--at-once", "2"], "--at-once is for --local"),
        ([], "there is no Slurm here (no srun on the PATH); --local runs the jobs on this machine"),
    ],
)
def test_what_cannot_be_submitted_is_one_line(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert submit("--method", "ce", *arguments, root=tmp_path) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_submitit_is_asked_for_where_it_is_missing(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    assert submit("--method", "ce", "--local", root=tmp_path) == 2
    assert "pip install 'mislas[cluster]'\n" in capsys.readouterr().err


def test_slurms_refusal_is_one_line(slurm, tmp_path, capsys):
    (slurm / "sbatch").write_text("#!/bin/sh\necho 'sbatch: error: invalid partition specified: none' >&2\nexit 1\n")
    assert submit("--method", "ce", "--partition", "none", root=tmp_path) == 2
    error = capsys.readouterr().err
    last = error.splitlines()[-1]  # sbatch's own words are shown, too
    assert last == "mislas: Slurm does not take the jobs: sbatch: error: invalid partition specified: none"


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(MislasError, match="name another with --folder"):
        cluster.executor(tmp_path / "file" / "jobs", Resources(), local=True)


def test_data_that_are_not_there_are_noticed_before_a_job_waits_for_its_turn(tmp_path, options):
    job = ClusterJob((configure("cifar10", "ce"),), tmp_path, None, options)
    with pytest.raises(DataError, match="'cifar10' in vain: no --data-root is given"):
        cluster.check_data([job])
    with pytest.raises(DataError, match="they are not under"):
        cluster.check_data([ClusterJob(job.configs, tmp_path, tmp_path, options)])
    cluster.check_data([ClusterJob((digits("ce"),), tmp_path, None, options)])
