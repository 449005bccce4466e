"""A model as a library builds it: transformers' vision transformer, dictionaries in and dictionaries out.

    pip install 'autocompress[hf]'
    autocompress search docs/examples/library.py:vit --budget size=10% --epochs 4

It reads scikit-learn's handwritten digits. Nothing is downloaded: the first use trains the network (seeded, a minute on
one core) and keeps it in the user's cache folder.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification

from autocompress import ClassificationTask
from autocompress.tasks.digits import splits
from autocompress.tasks.trained import trained

SEED, EPOCHS, BATCH = 0, 60, 32
VERSION = 1  # raise when the network or its training changes, so that an old cache is not read


class Digits(ClassificationTask):
    """Batches are what the model's `forward` takes: a dictionary of arguments."""

    def prepare(self, inputs: Tensor) -> dict[str, Tensor]:
        return {"pixel_values": inputs}


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
