"""The rows of the paper's tables. A method is a name and how its Stage-1 and Stage-2 are trained.

To add a row, add one entry to :data:`METHODS`: what it changes in Stage-1, and what Stage-2 is, if it has one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from .config import (
    Adjustment,
    Memory,
    RunConfig,
    Stage1,
    Stage2,
    assignment,
    check_type,
    differences,
    locate,
    stage2_kind,
)
from .data import LISTS, dataset_name
from .errors import MislasError, UnknownName, unknown
from .losses import LOSSES, Loss


@dataclass(frozen=True)
class Settings:
    """The paper's Table 5 for one dataset, with what the paper leaves to the works it follows.

    Attributes:
        stage1, stage2: fields of the stages, by name.
        delta_lr, eps_1, eps_k: of MiSLAS's Stage-2: the rate of dW as a ratio of the stage's, and label-aware
            smoothing's factors of the largest and the smallest class.
        mixup: alpha of Stage-1's Beta(alpha, alpha), where a method mixes.
        backbone, precision: see :class:`mislas.config.RunConfig`.
        authors: what the authors' own configurations of MiSLAS's Stage-2 have in place of ``stage2``, ``delta_lr``,
            ``eps_1``, ``eps_k`` and shifted batch norm, by imbalance factor (None: the only one).
    """

    stage1: dict[str, Any]
    stage2: dict[str, Any]
    delta_lr: float
    eps_1: float
    eps_k: float
    mixup: float = 1.0
    backbone: str = "resnet32"
    precision: str = "bf16"
    authors: dict[float | None, dict[str, Any]] = field(default_factory=dict)


_CIFAR1 = dict(epochs=200, batch_size=128, lr=0.1, weight_decay=2e-4, schedule="multistep", warmup=5)
_CIFAR2 = dict(epochs=10, batch_size=128, lr=0.1, weight_decay=2e-4)
_CIFAR10 = Settings(
    _CIFAR1, _CIFAR2, delta_lr=0.5, eps_1=0.3, eps_k=0.0,
    authors={
        100: dict(shift_bn=False),
        50: dict(shift_bn=False, eps_1=0.2, delta_lr=0.2),
        10: dict(shift_bn=False, eps_1=0.1, delta_lr=0.2),
    },
)  # fmt: skip
_CIFAR100 = Settings(
    _CIFAR1, _CIFAR2, delta_lr=0.2, eps_1=0.4, eps_k=0.1,
    authors={
        100: {},
        50: dict(eps_1=0.3, eps_k=0.0, delta_lr=0.1),
        10: dict(eps_1=0.2, eps_k=0.0, delta_lr=0.1),
    },
)  # fmt: skip

_LARGE1 = dict(batch_size=256, lr=0.1, schedule="cosine")
_LARGE2 = dict(batch_size=256, lr=0.1)

SETTINGS: dict[str, Settings] = {
    "cifar10": _CIFAR10,
    "cifar10-jpeg": _CIFAR10,
    "cifar100": _CIFAR100,
    "cifar100-jpeg": _CIFAR100,
    "tinyimagenet32": _CIFAR100,  # the measured neighbour of CIFAR-100-LT: its settings, not the paper's dataset
    "tinyimagenet64": _CIFAR100,
    # Kang et al. (2020): cosine, no warm-up. The recipe on Places-LT starts from torchvision's ResNet-152, version 1.
    "imagenet-lt": Settings(
        _LARGE1 | dict(weight_decay=5e-4, epochs=180), _LARGE2 | dict(weight_decay=5e-4, epochs=10),
        delta_lr=0.05, eps_1=0.4, eps_k=0.1, mixup=0.2, backbone="resnet50",
        authors={None: dict(eps_1=0.3, eps_k=0.0)},
    ),
    "places-lt": Settings(
        _LARGE1 | dict(weight_decay=5e-4, epochs=90, weights="394f9c45"), _LARGE2 | dict(weight_decay=5e-4, epochs=10),
        delta_lr=0.05, eps_1=0.4, eps_k=0.1, mixup=0.2, backbone="resnet152",
        authors={None: {}},
    ),
    "inaturalist18": Settings(
        _LARGE1 | dict(weight_decay=1e-4, epochs=200), _LARGE2 | dict(weight_decay=1e-4, epochs=30),
        delta_lr=0.05, eps_1=0.4, eps_k=0.1, mixup=0.2, backbone="resnet50",
        authors={None: dict(epochs=10, eps_1=0.3, eps_k=0.0)},
    ),
    "generated": Settings(  # JPEG files and list files, small enough for tests; not from the paper
        _LARGE1 | dict(weight_decay=5e-4, epochs=5, batch_size=32, lr=0.05),
        _LARGE2 | dict(weight_decay=5e-4, epochs=2, batch_size=32),
        delta_lr=0.05, eps_1=0.4, eps_k=0.1, mixup=0.2, backbone="resnet8", precision="fp32",
    ),
    "digits": Settings(  # small enough for a laptop and for tests; not from the paper
        dict(epochs=20, batch_size=32, lr=0.1, weight_decay=2e-4, schedule="multistep", warmup=2),
        dict(epochs=5, batch_size=32, lr=0.1, weight_decay=2e-4),
        delta_lr=0.5,
        eps_1=0.3,
        eps_k=0.0,
        backbone="resnet8",
        precision="fp32",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Method:
    r"""One row of a table.

    Attributes:
        title: as the paper prints it.
        idea: one sentence.
        source: citation.
        tables: the paper's tables that have this row.
        equation: what it computes, as LaTeX, set as ``aligned``.
        mixup: whether Stage-1 mixes; alpha is the dataset's (1 on CIFAR).
        longer: Stage-1's epochs as a multiple of the dataset's.
        stage1: fields of :class:`Stage1` that differ from the dataset's settings.
        stage2: fields of :class:`Stage2`, of :class:`Adjustment` (with ``rule``), of :class:`FewShot` (with ``shots``)
            or of :class:`Memory` (with ``centroid_weight``), or None for a one-stage method. With ``loss="las"`` the
            dataset's eps_1 and eps_k are filled in.
    """

    title: str
    idea: str
    source: str
    tables: tuple[int, ...] = ()
    equation: str = ""
    mixup: bool = False
    longer: float = 1.0
    stage1: dict[str, Any] = field(default_factory=dict)
    stage2: dict[str, Any] | None = None

    @property
    def where(self) -> str:
        """The paper's tables that have this row, in words."""
        if not self.tables:
            return "not in the paper's tables"
        return f"Table{'s' * (len(self.tables) > 1)} {', '.join(map(str, self.tables))} of the paper"


