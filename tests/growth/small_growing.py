"""Modules that tests of growth share."""

from torch import Tensor, nn


class TiedWithHidden(nn.Module):
    """A head that is the embedding, and hidden neurons of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.hidden = nn.Embedding(11, 8), nn.Linear(8, 16)
        self.back, self.head = nn.Linear(16, 8), nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        return self.head(x + self.back(self.hidden(x).relu()))
