"""Study, tables and figures: what a notebook shows."""

import json
import re
import shlex
from pathlib import Path

import matplotlib
import pytest

matplotlib.use("Agg")

from mislas import paper
from mislas import study as study_module
from mislas.archive import checked
from mislas.campaign import wanted
from mislas.cells import percent
from mislas.cli import _parser, parse_overrides
from mislas.config import Adjustment
from mislas.errors import DataError, MislasError
from mislas.losses import LOSSES, LossSpec, cross_entropy
from mislas.methods import METHODS, configure
from mislas.models import BACKBONES
from mislas.plots import missing_commands, reliability_figure
from mislas.runs import Store, run
from mislas.study import ALL_OF_THEIRS, FORMS, GRID, THEIR_FACTORS, Study, authors_variants, missing_by_command
from mislas.tables import compare, distance, measures, table3
from mislas.train import Options

QUICK = {"epochs": 2, "stage2.epochs": 1}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A store with two seeds of CE and one of LWS on digits."""
    store = Store(tmp_path_factory.mktemp("results"))
    configs = [configure("digits", "ce", 10, seed, QUICK) for seed in (0, 1)] + [
        configure("digits", "lws", 10, 0, QUICK)
    ]
    run(configs, store, options=Options(device="cpu", progress=False))
    return store


def test_stored_finds_every_seed_and_trains_nothing(store):
    study = Study("stored", results_root=store.root, overrides=QUICK)
    assert [record.config.seed for record in study.runs("digits", "ce", 10)] == [0, 1]
    assert study.runs("digits", "mislas", 10) == []
    assert [
        record.config.seed for record in Study("stored", None, store.root, [1], None, QUICK).runs("digits", "ce", 10)
    ] == [1]


def test_a_stand_in_is_used_only_where_the_exact_data_have_no_run(store, tmp_path):
    record = Study("stored", results_root=store.root, overrides=QUICK).runs("digits", "ce", 10)[0]
    jpeg = configure("cifar10-jpeg", "ce", 10)
    Store(tmp_path).put(jpeg, record.metrics, record.history, {}, record.provenance)
    study = Study("stored", results_root=tmp_path)
    assert [r.config.dataset for r in study.runs("cifar10", "ce", 10)] == ["cifar10-jpeg"]
    Store(tmp_path).put(configure("cifar10", "ce", 10), record.metrics, record.history, {}, record.provenance)
    assert [r.config.dataset for r in study.runs("cifar10", "ce", 10)] == ["cifar10"]


def test_table_shows_mean_spread_and_n_and_names_the_command_for_the_rest(store):
    study = Study("stored", results_root=store.root, overrides=QUICK)
    table = compare(study, "digits", ["ce", "lws", "mislas"], [10], lambda method, imbalance: 12.3)
    accuracies = [record.metrics["accuracy"] for record in study.runs("digits", "ce", 10)]
    assert table.frame.loc["CE"].tolist()[:2] == ["12.3", f"{percent(accuracies)} (n=2)"]
    assert table.frame.loc["MiSLAS"].tolist()[1:] == ["[a]", "–"]
    assert table.notes[0] == (
        "[a] Not measured yet: `mislas train --dataset digits --imbalance 10 --method mislas "
        f"--set epochs=2 stage2.epochs=1 --data-root DIR --results-root {store.root}`"
    )
    assert "seeds 0, 1" in table.notes[-1]


def test_table_3_of_an_empty_store_shows_the_paper_and_how_to_fill_it(tmp_path):
    table = table3(Study("stored", results_root=tmp_path), "cifar10")
    assert table.frame["IF 100", "paper"].tolist() == [
        "70.4",
        "73.1",
        "77.1",
        "79.9",
        "79.8",
        "–",
        "–",
        "79.1",
        "76.3",
        "82.1",
    ]
    assert {name for _, name in table.frame.columns} == {"paper"}
    command = "mislas train --dataset cifar10 --imbalance 100 --method ce mixup"
    assert table.notes[0].startswith(f"Not measured yet: `{command}")
    html = table._repr_html_()
    assert html == table._repr_html_()
    assert "mislas-caption" in html
    assert "<code>mislas train" in html


def test_the_commands_of_the_notes_are_commands(tmp_path):
    for note in table3(Study("stored", results_root=tmp_path), "cifar100").notes:
        command = re.search("`mislas (.*)`", note)[1]
        arguments = _parser().parse_args(command.split())
        assert [configure(arguments.dataset, method) for method in arguments.method]


def test_tiny_keeps_its_runs_if_it_is_told_where(tmp_path, monkeypatch):
    def trained(root):
        (record,) = Study("tiny", None, root, overrides={"epochs": 1}).runs("cifar10", "ce", 10)
        return record

    record, gone = trained(tmp_path), trained(None)
    assert record.metrics == gone.metrics
    monkeypatch.setattr("mislas.runs.train_stage1", lambda *args, **options: pytest.fail("trained again"))
    assert trained(tmp_path).provenance == record.provenance


def test_tiny_shows_no_paper_number(monkeypatch):
    study = Study("tiny", overrides={"epochs": 1, "stage2.epochs": 1})
    monkeypatch.setenv("TQDM_DISABLE", "1")
    table = compare(study, "cifar10", ["ce", "lws"], [10], lambda method, imbalance: 99.9)
    assert list(table.frame.index) == ["CE", "LWS"]
    assert {name for _, name in table.frame.columns} == {"tiny", "ECE"}
    assert "99.9" not in str(table)
    assert "smoke" in table.caption


def test_a_record_names_what_a_script_put_in_place_of_the_librarys(tmp_path, monkeypatch):
    """Its identity does not: the loss has the same name."""

    def line(root):
        run([configure("digits", "ce", 10, overrides=QUICK)], Store(root), options=Options(progress=False))
        study = Study("stored", results_root=root, overrides=QUICK)
        return study.provenance(study.runs("digits", "ce", 10))

    assert line(tmp_path / "library").endswith("; last epoch.")
    monkeypatch.setitem(LOSSES, "ce", LossSpec(lambda class_counts: lambda z, y: 2 * cross_entropy(z, y)))
    assert line(tmp_path / "own").endswith("; last epoch; registered by a script: LOSSES.ce.")


def test_distance_is_measured_minus_paper(store, tmp_path):
    record = Study("stored", results_root=store.root, overrides=QUICK).runs("digits", "ce", 10)[0]
    metrics = record.metrics | {"accuracy": 0.7140}
    Store(tmp_path).put(configure("cifar10", "ce"), metrics, record.history, {}, record.provenance)
    table = distance(Study("stored", results_root=tmp_path), "cifar10")
    assert table.frame.loc["CE"].tolist() == ["+1.0", "–", "–"]
    assert list(table.frame.index) == ["CE"]


def test_measures_shows_a_dash_for_an_empty_group(store):
    study = Study("stored", results_root=store.root, overrides=QUICK)
    table = measures(study, "digits", ["ce", "mislas"], 10)
    assert table.frame.loc["MiSLAS"].tolist() == ["–"] * len(table.frame.columns)
    mean = sum(record.metrics["nll"] for record in study.runs("digits", "ce", 10)) / 2
    assert table.frame.loc["CE", "NLL"] == f"{mean:.3f}"


def test_figure_says_which_panels_are_missing(store):
    study = Study("stored", results_root=store.root, overrides=QUICK)
    panels = [("CE", "ce", 10), ("MiSLAS", "mislas", 10)]
    figure = reliability_figure(study, "digits", panels)
    texts = [text.get_text() for ax in figure.axes for text in ax.texts]
    accuracy = study.runs("digits", "ce", 10)[0].metrics["accuracy"]
    assert any(f"Acc. {100 * accuracy:.1f}%" in text for text in texts)
    assert "not measured yet" in texts
    assert "--method mislas" in missing_commands(study, "digits", panels)[0]


def test_a_command_names_the_methods_that_share_all_else_each_once():
    more = {"eps_1": 0.2, "eps_k": 0.1}
    runs = [("ce", 10, {}), ("mislas", 10, more), ("crt", 10, {}), ("ce", 50, {}), ("ce", 10, {})]
    runs.append(("lws+las", 10, dict(reversed(more.items()))))
    assert missing_by_command(runs, [[]] * len(runs)) == [
        (["ce", "crt"], 10, {}),
        (["mislas", "lws+las"], 10, more),
        (["ce"], 50, {}),
    ]
    assert missing_by_command(runs[:2], [["a record"], []]) == [(["mislas"], 10, more)]


def test_a_panel_may_have_changes_of_its_own(store):
    """Panels with other changes cannot share a command."""
    study = Study("stored", results_root=store.root, overrides=QUICK)
    smaller = {"imbalance": 1, "n_max": 20}
    panels = [("MiSLAS", "mislas", 10), ("cRT", "crt", 10), ("of 200 images", "ce", 10, smaller)]
    together, alone = missing_commands(study, "digits", panels)
    assert "--imbalance 10 --method mislas crt" in together
    assert "--imbalance 1 --method ce" in alone
    assert "--set epochs=2 n_max=20" in alone  # what changes nothing in these runs is left out
    put = {panel.get_title() for panel in reliability_figure(study, "digits", [*panels, ("CE", "ce", 10)]).axes}
    assert {"of 200 images", "CE"} <= put


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"profile": "tinny"}, MislasError, "unknown profile 'tinny'; did you mean 'tiny'?"),
        ({"profile": "full"}, DataError, "needs data_root"),
        ({"profile": "full", "data_root": "/nowhere"}, DataError, "needs data_root"),
        ({"seeds": 3}, MislasError, "seeds is a list"),
        ({"seeds": [-1]}, MislasError, "seeds is a list"),
        ({"overrides": {"epoch": 3}}, MislasError, "unknown field 'epoch'"),
        ({"overrides": {"eps_1": "high"}}, MislasError, "eps_1 takes float"),
        ({"overrides": '{"epochs": 2}'}, MislasError, "overrides is a dict"),
        ({"overrides": {1: 2}}, MislasError, "overrides is a dict"),
        ({"overrides": {"imbalance": 10}}, MislasError, "imbalance says which run"),
        ({"overrides": {"seed": 1}}, MislasError, "use seeds"),
        ({"seeds": [0, 0]}, MislasError, "different integers"),
        ({"seeds": 0.5}, MislasError, "seeds is a list"),
        ({"results_root": "/nowhere"}, DataError, "an existing folder, got '/nowhere'"),
    ],
)
def test_bad_parameters_stop_at_once(arguments, error, message):
    with pytest.raises(error, match=re.escape(message)):
        Study(**arguments)


def test_sweep_gives_each_change_its_records(made_up):
    for change in GRID[:2]:
        made_up("cifar10", "mislas", change)
    found = Study(results_root=made_up.root).sweep("cifar10", "mislas", GRID[:3])
    assert [len(records) for records in found] == [1, 1, 0]
    assert [records[0].config.stage2.eps_1 for records in found[:2]] == [0.0, 0.1]


def test_sweep_compares_on_the_data_and_seeds_that_have_most_of_it(made_up):
    made_up("cifar10", "mislas", GRID[0])  # the exact data, but one cell of three
    for seed in (0, 2):
        for change in GRID[:3]:
            made_up("cifar10-jpeg", "mislas", change, seed)
    made_up("cifar10-jpeg", "mislas", GRID[1], seed=1)  # a seed of which the others are missing
    found = Study(results_root=made_up.root).sweep("cifar10", "mislas", GRID[:3])
    assert [[r.config.seed for r in records] for records in found] == [[0, 2]] * 3
    assert {r.config.dataset for records in found for r in records} == {"cifar10-jpeg"}


def test_side_by_side_compares_on_one_dataset_the_one_that_has_most(made_up):
    made_up("cifar10", "ce")
    asked = [(method, 100, {}) for method in ("ce", "mixup", "mislas")]

    def found():
        records = Study(results_root=made_up.root).side_by_side("cifar10", asked)
        return [[record.config.dataset for record in of] for of in records]

    assert found() == [["cifar10"], [], []]
    made_up("cifar10-jpeg", "ce")
    made_up("cifar10-jpeg", "mixup")
    assert found() == [["cifar10-jpeg"], ["cifar10-jpeg"], []]
    made_up("cifar10", "mislas")
    assert found() == [["cifar10"], [], ["cifar10"]]


def test_sweep_of_an_empty_store_is_empty(tmp_path):
    assert Study(results_root=tmp_path).sweep("cifar100", "mislas", FORMS) == [[]] * len(FORMS)


def test_sweep_trains_all_of_it_in_one_call(monkeypatch):
    calls = []
    monkeypatch.setattr(study_module, "run", lambda configs, *_: calls.append(configs) or configs)
    found = Study("tiny", seeds=[0, 1]).sweep("cifar10", "mislas", GRID)
    assert len(calls) == 1
    assert [[(c.stage2.eps_1, c.stage2.eps_k, c.seed) for c in cell] for cell in found] == [
        [(change["eps_1"], change["eps_k"], seed) for seed in (0, 1)] for change in GRID
    ]


def test_changes_come_after_the_overrides(tmp_path):
    study = Study(results_root=tmp_path, overrides={"eps_1": 0.5, "stage2.epochs": 3})
    (config,) = study.configs("cifar10", "mislas", changes={"eps_1": 0.2})
    assert (config.stage2.eps_1, config.stage2.epochs) == (0.2, 3)


def test_grid_and_forms_are_the_papers():
    assert len(GRID) == 21
    assert {"eps_1": 0.4, "eps_k": 0.1} in GRID
    assert all(0 <= change["eps_k"] <= change["eps_1"] <= 0.5 for change in GRID)
    assert [change["form"] for change in FORMS[:2]] == ["linear", "convex"]


def test_neighbours_depend_on_the_profile(tmp_path):
    assert list(Study(results_root=tmp_path).neighbours("cifar100")) == ["cifar10", "tinyimagenet32"]
    assert Study(results_root=tmp_path).neighbours("cifar10") == {}
    assert Study("tiny").neighbours("cifar100") == {}
    for split in ("train", "test"):
        (tmp_path / "cifar10-jpeg" / split).mkdir(parents=True)
    full = Study("full", tmp_path, tmp_path / "results")
    assert full.neighbours("cifar100") == {"cifar10": "CIFAR-10-LT, a neighbour of CIFAR-100-LT"}


def test_full_trains_no_dataset_of_which_only_neighbours_are_at_hand(tmp_path):
    empty = Study("full", tmp_path, tmp_path / "results")
    with pytest.raises(DataError, match="cannot read cifar100"):
        empty.runs("cifar100", "ce")  # nothing at all is there: say what is missing
    for split in ("train", "test"):
        (tmp_path / "cifar10-jpeg" / split).mkdir(parents=True)
    assert not empty.trains("cifar100")
    assert empty.runs("cifar100", "ce") == []
    assert empty.sweep("cifar100", "mislas", GRID[:2]) == [[], []]
    assert empty.trains("cifar10")


def test_commands_carry_changes_that_the_command_line_understands(tmp_path):
    (tmp_path / "my runs").mkdir()
    study = Study(results_root=tmp_path / "my runs", seeds=[1], overrides={"stage2.epochs": 3})
    changes = {"stage2.shift_bn": True, "stage2.sampler": "class_cyclic"}
    command = study.command("cifar10", ["lws"], 100, changes)
    arguments = _parser().parse_args(shlex.split(command)[1:])
    assert parse_overrides(arguments.set) == {"stage2.epochs": 3, **changes}
    assert arguments.seed == [1]
    assert arguments.results_root == str(tmp_path / "my runs")
    assert "--results-root" not in Study().command("cifar10", ["lws"], 100)
    campaign = _parser().parse_args(shlex.split(study.campaign_command("cifar100", [100]))[1:])
    assert (campaign.dataset, campaign.imbalance, campaign.seed) == ("cifar100", [100], [1])
    assert "--imbalance" not in study.campaign_command("cifar100")


@pytest.mark.parametrize("registers", ["method", "loss", "network"])
def test_a_command_that_needs_a_script_says_so(registers, monkeypatch):
    study, changes = Study(), {}
    if registers == "method":
        monkeypatch.setitem(METHODS, "mine", METHODS["ce"])
    elif registers == "loss":
        monkeypatch.setitem(LOSSES, "mine", LossSpec(lambda class_counts: cross_entropy))
        changes = {"stage1.loss": "mine"}
    else:
        monkeypatch.setitem(BACKBONES, "mine", lambda: None)
        study = Study(overrides={"backbone": "mine"})
        assert study.campaign_command("cifar10").startswith("python SCRIPT.py campaign --dataset cifar10 ")
    method = "mine" if registers == "method" else "ce"
    command = study.command("cifar10", ["mixup", method], 50, changes)
    assert command.startswith(f"python SCRIPT.py train --dataset cifar10 --imbalance 50 --method mixup {method} ")
    assert Study().command("cifar10", ["mixup", "ce"], 50).startswith("mislas train --dataset cifar10 ")


def test_the_committed_records_are_whole_and_on_the_full_schedule():
    root = Path(__file__).resolve().parents[1] / "results"
    records, checkpoints = checked({p.relative_to(root).as_posix(): p.read_bytes() for p in root.glob("*/*")}, root)
    assert len(records) > 300
    assert not checkpoints
    known: dict[tuple, set[str]] = {}  # what the campaign wants, and every method, is at the full schedule
    for record in records.values():
        key = record.config.dataset, record.config.imbalance, record.config.seed
        if key not in known:
            methods = [configure(key[0], method, key[1], key[2]) for method in METHODS]
            configs = [*wanted(key[0], seeds=[key[2]]), *methods]
            known[key] = {config.id for config in [*configs, *(config.stage1_only for config in configs)]}
        assert record.config.id in known[key]
        assert record.predictions().correct.mean() == pytest.approx(record.metrics["accuracy"], abs=1e-6)
        # confidences are stored in steps of 1 / 65535: one of 10,000 may change its bin, and both bins' gaps by 1e-4
        assert record.predictions().reliability().ece == pytest.approx(record.metrics["ece"], abs=2e-4)
        stage = record.config.stage2 or record.config.stage1
        assert record.history[-1]["epoch"] == (0 if isinstance(stage, Adjustment) else stage.epochs)
        assert not record.provenance["commit"].endswith("+changes")
        assert record.path.with_suffix(".npz").stat().st_size < 100_000
        json.loads(record.path.read_text())
    assert paper.IMBALANCES == (100, 50, 10)


def test_all_of_the_authors_variants_is_their_configuration():
    """Their files for CIFAR-10 at 1:50 say: factors 0.2 and 0.0, classifier at 0.2 of the rate, no shift."""
    changes = authors_variants("cifar10-jpeg", 50)
    stage = configure("cifar10-jpeg", "mislas", 50, overrides=changes[ALL_OF_THEIRS]).stage2
    assert (stage.eps_1, stage.eps_k, stage.delta_lr, stage.shift_bn) == (0.2, 0.0, 0.2, False)
    assert (stage.smoothing_over, stage.a, stage.delta, stage.sampler) == ("all", 0, "stage1", "class_cyclic")
    assert configure("cifar10", "mislas", 50, overrides=changes["the paper's equations"]).stage2.eps_1 == 0.3
    stage = configure("cifar100", "mislas", 10, overrides=authors_variants("cifar100", 10)[ALL_OF_THEIRS]).stage2
    assert (stage.eps_1, stage.eps_k, stage.delta_lr, stage.shift_bn) == (0.2, 0.0, 0.1, True)
    assert ALL_OF_THEIRS not in authors_variants("cifar10", 20)  # they published none
    assert THEIR_FACTORS not in authors_variants("cifar10", 100)  # those of Table 5


def test_overrides_may_suit_another_dataset_than_the_digits():
    """More images than the digits have of a class; weights for a network that they are not trained with."""
    (balanced,) = Study("stored", overrides={"n_max": 1240}).configs("cifar10", "ce", 1)
    (pretrained,) = Study("stored", overrides={"weights": "0123abcd"}).configs("places-lt", "ce")
    assert (balanced.n_max, pretrained.stage1.weights) == (1240, "0123abcd")


def test_captions_name_no_override_that_the_page_varies_itself_or_no_run_has(made_up):
    study = Study(results_root=made_up.root, overrides={"eps_1": 0.4, "shift_epochs": 3})
    grid = [made_up("cifar10", "mislas", {"eps_1": eps, "eps_k": 0.0}) for eps in (0.4, 0.5)]
    assert study.changed() == " With eps_1=0.4, shift_epochs=3."
    assert study.changed(grid[:1]) == " With eps_1=0.4."
    assert study.changed(grid) == ""


def test_seeds_that_were_asked_for_and_are_missing_have_a_command(made_up):
    made_up("cifar10", "ce")
    study = Study(results_root=made_up.root, seeds=[0, 1])
    table = table3(study, "cifar10", [100], ["ce", "mislas"])
    given = "mislas train --dataset cifar10 --imbalance 100 --method ce mislas --seed 0 1 --data-root DIR"
    given += f" --results-root {made_up.root}"
    assert table.notes[0] == f"[a] Not measured yet: `{given}`"
    alone = table3(study, "cifar10", [100], ["ce"]).notes[0]
    assert alone == f"Not measured with every seed yet: `{given.replace(' mislas --seed', ' --seed')}`"
    (command,) = missing_commands(study, "cifar10", [("CE", "ce", 100)])
    assert command.startswith(given.replace(" mislas --seed", " --seed"))


def test_captions_name_the_overrides(made_up):
    made_up("cifar10", "ce", {"stage1.weight_decay": 5e-4})
    study = Study(results_root=made_up.root, overrides={"stage1.weight_decay": 5e-4})
    assert table3(study, "cifar10", [100], ["ce"]).caption.endswith(" With stage1.weight_decay=0.0005.")
    figure = reliability_figure(study, "cifar10", [("CE", "ce", 100)])
    assert "with stage1.weight_decay=0.0005" in " ".join(figure.get_suptitle().split())