CAO = "Cao et al., Learning imbalanced datasets with label-distribution-aware margin loss, NeurIPS 2019"
CHOU = "Chou et al., Remix: Rebalanced mixup, ECCV Workshops 2020"
CUI = "Cui et al., Class-balanced loss based on effective number of samples, CVPR 2019"
GIDARIS = "Gidaris and Komodakis, Dynamic few-shot visual learning without forgetting, CVPR 2018"
GUO = "Guo et al., On calibration of modern neural networks, ICML 2017"
KANG = "Kang et al., Decoupling representation and classifier for long-tailed recognition, ICLR 2020"
LIN = "Lin et al., Focal loss for dense object detection, ICCV 2017"
LIU = "Liu et al., Large-scale long-tailed recognition in an open world, CVPR 2019"
MENON = "Menon et al., Long-tail learning via logit adjustment, ICLR 2021"
MISLAS = "Improving calibration for long-tailed recognition (the paper)"
OH_SONG = "Oh Song et al., Deep metric learning via lifted structured feature embedding, CVPR 2016"
REN = "Ren et al., Balanced meta-softmax for long-tailed visual recognition, NeurIPS 2020"
XIANG = (
    "Xiang et al., Learning from multiple experts: Self-paced knowledge distillation for long-tailed classification, "
    "ECCV 2020"
)
YUN = "Yun et al., CutMix: Regularization strategy to train strong classifiers with localizable features, ICCV 2019"
ZHANG = "Zhang et al., mixup: Beyond empirical risk minimization, ICLR 2018"
ZHANG_RANGE = "Zhang et al., Range loss for deep face recognition with long-tailed training data, ICCV 2017"
ZHOU = "Zhou et al., BBN: Bilateral-branch network with cumulative learning, CVPR 2020"

