import json
import re
from dataclasses import asdict, fields, replace

import numpy as np
import pytest

from mislas.config import SCHEDULES, Adjustment, FewShot, Memory, RunConfig, Stage1, Stage2, field_names
from mislas.errors import MislasError
from mislas.losses import LOSSES, LossSpec, cross_entropy
from mislas.methods import METHODS, configure
from mislas.models import CLASSIFIERS
from mislas.rules import RULES, tau_normalised

MISLAS = configure("cifar10-jpeg", "mislas")

# --------------------------------------------------------------------------------------------------------- identity


@pytest.mark.parametrize(
    ("method", "identity"), [("ce", "abfce2eb98d4"), ("mixup", "c8ddce713121"), ("mislas", "4d55269578e6")]
)
def test_identities_are_what_they_were_when_runs_were_first_stored(method, identity):
    """If this fails, every stored run has lost its name: a new field must be None by default."""
    assert configure("cifar10-jpeg", method).id == identity


def test_the_name_of_the_method_is_no_part_of_the_identity():
    assert replace(MISLAS, method="ours").id == MISLAS.id


def test_fields_that_are_off_are_left_out_of_the_identity():
    canonical = configure("digits", "lws").canonical()
    assert canonical["stage1"].keys() == {
        *("epochs", "batch_size", "lr", "weight_decay", "schedule", "momentum", "warmup", "loss", "sampler")
    }
    assert not {"delta", "delta_lr", "eps_1", "eps_k", "form", "power", "smoothing_over"} & canonical["stage2"].keys()
    assert "stage2" not in configure("digits", "ce").canonical()


OTHER = {
    "dataset": "cifar10",
    "stage1.momentum": 0.5,
    "stage2.momentum": 0.5,
    "imbalance": 50.0,
    "backbone": "resnet20",
    "seed": 1,
    "n_max": 1000,
    "precision": "fp32",
    "stage1.schedule": "cosine",
    "stage1.loss": "las",
    "stage1.sampler": "class_balanced",
    "stage2.a": 0,
    "stage2.learn_scale": False,
    "stage2.delta": "stage1",
    "stage2.form": "linear",
    "stage2.smoothing_over": "all",
    "stage2.shift_bn": False,
    "stage2.schedule": "multistep",
    "stage2.sampler": "class_cyclic",
    "stage2.mixup": 0.2,
    "stage2.draw": 1,
    "stage2.shift_average": "cumulative",
    "stage2.eps_1": 0.5,
    "stage2.eps_k": 0.1,
}


#: Fields that mean something in other methods than MiSLAS: one that has them on, and what changes.
ELSEWHERE = {
    "stage1.mix": ("mixup", {"mix": "cutmix"}),
    "stage1.remix_kappa": ("remix", {"remix_kappa": 4.0}),
    "stage1.remix_tau": ("remix", {"remix_tau": 0.4}),
    "stage1.gamma": ("focal", {"gamma": 1.0}),
    "stage2.gamma": ("lws", {"stage2.loss": "focal", "stage2.gamma": 1.0}),
    "stage2.adjustment": ("lws", {"stage2.loss": "logit_adjusted", "stage2.adjustment": 1.0}),
    "stage1.max_margin": ("ldam", {"max_margin": 0.4}),
    "stage1.scale": ("ldam", {"scale": 20.0}),
    "stage1.adjustment": ("balanced-softmax", {"adjustment": 0.5}),
    "stage1.beta": ("ce", {"beta": 0.99}),
    "stage1.defer": ("ce+drw", {"defer": 0.5}),
    "stage1.deferred_sampler": ("ldam+drs", {"deferred_sampler": "reverse"}),
    "stage1.second_sampler": ("ce", {"second_sampler": "class_balanced"}),
    "stage1.holdout": ("temperature", {"holdout": 0.2}),
    "stage1.weights": ("ce", {"weights": "0123abcd", "backbone": "resnet50"}),
    "stage1.metric": ("lifted", {"metric": "range"}),
    "stage1.metric_weight": ("lifted", {"metric_weight": 0.2}),
    "stage1.group": ("ce", {"group": "few"}),
    "stage1.distillation": ("oltr+lfme", {"distillation": 4.0}),
    "stage2.rule": ("temperature", {"rule": "tau_norm"}),
    "stage2.value": ("temperature", {"value": 1.5}),
    "stage2.shift_epochs": ("ncm", {"shift_epochs": 1}),
    "stage2.shift_sampler": ("ncm+shift", {"shift_sampler": "instance_balanced"}),
    "stage2.shots": ("fslwf", {"shots": 1}),
    "stage2.centroid_weight": ("oltr", {"centroid_weight": 0.1}),
    "stage2.backbone_lr": ("oltr", {"backbone_lr": None}),
    "stage2.attention": ("oltr", {"attention": False}),
}


