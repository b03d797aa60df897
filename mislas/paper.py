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

#: Rows of Table 3 that the paper prints with a remark; the others are called as in the registry of methods.
TITLES = {"bbn": "BBN (include mixup)", "remix+drw": "Remix+DRW (300 epochs)"}

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

# ------------------------------------------------------------------------- the large benchmarks: Tables 1, 4, 6, 7, 8

DATASETS |= {"imagenet-lt": "ImageNet-LT", "inaturalist18": "iNaturalist 2018", "places-lt": "Places-LT"}

#: Columns of Tables 6, 7 and 8. What each row averages over is in :data:`GROUP_SIZES`.
GROUPS = ("many", "medium", "few", "all")

#: Table 1: top-1 accuracy (%) on ImageNet-LT, as (cRT, LWS) by (mixup in Stage-1, mixup in Stage-2) and backbone.
#: In the rows without Stage-2 (None) both columns are Stage-1's. In the last row three values of cRT are lost in the
#: text of the paper that we have (None): it runs the last two rows together and keeps one number of two.
TABLE1: dict[tuple[bool, bool | None], dict[str, tuple[float | None, float]]] = {
    (False, None): {
        "resnet10": (36.8, 36.8),
        "resnet50": (45.8, 45.8),
        "resnet101": (47.3, 47.3),
        "resnet152": (48.7, 48.7),
    },
    (True, None): {
        "resnet10": (35.7, 35.7),
        "resnet50": (45.6, 45.6),
        "resnet101": (47.7, 47.7),
        "resnet152": (48.4, 48.4),
    },
    (False, False): {
        "resnet10": (43.3, 43.5),
        "resnet50": (50.3, 51.2),
        "resnet101": (51.4, 52.3),
        "resnet152": (52.7, 53.8),
    },
    (False, True): {
        "resnet10": (43.0, 43.3),
        "resnet50": (50.2, 51.1),
        "resnet101": (51.4, 52.2),
        "resnet152": (52.8, 53.6),
    },
    (True, False): {
        "resnet10": (43.4, 42.9),
        "resnet50": (51.7, 52.0),
        "resnet101": (53.1, 53.5),
        "resnet152": (54.2, 54.6),
    },
    (True, True): {
        "resnet10": (43.3, 42.8),
        "resnet50": (None, 51.9),
        "resnet101": (None, 53.5),
        "resnet152": (None, 54.5),
    },
}

#: Table 4: top-1 accuracy (%) with ResNet-50 (ImageNet-LT, iNaturalist 2018) and ResNet-152 (Places-LT).
#: CE on ImageNet-LT is 44.6 here and 45.8 in Table 1; cRT+mixup on Places-LT is 38.3 here and 38.1 in Table 8.
TABLE4: dict[str, dict[str, float]] = {
    "imagenet-lt": {
        "ce": 44.6,
        "ce+drw": 48.5,
        "focal+drw": 47.9,
        "ldam+drw": 48.8,
        "crt+mixup": 51.7,
        "lws+mixup": 52.0,
        "mislas": 52.7,
    },
    "inaturalist18": {
        "cb-focal": 61.1,
        "ldam+drw": 68.0,
        "bbn": 69.6,
        "remix+drw": 70.5,
        "crt+mixup": 70.2,
        "lws+mixup": 70.9,
        "mislas": 71.6,
    },
    "places-lt": {
        "range": 35.1,
        "fslwf": 34.9,
        "oltr": 35.9,
        "oltr+lfme": 36.2,
        "crt+mixup": 38.3,
        "lws+mixup": 39.7,
        "mislas": 40.4,
    },
}

