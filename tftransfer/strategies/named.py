"""The named strategies: each a function that returns a tuple of phases, with its source and when to use it."""

from __future__ import annotations

import dataclasses

from tftransfer.adapters import Lora
from tftransfer.averages import Ema, WiseFt
from tftransfer.errors import check
from tftransfer.penalties import EWC, L2SP, DistillFromSource
from tftransfer.strategies.phase import Phase, Strategy, scaled

_PROBE = Phase("probe", "head", 10, 9e-3, weight_decay=1.0)
_TUNE = Phase("fine-tune", "all", 20, 5e-4, layer_decay=0.9, weight_decay=0.05, average=Ema(4.0))


def linear_probe(
    weight_decay: float = 1.0,
    augmentation: str = "none",
    epochs: int | None = None,
    learning_rate: float | None = None,
) -> Strategy:
    """Train the head alone: the strongest choice for a handful of examples, and the cheapest.

    Args:
        weight_decay: Of the head, see `Phase`; more of it learns less by heart. Defaults to 1.
        augmentation: One of `AUGMENTATIONS`; best with `views`, which can be kept. Defaults to `"none"`.
        epochs: Total passes over the training split. Defaults to 30.
        learning_rate: Peak rate. Defaults to 1e-2.

    Source: Kornblith et al. 2019, "Do Better ImageNet Models Transfer Better?", arXiv:1805.08974.

    Example:
        >>> [phase.selector for phase in linear_probe()]
        ['head']
    """
    phase = Phase("linear probe", "head", 30, 1e-2, weight_decay=weight_decay, augmentation=augmentation)
    return scaled((phase,), epochs, learning_rate)


def full(
    layer_decay: float = 1.0,
    augmentation: str = "light",
    schedule: str = "cosine",
    optimizer: str = "adamw",
    epochs: int | None = None,
    learning_rate: float | None = None,
) -> Strategy:
    """Train everything at once: for many examples, or a task far from the backbone's.

    Args:
        layer_decay: Factor on the rate per depth group below the head, in (0, 1]. Defaults to 1.
        augmentation, schedule, optimizer: See `Phase`. Augmentation defaults to `"light"`, the others as there.
        epochs: Total passes over the training split. Defaults to 20.
        learning_rate: Peak rate. Defaults to 3e-4: at three times as much small networks can lose all they know.

    Source: Girshick et al. 2014, "Rich Feature Hierarchies", arXiv:1311.2524; Kornblith et al. 2019, arXiv:1805.08974.

    Example:
        >>> [phase.selector for phase in full()]
        ['all']
    """
    phase = Phase("full", "all", 20, 3e-4, layer_decay, schedule, augmentation=augmentation, optimizer=optimizer)
    return scaled((phase,), epochs, learning_rate)


def partial(
    last: int | None = None,
    layers: str = "",
    augmentation: str = "light",
    epochs: int | None = None,
    learning_rate: float | None = None,
) -> Strategy:
    """Train the head and some layers: between a probe and full fine-tuning.

    Args:
        last: How many of the topmost depth groups of the backbone train, at least 1. Defaults to 2.
        layers: In place of `last`, a selector: `"from:LAYER"`, `"LAYER_A:LAYER_B"`, `"re:PATTERN"`,
            `"groups:A+B"`. Defaults to none.
        augmentation: One of `AUGMENTATIONS`. Defaults to `"light"`.
        epochs: Total passes over the training split. Defaults to 20.
        learning_rate: Peak rate. Defaults to 1e-3.

    Source: Yosinski et al. 2014, "How Transferable Are Features in Deep Neural Networks?", arXiv:1411.1792.

    Example:
        >>> partial(last=3)[0].selector, partial(layers="from:block_12")[0].selector
        ('last:3', 'from:block_12')
    """
    check(last is None or (isinstance(last, int) and last >= 1), "last", "a whole number from 1", last)
    check(last is None or not layers, "last", "left out where `layers` says what trains", last)
    phase = Phase("partial", layers or f"last:{last or 2}", 20, 1e-3, augmentation=augmentation)
    return scaled((phase,), epochs, learning_rate)


def freeze_then_unfreeze(
    augmentation: str = "strong", epochs: int | None = None, learning_rate: float | None = None
) -> Strategy:
    """Probe first, then train everything from there: a good default from a few hundred examples up.

    Starting from a trained head keeps the first steps from spoiling the features.

    Args:
        augmentation: One of `AUGMENTATIONS`, for the second phase. Defaults to `"strong"`.
        epochs: Total passes over the training split, shared one to two. Defaults to 30.
        learning_rate: Peak rate of the second phase; the probe's is 18 times as high. Defaults to 5e-4.

    Source: Kumar et al. 2022, "Fine-Tuning can Distort Pretrained Features" (LP-FT), arXiv:2202.10054.

    Example:
        >>> [(phase.selector, phase.epochs) for phase in freeze_then_unfreeze(epochs=6)]
        [('head', 2), ('all', 4)]
    """
    return scaled((_PROBE, dataclasses.replace(_TUNE, augmentation=augmentation)), epochs, learning_rate)