BY_NAME = ("stage1.loss", "stage2.loss", "stage2.classifier")  # names with what belongs to them: tests of their own


@pytest.mark.parametrize("key", [key for key in field_names() if key not in BY_NAME])
def test_every_field_changes_the_identity(key):
    if key in ELSEWHERE:
        method, changes = ELSEWHERE[key]
        before = configure("cifar10-jpeg", method)
    else:
        before, (where, _, field) = MISLAS, key.rpartition(".")
        value = getattr(getattr(MISLAS, where) if where else MISLAS, field)
        changes = {key: OTHER[key] if key in OTHER else 2 * value if value is not None else 2.0}
    if key == "stage2.power":
        changes["stage2.form"] = "power"
    with_change = before.override(changes)
    assert with_change != before
    assert with_change.id != before.id
    assert RunConfig.from_json(with_change.to_json()) == with_change


def test_loss_changes_the_identity():
    lws = configure("digits", "lws")
    las = lws.override({"stage2.loss": "las", "eps_1": 0.3, "eps_k": 0.0, "form": "linear", "smoothing_over": "all"})
    assert las.id != lws.id


def test_an_identity_is_12_hex_digits_and_whole_numbers_are_as_good_as_decimals():
    assert len(MISLAS.id) == 12
    int(MISLAS.id, 16)
    assert configure("digits", "ce", 10).id == configure("digits-lt", "ce", 10.0).id
    assert MISLAS.override({"mixup": 1}).id == MISLAS.id


def test_json_gives_the_configuration_back():
    for method in ("ce", "lws", "mislas"):
        config = configure("cifar100", method, 50, 3)
        again = RunConfig.from_json(json.loads(json.dumps(config.to_json())))
        assert again == config
        assert again.id == config.id


def test_stage1_is_a_run_of_its_own_shared_between_methods():
    assert configure("digits", "crt").stage1_only == configure("digits", "ce")
    assert configure("digits", "lws+las").stage1_only == configure("digits", "ce")
    assert MISLAS.stage1_only == configure("cifar10-jpeg", "mixup")
    ce = configure("digits", "ce")
    assert ce.stage1_only is ce


def test_stage2_runs_share_a_pass_where_they_see_the_same_features():
    def shared(method, **changes):
        return configure("digits", method, overrides=changes).shared_pass

    assert shared("crt") == shared("lws") == shared("lws+las") == shared("lws", **{"stage2.lr": 0.5})
    assert shared("mislas") == shared("mislas", eps_1=0.4, form="linear") == shared("lws+mixup+shift")
    others = [shared("crt", **{f"stage2.{key}": value}) for key, value in (
        ("epochs", 7), ("batch_size", 7), ("sampler", "class_cyclic"), ("shift_bn", True), ("mixup", 0.2),
    )]  # fmt: skip
    assert len({shared("crt"), shared("crt+mixup"), shared("crt", seed=1), shared("ce"), *others}) == 9


# -------------------------------------------------------------------------------------------------------- overrides


def test_a_dotted_name_changes_that_stage_and_a_bare_one_stage1_first():
    config = MISLAS.override({"epochs": 20, "stage2.epochs": 3, "eps_1": 0.5, "seed": 7})
    assert (config.stage1.epochs, config.stage2.epochs, config.stage2.eps_1, config.seed) == (20, 3, 0.5, 7)
    assert config.method == "mislas"
    assert MISLAS.stage1.epochs == 200