# Parts that rows share. Deferral starts after 80% of the epochs, 160 of 200 (Cao et al.).
DRW = dict(beta=0.9999, defer=0.8)
DRS = dict(deferred_sampler="class_balanced", defer=0.8)
LDAM = dict(loss="ldam", max_margin=0.5, scale=30.0)
REMIX = dict(mix="remix", remix_kappa=3.0, remix_tau=0.5)
HOLDOUT = dict(holdout=0.1)
OLTR = dict(centroid_weight=0.01, backbone_lr=0.1, attention=True)
GENERALISED = dict(a=1, learn_scale=True, delta="zeros")  # equation (4); delta_lr is the dataset's
LAS = dict(loss="las", form="concave", smoothing_over="others")

ONE_STAGE: dict[str, Method] = {
    "ce": Method(
        "CE", "Cross-entropy on the images as they come.", "the plain model", (1, 3, 4), r"l = -\log p_y"
    ),
    "focal": Method(
        "Focal Loss", "Images that are classified well count less.", LIN, (8,),
        r"l = -(1 - p_y)^\gamma \log p_y, \quad \gamma = 2", stage1=dict(loss="focal", gamma=2.0),
    ),
    "cb": Method(
        "CB", "Classes are weighted by the inverse of their effective number of images.", CUI, (),
        r"l = -\frac{1 - \beta}{1 - \beta^{N_y}} \log p_y, \quad \beta = 0.9999", stage1=dict(beta=0.9999),
    ),
    "cb-focal": Method(
        "CB-Focal", "Focal loss, with class weights by effective number.", CUI, (4,),
        r"l = -\frac{1 - \beta}{1 - \beta^{N_y}} (1 - p_y)^\gamma \log p_y, \quad \beta = 0.999, \gamma = 0.5",
        stage1=dict(loss="focal", gamma=0.5, beta=0.999),
    ),
    "ldam": Method(
        "LDAM", "Rarer classes must win by a larger margin.", CAO, (),
        r"l &= -\log \frac{e^{z_y - s \Delta_y}}{e^{z_y - s \Delta_y} + \sum_{i \ne y} e^{z_i}}, \\ "
        r"z &= s \cos, \quad \Delta_k \propto N_k^{-1/4}",
        stage1=LDAM,
    ),
    "ce+drw": Method(
        "CE+DRW", "Cross-entropy; class weights from 80% of the epochs on.", CAO, (4,),
        r"l = -\omega_y(t) \log p_y, \quad \omega_y(t) = 1 \text{ before, } "
        r"\tfrac{1 - \beta}{1 - \beta^{N_y}} \text{ after}", stage1=DRW,
    ),
    "focal+drw": Method(
        "Focal+DRW", "Focal loss; class weights from 80% of the epochs on.", CAO, (4,),
        r"l = -\omega_y(t) (1 - p_y)^\gamma \log p_y, \quad \gamma = 1", stage1=dict(loss="focal", gamma=1.0) | DRW,
    ),
    "ldam+drw": Method(
        "LDAM+DRW", "LDAM; class weights from 80% of the epochs on.", CAO, (3, 4),
        r"l = \omega_y(t) \, l_{\mathrm{LDAM}}", stage1=LDAM | DRW,
    ),
    "ldam+drs": Method(
        "LDAM+DRS", "LDAM; class-balanced batches from 80% of the epochs on.", CAO, (),
        r"l = l_{\mathrm{LDAM}}", stage1=LDAM | DRS,
    ),
    "mixup": Method(
        "mixup", "Train on convex combinations of images and of their labels.", ZHANG, (1, 3),
        r"\tilde x &= \lambda x_i + (1 - \lambda) x_j, \\ l &= \lambda l(y_i) + (1 - \lambda) l(y_j)", mixup=True,
    ),
    "cutmix": Method(
        "CutMix", "Paste a box of one image into another; mix labels by area.", YUN, (),
        r"\tilde x &= M \odot x_i + (1 - M) \odot x_j, \\ l &= \lambda l(y_i) + (1 - \lambda) l(y_j)",
        mixup=True, stage1=dict(mix="cutmix"),
    ),
    "remix": Method(
        "Remix", "mixup whose label goes to the rarer of two very unequal classes.", CHOU, (),
        r"\lambda_y = 0 \text{ if } N_i / N_j \ge \kappa, \lambda < \tau; \;"
        r" 1 \text{ if } N_i / N_j \le 1 / \kappa, 1 - \lambda < \tau; \; \lambda \text{ else}",
        mixup=True, stage1=REMIX,
    ),
    "remix+drw": Method(
        "Remix+DRW", "Remix for half as long again; class weights from 80% of the epochs on.", CHOU, (3, 4),
        r"l = \lambda_y \omega_{y_i}(t) l(y_i) + (1 - \lambda_y) \omega_{y_j}(t) l(y_j)",
        mixup=True, longer=1.5, stage1=REMIX | DRW,
    ),
    "bbn": Method(
        "BBN", "Two branches, one fed the images as they come, one mostly rare classes; the weight moves over.",
        ZHOU, (3, 4),
        r"z &= \alpha W_c^\top f_c + (1 - \alpha) W_r^\top f_r, \\ l &= \alpha l(y_c) + (1 - \alpha) l(y_r), \\ "
        r"\alpha &= 1 - (t / T)^2",
        stage1=dict(second_sampler="reverse", schedule="multistep-bbn", weights=None),
    ),
    "balanced-softmax": Method(
        "Balanced softmax", "Cross-entropy of logits shifted by the log of the class frequencies.", REN, (),
        r"l = -\log \frac{N_y e^{z_y}}{\sum_i N_i e^{z_i}}", stage1=dict(loss="logit_adjusted", adjustment=1.0),
    ),
    # Features of unit length; that, and the weights of 0.1, are ours: see mislas.metric.
    "lifted": Method(
        "Lifted Loss", "Cross-entropy, and of every two images of a class a distance below that to any other class.",
        OH_SONG, (8,),
        r"l &= -\log p_y + \frac{0.1}{2 |P|} \sum_{(i, j) \in P} \max(0, J_{ij})^2, \\ J_{ij} &= D_{ij} + "
        r"\log \Big( \sum_{k: y_k \ne y_i} e^{1 - D_{ik}} + \sum_{k: y_k \ne y_j} e^{1 - D_{jk}} \Big)",
        stage1=dict(metric="lifted", metric_weight=0.1),
    ),
    "range": Method(
        "Range Loss", "Cross-entropy, and in every batch tighter classes and a gap between the two nearest centres.",
        ZHANG_RANGE, (4, 8),
        r"l &= -\log p_y + 0.1 \, r, \\ r &= \sum_k \frac{2}{1 / D_1^{(k)} + 1 / D_2^{(k)}} + "
        r"\max(0, 1 - \min_{j \ne k} \lVert m_j - m_k \rVert^2), \\ D_1^{(k)}, D_2^{(k)} "
        r"& \text{: the largest squared distances within class } k",
        stage1=dict(metric="range", metric_weight=0.1),
    ),
}  # fmt: skip

