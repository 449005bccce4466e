"""Networks that a task trains at its first use and keeps in the user's cache folder."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import nn

from autocompress.files import cache_folder, write


def trained(
    name: str, network: Callable[[], nn.Module], train: Callable[[nn.Module], None], seed: int = 0
) -> nn.Module:
    """What `train` makes of `network()`, in evaluation mode: from the cache, or now, which `seed` decides.

    `name` stands for both, so it should have a version in it. Training is repeated where the file is absent, torn or
    of other shapes; one that cannot be written costs time, not the search.
    """
    path = cache_folder() / f"{name}-torch{torch.__version__.split('+')[0]}.safetensors"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = network()
        try:
            model.load_state_dict(load(path.read_bytes()))
        except (OSError, SafetensorError, RuntimeError):
            train(model)
            with contextlib.suppress(OSError):
                write(path, save(model.state_dict()))
    return model.eval()