def test_overrides_without_meaning_are_passed_over():
    changes = {"stage2.epochs": 3, "eps_1": 0.5, "delta_lr": 0.1, "form": "linear"}
    ce, lws = configure("digits", "ce"), configure("digits", "lws")
    assert ce.override(changes) == ce
    assert lws.override(changes) == lws.override({"stage2.epochs": 3})


def test_class_means_have_no_value():
    ncm, tau_norm = configure("digits", "ncm"), configure("digits", "tau-norm", overrides={"value": 2.0})
    assert tau_norm.stage2.value == 2.0
    assert ncm.override({"value": 2.0}) == ncm
    assert tau_norm.override({"rule": "ncm"}).stage2 == replace(tau_norm.stage2, rule="ncm", value=None)
    with pytest.raises(MislasError, match=r"goes with a rule that chooses one, .* 'ncm' has none, got 2\.0"):
        replace(ncm, stage2=replace(ncm.stage2, value=2.0))


def test_what_mixes_is_passed_over_where_nothing_does():
    """So that one set of overrides serves Table 3, which has BBN and Remix in it."""
    assert configure("digits", "bbn", overrides={"mixup": 0.2}) == configure("digits", "bbn")
    plain = configure("digits", "remix", overrides={"mixup": None})
    assert plain.stage1 == configure("digits", "ce").stage1
    assert configure("digits", "remix", overrides={"mix": None}).stage1 == configure("digits", "mixup").stage1


def test_no_overrides_change_nothing():
    assert MISLAS.override({}) == MISLAS


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("stage2.eps1", "stage2.eps_1"),
        ("epoch", "stage1.epochs"),
        ("stage1.Epochs", "stage1.epochs"),
        ("stage1.eps_1", "stage2.eps_1"),
        ("stage3.lr", "stage1.lr"),
        ("sed", "seed"),
    ],
)
def test_an_unknown_field_lists_near_names_first(key, near):
    with pytest.raises(MislasError) as caught:
        MISLAS.override({key: 1})
    message = str(caught.value)
    assert f"unknown field {key!r}; did you mean" in message
    hint, known = message.split(" Known: ")
    assert near in (hint.split("did you mean ")[1].strip("'?"), *known.split(", ")[:3])
    assert sorted(known.split(", ")) == sorted(field_names())
    assert "\n" not in message


def test_fields_are_those_of_the_dataclasses_except_the_label():
    expected = {f.name for f in fields(RunConfig)} - {"stage1", "stage2", "method"}
    expected |= {f"stage1.{f.name}" for f in fields(Stage1)}
    expected |= {f"stage2.{f.name}" for owner in (Stage2, Adjustment, FewShot, Memory) for f in fields(owner)}
    assert set(field_names()) == expected