#: Decoupled methods: how the classifier is found on a frozen backbone. Each comes with and without mixup in Stage-1,
#: and with and without shifted batch norm.
DECOUPLED: dict[str, tuple[str, str, str, dict[str, Any], dict[str, Any]]] = {
    "crt": (
        "cRT", "Learn a new classifier on balanced classes.", r"z = W'^\top x",
        {}, dict(a=0, learn_scale=False, delta="fresh", delta_lr=1.0),
    ),
    "lws": (
        "LWS", "Learn one scale per class on balanced classes.", r"z = \mathrm{diag}(s) W^\top x",
        {}, dict(a=1, learn_scale=True),
    ),
    "tau-norm": (
        "τ-normalized", "Divide each class's weights by a power of their norm, chosen on held-out images.",
        r"z_k = w_k^\top x / \lVert w_k \rVert^\tau", HOLDOUT, dict(rule="tau_norm"),
    ),
    "ncm": (
        "NCM", "The class whose mean feature is nearest.", r"z_k = -\tfrac12 \lVert x - m_k \rVert^2",
        {}, dict(rule="ncm"),
    ),
}  # fmt: skip
#: The paper's tables with each of them, by (mixup, shift).
_TABLES = {
    "crt": {(False, False): (1, 6, 7, 8), (True, False): (1, 3, 4, 6, 7, 8)},
    "lws": {(False, False): (1, 2, 6, 7, 8), (True, False): (1, 2, 3, 4, 6, 7, 8), (True, True): (2,)},
    "tau-norm": {(False, False): (7, 8)},
}


