"""The paper's published numbers, as data: percent, typed from its tables. What we measured lives in the store."""

from __future__ import annotations

DATASETS = {"cifar10": "CIFAR-10-LT", "cifar100": "CIFAR-100-LT"}
IMBALANCES = (100, 50, 10)

#: Table 3: top-1 accuracy (%) of ResNet-32. Columns in the order of IMBALANCES; None where the paper has a dash.
TABLE3: dict[str, dict[str, tuple[float | None, ...]]] = {
    "cifar10": {
        "ce": (70.4, 74.8, 86.4),
        "mixup": (73.1, 77.8, 87.1),
        "ldam+drw": (77.1, 81.1, 88.4),
        "bbn": (79.9, 82.2, 88.4),
        "remix+drw": (79.8, None, 89.1),
        "crt+mixup": (79.1, 84.2, 89.8),
        "lws+mixup": (76.3, 82.6, 89.6),
        "mislas": (82.1, 85.8, 89.9),
    },
    "cifar100": {
        "ce": (38.4, 43.9, 55.8),
        "mixup": (39.6, 45.0, 58.2),
        "ldam+drw": (42.1, 46.7, 58.8),
        "bbn": (42.6, 47.1, 59.2),
        "remix+drw": (46.8, None, 61.3),
        "crt+mixup": (45.1, 50.9, 62.1),
        "lws+mixup": (44.2, 50.6, 62.2),
        "mislas": (47.0, 52.3, 63.0),
    },
}

#: Rows of Table 3 as the paper prints them.
TITLES = {
    "ce": "CE",
    "mixup": "mixup",
    "ldam+drw": "LDAM+DRW",
    "bbn": "BBN (include mixup)",
    "remix+drw": "Remix+DRW (300 epochs)",
    "crt+mixup": "cRT+mixup",
    "lws+mixup": "LWS+mixup",
    "mislas": "MiSLAS",
}

#: Accuracy and ECE (%) that the authors published with their code (best epoch on the test set), by IF.
AUTHORS_CODE: dict[str, dict[str, dict[int, tuple[float, float]]]] = {
    "cifar10": {
        "mixup": {10: (87.6, 11.9), 50: (78.1, 2.49), 100: (72.8, 2.14)},
        "mislas": {10: (90.0, 1.20), 50: (85.7, 2.01), 100: (82.5, 3.66)},
    },
    "cifar100": {
        "mixup": {10: (59.1, 5.24), 50: (45.4, 4.33), 100: (39.5, 8.82)},
        "mislas": {10: (63.2, 1.73), 50: (52.3, 2.47), 100: (47.0, 4.83)},
    },
}

#: Table 2: top-1 accuracy (%) on CIFAR-100-LT as modules are added. Columns in the order of IMBALANCES.
TABLE2: dict[str, tuple[float, ...]] = {
    "lws": (41.2, 46.0, 58.5),
    "lws+mixup": (44.2, 50.6, 62.2),
    "lws+mixup+shift": (45.3, 51.4, 62.8),
    "mislas": (47.0, 52.3, 63.0),
}

#: Rows of Table 2 by the modules that they tick: mixup in Stage-1, shifted batch norm, label-aware smoothing.
TABLE2_TITLES = {
    "lws": "none (LWS)",
    "lws+mixup": "MU",
    "lws+mixup+shift": "MU, SL",
    "mislas": "MU, SL, LAS (MiSLAS)",
}

#: Columns of Table 5, as the paper prints them, and the fields of the configuration that they say.
TABLE5_COLUMNS: dict[tuple[str, str], tuple[str, ...]] = {
    ("Common", "LR"): ("stage1.lr", "stage2.lr"),
    ("Common", "BS"): ("stage1.batch_size", "stage2.batch_size"),
    ("Common", "WD"): ("stage1.weight_decay", "stage2.weight_decay"),
    ("Stage-1", "epochs"): ("stage1.epochs",),
    ("Stage-1", "LRS"): ("stage1.schedule",),
    ("Stage-2", "epochs"): ("stage2.epochs",),
    ("Stage-2", "LRS"): ("stage2.schedule",),
    ("Stage-2", "ε₁"): ("stage2.eps_1",),
    ("Stage-2", "ε_K"): ("stage2.eps_k",),
    ("Stage-2", "ΔW"): ("stage2.delta_lr",),
}

#: Table 5: the settings, in the order of TABLE5_COLUMNS.
TABLE5: dict[str, tuple[float | str, ...]] = {
    "cifar10": (0.1, 128, 2e-4, 200, "multistep", 10, "cosine", 0.3, 0.0, 0.5),
    "cifar100": (0.1, 128, 2e-4, 200, "multistep", 10, "cosine", 0.4, 0.1, 0.2),
    "imagenet-lt": (0.1, 256, 5e-4, 180, "cosine", 10, "cosine", 0.4, 0.1, 0.05),
    "places-lt": (0.1, 256, 5e-4, 90, "cosine", 10, "cosine", 0.4, 0.1, 0.05),
    "inaturalist18": (0.1, 256, 1e-4, 200, "cosine", 30, "cosine", 0.4, 0.1, 0.05),
}

#: Rows of Table 5 as the paper prints them.
TABLE5_TITLES = {
    "cifar10": "LT CIFAR-10",
    "cifar100": "LT CIFAR-100",
    "imagenet-lt": "ImageNet-LT",
    "places-lt": "Places-LT",
    "inaturalist18": "iNaturalist'18",
}

#: Accuracy of label-aware smoothing minus that of cross-entropy, in points, as section 4.2 puts it: Figures 5 and 10
#: print their cells only as a picture.
SMOOTHING_GAIN = {"cifar10": 3.3, "cifar100": 0.9}