@pytest.mark.parametrize(
    ("key", "value", "takes"),
    [
        ("epochs", 2.5, "int"),
        ("epochs", "2", "int"),
        ("epochs", True, "int"),
        ("epochs", None, "int"),
        ("lr", "fast", "float"),
        ("lr", True, "float"),
        ("mixup", "no", "float or None"),
        ("learn_scale", 1, "bool or None"),
        ("shift_bn", 1, "bool"),
        ("schedule", 3, "str"),
        ("delta", 0, "str or None"),
        ("seed", 0.0, "int"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused(key, value, takes):
    with pytest.raises(MislasError, match=f"^{key} takes {takes}, got {value!r}$"):
        MISLAS.override({key: value})


@pytest.mark.parametrize(
    ("changes", "off"),
    [
        ({"delta": None}, {"delta": None, "delta_lr": None}),
        (
            {"stage2.loss": "ce"},
            {"loss": "ce"} | dict.fromkeys(("eps_1", "eps_k", "form", "smoothing_over")),
        ),
    ],
)
def test_a_part_of_mislas_can_be_switched_off(changes, off):
    """With it goes what means nothing without it."""
    assert MISLAS.override(changes).stage2 == replace(MISLAS.stage2, **off)


# -------------------------------------------------------------------------------------------------------- validation


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"precision": "fp16"}, r"unknown precision 'fp16'.*Known: .*bf16.*fp32|Known: .*fp32.*bf16"),
        ({"backbone": "vgg"}, r"unknown backbone 'vgg'.*resnet32"),
        ({"backbone": "resnet33"}, r"unknown backbone 'resnet33'; did you mean 'resnet34'"),
        ({"dataset": "cifar"}, r"unknown dataset 'cifar'; did you mean 'cifar10'.*digits"),
        ({"stage1.schedule": "step"}, r"unknown stage1.schedule 'step'; did you mean 'multistep'\? .*cosine"),
        ({"stage2.sampler": "balanced"}, r"unknown stage2.sampler 'balanced'.*Known: .*instance_balanced"),
        ({"delta": "new"}, r"unknown stage2.delta 'new'.*Known: fresh, stage1, zeros"),
        ({"stage2.classifier": "lws"}, r"unknown stage2.classifier 'lws'. Known: "),
        ({"form": "concav"}, r"unknown form.*did you mean 'concave'"),
        ({"smoothing_over": "other"}, r"did you mean 'others'"),
    ],
)
def test_an_unknown_name_lists_the_known_ones(changes, message):
    with pytest.raises(MislasError, match=message) as caught:
        MISLAS.override(changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"imbalance": 0.5}, "imbalance factor must be >= 1"),
        ({"imbalance": float("nan")}, "imbalance factor must be >= 1"),
        ({"seed": -1}, "seed must be an integer >= 0"),
        ({"n_max": 0}, "n_max must be in 1 .. 5000"),
        ({"n_max": 5001}, "n_max must be in 1 .. 5000"),
        ({"n_max": 99}, "leaves class 9 with no image (the largest class has 99)"),
        ({"epochs": 0}, "stage1.epochs must be > 0"),
        ({"batch_size": -1}, "stage1.batch_size must be > 0"),
        ({"lr": 0.0}, "stage1.lr must be > 0"),
        ({"lr": float("nan")}, "stage1.lr must be > 0"),
        ({"weight_decay": -1.0}, "stage1.weight_decay must be >= 0"),
        ({"stage2.momentum": -0.1}, "stage2.momentum must be >= 0"),
        ({"momentum": 1.0}, "stage1.momentum must be >= 0 and < 1, got 1.0"),
        ({"weight_decay": float("inf")}, "stage1.weight_decay must be >= 0 and finite, got inf"),
        ({"warmup": -3}, "stage1.warmup must be >= 0"),
        ({"delta_lr": float("inf")}, "stage2.delta_lr must be > 0 and finite"),
        ({"mixup": 0.0}, "stage1.mixup is alpha > 0, or null"),
        ({"a": 2}, "stage2.a is 0 or 1"),
        ({"draw": 0}, "stage2.draw counts from 1, or is null for the seed's own draw, got 0"),
        ({"delta_lr": 0.0}, "stage2.delta_lr must be > 0"),
        ({"eps_1": 0.1, "eps_k": 0.2}, "0 <= eps_k <= eps_1 <= 0.5"),
        ({"eps_1": 1.5}, "0 <= eps_k <= eps_1 <= 0.5"),
        ({"eps_k": -0.1}, "0 <= eps_k <= eps_1 <= 0.5"),
        ({"eps_1": None}, "loss 'las' needs eps_1"),
        ({"power": 2.0}, "power > 0 goes with form='power'"),
        ({"form": "power"}, "power > 0 goes with form='power'"),
    ],
)
def test_a_value_outside_its_range_is_refused_when_configured(changes, message):
    with pytest.raises(MislasError, match=re.escape(message)):
        configure("cifar10", "mislas", overrides=changes)


def test_a_list_has_no_size_to_choose():
    with pytest.raises(MislasError, match="places-lt is long-tailed as it is"):
        configure("places-lt", "ce", overrides={"n_max": 100})


def test_the_size_that_a_dataset_has_is_no_change():
    assert MISLAS.override({"n_max": 5000}) == MISLAS