def _decoupled() -> dict[str, Method]:
    """Every decoupled method with and without mixup, with and without shifted batch norm (SL)."""
    found = {}
    for name, (title, idea, equation, stage1, stage2) in DECOUPLED.items():
        for mixup in (False, True):
            for shift in (False, True):
                moved = {} if not shift else {"shift_epochs": 10} if "rule" in stage2 else {"shift_bn": True}
                extra = " Stage-1 with mixup." * mixup + " Batch norm's running statistics are shifted." * shift
                found[name + "+mixup" * mixup + "+shift" * shift] = Method(
                    title + "+mixup" * mixup + "+SL" * shift, idea + extra, MISLAS if shift else KANG,
                    _TABLES.get(name, {}).get((mixup, shift), ()), equation, mixup, 1.0, stage1, stage2 | moved,
                )  # fmt: skip
    return found


#: Methods that keep images of the training set, their means, or other networks to learn from.
MEMORY: dict[str, Method] = {
    # Stage-1's scale of cosines is where theirs starts; it is learned in Stage-2. What is novel: see mislas.fewshot.
    "fslwf": Method(
        "FSLwF", "Learn to make a class's weights from a few images and other classes' weights; use it on rare ones.",
        GIDARIS, (4, 8),
        r"z_k &= \tau \cos(w_k, x), \\ w_{\mathrm{few}} &= \phi_{\mathrm{avg}} \odot \tfrac1N \sum_i \bar x_i + "
        r"\phi_{\mathrm{att}} \odot \tfrac1N \sum_i \sum_b a_{ib} \bar w_b, \\ a_i &= \mathrm{softmax}_b \, "
        r"\gamma \cos(\Phi \bar x_i, \kappa_b)",
        stage1=dict(scale=10.0), stage2=dict(shots=5),
    ),
    # As the authors' code for ImageNet-LT, but as long as Stage-1: see mislas.memory.
    "oltr": Method(
        "OLTR", "Enrich attended features from a memory of class centroids, and train on with balanced classes.",
        LIU, (4, 8),
        r"x &= \mathrm{mean} \big( f + \mathrm{MA}(f) \odot \mathrm{SA}(f) \big), \\ "
        r"v &= \tfrac{10}{\gamma} \big( x + \tanh(T x) \odot \sum_i o_i c_i \big), \\ "
        r"o &= \mathrm{softmax}(H x), \quad \gamma = \min_i \lVert x - c_i \rVert, \\ "
        r"z_k &= 16 \, \tfrac{\lVert v \rVert}{1 + \lVert v \rVert} \cos(w_k, v), \\ "
        r"l &= -\log p_y + 0.01 \, l_{\mathrm{centroids}}",
        stage2=OLTR,
    ),
    # How the two are joined is our reading: the student is where OLTR starts. All three groups must have classes.
    "oltr+lfme": Method(
        "OLTR+LFME", "Experts on many, medium and few shots teach a student, the less the better it is; then OLTR.",
        XIANG, (4, 8),
        r"l &= -v_i(t) \log p_y + \sum_g w_g(t) \, \mathrm{KL}(\tilde q^{(g)} \Vert \tilde p^{(g)}), \\ "
        r"v_i &= \pi_i + (1 - \pi_i) \tfrac tT, \quad \pi_i = q^{(g)}_{y_i}, \\ "
        r"w_g &= \min \Big( 1, \max \Big( 0, \frac{A_g - a_g}{0.7 A_g} \Big) \Big), \\ "
        r"a_g, A_g & \text{: accuracies of student and expert}, \\ "
        r"q^{(g)}, \tilde q^{(g)}, \tilde p^{(g)} & \text{: over group } g \text{ alone; } \tilde q, \tilde p "
        r"\text{ at temperature 2}",
        stage1=dict(distillation=2.0, sampler="class_cyclic") | HOLDOUT, stage2=OLTR,
    ),
}  # fmt: skip

