"""A second rival, where torch and torchvision are installed: PyTorch's tutorial on transfer learning, written straight.

https://pytorch.org/tutorials/beginner/transfer_learning_tutorial: MobileNetV2 of the same width as a fixed feature
extractor, random crops and flips of pictures that two worker processes decode in every epoch, SGD on the last layer.
Weights are random, which costs the same; accuracies are not to be compared.
"""

from __future__ import annotations

import importlib.util
from importlib import metadata
from pathlib import Path

INSTALLED = all(importlib.util.find_spec(name) for name in ("torch", "torchvision"))


def versions() -> dict[str, str]:
    """Return the versions of what this rival is made of."""
    return {name: metadata.version(name) for name in ("torch", "torchvision")}


def train(folder: Path, side: int, width: float, epochs: int) -> float:
    """Train the last layer on nine tenths of `FOLDER/CLASS/*.jpg`; returns the last validation accuracy.

    Args:
        folder: With a folder per class.
        side: Of the pictures, in pixels.
        width: Of MobileNetV2.
        epochs: Passes over the training pictures, each followed by validation.
    """
    import torch
    from torchvision import datasets, models, transforms

    torch.manual_seed(0)
    seen = transforms.Compose(
        [transforms.RandomResizedCrop(side), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
    )
    plain = transforms.Compose([transforms.Resize((side, side)), transforms.ToTensor()])
    count = len(datasets.ImageFolder(folder))
    order = torch.randperm(count).tolist()
    training, validation = (
        torch.utils.data.DataLoader(
            torch.utils.data.Subset(datasets.ImageFolder(folder, how), part), 32, shuffle=how is seen, num_workers=2
        )
        for how, part in ((seen, order[count // 10 :]), (plain, order[: count // 10]))
    )
    model = models.mobilenet_v2(width_mult=width)
    for parameter in model.parameters():
        parameter.requires_grad = False
    classes = len(datasets.ImageFolder(folder).classes)
    model.classifier[1] = torch.nn.Linear(model.classifier[1].in_features, classes)
    loss = torch.nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.classifier[1].parameters(), lr=1e-3, momentum=0.9)
    right = 0
    for _ in range(epochs):
        model.train()
        for pictures, targets in training:
            optimizer.zero_grad()
            loss(model(pictures), targets).backward()
            optimizer.step()
        model.eval()
        with torch.no_grad():
            right = sum(int((model(pictures).argmax(1) == targets).sum()) for pictures, targets in validation)
    return right / max(count // 10, 1)