def test_a_run_says_what_it_trains_on():
    smaller = MISLAS.override({"n_max": 1000})
    assert (MISLAS.data_title, smaller.data_title) == ("cifar10-jpeg IF=100", "cifar10-jpeg IF=100 N_max=1000")


@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        ("focal", {"gamma": -1.0}, "stage1.gamma must be >= 0"),
        ("focal", {"gamma": None}, "loss 'focal' needs gamma in stage1"),
        ("ldam", {"scale": 0.0}, "stage1.scale must be > 0"),
        ("cb", {"beta": 1.0}, "stage1.beta, of the effective number, must be in [0, 1)"),
        ("ce", {"defer": 0.5}, "stage1.defer needs beta or deferred_sampler to defer"),
        ("ce", {"deferred_sampler": "class_balanced"}, "deferred_sampler needs defer"),
        ("ce+drw", {"defer": 1.0}, "stage1.defer is a share of the epochs"),
        ("mixup", {"mix": "manifold"}, "unknown stage1.mix 'manifold'"),
        ("ce", {"mix": "cutmix"}, "needs stage1.mixup, its alpha"),
        ("mixup", {"mix": "remix"}, "remix_tau go with mix='remix'"),
        ("bbn", {"mixup": 1.0, "second_sampler": "reverse"}, "two branches mix features in place of images"),
        ("bbn", {"weights": "0123abcd", "backbone": "resnet50"}, "two branches start from random weights"),
        ("mixup", {"mixup": float("inf")}, "stage1.mixup is alpha > 0"),
        (
            "lws",
            {"stage2.loss": "ldam"},
            "loss 'ldam' needs max_margin, scale, which stage2 does not have; it has ce, las, ",
        ),
        ("range", {"metric": "rnage"}, "unknown stage1.metric 'rnage'; did you mean 'range'"),
        ("range", {"metric_weight": -0.1}, "stage1.metric_weight must be >= 0 and finite, got -0.1"),
        ("range", {"metric_weight": None}, "stage1.metric_weight goes with metric"),
        ("ce", {"metric_weight": 0.1}, "stage1.metric_weight goes with metric"),
        ("lifted", {"mixup": 1.0, "metric": "range"}, "stage1.metric compares images of one class each: stage1.mixup"),
        ("lifted", {"second_sampler": "reverse"}, "stage1.mixup and stage1.second_sampler must be null"),
        ("lws", {"second_sampler": "reverse"}, "stage2 needs a linear classifier"),
        ("temperature", {"holdout": None}, "'temperature' chooses its value on held-out images"),
        ("temperature", {"holdout": 0.6}, "stage1.holdout is a share of each class"),
        (
            "temperature",
            {"value": 0.0},
            "'temperature' must be >= 0.001 and finite, or null to choose it on held-out images; got 0.0",
        ),
        (
            "temperature",
            {"value": float("inf")},
            "'temperature' must be >= 0.001 and finite, or null to choose it on held-out images; got inf",
        ),
        (
            "tau-norm",
            {"value": -1.0},
            "stage2.value of 'tau_norm' must be >= 0 and finite, or null to choose it on held-out images; got -1.0",
        ),
        ("vector-scaling", {"holdout": None}, "'vector_scaling' is fitted to held-out images: set stage1.holdout"),
        ("ncm", {"rule": "nmc"}, "unknown stage2.rule 'nmc'; did you mean 'ncm'"),
        ("ncm+shift", {"shift_epochs": 0}, "stage2.shift_epochs must be at least 1"),
        ("ncm+shift", {"shift_sampler": "balanced"}, "unknown stage2.shift_sampler 'balanced'"),
        ("ncm", {"shift_sampler": "reverse"}, "set stage2.shift_epochs, too"),
        ("ncm+shift", {"shift_average": "plain"}, "unknown stage2.shift_average 'plain'. Known: cumulative"),
    ],
)
def test_settings_of_other_methods_are_checked_too(method, changes, message):
    with pytest.raises(MislasError, match=re.escape(message)) as caught:
        configure("digits", method, overrides=changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        ("fslwf", {"shots": 0}, "stage2.shots must be at least 1, got 0"),
        ("fslwf", {"scale": None}, "stage2 with shots needs a cosine classifier: set stage1.scale"),
        ("fslwf", {"second_sampler": "reverse"}, "stage1.second_sampler must be null"),
        ("fslwf", {"stage2.lr": 0.0}, "stage2.lr must be > 0"),
        ("oltr", {"centroid_weight": -1.0}, "stage2.centroid_weight must be >= 0 and finite, got -1.0"),
        ("oltr", {"backbone_lr": 0.0}, "stage2.backbone_lr must be > 0, or null to freeze the backbone, got 0.0"),
        ("oltr", {"backbone_lr": None, "attention": True}, "stage2.attention is learned with the backbone"),
        ("oltr", {"scale": 16.0}, "stage2 needs a linear classifier: stage1.scale"),
        ("ce", {"group": "tail"}, "unknown stage1.group 'tail'. Known: few, many, medium"),
        ("ce", {"group": "few", "sampler": "class_balanced"}, "stage1.group takes 'instance_balanced' batches"),
        ("oltr+lfme", {"group": "few"}, "stage1.group takes 'instance_balanced' batches, one branch"),
        ("oltr+lfme", {"distillation": 0.0}, "stage1.distillation is a temperature > 0, or null, got 0.0"),
        ("oltr+lfme", {"holdout": None}, "stage1.distillation compares student and experts on held-out images"),
        (
            "oltr+lfme",
            {"stage1.mixup": 1.0, "distillation": 2.0},
            "stage1.distillation weighs whole images: mixup, second_sampler",
        ),
        ("oltr+lfme", {"beta": 0.9}, "metric and beta of stage1 must be null"),
        ("oltr", {"stage2.sampler": "balanced"}, "unknown stage2.sampler 'balanced'"),
    ],
)
def test_settings_of_the_memory_methods_are_checked(method, changes, message):
    with pytest.raises(MislasError, match=re.escape(message)) as caught:
        configure("digits", method, overrides=changes)
    assert "\n" not in str(caught.value)


