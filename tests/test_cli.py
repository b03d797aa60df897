import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

from mislas import cli
from mislas.archive import merge, pack
from mislas.cli import main, parse_overrides
from mislas.errors import MislasError
from mislas.methods import METHODS, changed, configure
from mislas.models import BACKBONES
from mislas.runs import Store, run
from mislas.train import Options

SHORT = ["--imbalance", "10", "--quiet", "--device", "cpu", "--set", "epochs=2"]
QUICK = [*SHORT, "stage2.epochs=1"]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    root = str(tmp_path_factory.mktemp("results"))
    assert main(["train", "--dataset", "digits-lt", "--method", "ce", "lws", "--results-root", root, *QUICK]) == 0
    return root


def printed_runs(capsys, store):
    main(["list", "--results-root", store])
    return [line.split() for line in capsys.readouterr().out.splitlines()[1:]]


def test_train_stores_what_list_shows(store, capsys):
    assert [(row[1], row[3]) for row in printed_runs(capsys, store)] == [("digits", "ce"), ("digits", "lws")]


def test_list_tells_runs_of_one_method_apart_by_what_they_change(store, made_up, capsys):
    assert [row[9:] for row in printed_runs(capsys, store)] == [["epochs=2"], ["epochs=2", "stage2.epochs=1"]]
    for changes in ({}, {"mixup": 1.0}, {"backbone": "resnet14", "schedule": "cosine"}):
        made_up("digits", "ce", changes)
    made_up("digits", "mixup", {"epochs": 2, "mixup": None})
    assert {" ".join(row[9:]) for row in printed_runs(capsys, str(made_up.root))} == {
        "", "mixup=1.0", "backbone=resnet14 schedule=cosine", "epochs=2 mixup=null",
    }  # fmt: skip


def test_a_run_of_a_name_that_is_no_method_is_listed(made_up, monkeypatch, capsys):
    monkeypatch.setitem(METHODS, "mine", METHODS["ce"])
    made_up("digits", "mine", {"epochs": 1})
    monkeypatch.delitem(METHODS, "mine")
    ((_, _, _, method, *_, date),) = printed_runs(capsys, str(made_up.root))
    assert (method, date) == ("mine", "2000-01-01")