#: What is done to Stage-1's classifier after training. Each comes with and without mixup in Stage-1.
AFTER_TRAINING: dict[str, tuple[tuple[str, str], str, str, str, dict[str, Any], dict[str, Any]]] = {
    "logit-adjustment": (
        ("Logit adjustment", "Logit adjustment+mixup"),
        "Subtract the log of the class frequencies from the logits.", MENON,
        r"z_k - \log \pi_k", {}, dict(rule="logit_adjustment", value=1.0),
    ),
    "temperature": (
        ("CE+TS", "mixup+TS"), "Divide the logits by a temperature, chosen on held-out images.", GUO,
        r"z / T", HOLDOUT, dict(rule="temperature"),
    ),
    "logit-adjustment+temperature": (
        ("Logit adjustment+TS", "Logit adjustment+mixup+TS"),
        "Subtract the log of the class frequencies; then divide by a temperature, chosen on held-out images.",
        f"{MENON}; {GUO}", r"(z_k - \log \pi_k) / T", HOLDOUT, dict(rule="adjusted_temperature"),
    ),
    "lws-held-out": (
        ("LWS, held out", "LWS+mixup, held out"),
        "The scales of LWS, fitted to images that Stage-1 has not seen: a control of ours.", KANG,
        r"z = \mathrm{diag}(s) W^\top x", HOLDOUT, dict(rule="class_scales"),
    ),
    "vector-scaling": (
        ("CE+vector scaling", "mixup+vector scaling"),
        "Scale and shift each logit, as is likeliest on held-out images.", GUO,
        r"a_k z_k + c_k", HOLDOUT, dict(rule="vector_scaling"),
    ),
}  # fmt: skip


def _after_training() -> dict[str, Method]:
    """Every method of :data:`AFTER_TRAINING` with and without mixup."""
    return {
        name + "+mixup" * mixup: Method(
            titles[mixup], idea + " Stage-1 with mixup." * mixup, source, (), equation, mixup, 1.0, stage1, stage2
        )
        for name, (titles, idea, source, equation, stage1, stage2) in AFTER_TRAINING.items()
        for mixup in (False, True)
    }


THE_PAPER: dict[str, Method] = {
    "lws+las": Method(
        "LWS+LAS", "LWS learned with label-aware smoothing.", MISLAS, (), r"\text{equations (1), (3)}",
        stage2=DECOUPLED["lws"][-1] | LAS,
    ),
    "mislas": Method(
        "MiSLAS",
        "mixup in Stage-1; then scales and a shift of the classifier, label-aware smoothing, shifted batch norm.",
        MISLAS, (2, 3, 4, 6, 7, 8), r"z = \mathrm{diag}(s) (a W + \Delta W)^\top x, \text{ equations (1) to (6)}",
        mixup=True, stage2=GENERALISED | LAS | {"shift_bn": True},
    ),
}  # fmt: skip

METHODS: dict[str, Method] = ONE_STAGE | _decoupled() | MEMORY | _after_training() | THE_PAPER


def settings_of(dataset: str) -> Settings:
    """What :data:`SETTINGS` has of a dataset.

    Raises:
        UnknownName: it has none.
    """
    if dataset not in SETTINGS:
        raise UnknownName(f"no settings to train {dataset} with: add an entry to mislas.methods.SETTINGS")
    return SETTINGS[dataset]