def test_oltr_trains_as_long_as_stage1():
    stage1, stage2 = (getattr(configure("cifar10", "oltr"), stage) for stage in ("stage1", "stage2"))
    for key in ("epochs", "batch_size", "lr", "weight_decay", "schedule"):
        assert getattr(stage1, key) == getattr(stage2, key)
    assert (stage2.sampler, stage2.backbone_lr, stage2.centroid_weight) == ("class_cyclic", 0.1, 0.01)


def test_few_shot_learning_has_stage2s_schedule_and_passes_over_what_it_does_not_know():
    config = configure("cifar10", "fslwf")
    stage2 = config.stage2
    assert (stage2.epochs, stage2.batch_size, stage2.lr, stage2.shots) == (10, 128, 0.1, 5)
    assert config.override({"stage2.mixup": 0.2, "stage2.loss": "las", "eps_1": 0.5, "delta_lr": 0.3}) == config
    assert RunConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
    assert config.stage1_only.method == "ce+cosine"
    assert config.shared_pass == config.id


def test_eps_beyond_the_papers_range_warns_when_configured():
    with pytest.warns(UserWarning, match=r"eps_1=0\.8 is outside"):
        configure("cifar10", "mislas", overrides={"eps_1": 0.8})


def test_a_stage2_that_learns_nothing_is_refused():
    stage2 = asdict(configure("digits", "lws").stage2)
    for nothing in ({"learn_scale": False}, {"a": 0}):
        with pytest.raises(MislasError, match="learns nothing"):
            replace(configure("digits", "ce"), stage2=Stage2(**stage2 | nothing))


def test_how_a_shift_averages_is_off_where_nothing_shifts():
    changes = {"shift_average": "cumulative"}
    for method in ("lws", "ncm"):
        plain = configure("digits", method)
        assert plain.override(changes) == plain
        assert plain.override(changes | {"shift_epochs": 1}).stage2.shift_average == "cumulative"
        with pytest.raises(MislasError, match="shift_average is of shifted batch norm: set"):
            replace(plain, stage2=replace(plain.stage2, **changes))
    assert MISLAS.override(changes).shared_pass != MISLAS.shared_pass


