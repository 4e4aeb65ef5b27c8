"""Image classification: from pictures to a report and a served model.

    python recipes/image_classification.py                   # handwritten digits, nothing to download
    python recipes/image_classification.py --data PHOTOS     # PHOTOS/CLASS/*.jpg, ImageNet weights

The task follows from the labels: one class per picture, or several separated by `|` in a table; `--task regression`
learns numbers. Writes a folder with model.keras, report.html, report.json, serving/1 (a verified SavedModel) and more.
Expected on the digits: test accuracy 0.98 or more, in under two minutes of training on two cores.
"""

import tftransfer as tft
from tftransfer import cli

NAME = "image_classification"


def main() -> int:
    """Read the data, fine-tune, measure, publish."""
    parser = cli.recipe_parser(NAME, __doc__)
    parser.add_argument("--task", default="auto", help="auto, single_label, multi_label, regression (default: auto)")
    parser.add_argument("--hidden", type=int, nargs="*", default=(), help="sizes of hidden layers in the head")
    parser.add_argument("--dropout", type=float, default=0.2, help="share dropped in the head (default: %(default)s)")
    parser.add_argument("--label-smoothing", type=float, default=0.0, help="in [0, 1) (default: %(default)s)")
    parser.add_argument("--patience", type=cli.at_least(1), help="end a phase after so many epochs without progress")
    parser.add_argument("--balance", action="store_true", help="give every class the same total weight")
    parser.add_argument("--source", help="what the backbone was trained on: measure forgetting (demo, or as --data)")
    parser.add_argument(
        "--checks",
        default="",
        help="comma list of further ones: labels (which are likely wrong), duplicates (pictures in two splits)",
    )
    parser.add_argument(
        "--remove-duplicates", action="store_true", help="train without pictures that are in another split too"
    )
    parser.add_argument(
        "--time-limit",
        type=cli.duration,
        metavar="SECONDS|90m|2h",
        help="end training then, evaluate and export the best so far; the same command goes on (default: no limit)",
    )
    options = cli.parse(parser)
    import keras  # after TensorFlow was loaded quietly

    run = tft.runs.prepare(NAME, options)
    if run.finished:
        return tft.runs.show_finished(run)
    keras.utils.set_random_seed(options.seed)
    choice = tft.choices.strategy_choice(options)
    network = tft.choices.choose_network(options)
    data, task = tft.data.load(
        options.data,
        image_size=network.image_size,
        task_kind=options.task,
        seed=options.seed,
        label_smoothing=options.label_smoothing,
        balance=options.balance,
        limit=64 if options.smoke else None,
        cache_dir=options.cache_dir,
    )
    data, found = tft.runs.without_duplicates(data) if options.remove_duplicates else (data, tft.report.Findings())
    with tft.devices(options.devices, options.precision) as devices:
        model = tft.builders.image_classifier(
            network.backbone,
            task.num_outputs,
            image_size=network.image_size,
            weights=network.weights,
            hidden=options.hidden,
            dropout=options.dropout,
            trust=options.trust,
        )
        model = tft.builders.in_units_of(model, data.train.targets) if task.kind == "regression" else model
    tft.planning.check_strategy(model, choice.planned, task)
    tft.runs.check_names(options.checks, task)
    source = tft.choices.old_task(options.source, network, model, options)
    if options.dry_run:
        return tft.runs.show_plan(run, model, data, choice, devices)

    with tft.runs.held(run):
        with tft.runs.features_folder(options, choice) as cache_dir:
            common = {
                "seed": options.seed,
                "batch_size": options.batch_size,
                "max_steps": 2 if options.smoke else None,
                "cache_dir": cache_dir,
            }
            chosen = choice(model, task, data, **common, decided=run.decisions.get("trains", ""))
            tft.runs.begin(run, data, devices, chosen)
            found += tft.runs.check_data(
                options.checks, model, task, data, seed=options.seed, batch_size=options.batch_size, cache_dir=cache_dir
            )
            history = tft.fine_tune(
                model,
                task,
                data,
                chosen.strategy,
                **common,
                output=run.folder,
                source=source,
                time_limit=run.seconds_left,
                cache=options.cache,
                quiet=options.quiet,
            )
        return tft.runs.finish(run, model, task, data, history, network, devices, chosen, source, found)


if __name__ == "__main__":
    cli.run_recipe(main)