#: Table 6: ImageNet-LT, 180 epochs; top-1 accuracy (%) by backbone, columns in the order of GROUPS.
TABLE6: dict[str, dict[str, tuple[float, float, float, float]]] = {
    "resnet50": {
        "crt": (62.5, 47.4, 29.5, 50.3),
        "lws": (61.8, 48.6, 33.5, 51.2),
        "crt+mixup": (63.9, 49.1, 30.2, 51.7),
        "lws+mixup": (62.9, 49.8, 31.6, 52.0),
        "mislas": (61.7, 51.3, 35.8, 52.7),
    },
    "resnet101": {
        "crt": (63.8, 48.5, 30.0, 51.4),
        "lws": (63.1, 49.9, 33.8, 52.3),
        "crt+mixup": (65.2, 50.6, 31.6, 53.1),
        "lws+mixup": (64.5, 51.2, 34.1, 53.5),
        "mislas": (64.3, 52.1, 35.8, 54.1),
    },
    "resnet152": {
        "crt": (64.9, 50.4, 30.6, 52.7),
        "lws": (64.1, 51.8, 35.5, 53.8),
        "crt+mixup": (66.5, 51.6, 32.8, 54.2),
        "lws+mixup": (66.1, 52.2, 34.5, 54.6),
        "mislas": (65.4, 53.2, 37.1, 55.2),
    },
}

#: Table 7: iNaturalist 2018, ResNet-50, 200 epochs; top-1 accuracy (%), columns in the order of GROUPS.
TABLE7: dict[str, tuple[float, float, float, float]] = {
    "crt": (73.2, 68.8, 66.1, 68.2),
    "tau-norm": (71.1, 68.9, 69.3, 69.3),
    "lws": (71.0, 69.8, 68.8, 69.5),
    "crt+mixup": (74.2, 71.1, 68.2, 70.2),
    "lws+mixup": (72.8, 71.6, 69.8, 70.9),
    "mislas": (73.2, 72.4, 70.4, 71.6),
}

#: Table 8: Places-LT, ResNet-152 pretrained on ImageNet; top-1 accuracy (%), columns in the order of GROUPS.
#: cRT+mixup has 38.3 in Table 4. The rows here do not share one definition of the groups: see :data:`GROUP_SIZES`.
TABLE8: dict[str, tuple[float, float, float, float]] = {
    "lifted": (41.1, 35.4, 24.0, 35.2),
    "focal": (41.1, 34.8, 22.4, 34.6),
    "range": (41.1, 35.4, 23.2, 35.1),
    "fslwf": (43.9, 29.9, 29.5, 34.9),
    "oltr": (44.7, 37.0, 25.3, 35.9),
    "oltr+lfme": (39.3, 39.6, 24.2, 36.2),
    "crt": (42.0, 37.6, 24.9, 36.7),
    "tau-norm": (37.8, 40.7, 31.8, 37.9),
    "lws": (40.6, 39.1, 28.6, 37.6),
    "crt+mixup": (44.1, 38.5, 27.1, 38.1),
    "lws+mixup": (41.7, 41.3, 33.1, 39.7),
    "mislas": (39.6, 43.3, 36.1, 40.4),
}

#: Rows of Tables 4, 6, 7 and 8 as the paper prints them.
TITLES_LARGE = {"bbn": "BBN (include mixup)"}

#: How many classes are many, medium and few, by whom. The paper's words (few: less than 20 training images) need the
#: training list: that of Places-LT has six classes of exactly 20, which are few in the authors' code.
GROUP_SIZES: dict[str, dict[str, tuple[int, int, int]]] = {
    "imagenet-lt": {"authors' code": (390, 445, 165)},
    "places-lt": {"paper's words": (131, 163, 71), "authors' code": (131, 157, 77)},
}

#: Accuracy and ECE (%) that the authors published with their code (best epoch on the test set); backbones of Table 4.
AUTHORS_CODE_LARGE: dict[str, dict[str, tuple[float, float]]] = {
    "imagenet-lt": {"mixup": (45.5, 7.98), "mislas": (52.7, 1.78)},
    "inaturalist18": {"mixup": (66.9, 5.37), "mislas": (71.6, 7.67)},
    "places-lt": {"mixup": (29.4, 16.7), "mislas": (40.4, 3.41)},
}