def test_a_classifier_of_your_own_takes_the_place_of_equation_4(monkeypatch):
    """Whatever is set of that, before or beside it; and its run sees the features of the run that it replaces."""
    monkeypatch.setitem(CLASSIFIERS, "mine", None)
    config = configure("digits", "mislas", overrides={"classifier": "mine", "a": 0})
    off = dict.fromkeys(("a", "learn_scale", "delta", "delta_lr"))
    before = configure("digits", "mislas")
    assert config.stage2 == replace(before.stage2, classifier="mine", **off)
    assert config.id != before.id
    assert config.shared_pass == before.shared_pass
    assert RunConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
    with pytest.raises(MislasError, match="a, learn_scale and delta are equation \\(4\\)'s"):
        replace(config, stage2=replace(config.stage2, delta="zeros"))
    with pytest.raises(MislasError, match=r"stage2\.a is 0 or 1, got None"):
        config.override({"classifier": None})
    with pytest.raises(MislasError, match="learn_scale is true or false"):
        replace(before, stage2=replace(before.stage2, learn_scale=None))


def test_eps_belongs_to_label_aware_smoothing():
    config = configure("digits", "lws")
    with pytest.raises(MislasError, match=r"eps_1 belongs to loss 'las'; stage2\.loss is 'ce'"):
        replace(config, stage2=replace(config.stage2, eps_1=0.3))


@pytest.mark.parametrize(
    "changes", [{"loss": "focl"}, {"stage1.loss": "las"}, {"imbalance": float("inf")}, {"lr": float("inf")}]
)
def test_what_cannot_be_trained_is_refused_when_configured(changes):
    with pytest.raises(MislasError):
        configure("digits", "ce", overrides=changes)


def test_a_loss_says_which_setting_its_stage_does_not_have():
    with pytest.raises(MislasError, match="'las' needs eps_1, eps_k, form, smoothing_over, which stage1 does not have"):
        configure("cifar10", "ce", overrides={"stage1.loss": "las"})


def test_experts_take_plain_batches_whatever_their_student_takes():
    changes = {"deferred_sampler": "class_balanced", "defer": 0.5}
    for expert in configure("cifar100", "oltr+lfme", overrides=changes).experts:
        assert (expert.stage1.sampler, expert.stage1.deferred_sampler) == ("instance_balanced", None)


def test_what_is_deferred_comes_after_its_share_of_the_epochs():
    """0.55 of 200 epochs is 110 of them; in binary it is a little more."""
    stage1 = configure("cifar10", "ldam+drw", overrides={"defer": 0.55}).stage1
    assert [stage1.deferred(epoch) for epoch in (109, 110)] == [True, False]


def test_a_number_of_another_type_is_the_same_run():
    config = configure("digits", "focal", 10)
    same = replace(config, stage1=replace(config.stage1, gamma=2))
    assert config.stage1.gamma == 2.0
    assert same.id == config.id
    assert type(same.stage1.gamma) is float


@pytest.mark.parametrize(("field", "value"), [("epochs", 3.0), ("gamma", "2"), ("epochs", True)])
def test_a_value_of_another_kind_is_refused_whoever_makes_the_stage(field, value):
    config = configure("digits", "focal", 10)
    with pytest.raises(MislasError, match=f"stage1.{field} takes .*, got {value!r}"):
        replace(config, stage1=replace(config.stage1, **{field: value}))


@pytest.mark.parametrize("n_max", [20.0, True])
def test_a_number_of_images_is_an_integer(n_max):
    with pytest.raises(MislasError, match="n_max takes int or None"):
        replace(configure("digits", "ce", 10), n_max=n_max)


def test_truth_is_no_seed():
    with pytest.raises(MislasError, match="seed must be an integer"):
        configure("digits", "ce", 10, seed=True)