def configure(
    dataset: str,
    method: str,
    imbalance: float | None = None,
    seed: int = 0,
    overrides: dict[str, Any] | None = None,
) -> RunConfig:
    """The configuration of a row of a table: the dataset's settings (Table 5), the method's recipe, your overrides.

    Args:
        dataset: a key of :data:`mislas.data.SPECS` or :data:`mislas.data.LISTS`.
        method: a key of :data:`METHODS`.
        imbalance: imbalance factor, >= 1. None is 100, or that of the dataset's training list.
        seed: 0 or more.
        overrides: see :meth:`RunConfig.override`.

    Raises:
        MislasError: unknown dataset, method or field, or a value outside its range.
    """
    dataset = dataset_name(dataset)
    if method not in METHODS:
        unknown("method", method, METHODS)
    settings, recipe = settings_of(dataset), METHODS[method]
    if not isinstance(recipe, Method):
        raise MislasError(f"METHODS[{method!r}] must be a Method, got {recipe!r}")
    if imbalance is None:
        imbalance = LISTS[dataset].imbalance if dataset in LISTS else 100
    ours = {
        "mixup": settings.mixup if recipe.mixup else None,
        "epochs": round(recipe.longer * settings.stage1["epochs"]),
    }
    stage1 = _stage(Stage1, method, settings.stage1 | ours | recipe.stage1)
    stage2 = None
    if recipe.stage2 is not None:
        kind = stage2_kind(recipe.stage2)
        filled = {} if kind is Adjustment else dict(settings.stage2)
        if kind is Memory:  # as long as Stage-1 and as it, but for its start
            known = {f.name for f in fields(Memory)}
            filled = {key: value for key, value in settings.stage1.items() if key in known}
        if recipe.stage2.get("delta"):
            filled["delta_lr"] = settings.delta_lr
        if recipe.stage2.get("loss") == "las":
            filled |= {"eps_1": settings.eps_1, "eps_k": settings.eps_k}
        stage2 = _stage(kind, method, filled | recipe.stage2)
    config = RunConfig(dataset, imbalance, settings.backbone, seed, settings.precision, stage1, stage2, method)
    return config.override(overrides or {})


def _stage(kind: type, method: str, values: dict[str, Any]) -> Any:
    where, known = "stage1" if kind is Stage1 else "stage2", {f.name for f in fields(kind)}
    typed = {key: check_type(f"method {method!r}: {key}", values[key], where, key) for key in known & values.keys()}
    missing = [key for key in ("a", "learn_scale") if key not in values]
    if kind is Stage2 and missing and "classifier" not in values:
        raise MislasError(f"method {method!r}: stage2 is missing {' and '.join(missing)}, or classifier in their place")
    try:
        return kind(**values | typed)
    except TypeError as error:  # a slip in a recipe: a field too many, or one that is missing
        raise MislasError(f"method {method!r}: {str(error).replace('.__init__()', '')}") from error


def loss_for(stage: Stage1 | Stage2, class_counts: Sequence[int]) -> Loss:
    """The loss that a stage trains with, made for a training set's class counts.

    Raises:
        MislasError: what should make it makes no function.
    """
    spec = LOSSES[stage.loss]
    settings = {name: getattr(stage, name, None) for name in spec.settings + spec.optional}
    settings = {name: value for name, value in settings.items() if value is not None}
    try:
        loss = spec.make(class_counts, **settings)
    except TypeError as error:  # such as the loss itself in place of what makes it
        raise MislasError(f"loss {stage.loss!r} cannot be made of class counts and its settings: {error}") from error
    if not callable(loss):
        raise MislasError(f"loss {stage.loss!r} must be made as a function of logits and targets, got {loss!r}")
    return loss


def changed(config: RunConfig) -> str:
    """What a run has otherwise than its method's defaults, as ``--set`` takes it: ``"epochs=20 stage2.mixup=1.0"``.
    Empty for nothing, and for a name that is no method's, such as an expert's."""
    if config.method not in METHODS or config.dataset not in SETTINGS:
        return ""
    usual = configure(config.dataset, config.method, config.imbalance, config.seed)
    return " ".join(assignment(_short(key), value) for key, value in differences(config, usual).items())


def _short(key: str) -> str:
    """A field without its stage, where that names the same."""
    where, field = locate(key)
    return field if locate(field) == (where, field) else key
