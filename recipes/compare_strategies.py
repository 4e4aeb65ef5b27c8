"""Compare fine-tuning strategies on one data set: the same network, the same budget, several seeds.

    python recipes/compare_strategies.py                                         # on the digits, with forgetting
    python recipes/compare_strategies.py --data PHOTOS --strategy full,lora:rank=8 --seeds 0,1,2 --folds 5

With `--folds K` strategies are compared by cross-validation on the training split, and the test split is not looked
at: choose so, then measure the choice without it. Writes comparison.json, comparison.md and comparison.png; the same
command with the same --out goes on after the last trial of a run that was stopped, if versions are the same.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import tftransfer as tft
from tftransfer import cli
from tftransfer.versions import versions

if TYPE_CHECKING:
    import keras

NAME = "compare_strategies"
PHOTOS = "linear_probe,full,freeze_then_unfreeze,l2_sp,wise_ft"
DIGITS = "linear_probe," + ",".join(  # a mirrored digit is another sign
    f"{name}:augmentation=light_no_flip" for name in ("full", "freeze_then_unfreeze", "l2_sp", "ewc", "wise_ft")
)


def main() -> int:
    """Train every strategy with every seed, and put the results side by side."""
    parser = cli.recipe_parser(
        NAME,
        __doc__,
        strategy_help=f"comma list of NAME[:OPTION=VALUE,...] (default: {PHOTOS}; on the digits with ewc, no flips)",
        epochs_help="30, the budget of every strategy",
    )
    parser.set_defaults(epochs=30)
    parser.add_argument("--seeds", default="0,1,2", help="comma list (default: %(default)s)")
    parser.add_argument("--folds", type=cli.at_least(2), help="cross-validate on the training split (default: test)")
    parser.add_argument(
        "--train-on-validation",
        action="store_true",
        help="the validation split trains too, once what trains is chosen: as for the model that is used at last",
    )
    parser.add_argument("--source", help="measure forgetting on this (demo, or as --data; default: demo if it fits)")
    options = cli.parse(parser)
    texts = tft.comparison.split_list(options.strategy or (DIGITS if options.data == "demo" else PHOTOS))
    choices = [tft.advice.Choice(text, options.epochs, options.learning_rate) for text in texts]
    seeds = cli.seeds(options.seeds)
    if options.train_on_validation:
        tft.comparison.check_validation_is_free(choices)

    run = tft.runs.prepare(NAME, options)
    if run.finished:
        run.console.print((run.folder / tft.comparison.MARKDOWN).read_text(encoding="utf-8"))
        return cli.DONE
    network = tft.choices.choose_network(options)
    data, task = tft.data.load(
        options.data,
        image_size=network.image_size,
        seed=options.seed,
        limit=64 if options.smoke else None,
        cache_dir=options.cache_dir,
    )
    parts = dict(enumerate(tft.comparison.folds(data, options.folds, options.seed))) if options.folds else {-1: data}

    def build() -> keras.Model:
        return tft.builders.image_classifier(
            network.backbone,
            task.num_outputs,
            image_size=network.image_size,
            weights=network.weights,
            trust=options.trust,
        )

    with tft.devices(options.devices, options.precision) as devices:
        model = build()
    for choice in choices:
        tft.planning.check_strategy(model, choice.planned, task)
    source = tft.choices.old_task(options.source or ("demo" if network.is_demo else None), network, model, options)
    tft.runs.announce(run, data, devices)
    if options.dry_run:
        planned = len(choices) * len(seeds) * len(parts)
        run.console.print(f"{planned} trials; nothing was written, the run would go to {run.folder}", soft_wrap=True)
        return cli.DONE

    with tft.runs.held(run):
        about = _about(options, network, data, devices)
        metric = task.main_metric
        tft.bundles.begin(run.folder, run.configuration, again=run.again)
        trials = tft.comparison.begin(run.folder, about)
        done = {trial.key for trial in trials}
        for choice in choices:
            for seed in seeds:
                for fold, part in parts.items():
                    if (choice.text, seed, fold) in done:
                        continue
                    with tft.devices(options.devices, options.precision):
                        trial = tft.comparison.run_trial(
                            choice,
                            build,
                            task,
                            part,
                            seed=seed,
                            fold=fold,
                            batch_size=options.batch_size,
                            max_steps=2 if options.smoke else None,
                            source=source,
                            train_on_validation=options.train_on_validation,
                            cache=options.cache,
                            cache_dir=options.cache_dir,
                        )
                    trials = (*trials, trial)
                    run.console.print(trial.line(metric))
                    for reason in trial.reasons:
                        run.console.print(f"  {reason}", soft_wrap=True)
                    tft.comparison.write(run.folder, trials, metric, about)
        compared = tft.comparison.write(run.folder, trials, metric, about)
        tft.bundles.finish(run.folder, run.configuration, data={"fingerprint": data.fingerprint, "splits": data.splits})
        tft.runs.print_table(run.console, compared)
        run.console.print(f"Table: {run.folder / tft.comparison.MARKDOWN}", soft_wrap=True)
        return cli.DONE


def _about(options: Any, network: Any, data: Any, devices: Any) -> dict[str, Any]:
    """Return what a reader of the table must know, and what must be the same when a comparison goes on."""
    return {
        "backbone": network.backbone,
        "weights": network.weights and Path(network.weights).name,
        "image_size": list(network.image_size),
        "data": data.name,
        "fingerprint": data.fingerprint,
        "train": len(data.train) + options.train_on_validation * len(data.validation),
        "test": len(data.test),
        "quarantined": len(data.quarantined),
        "folds": options.folds,
        "train_on_validation": options.train_on_validation,
        "epochs": options.epochs,
        "batch_size": options.batch_size,
        "learning_rate": options.learning_rate,
        "precision": devices.precision,
        "versions": versions(),
    }


if __name__ == "__main__":
    cli.run_recipe(main)