def test_an_entry_that_is_no_loss_or_rule_says_so(monkeypatch):
    monkeypatch.setitem(LOSSES, "bare", cross_entropy)
    with pytest.raises(MislasError, match=r"LOSSES\['bare'\] must be a LossSpec"):
        configure("digits", "ce", 10)
    with pytest.raises(MislasError, match=r"a tuple of names, such as \('gamma',\), got 'gamma'"):
        LossSpec(cross_entropy, settings=("gamma"))
    monkeypatch.delitem(LOSSES, "bare")
    monkeypatch.setitem(RULES, "bare", tau_normalised)
    with pytest.raises(MislasError, match=r"RULES\['bare'\] must be a Rule"):
        configure("digits", "tau-norm", 10, overrides={"rule": "bare"})


def test_a_loss_takes_no_field_that_has_another_effect(monkeypatch):
    monkeypatch.setitem(LOSSES, "mine", LossSpec(lambda class_counts, beta: cross_entropy, ("beta",)))
    with pytest.raises(
        MislasError, match="'mine' takes beta, which stage1 has for something else; a loss may take adj"
    ):
        configure("digits", "ce", 10, overrides={"loss": "mine", "beta": 0.99})


def test_a_method_that_is_none_says_so(monkeypatch):
    monkeypatch.setitem(METHODS, "mine", "ce")
    with pytest.raises(MislasError, match=r"METHODS\['mine'\] must be a Method, got 'ce'"):
        configure("digits", "mine", 10)


@pytest.mark.parametrize("schedule", [0.1, (0.1, (0.5,)), ((0.5,), "half"), (0.5, 0.1)])
def test_a_schedule_that_is_none_says_so(monkeypatch, schedule):
    monkeypatch.setitem(SCHEDULES, "mine", schedule)
    with pytest.raises(MislasError, match=r"SCHEDULES\['mine'\] must be None, which is cosine, or shares"):
        configure("digits", "ce", 10, overrides={"schedule": "mine"})
    monkeypatch.setitem(SCHEDULES, "mine", ((0.5,), 0.1))
    assert configure("digits", "ce", 10, overrides={"schedule": "mine"}).stage1.schedule == "mine"


def test_numbers_of_numpy_are_numbers():
    ours = configure("digits", "ce", 10, 1, {"epochs": 3, "lr": 0.5})
    theirs = configure("digits", "ce", 10, np.int64(1), {"epochs": np.int32(3), "lr": np.float32(0.5)})
    assert theirs.id == ours.id
    assert {type(theirs.seed), type(theirs.stage1.epochs)} == {int}
    with pytest.raises(MislasError, match="epochs takes int"):
        configure("digits", "ce", 10, overrides={"epochs": np.bool_(True)})


def test_a_stage1_is_named_by_its_loss_and_what_it_mixes(monkeypatch):
    named = {
        changes["loss"] + str(changes.get("mix")): configure("digits", "lws+mixup", 10, overrides=changes).stage1_only
        for changes in (
            {"loss": "ce"},
            {"loss": "ce", "mix": "cutmix"},
            {"loss": "focal", "stage1.gamma": 1.0},
            {"loss": "focal", "stage1.gamma": 1.0, "mix": "cutmix"},
        )
    }
    assert [config.method for config in named.values()] == ["mixup", "cutmix", "focal+mixup", "focal+cutmix"]


@pytest.mark.parametrize("method", ["lifted", "oltr+lfme", "bbn"])
def test_an_override_of_mixup_passes_over_what_takes_whole_images(method):
    assert configure("digits", method, 10, overrides={"stage1.mixup": 0.5}).id == configure("digits", method, 10).id


@pytest.mark.parametrize(("loss", "setting"), [("focal", "gamma"), ("logit_adjusted", "adjustment")])
def test_stage_2_learns_with_other_losses_too(loss, setting):
    config = configure("digits", "lws", 10, overrides={"stage2.loss": loss, f"stage2.{setting}": 1.0})
    assert getattr(config.stage2, setting) == 1.0
    assert config.stage1_only.id == configure("digits", "ce", 10).id
    with pytest.raises(MislasError, match=f"loss '{loss}' needs {setting} in stage2"):
        configure("digits", "lws", 10, overrides={"stage2.loss": loss})
