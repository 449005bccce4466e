"""Double precision on the fly is that of a model of doubles."""

import copy

import torch
from torch import Tensor, nn

from autocompress.precise import Doubles


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(20, 16)
        self.layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
        self.head = nn.Linear(16, 20)
        self.head.weight = self.words.weight
        self.register_buffer("offset", torch.randn(6, 16))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.words(tokens)
        x += self.offset
        kept = torch.zeros(len(tokens), 7, 16, dtype=x.dtype)
        kept[:, :6] = self.layer(x)
        return self.head(kept)


def test_outputs_are_those_of_a_model_of_doubles() -> None:
    torch.manual_seed(0)
    model, tokens = Encoder().eval(), torch.randint(0, 20, (3, 6))
    before = copy.deepcopy(model.state_dict())
    exact = copy.deepcopy(model).double()
    with torch.no_grad():
        expected, single = exact(tokens), model(tokens)
        with Doubles():
            found = model(tokens)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(single.double(), expected, rtol=1e-12, atol=1e-12)  # so the test can fail
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_what_is_written_to_keeps_its_type() -> None:
    memory = torch.zeros(3)
    with Doubles():
        memory += torch.full((3,), 0.1)
        memory[0] = torch.tensor(2.0, dtype=torch.float64)
        counts = torch.zeros(2, dtype=torch.long).add_(1)
        total = torch.add(memory, memory, out=torch.zeros(3))
    assert memory.dtype == torch.float32
    assert torch.equal(memory, torch.tensor([2.0, 0.1, 0.1]))
    assert torch.equal(counts, torch.ones(2, dtype=torch.long))
    assert torch.equal(total, 2 * memory)
