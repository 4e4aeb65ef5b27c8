"""Compare fine-tuning strategies on one data set: the same network, the same budget, several seeds.

    python recipes/compare_strategies.py                                         # on the digits, with forgetting
    python recipes/compare_strategies.py --data PHOTOS --strategy full,lora:rank=8 --seeds 0,1,2 --folds 5

With `--folds K` strategies are compared by cross-validation on the training split, and the test split is not looked
at: choose so, then measure the choice without it. Writes comparison.json, comparison.md and comparison.png; a run that
was stopped goes on after its last trial.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import tftransfer as tft
from tftransfer import cli

if TYPE_CHECKING:
    import keras

NAME = "compare_strategies"
STRATEGIES = "linear_probe,full,freeze_then_unfreeze,l2_sp,ewc,wise_ft"


def main() -> int:
    """Train every strategy with every seed, and put the results side by side."""
    parser = cli.recipe_parser(NAME, __doc__, epochs_help="30, the budget of every strategy")
    parser.set_defaults(strategy=STRATEGIES, epochs=30)
    parser.add_argument("--seeds", default="0,1,2", help="comma list (default: %(default)s)")
    parser.add_argument("--folds", type=cli.at_least(2), help="cross-validate on the training split (default: test)")
    parser.add_argument(
        "--source", help="measure forgetting on this (demo, or as --data; default: demo for the digits)"
    )
    options = cli.parse(parser)
    strategies, seeds = tft.comparison.split_list(options.strategy), tft.comparison.seeds(options.seeds)

    run = tft.runs.prepare(NAME, options)
    if run.finished:
        run.console.print((run.folder / "comparison.md").read_text(encoding="utf-8"), markup=False)
        return cli.DONE
    network = tft.runs.choose_network(options)
    data, task = tft.data.load(
        options.data, image_size=network.image_size, seed=options.seed, limit=64 if options.smoke else None
    )
    source = tft.runs.old_data(
        options.source or ("demo" if network.is_demo else None), network.image_size, options.seed
    )
    metric = tft.comparison.metric_of(task)
    parts = dict(enumerate(tft.comparison.folds(data, options.folds, options.seed))) if options.folds else {-1: data}

    def build() -> keras.Model:
        return tft.builders.image_classifier(
            network.backbone, task.num_outputs, image_size=network.image_size, weights=network.weights
        )

    if options.dry_run:
        trials = len(strategies) * len(seeds) * len(parts)
        run.console.print(f"{trials} trials of {len(data.train)} training examples; nothing was written")
        return cli.DONE
    trials = tft.runs.begin_trials(run)
    for strategy in strategies:
        for seed in seeds:
            for fold, part in parts.items():
                if (strategy, seed, fold) in {trial.key for trial in trials}:
                    continue
                with tft.devices(options.devices, options.precision):
                    trial = tft.comparison.run_trial(
                        strategy,
                        build,
                        task,
                        part,
                        seed=seed,
                        fold=fold,
                        epochs=options.epochs,
                        batch_size=options.batch_size,
                        max_steps=2 if options.smoke else None,
                        source=source,
                    )
                trials = tft.runs.add_trial(run, trials, trial, metric)
    return tft.runs.finish_trials(run, trials, data, metric)


if __name__ == "__main__":
    cli.run_recipe(main)
