"""The command line: ``mislas train | submit | eval | list | show | campaign | merge | data``."""

from __future__ import annotations

import argparse
import contextlib
import csv
import difflib
import io
import itertools
import json
import math
import os
import sys
import textwrap
import time
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from . import __version__, cluster, distributed
from .archive import merge, pack
from .batches import plain_images
from .campaign import estimate, images_per_second, jobs, parse_budget, wanted
from .config import RunConfig, assignment, field_names, locate, takes, takes_text
from .data import LISTS, SPECS, dataset_name, load
from .errors import MislasError, RecordError
from .evaluate import BINS, predict, summarise
from .lists import check, load_lists
from .methods import METHODS, changed, configure
from .runs import Record, Store, device_name, read_record, run
from .study import WHICH
from .train import Options, OutOfTime

EXAMPLES = """\
examples:
  mislas train --dataset digits --method ce mislas --imbalance 10        (seconds, no data needed)
  mislas train --dataset cifar10 --method mislas --data-root data --download
  mislas train --dataset generated --method ce mislas    (JPEG files and lists, written here; no data needed)
  mislas train --dataset imagenet-lt --method mislas --data-root data
  torchrun --nproc-per-node 4 -m mislas.cli train --dataset imagenet-lt --method mislas --data-root data    (4 GPUs)
  mislas train --dataset cifar10-jpeg --method ce mixup mislas --imbalance 100 50 10 --seed 0 1 2 --data-root data
  mislas submit --dataset cifar10 --method mislas --seed 0 1 2 --data-root data --dry-run     (jobs for Slurm)
  mislas list
  mislas show 6b5417f459cc
  mislas eval 6b5417f459cc --bins 10
  mislas data check places-lt --root places --lists lists
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, 1 for data that fail a check, 2 after an error that the
    user can mend, or 130 if stopped."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # of a terminal without dashes or Greek
    arguments = _parser().parse_args(argv)
    trains = arguments.call in (_train, _campaign)
    first = not trains or os.environ.get("WORLD_SIZE") in (None, "", "1") or os.environ.get("RANK", "0") == "0"
    warned = set()

    def warn(message: Warning | str, *_) -> None:
        if first and str(message) not in warned:  # once, however many runs it is about
            warned.add(str(message))
            print(f"mislas: warning: {message}", file=sys.stderr)

    warnings.showwarning = warn
    try:
        together = distributed.started(arguments.device) if trains else contextlib.nullcontext()
        with together, contextlib.nullcontext() if first else contextlib.redirect_stdout(io.StringIO()):
            return arguments.call(arguments) or 0
    except MislasError as error:
        if not first:
            time.sleep(2)  # if the first one has said the same, torchrun stops this process meanwhile
        print(f"mislas: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("mislas: stopped; the same command goes on from what is stored or checkpointed", file=sys.stderr)
        return 130
    except BrokenPipeError:
        sys.stderr.close()
    except (OSError, MemoryError, torch.OutOfMemoryError) as error:  # a full disk, a small GPU, no right to write
        reason = " ".join(str(error).split())
        print(
            f"mislas: {reason}; once that is mended, the same command goes on from what is stored or checkpointed",
            file=sys.stderr,
        )
        return 2
    except RuntimeError as error:
        if "home directory" not in str(error):
            raise
        print("mislas: there is no such home folder: write paths in full, MISLAS_CACHE too", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mislas",
        description="Train and measure as in 'Improving Calibration for Long-Tailed Recognition'.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"mislas {__version__}")
    commands = parser.add_subparsers(required=True, metavar="{train,submit,eval,list,show,campaign,merge,data}")
    store = argparse.ArgumentParser(add_help=False)
    store.add_argument(
        "--results-root", metavar="DIR", help="the store of finished runs (default: the project's results/)"
    )

    which = _which()
    asked = _asked(which)
    _add_train(commands, [store, asked])
    _add_submit(commands, [store, asked])
    _add_eval(commands, [store])
    _add_campaign(commands, [store, which])
    _add_merge(commands, [store])
    _add_list_and_show(commands, [store])
    data = commands.add_parser("data", help="check a dataset's files, or make its images smaller")
    parts = data.add_subparsers(required=True, metavar="{check,shrink}")
    _add_check(parts)
    _add_shrink(parts)
    return parser


def _which() -> argparse.ArgumentParser:
    """What every command that trains takes."""
    which = argparse.ArgumentParser(add_help=False)
    which.add_argument("--dataset", required=True, metavar="NAME", help=f"one of: {', '.join([*SPECS, *LISTS])}")
    which.add_argument("--seed", type=int, nargs="+", default=[0], metavar="N", help="seeds (default: 0)")
    which.add_argument("--data-root", metavar="DIR", help="folder with the images; digits and generated need none")
    which.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="FIELD=VALUE",
        help="change fields of every run, e.g. epochs=20 stage2.eps_1=0.4",
    )
    which.add_argument(
        "--device", metavar="NAME", help="cpu, cuda, cuda:1, ... (default: an NVIDIA GPU if there is one)"
    )
    which.add_argument(
        "--compile",
        action="store_true",
        help="fuse the backbone with torch.compile: faster on long runs; needs a C++ compiler",
    )
    which.add_argument(
        "--together",
        type=int,
        default=1,
        metavar="N",
        help="train up to N Stage-1 runs of small networks at once, in equal batches (default: 1)",
    )
    which.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="processes that decode image files; 0 decodes in this one (default: one per processor)",
    )
    which.add_argument("--quiet", action="store_true", help="no progress bar")
    return which


def _asked(which: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """What "train" and "submit" have in common."""
    asked = argparse.ArgumentParser(add_help=False, parents=[which])
    asked.add_argument(
        "--method", required=True, nargs="+", metavar="NAME", help=f"one or more of: {', '.join(METHODS)}"
    )
    asked.add_argument(
        "--imbalance",
        type=float,
        nargs="+",
        default=[None],
        metavar="IF",
        help="imbalance factors >= 1; 1 is balanced (default: 100). Datasets of list files have their own",
    )
    asked.add_argument(
        "--eval-every",
        type=int,
        default=10,
        metavar="N",
        help="epochs between test evaluations along the way (default: 10); the last epoch is what counts",
    )
    return asked


def _fields() -> str:
    names = textwrap.wrap("  ".join(field_names()), 100, break_on_hyphens=False)
    return "fields for --set, with the values of Table 5 as defaults:\n  " + "\n  ".join(names)


def _add_train(commands: argparse._SubParsersAction, parents: list[argparse.ArgumentParser]) -> None:
    train = commands.add_parser(
        "train",
        parents=parents,
        help="train what is not in the store yet",
        description="Train the runs asked for: every combination of method, imbalance factor and seed. What the store "
        "has is not trained again, Stage-1 is shared, and a run that was stopped goes on from its checkpoint.",
        epilog=_fields(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    train.add_argument("--budget", metavar="TIME", help="stop, checkpointed, before this time is over: 90s, 9m, 1.5h")
    train.add_argument("--download", action="store_true", help="fetch CIFAR-10/100 into --data-root if missing")
    train.set_defaults(call=_train)


def _add_submit(commands: argparse._SubParsersAction, parents: list[argparse.ArgumentParser]) -> None:
    submitting = commands.add_parser(
        "submit",
        parents=parents,
        help="train on a Slurm cluster what is not in the store yet",
        description="Submit the runs asked for, as 'mislas train' takes them, as Slurm jobs. What the store has is not "
        "submitted; runs that share a Stage-1 are one job. A job that is preempted or reaches its time limit is queued "
        "again and goes on from its checkpoint. Store, data and logs must be on a disk that every node sees.",
        epilog=_fields(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    submitting.add_argument("--partition", metavar="NAME", help="of the cluster (default: its own)")
    submitting.add_argument(
        "--gpus", type=int, default=1, metavar="N", help="GPUs of each job, which train it together (default: 1)"
    )
    submitting.add_argument(
        "--nodes", type=int, default=1, metavar="N", help="machines of each job, which share its GPUs (default: 1)"
    )
    submitting.add_argument(
        "--hours",
        type=float,
        default=24.0,
        metavar="H",
        help="time limit of a job before it is queued again (default: 24)",
    )
    submitting.add_argument("--folder", default="jobs", metavar="DIR", help="for logs (default: jobs)")
    submitting.add_argument("--local", action="store_true", help="run the jobs on this machine, without Slurm")
    submitting.add_argument(
        "--at-once",
        type=int,
        default=1,
        metavar="N",
        help="with --local: jobs that run at once, each with its share of processors and GPUs (default: 1)",
    )
    submitting.add_argument("--dry-run", action="store_true", help="print the jobs, submit nothing")
    submitting.set_defaults(call=_submit)


def _add_eval(commands: argparse._SubParsersAction, parents: list[argparse.ArgumentParser]) -> None:
    evaluate = commands.add_parser(
        "eval",
        parents=parents,
        help="measure a finished run again",
        description="Measure a finished run again from its stored predictions, with other bins if you like. "
        "With --data-root, a Stage-1 model is loaded from its stored weights and run over the test images.",
    )
    evaluate.add_argument("run", metavar="RUN", help="identity of a run, or its beginning; see 'mislas list'")
    evaluate.add_argument(
        "--bins", type=int, default=BINS, metavar="N", help=f"bins of the ECE (default: {BINS}, the paper's)"
    )
    evaluate.add_argument("--data-root", metavar="DIR", help="folder with the images")
    evaluate.add_argument("--device", metavar="NAME", help="cpu, cuda, ... (default: an NVIDIA GPU if there is one)")
    evaluate.set_defaults(call=_eval)


def _add_campaign(commands: argparse._SubParsersAction, parents: list[argparse.ArgumentParser]) -> None:
    push = commands.add_parser(
        "campaign",
        parents=parents,
        help="fill the store with what the book wants, within a time budget",
        description="Train what the tables and figures want of a dataset and the store lacks, most wanted first. "
        "What a table or figure varies keeps its values whatever --set says. Can be killed at any moment; the same "
        "command goes on.",
    )
    push.add_argument(
        "--imbalance",
        type=float,
        nargs="+",
        metavar="IF",
        help="imbalance factors (default: 100 50 10). Datasets of list files have their own",
    )
    push.add_argument("--budget", metavar="TIME", help="stop, checkpointed, before this time is over: 90s, 9m, 1.5h")
    push.add_argument(
        "--pack",
        metavar="FILE",
        help="pack what the store has of all this, and every checkpoint, into this tar; it is added to if it is there",
    )
    push.add_argument("--dry-run", action="store_true", help="print the plan and its cost, train nothing")
    push.set_defaults(call=_campaign)


def _add_merge(commands: argparse._SubParsersAction, parents: list[argparse.ArgumentParser]) -> None:
    joining = commands.add_parser(
        "merge",
        parents=parents,
        help="add a packed archive to the store",
        description="Add what 'mislas campaign --pack' wrote to the store. Damage and conflicts are refused before "
        "anything is added.",
    )
    joining.add_argument("archive", nargs="+", metavar="FILE")
    joining.set_defaults(call=_merge)


#: What runs are listed by: type, placeholder, and what it is.
FILTERS = {
    "dataset": (str, "NAME", "a dataset"),
    "imbalance": (float, "IF", "an imbalance factor"),
    "method": (str, "NAME", "a method"),
    "seed": (int, "N", "a seed"),
}


def _add_list_and_show(commands: argparse._SubParsersAction, parents: list[argparse.ArgumentParser]) -> None:
    listing = commands.add_parser("list", parents=parents, help="list finished runs, methods or datasets")
    listing.add_argument("what", nargs="?", choices=("runs", "methods", "datasets"), default="runs")
    for key, (kind, metavar, said) in FILTERS.items():
        listing.add_argument(
            f"--{key}", type=kind, nargs="+", default=[], metavar=metavar, help=f"only runs of such {said}"
        )
    listing.add_argument("--csv", action="store_true", help="every measure of every run, as comma-separated values")
    listing.set_defaults(call=_list)

    show = commands.add_parser("show", parents=parents, help="everything about one finished run")
    show.add_argument("run", metavar="RUN", help="identity of a run, or its beginning; see 'mislas list'")
    show.set_defaults(call=_show)


def _add_check(parts: argparse._SubParsersAction) -> None:
    checking = parts.add_parser(
        "check",
        help="hold a dataset against what is expected of it",
        description="Count images and classes, look for missing files, decode every image, and report. The exit status "
        "is 0 if all is well, 1 if the data are wrong, 2 if the command is.",
    )
    checking.add_argument("name", metavar="NAME", help=f"one of: {', '.join([*LISTS, *SPECS])}")
    checking.add_argument("--root", metavar="DIR", help="folder with the images; digits needs none")
    checking.add_argument("--lists", metavar="DIR", help="folder with the list files (default: --root)")
    checking.add_argument("--quiet", action="store_true", help="no progress bar")
    checking.set_defaults(call=_check)


def _add_shrink(parts: argparse._SubParsersAction) -> None:
    shrinking = parts.add_parser(
        "shrink",
        help="copy large images at a size that decodes faster",
        description="Copy the images of both lists into another folder, the shorter side at most --side pixels. They "
        "are other data then, and say so. Can be stopped at any moment; the same command goes on.",
    )
    shrinking.add_argument("name", metavar="NAME", help=f"one of: {', '.join(LISTS)}")
    shrinking.add_argument("--root", required=True, metavar="DIR", help="folder with the images")
    shrinking.add_argument("--lists", metavar="DIR", help="folder with the list files (default: --root)")
    shrinking.add_argument("--to", required=True, metavar="DIR", help="the new folder")
    shrinking.add_argument("--side", type=int, default=256, metavar="N", help="of the shorter side (default: 256)")
    shrinking.add_argument("--quiet", action="store_true", help="no progress bar")
    shrinking.set_defaults(call=_shrink)


def _store(arguments: argparse.Namespace, read: bool = False) -> Store:
    """The store that is meant; to ``read`` from, it must be there."""
    if arguments.results_root == "":
        raise RecordError("--results-root is empty; name a folder, or leave it out")
    store = Store(arguments.results_root)
    if read and arguments.results_root and not store.root.is_dir():
        raise RecordError(
            f"--results-root {arguments.results_root} is no folder; a store is one that 'train' wrote into"
        )
    return store


def parse_overrides(pairs: Sequence[str]) -> dict[str, Any]:
    """``["epochs=20", "form=linear"]`` to ``{"epochs": 20, "form": "linear"}``; values are JSON, Python's words for
    true, false and null, or text.

    Raises:
        MislasError: no ``=``, an unknown field, or one that says which runs are meant.
    """
    overrides = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals:
            raise MislasError(f"--set takes FIELD=VALUE, got {pair!r}")
        try:
            value = json.loads({"True": "true", "False": "false", "None": "null"}.get(text, text))
        except json.JSONDecodeError:
            value = text
        if key in WHICH:
            raise MislasError(f"--set changes how runs are trained; for which runs there is --{key}; got {pair!r}")
        digits = isinstance(value, int | float) and takes_text(key)  # a checksum may look like a number
        for other in [other for other in overrides if locate(other) == locate(key)]:
            del overrides[other]  # the same field by another name: the last one counts
        overrides[key] = text if digits else value
    return overrides


def _configs(arguments: argparse.Namespace) -> list[RunConfig]:
    overrides, configs = parse_overrides(arguments.set), []
    for imbalance, seed, method in itertools.product(arguments.imbalance, arguments.seed, arguments.method):
        try:
            configs.append(configure(arguments.dataset, method, imbalance, seed, overrides))
        except MislasError as error:
            if "," in method and method not in METHODS:
                raise MislasError(f"--method takes names with spaces between them, got {method!r}") from error
            if len(arguments.method) == 1 or method not in METHODS:
                raise
            raise MislasError(f"{method}: {error}") from error
    for key, value in overrides.items():
        if not any(takes(config, key, value) for config in configs if config.stage2 or locate(key)[0] != "stage2"):
            warnings.warn(f"--set {assignment(key, value)} changes nothing in any of these runs", stacklevel=2)
    return configs


def _options(arguments: argparse.Namespace) -> Options:
    names = ("device", "compile", "eval_every", "workers", "together")  # a campaign has no eval_every
    how = {name: getattr(arguments, name) for name in names if name in arguments}
    if getattr(arguments, "budget", None) is not None:  # a submission has none
        how["deadline"] = time.monotonic() + parse_budget(arguments.budget)
    return Options(progress=not arguments.quiet, **how)


def _train(arguments: argparse.Namespace) -> None:
    configs, options, store = _configs(arguments), _options(arguments), _store(arguments)
    try:
        _print_runs(run(configs, store, arguments.data_root, options, arguments.download))
    except OutOfTime as error:
        print(f"{error}; {_stored(configs, store)}, the same command goes on")


def _stored(configs: Sequence[RunConfig], store: Store) -> str:
    have = sum(store.get(config) is not None for config in configs)
    return f"{have} of {len(configs)} runs are in the store"


def _submit(arguments: argparse.Namespace) -> None:
    configs, options, store = _configs(arguments), _options(arguments), _store(arguments)
    processors = None if arguments.workers is None else arguments.workers + 1
    resources = cluster.Resources(arguments.gpus, arguments.nodes, arguments.hours, arguments.partition, processors)
    if arguments.at_once < 1:
        raise MislasError(f"--at-once must be at least 1, got {arguments.at_once}")
    if arguments.at_once > 1 and not arguments.local:
        raise MislasError("--at-once is for --local; Slurm decides itself how many jobs run at once")
    planned = cluster.cluster_jobs(configs, store, arguments.data_root, options, resources.tasks)
    print(f"{_stored(configs, store)}; jobs to do: {len(planned)}, each with {resources}")
    for job in planned:
        print(f"  {job}")
        for step in jobs(job.configs, store):
            print(f"      {step}")
    if arguments.dry_run or not planned:
        return
    executor = cluster.executor(arguments.folder, resources, arguments.local)
    cluster.check_data(planned)
    cluster.check_entries(planned)
    if arguments.local:
        ended = cluster.run_here(planned, executor, options.progress, arguments.at_once, resources.gpus)
        with cluster.stoppable(), contextlib.closing(ended):
            _print_ended(planned, ended)
        return
    handles = cluster.submit(planned, executor)
    print("submitted:")
    for job, handle in zip(planned, handles, strict=True):
        print(f"  {handle.job_id}  {job}\n      log: {handle.paths.stderr}")
    print(f"progress: mislas list --results-root {store.root} (finished, under way), squeue --me, or a job's log")


def _print_ended(planned: Sequence[cluster.ClusterJob], ended: Iterable[tuple]) -> None:
    failed = []
    for job, handle, failure in ended:
        log = handle.paths.stderr
        tqdm.write(f"job {handle.job_id} {'failed' if failure else 'is done'}: {job}\n      log: {log}")
        if failure:
            failed.append(f"{failure} (log: {log})")
    if failed:
        raise MislasError(f"{len(failed)} of {len(planned)} jobs failed: {'; '.join(failed)}")
    print("all jobs are done; mislas list shows what they measured")


def _campaign(arguments: argparse.Namespace) -> None:
    store, overrides, options = _store(arguments), parse_overrides(arguments.set), _options(arguments)
    configs = wanted(arguments.dataset, arguments.imbalance, arguments.seed, overrides)
    planned, rates = jobs(configs, store), images_per_second(store)
    here = rates.get(device_name(options.torch_device()), {})
    print(f"{_stored(configs, store)}; {len(planned)} jobs to do, most wanted first:")
    seconds = [job.seconds_at(here) for job in planned]
    for job, cost in zip(planned, seconds, strict=True):
        print(f"  {job}" + ("" if cost is None else f", about {cost / 60:.0f} min"))
    if planned and None not in seconds:
        print(
            f"  about {sum(seconds) / 3600:.1f} h in all, at the rates of the store's runs on this device"
            + (", one after another" if options.together > 1 else "")
        )
    elif elsewhere := estimate(planned, rates):
        print(f"  {elsewhere}; of this device the store has too few runs to tell")
    if arguments.dry_run:
        return
    packs = arguments.pack and distributed.rank() == 0
    if packs:  # what was left if the last start was killed; and better an error now than after training
        pack(configs, store, Path(arguments.pack).expanduser())
    with cluster.stoppable():
        try:
            run(configs, store, arguments.data_root, options)
            print(_stored(configs, store))
        except OutOfTime as error:
            print(f"{error}; {_stored(configs, store)}, the same command goes on")
        finally:  # what was made until then is packed, too, if a run diverges or somebody stops it
            if packs:
                print(f"{pack(configs, store, Path(arguments.pack).expanduser())} files packed into {arguments.pack}")


def _merge(arguments: argparse.Namespace) -> None:
    for archive in arguments.archive:
        _print_runs(merge(Path(archive).expanduser(), _store(arguments)))


def find_run(store: Store, prefix: str) -> Record:
    """The one run whose identity begins with ``prefix``.

    Raises:
        MislasError: none does, or several do.
    """
    known = {path.stem.rpartition("-")[2]: path for path in sorted(store.root.glob("*/*.json"))}
    found = [identity for identity in known if identity.startswith(prefix)]
    if len(found) == 1:
        return read_record(known[found[0]])
    said = f"{len(found)} runs begin with {prefix!r}" if found else f"unknown run {prefix!r}"
    near = found[:3] or difflib.get_close_matches(prefix, known, cutoff=0.8)
    hint = f" ({', '.join(near)}{', ...' * (len(found) > 3)})" if near else ""
    raise MislasError(f"{said}{hint}; 'mislas list' shows the {len(known)} runs of the store {store.root}")


def _eval(arguments: argparse.Namespace) -> None:
    store = _store(arguments, read=True)
    record = find_run(store, arguments.run)
    print(f"{record.config.method} on {record.config.data_title} seed {record.config.seed}")
    if record.config.stage2 is not None and arguments.data_root is not None:
        raise RecordError("only Stage-1 models are stored as weights; leave out --data-root to use stored predictions")
    options = Options(arguments.device)
    device = options.torch_device()
    bundled = record.config.dataset in ("digits", "generated")
    again = arguments.data_root is not None or (bundled and store.find(record.config, ".safetensors").exists())
    if record.config.stage2 is not None or not again:
        predictions = record.predictions()
    else:
        config = record.config
        data = load(config.dataset, arguments.data_root, config.imbalance, n_max=config.n_max)
        if data.checksum != record.provenance["data_checksum"]:
            raise RecordError(
                f"these images differ from the run's: {data.checksum}, not {record.provenance['data_checksum']}"
            )
        network, head = store.get_weights(record.config, data.num_classes)
        (logits,) = predict(network.to(device), [head.to(device)], plain_images(data, options))
        metrics, predictions = summarise(logits, data.test_targets, data.groups)
        print(f"from weights: accuracy {metrics['accuracy']:.4f}, recorded {record.metrics['accuracy']:.4f}")
    bins = predictions.reliability(arguments.bins)
    print(
        f"accuracy {predictions.correct.mean():.4f}  confidence {predictions.confidence.mean():.4f}  "
        f"ECE {bins.ece:.4f}  MCE {bins.mce:.4f}  ({arguments.bins} bins)"
    )
    print("bin             images  accuracy  confidence")
    for low, high, count, accuracy, confidence in zip(
        bins.edges, bins.edges[1:], bins.count, bins.accuracy, bins.confidence, strict=False
    ):
        print(
            f"({low:.3f}, {high:.3f}]  {count:6d}  "
            + (f"{accuracy:8.4f}  {confidence:10.4f}" if count else "       –           –")
        )


def _print_runs(records: Sequence[Record]) -> None:
    print(
        f"{'run':12}  {'dataset':16}  {'IF':>5}  {'method':18}  {'seed':>4}  {'accuracy':>8}  {'confidence':>10}  "
        f"{'ECE':>6}  {'date':10}  changed"
    )
    for record in records:
        c, m = record.config, record.metrics
        print(
            f"{c.id:12}  {c.dataset:16}  {c.imbalance:5g}  {c.method:18}  {c.seed:4d}  {m['accuracy']:8.4f}  "
            f"{m.get('confidence', math.nan):10.4f}  {m['ece']:6.4f}  {record.provenance['date'][:10]:10}  "
            f"{changed(c)}".rstrip()
        )


def _list(arguments: argparse.Namespace) -> None:
    only = {key: values for key in FILTERS if (values := getattr(arguments, key))}
    options = [*["csv"] * arguments.csv, *only]
    if options and arguments.what != "runs":
        raise MislasError(f"--{options[0]} is of runs, not of {arguments.what}")
    if arguments.what == "methods":
        width = max(map(len, METHODS))
        for name, method in METHODS.items():
            print(f"{name:{width}}  {method.idea}\n{'':{width}}  {method.source}; {method.where}")
        return
    if arguments.what == "datasets":
        for name, spec in SPECS.items():
            print(f"{name:16}  {spec.num_classes:4d} classes, {spec.size}x{spec.size} pixels; {spec.title}")
        for name, spec in LISTS.items():
            print(
                f"{name:16}  {spec.num_classes:4d} classes, {spec.size}x{spec.size} crops; {spec.title}, by list files"
            )
        return
    store = _store(arguments, read=True)
    if "dataset" in only:
        only["dataset"] = [dataset_name(name) for name in only["dataset"]]
    records = [r for r in store if all(getattr(r.config, key) in values for key, values in only.items())]
    if only and not records:
        asked = "; ".join(f"{key} {', '.join(map(str, values))}" for key, values in only.items())
        raise MislasError(f"no run in the store {store.root} is of {asked}; 'mislas list' shows what is")
    if arguments.csv:
        rows = [record.row() for record in records]
        writer = csv.DictWriter(sys.stdout, dict.fromkeys(key for row in rows for key in row), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return
    _print_runs(records)
    for checkpoint in [] if only else store.under_way():
        print(f"under way: {checkpoint}")


def _show(arguments: argparse.Namespace) -> None:
    record = find_run(_store(arguments, read=True), arguments.run)
    print(json.dumps(json.loads(record.path.read_text()), indent=2))


def _check(arguments: argparse.Namespace) -> int:
    report = check(arguments.name, arguments.root, arguments.lists, progress=not arguments.quiet)
    print(report)
    return 0 if report.ok else 1


def _shrink(arguments: argparse.Namespace) -> None:
    from .pipeline import shrink  # here: torchvision takes seconds to import

    if arguments.side < 1:
        raise MislasError(f"--side must be at least 1, got {arguments.side}")
    data = load_lists(arguments.name, arguments.root, arguments.lists)
    for images in (data.train, data.test):
        shrink(images, arguments.to, arguments.side, progress=not arguments.quiet)
    print(f"{len(data.train) + len(data.test):,} images are in {arguments.to}; use it as the root")


if __name__ == "__main__":
    sys.exit(main())
