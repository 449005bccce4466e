"""A model as a library builds it: transformers' vision transformer, dictionaries in and dictionaries out.

    pip install 'autocompress[hf]'
    autocompress search docs/examples/library.py:vit --budget size=10% --epochs 4

It reads scikit-learn's handwritten digits. Nothing is downloaded: the first use trains the network (seeded, a minute on
one core) and keeps it in the user's cache folder.
"""

from __future__ import annotations

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification

from autocompress import ClassificationTask
from autocompress.tasks.trained import trained

SEED, EPOCHS, BATCH = 0, 60, 32
VERSION = 1  # raise when the network or its training changes, so that an old cache is not read


class Digits(ClassificationTask):
    """Batches are what the model's `forward` takes: a dictionary of arguments."""

    def prepare(self, inputs: Tensor) -> dict[str, Tensor]:
        return {"pixel_values": inputs}


def splits() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Images (n, 1, 8, 8) in [0, 1]: 60% to train on, 20% in `val` and 20% in `test`, with the same mix of digits."""
    flat, y = load_digits(return_X_y=True)
    x = (flat / 16).astype(np.float32).reshape(-1, 1, 8, 8)
    train_x, rest_x, train_y, rest_y = train_test_split(x, y, test_size=0.4, random_state=SEED, stratify=y)
    val_x, test_x, val_y, test_y = train_test_split(rest_x, rest_y, test_size=0.5, random_state=SEED, stratify=rest_y)
    return {"train": (train_x, train_y), "val": (val_x, val_y), "test": (test_x, test_y)}


def network() -> nn.Module:
    """Sixteen patches of 2 x 2 pixels, four layers of four heads (Dosovitskiy et al. 2020, 2010.11929, made small)."""
    config = ViTConfig(
        image_size=8,
        patch_size=2,
        num_channels=1,
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=128,
        num_labels=10,
    )
    return ViTForImageClassification(config)


def vit() -> ClassificationTask:
    """The task."""
    return Digits(
        lambda: trained(f"digits-vit-v{VERSION}", network, train, SEED), **splits(), name="digits-vit", batch_size=BATCH
    )


def train(model: nn.Module) -> None:
    """AdamW and one cycle."""
    task = Digits(model, **splits(), batch_size=BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    steps = EPOCHS * len(task.batches("train", SEED))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps)
    model.train()
    for epoch in range(EPOCHS):
        for batch in task.batches("train", SEED + epoch):
            optimizer.zero_grad()
            task.loss(model(**batch.inputs), batch).backward()
            optimizer.step()
            schedule.step()