def gradual(
    stages: int = 3, augmentation: str = "strong", epochs: int | None = None, learning_rate: float | None = None
) -> Strategy:
    """Unfreeze from top to stem, stage by stage, each layer group at a lower rate than the one above it.

    Use it where training everything at once forgets too much. As many stages as the network has depth groups unfreeze
    group by group; more are refused. The optimizer's moments are carried over.

    Args:
        stages: Into how many parts the backbone's depth groups are divided, at least 1. Defaults to 3.
        augmentation: One of `AUGMENTATIONS`, after the probe. Defaults to `"strong"`.
        epochs: Total passes over the training split. Defaults to 10 for the probe and 18 shared by the stages.
        learning_rate: Peak rate of the stages; the probe's is 18 times as high. Defaults to 5e-4.

    Source: Howard & Ruder 2018, "Universal Language Model Fine-tuning" (ULMFiT), arXiv:1801.06146.

    Example:
        >>> [phase.selector for phase in gradual(stages=3)]
        ['head', 'last:1/3', 'last:2/3', 'all']
    """
    check(isinstance(stages, int) and stages >= 1, "stages", "a whole number from 1", stages)
    steps = tuple(
        dataclasses.replace(
            _TUNE,
            name=f"unfreeze {stage} of {stages}",
            selector=f"last:{stage}/{stages}" if stage < stages else "all",
            epochs=max(18 // stages, 1),
            augmentation=augmentation,
            carry_moments=True,
        )
        for stage in range(1, stages + 1)
    )
    return scaled((_PROBE, *steps), epochs, learning_rate)


def discriminative(
    layer_decay: float = 0.7,
    augmentation: str = "strong",
    epochs: int | None = None,
    learning_rate: float | None = None,
) -> Strategy:
    """Probe, then train everything in one cycle with a learning rate that falls from group to group towards the stem.

    Use it where low layers fit already and high ones must change: most photographs.

    Args:
        layer_decay: Factor on the rate per depth group below the head, in (0, 1]. Defaults to 0.7.
        augmentation: One of `AUGMENTATIONS`, after the probe. Defaults to `"strong"`.
        epochs: Total passes over the training split, shared one to two. Defaults to 30.
        learning_rate: Peak rate of the head in the second phase. Defaults to 1e-3.

    Source: Howard & Ruder 2018, arXiv:1801.06146; Smith & Topin 2018, arXiv:1708.07120 (one cycle).

    Example:
        >>> discriminative()[1].schedule
        'one_cycle'
    """
    tune = dataclasses.replace(
        _TUNE,
        learning_rate=1e-3,
        layer_decay=layer_decay,
        schedule="one_cycle",
        warmup=0.3,
        augmentation=augmentation,
    )
    return scaled((_PROBE, tune), epochs, learning_rate)


def norm_only(epochs: int | None = None, learning_rate: float | None = None) -> Strategy:
    """Probe, then train scale and offset of the normalisation layers with the head.

    Use it for few examples whose pictures differ in colour, light or sharpness from the backbone's.

    Args:
        epochs: Total passes over the training split, shared one to two. Defaults to 30.
        learning_rate: Peak rate of the second phase. Defaults to 2e-3.

    Source: Frankle et al. 2021, "Training BatchNorm and Only BatchNorm", arXiv:2003.00152.
    """
    return _kind("norm", epochs, learning_rate)


def bias_only(epochs: int | None = None, learning_rate: float | None = None) -> Strategy:
    """Probe, then train biases and offsets with the head: a few parameters in a hundred, in large networks fewer.

    Use it where many tuned copies of one backbone must be kept.

    Args:
        epochs: Total passes over the training split, shared one to two. Defaults to 30.
        learning_rate: Peak rate of the second phase. Defaults to 2e-3.

    Source: Ben Zaken et al. 2022, "BitFit", arXiv:2106.10199.
    """
    return _kind("bias", epochs, learning_rate)


def attention_only(epochs: int | None = None, learning_rate: float | None = None) -> Strategy:
    """Probe, then train the attention (squeeze-and-excitation counts) with the head.

    Use it for transformers and for networks with squeeze-and-excitation; others have nothing to match.

    Args:
        epochs: Total passes over the training split, shared one to two. Defaults to 30.
        learning_rate: Peak rate of the second phase. Defaults to 2e-3.

    Source: Touvron et al. 2022, "Three things everyone should know about Vision Transformers", arXiv:2203.09795.
    """
    return _kind("attention", epochs, learning_rate)


def head_and_norm(epochs: int | None = None, learning_rate: float | None = None) -> Strategy:
    """Train head and normalisation layers together from the start: one phase, for a quick first model.

    Args:
        epochs: Total passes over the training split. Defaults to 20.
        learning_rate: Peak rate. Defaults to 5e-3.

    Source: Mudrakarta et al. 2019, "K for the Price of 1", arXiv:1810.10703.

    Example:
        >>> [phase.selector for phase in head_and_norm()]
        ['norm']
    """
    return scaled((Phase("head and norm", "norm", 20, 5e-3, weight_decay=1.0),), epochs, learning_rate)


def lora(
    rank: int = 4,
    where: str = "all",
    alpha: float | None = None,
    augmentation: str = "strong",
    epochs: int | None = None,
    learning_rate: float | None = None,
) -> Strategy:
    """Probe, then train a low-rank change of the kernels with the head; a run writes it as `adapter.safetensors`.

    Use it for large networks, or where many tasks share one backbone.

    Args:
        rank, where, alpha: See `adapters.Lora`. Default to 4, every Dense layer and convolution, and the rank.
        augmentation: One of `AUGMENTATIONS`, after the probe. Defaults to `"strong"`.
        epochs: Total passes over the training split, shared one to two. Defaults to 30.
        learning_rate: Peak rate of the second phase. Defaults to 2e-3.

    Source: Hu et al. 2021, arXiv:2106.09685.

    Example:
        >>> lora(rank=8)[1].adapter.rank
        8
    """
    tune = dataclasses.replace(
        _TUNE,
        name="LoRA",
        selector="head",
        learning_rate=2e-3,
        layer_decay=1.0,
        adapter=Lora(rank, where, alpha),
        augmentation=augmentation,
    )
    return scaled((_PROBE, tune), epochs, learning_rate)


def l2_sp(
    strength: float = 0.1,
    augmentation: str = "strong",
    epochs: int | None = None,
    learning_rate: float | None = None,
) -> Strategy:
    """Probe, then train everything on a leash to where it began.

    Use it where the tuned network must still be good at what the backbone knew, and nothing of that is at hand.

    Args:
        strength: Of the pull, see `penalties.L2SP`. Defaults to 0.1.
        augmentation, epochs, learning_rate: As for `freeze_then_unfreeze`.

    Source: Li et al. 2018, arXiv:1802.01483.
    """
    return _penalised(L2SP(strength), augmentation, epochs, learning_rate)


def ewc(
    strength: float = 0.1,
    augmentation: str = "strong",
    epochs: int | None = None,
    learning_rate: float | None = None,
) -> Strategy:
    """Probe, then train everything on a leash that is short for the weights that matter to the old task.

    Use it in place of `l2_sp` where pictures of the old task are at hand (`source`); without them the importance is
    measured on the features of the new task's pictures.

    Args:
        strength: Of the pull, see `penalties.EWC`. Defaults to 0.1.
        augmentation, epochs, learning_rate: As for `freeze_then_unfreeze`.

    Source: Kirkpatrick et al. 2017, arXiv:1612.00796.
    """
    return _penalised(EWC(strength), augmentation, epochs, learning_rate)


def distill_from_source(
    strength: float = 1.0,
    temperature: float = 2.0,
    augmentation: str = "strong",
    epochs: int | None = None,
    learning_rate: float | None = None,
) -> Strategy:
    """Probe, then train everything while the old task's answers to the new pictures stay as they were.

    Use it where weights may move far as long as the function stays. Without a `source` there is no old head: the
    features themselves are kept.

    Args:
        strength, temperature: See `penalties.DistillFromSource`. Default to 1 and 2.
        augmentation, epochs, learning_rate: As for `freeze_then_unfreeze`.

    Source: Li & Hoiem 2016, "Learning without Forgetting", arXiv:1606.09282.
    """
    return _penalised(DistillFromSource(strength, temperature), augmentation, epochs, learning_rate)


def wise_ft(
    steps: int = 10,
    augmentation: str = "strong",
    epochs: int | None = None,
    learning_rate: float | None = None,
) -> Strategy:
    """Probe, train everything, then go back along the line to the probe as far as validation allows.

    Use it where the network must also hold on pictures that differ from the training data, or must not forget.

    Args:
        steps: Into how many parts the line is divided, see `averages.WiseFt`. Defaults to 10.
        augmentation, epochs, learning_rate: As for `freeze_then_unfreeze`.

    Source: Wortsman et al. 2022, arXiv:2109.01903.
    """
    tune = dataclasses.replace(_TUNE, average=WiseFt(steps), augmentation=augmentation)
    return scaled((_PROBE, tune), epochs, learning_rate)


def _kind(selector: str, epochs: int | None, learning_rate: float | None) -> Strategy:
    tune = Phase(f"{selector} only", selector, 20, 2e-3, weight_decay=0.0, average=Ema(4.0))
    return scaled((_PROBE, tune), epochs, learning_rate)


def _penalised(
    penalty: L2SP | EWC | DistillFromSource, augmentation: str, epochs: int | None, learning_rate: float | None
) -> Strategy:
    return scaled(
        (_PROBE, dataclasses.replace(_TUNE, penalty=penalty, augmentation=augmentation)), epochs, learning_rate
    )
