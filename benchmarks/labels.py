"""How well wrong labels are found: labels of a training split are flipped at random, and looked for.

    python benchmarks/labels.py --data FOLDER --backbone MobileNetV2-0.35 --weights FILE

Flips 5, 10 and 20 % of the labels to another class, in five draws each, and ranks all examples by doubt: the precision
is the share of flipped ones among as many of the first as were flipped. The rival is what one would write oneself, one
out-of-fold logistic regression on standardised features, ranked by the probability of the given label. Writes
results/labels_DATA.json.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from record import write
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from tftransfer import cli

SHARES, DRAWS = (0.05, 0.1, 0.2), 5


def flipped(targets: np.ndarray, share: float, draw: int) -> tuple[np.ndarray, np.ndarray]:
    """Return targets of which a share is another class, and which these are."""
    generator = np.random.default_rng([draw, round(100 * share)])
    chosen = np.zeros(len(targets), bool)
    chosen[generator.choice(len(targets), round(share * len(targets)), replace=False)] = True
    classes = int(targets.max()) + 1
    return np.where(chosen, (targets + generator.integers(1, classes, len(targets))) % classes, targets), chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--backbone", default="MobileNetV2-0.35")
    parser.add_argument("--weights", default="imagenet")
    parser.add_argument("--image-size", type=int, default=224)
    options = parser.parse_args()
    cli.import_tensorflow()
    from tftransfer import backbones, data, inference
    from tftransfer.checks import labels

    size = (options.image_size, options.image_size)
    network = backbones.build(options.backbone, size, options.weights)
    parts = [getattr(data.load(options.data, image_size=size)[0], name) for name in ("train", "validation")]
    targets = np.concatenate([part.targets for part in parts])
    plain = np.concatenate([inference.pooled_features(network, part).values[0] for part in parts])
    views = [inference.pooled_features(network, part, augmentation="light_no_flip", views=2).values for part in parts]
    averaged = np.concatenate([plain[None], np.concatenate(views, axis=1)]).mean(axis=0)
    rival = make_pipeline(StandardScaler(), LogisticRegression(max_iter=300))
    result = {}
    for share in SHARES:
        found: dict[str, list[float]] = {"plain": [], "ours": [], "ours, three views": []}
        estimates = []
        for draw in range(DRAWS):
            given, wrong = flipped(targets, share, draw)
            count = int(wrong.sum())
            sure = cross_val_predict(rival, plain, given, cv=5, method="predict_proba")[np.arange(len(given)), given]
            found["plain"].append(float(wrong[np.argsort(sure, kind="stable")[:count]].mean()))
            for name, features in (("ours", plain), ("ours, three views", averaged)):
                probabilities = labels.out_of_fold(features, given, seed=draw)
                first = [one.index for one in labels.suspects(probabilities, given)[:count]]
                found[name].append(float(wrong[first].mean()))
            estimates.append(labels.estimated_count(probabilities, given))
        result[f"{share:.0%}"] = {
            "precision": {name: round(float(np.mean(some)), 3) for name, some in found.items()},
            "range": {name: [round(min(some), 3), round(max(some), 3)] for name, some in found.items()},
            "flipped": count,
            "estimated": estimates,
        }
        print(f"{share:.0%}: {result[f'{share:.0%}']}", flush=True)
    setting = {"backbone": options.backbone, "image_size": options.image_size, "examples": len(targets), "draws": DRAWS}
    write(f"labels_{options.data.name}", {"shares": result}, **setting)


if __name__ == "__main__":
    main()