def test_show_prints_the_record_of_an_identity_prefix(store, capsys):
    identity = printed_runs(capsys, store)[0][0]
    assert main(["show", identity[:5], "--results-root", store]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["id"] == identity
    assert shown["provenance"]["data"] == "digits"


def test_eval_from_weights_agrees_with_the_record(store, capsys):
    identity, *_, accuracy = printed_runs(capsys, store)[0][:6]
    assert main(["eval", identity, "--results-root", store, "--device", "cpu"]) == 0
    assert f"from weights: accuracy {accuracy}, recorded {accuracy}" in capsys.readouterr().out


def test_eval_of_a_two_stage_run_uses_stored_predictions(store, capsys):
    identity, *_, accuracy = printed_runs(capsys, store)[1][:6]
    assert main(["eval", identity, "--bins", "5", "--results-root", store]) == 0
    out = capsys.readouterr().out
    assert f"accuracy {accuracy}" in out
    assert "(5 bins)" in out


def test_eval_refuses_other_images_than_the_runs_and_weights_that_are_not_kept(store, tmp_path, capsys):
    (stage1, *_), (stage2, *_) = printed_runs(capsys, store)
    assert main(["eval", stage2, "--data-root", "data", "--results-root", store]) == 2
    assert "only Stage-1 models are stored as weights" in capsys.readouterr().err
    other = shutil.copytree(store, tmp_path / "other")
    (path,) = other.glob(f"*/*-{stage1}.json")
    content = json.loads(path.read_text())
    content["provenance"]["data_checksum"] = "0"
    path.write_text(json.dumps(content))
    assert main(["eval", stage1, "--results-root", str(other), "--device", "cpu"]) == 2
    assert "these images differ from the run's" in capsys.readouterr().err


def test_list_shows_what_is_under_way(store, tmp_path, capsys):
    other = shutil.copytree(store, tmp_path / "other")
    (other / "digits-if10" / "mixup-s0-0123456789ab.ckpt").touch()
    assert main(["list", "--results-root", str(other)]) == 0
    assert re.search(r"under way: .*mixup-s0-0123456789ab\.ckpt", capsys.readouterr().out)


def test_merge_adds_what_was_packed(store, tmp_path, capsys):
    archive, other = tmp_path / "a.tar", str(tmp_path / "other")
    pack([record.config for record in Store(store)], Store(store), archive)
    assert main(["merge", str(archive), "--results-root", other]) == 0
    assert "digits" in capsys.readouterr().out
    assert printed_runs(capsys, other) == printed_runs(capsys, store)


def test_downloads_and_budgets_reach_those_who_heed_them(tmp_path, monkeypatch):
    seen, root = [], ["--dataset", "digits", "--results-root", str(tmp_path)]
    monkeypatch.setattr(cli, "run", lambda *given: seen.append(given[3:]) or [])
    for more in ([], ["--download"]):
        assert main(["train", "--method", "ce", *root, *more]) == 0
    assert [download for _, download in seen] == [False, True]
    for command in (["campaign"], ["train", "--method", "ce"]):
        for more in ([], ["--budget", "9m"]):
            assert main([*command, *root, *more]) == 0
        (none, *_), (some, *_) = seen[-2:]
        assert none.deadline is None
        assert 0 <= time.monotonic() + 540 - some.deadline < 60


def test_a_rank_without_a_world_silences_nobody(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "3")
    assert main(["list", "datasets"]) == 0
    assert "cifar10" in capsys.readouterr().out


@pytest.mark.parametrize(("size", "status"), [("", 0), ("all", 2)])
def test_the_size_of_the_world_is_a_number(tmp_path, monkeypatch, capsys, size, status):
    monkeypatch.setattr(cli, "run", lambda *_: [])
    monkeypatch.setenv("WORLD_SIZE", size)
    assert main(["train", "--dataset", "digits", "--method", "ce", "--results-root", str(tmp_path)]) == status
    assert ("a number, got 'all'; unset it" in capsys.readouterr().err) == bool(status)


def test_one_run_is_found_without_the_others_being_read(store, tmp_path, capsys):
    (identity, *_), *_ = printed_runs(capsys, store)
    root = shutil.copytree(store, tmp_path / "other")
    next(path for path in root.glob("*/*.json") if identity not in path.name).write_text("damaged")
    assert main(["show", identity[:6], "--results-root", str(root)]) == 0
    assert json.loads(capsys.readouterr().out)["id"] == identity


def test_a_device_that_is_none_is_refused_even_where_none_is_used(store, capsys):
    identity = printed_runs(capsys, store)[0][0]
    assert main(["eval", identity, "--device", "gpu", "--results-root", store]) == 2


def test_what_does_not_fit_into_memory_is_one_line(store, capsys):
    identity = printed_runs(capsys, store)[0][0]
    assert main(["eval", identity, "--bins", str(10**14), "--results-root", store]) == 2
    assert capsys.readouterr().err.startswith("mislas: Unable to allocate")


def test_training_ends_within_its_budget_and_says_so(tmp_path, capsys):
    command = ["train", "--dataset", "digits", "--method", "ce", "--results-root", str(tmp_path), "--device", "cpu"]
    assert main([*command, "--quiet", "--budget", "1s", "--set", "epochs=5000"]) == 0
    assert "; 0 of 1 runs are in the store, the same command goes on" in capsys.readouterr().out
    assert main([*command, "--budget", "soon"]) == 2


def test_the_csv_has_every_measure_of_every_run(store, capsys):
    assert main(["list", "--csv", "--results-root", store]) == 0
    rows = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    records = list(Store(store))
    assert [row["id"] for row in rows] == [record.config.id for record in records]
    for row, record in zip(rows, records, strict=True):
        for key, value in record.metrics.items():
            assert row[key] == ("" if value is None else str(value))
        assert row["changed"] == changed(record.config) != ""
        assert row["data_checksum"] == record.provenance["data_checksum"]
    assert main(["list", "methods", "--csv"]) == 2


@pytest.mark.filterwarnings("always")
def test_what_set_changes_in_no_run_is_said(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cli, "run", lambda *_: [])
    command = ["train", "--dataset", "digits", "--results-root", str(tmp_path), "--method", "ce", "mislas"]
    assert main([*command, "--set", "eps_1=0.1", "stage2.epochs=1", "gamma=2"]) == 0
    assert capsys.readouterr().err == "mislas: warning: --set gamma=2 changes nothing in any of these runs\n"
    assert main([*command[:-1], "--set", "eps_1=0.1"]) == 0  # no run has a second stage
    assert capsys.readouterr().err == "mislas: warning: --set eps_1=0.1 changes nothing in any of these runs\n"


@pytest.mark.filterwarnings("always")
def test_a_warning_is_said_once(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cli, "run", lambda *_: [])
    command = ["train", "--dataset", "digits", "--method", "mislas", "--results-root", str(tmp_path)]
    assert main([*command, "--seed", "0", "1", "--set", "eps_1=0.7"]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert "eps_1=0.7 is outside the paper's range" in line


def test_list_takes_what_it_is_to_show(store, capsys):
    def methods(*only):
        assert main(["list", "--results-root", store, *only]) == 0
        return [line.split()[3] for line in capsys.readouterr().out.splitlines()[1:]]

    assert methods("--method", "lws") == ["lws"]
    assert methods("--dataset", "digits-lt", "--imbalance", "10", "50", "--seed", "0") == ["ce", "lws"]
    assert main(["list", "--results-root", store, "--method", "lws", "--csv"]) == 0
    assert [row["method"] for row in csv.DictReader(capsys.readouterr().out.splitlines())] == ["lws"]
    assert main(["list", "--results-root", store, "--method", "crt", "--seed", "1", "2"]) == 2
    assert "is of method crt; seed 1, 2; 'mislas list' shows what is" in capsys.readouterr().err
    assert main(["list", "methods", "--seed", "1"]) == 2
    assert "--seed is of runs, not of methods" in capsys.readouterr().err


def test_list_and_eval_show_confidence_beside_accuracy(store, capsys):
    row = printed_runs(capsys, store)[0]
    (record,) = [record for record in Store(store) if record.config.id == row[0]]
    assert [float(value) for value in row[5:8]] == [
        pytest.approx(record.metrics[name], abs=5e-5) for name in ("accuracy", "confidence", "ece")
    ]
    assert main(["eval", row[0], "--results-root", store]) == 0
    assert f"accuracy {row[5]}  confidence {row[6]}  ECE {row[7]}" in capsys.readouterr().out


def test_set_takes_pythons_words_too():
    assert parse_overrides(["shift_bn=True", "attention=False", "mixup=None", "form=linear"]) == {
        "shift_bn": True, "attention": False, "mixup": None, "form": "linear",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("method", "said"),
    [("MiSLAS", "did you mean 'mislas'?"), ("LWS+mixup", "did you mean 'lws+mixup'?"), ("ce,mislas", "with spaces")],
)
def test_a_methods_title_or_a_comma_is_understood(method, said, capsys):
    assert main(["train", "--dataset", "digits", "--method", method]) == 2
    assert said in capsys.readouterr().err


def test_the_plan_names_a_device_that_the_store_knows_where_it_does_not_know_this_one(store, capsys, monkeypatch):
    monkeypatch.setattr(cli, "device_name", lambda device: "a laptop")
    command = ["campaign", "--dataset", "digits", "--imbalance", "10", "--results-root", store, "--dry-run"]
    assert main(command) == 0
    *_, last = capsys.readouterr().out.splitlines()
    assert re.search(r"(about|more than) \d+\.\d h on .*CPU.*; of this device the store has too few runs to tell", last)


def test_a_store_that_cannot_be_written_is_one_line(tmp_path, capsys):
    (tmp_path / "file").touch()
    command = ["train", "--dataset", "digits", "--method", "ce", "--results-root", str(tmp_path / "file"), *SHORT]
    assert main(command) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"Not a directory: '{tmp_path / 'file'}" in line
    assert line.endswith("the same command goes on from what is stored or checkpointed")


def test_ctrl_c_is_one_line(store, capsys, monkeypatch):
    def run(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("mislas.cli.run", run)
    assert main(["train", "--dataset", "digits", "--method", "ce", "--results-root", store, *SHORT]) == 130
    assert capsys.readouterr().err == (
        "mislas: stopped; the same command goes on from what is stored or checkpointed\n"
    )


def test_a_gpu_that_is_too_small_is_one_line(store, capsys, monkeypatch):
    def run(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 20.00 MiB.")

    monkeypatch.setattr("mislas.cli.run", run)
    assert main(["train", "--dataset", "digits", "--method", "ce", "--results-root", store, *SHORT]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "CUDA out of memory. Tried to allocate 20.00 MiB." in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset", "digitz", "--method", "ce"], "unknown dataset 'digitz'; did you mean 'digits'?"),
        (["--dataset", "digits", "--method", "mislsa"], "unknown method 'mislsa'; did you mean 'mislas'?"),
        (["--dataset", "digits", "--method", "ce", "--imbalance", "0.5"], "imbalance factor must be >= 1"),
        (["--dataset", "digits", "--method", "ce", "--imbalance", "1000"], "leaves class"),
        (["--dataset", "digits", "--method", "ce", "--seed", "-1"], "seed must be an integer >= 0"),
        (["--dataset", "digits", "--method", "ce", "--set", "epoch=3"], "unknown field 'epoch'; did you mean"),
        (["--dataset", "digits", "--method", "ce", "--set", "epochs=many"], "epochs takes int, got 'many'"),
        (["--dataset", "digits", "--method", "ce", "--set", "epochs"], "--set takes FIELD=VALUE"),
        (["--dataset", "digits", "--method", "mislas", "--set", "eps_k=0.4"], "0 <= eps_k <= eps_1 <= 0.5"),
        (["--dataset", "cifar10", "--method", "ce"], "needs data_root"),
        (["--dataset", "cifar10-jpeg", "--method", "ce", "--data-root", "/nowhere"], "no images for 'cifar10-jpeg'"),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments, message, tmp_path, capsys):
    assert main(["train", *arguments, "--results-root", str(tmp_path), "--quiet"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.rglob("*.json"))


def test_a_run_that_is_not_one_says_where_to_look(store, tmp_path, capsys):
    identity = printed_runs(capsys, store)[0][0]
    for prefix, root, message in [
        ("zzz", store, f"unknown run 'zzz'; 'mislas list' shows the 2 runs of the store {store}"),
        ("zzz", str(tmp_path), f"unknown run 'zzz'; 'mislas list' shows the 0 runs of the store {tmp_path}"),
        (identity[:-1] + "z", store, f"unknown run '{identity[:-1]}z' ({identity}); "),
        ("", store, "2 runs begin with ''"),
    ]:
        assert main(["show", prefix, "--results-root", root]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1


def test_a_world_of_several_without_the_others_is_one_line_where_it_matters(store, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert main(["list", "--results-root", store]) == 0
    capsys.readouterr()
    assert main(["train", "--dataset", "digits", "--method", "ce", "--results-root", str(tmp_path)]) == 2
    assert "mislas: WORLD_SIZE says that 2 processes train together, but" in capsys.readouterr().err


def test_values_of_set_are_json_or_text():
    pairs = ["epochs=20", "stage2.eps_1=0.4", "form=linear", "stage2.shift_bn=false", "mixup=null", "weights=1234e567"]
    assert parse_overrides(pairs) == {
        "epochs": 20,
        "stage2.eps_1": 0.4,
        "form": "linear",
        "stage2.shift_bn": False,
        "mixup": None,
        "weights": "1234e567",
    }


def test_help_names_methods_datasets_and_fields(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["train", "--help"])
    assert exit_.value.code == 0
    out = capsys.readouterr().out
    assert "mislas" in out
    assert "cifar10-jpeg" in out
    assert "stage2.smoothing_over" in out


def test_a_campaign_that_ends_early_packs_what_it_made(tmp_path, monkeypatch, capsys):
    def half(configs, store, *_):
        run(configs[:1], store, options=Options(device="cpu", progress=False))
        raise MislasError("the second diverged")

    monkeypatch.setattr(cli, "run", half)
    where = ["--results-root", str(tmp_path / "results"), "--pack", str(tmp_path / "new.tar")]
    quick = ["--set", "epochs=1", "--set", "stage2.epochs=1"]
    assert main(["campaign", "--dataset", "digits", "--imbalance", "10", *quick, *where]) == 2
    printed = capsys.readouterr()
    assert "3 files packed" in printed.out
    assert "the second diverged" in printed.err
    assert [record.config.method for record in merge(tmp_path / "new.tar", Store(tmp_path / "other"))] == ["ce"]


def test_which_runs_are_meant_is_no_matter_of_set():
    with pytest.raises(MislasError, match="for which runs there is --imbalance"):
        parse_overrides(["imbalance=10"])


def test_a_store_that_is_not_there_is_no_empty_store(tmp_path, capsys):
    assert main(["list", "--results-root", str(tmp_path / "typo")]) == 2
    assert "typo is no folder" in capsys.readouterr().err


@pytest.mark.parametrize("pairs", [["epochs=1", "stage1.epochs=3"], ["stage1.epochs=1", "epochs=3"]])
def test_of_two_values_for_one_field_the_last_counts(pairs):
    config = configure("digits", "ce", overrides=parse_overrides(["lr=0.2", *pairs]))
    assert (config.stage1.epochs, config.stage1.lr) == (3, 0.2)


def test_of_several_methods_the_one_that_cannot_be_is_named(monkeypatch, capsys):
    monkeypatch.setitem(BACKBONES, "mine", None)
    assert main(["train", "--dataset", "digits", "--method", "ce", "bbn", "--set", "backbone=mine"]) == 2
    assert "bbn: stage1.second_sampler doubles the last block of a ResNet" in capsys.readouterr().err


def test_a_results_root_is_no_empty_word(capsys):
    assert main(["list", "--results-root", ""]) == 2
    assert "--results-root is empty; name a folder, or leave it out" in capsys.readouterr().err


def test_eval_without_weights_uses_stored_predictions(store, tmp_path, capsys):
    identity, *_, accuracy = printed_runs(capsys, store)[0][:6]
    other = shutil.copytree(store, tmp_path / "other")
    for path in other.glob("*/*.safetensors"):
        path.unlink()
    assert main(["eval", identity, "--results-root", str(other)]) == 0
    out = capsys.readouterr().out
    assert f"accuracy {accuracy}" in out
    assert "from weights" not in out


def test_a_campaign_that_is_told_to_end_packs_what_it_made(tmp_path, monkeypatch, capsys):
    def ended(configs, store, *_):
        run(configs[:1], store, options=Options(device="cpu", progress=False))
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(cli, "run", ended)
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    where = ["--results-root", str(tmp_path / "results"), "--pack", str(tmp_path / "new.tar")]
    try:
        with pytest.raises(SystemExit) as exit_:
            main(["campaign", "--dataset", "digits", "--imbalance", "10", "--set", "epochs=1", *where])
    finally:
        signal.signal(signal.SIGTERM, before)
    assert exit_.value.code == 143
    assert "3 files packed" in capsys.readouterr().out


def test_a_terminal_without_dashes_gets_the_whole_table(store, capsys):
    identity = printed_runs(capsys, store)[0][0]
    command = [sys.executable, "-m", "mislas.cli", "eval", identity, "--bins", "50", "--results-root", store]
    ascii_only = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, env=ascii_only, capture_output=True, text=True, check=True)
    assert "(0.980, 1.000]" in done.stdout


def test_a_home_folder_that_is_not_there_is_one_line(capsys):
    assert main(["list", "--results-root", "~nobody-of-this-name/results"]) == 2
    assert capsys.readouterr().err.startswith("mislas: there is no such home folder")
