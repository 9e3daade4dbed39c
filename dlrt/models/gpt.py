"""A plain GPT: RMS norms before attention and perceptron, rotary positions, a head tied to the embedding."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def rotated(x: Tensor) -> Tensor:
    """x (N, heads, T, d), pairs of features turned by angles that grow with the position. Su et al. 2021."""
    half = x.shape[3] // 2
    speed = 10_000 ** (-torch.arange(half, device=x.device) / half)
    angle = torch.arange(x.shape[2], device=x.device)[:, None] * speed
    cos, sin, (a, b) = angle.cos().to(x.dtype), angle.sin().to(x.dtype), x.chunk(2, dim=3)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=3)


class Block(nn.Module):
    """x + attention(norm(x)), and then x + perceptron(norm(x)), with four times the width and ReLU²."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        q, k, v = (
            layer(y).unflatten(2, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v)
        )
        y = F.scaled_dot_product_attention(rotated(q), rotated(k), v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.down(self.up(self.norm2(x)).relu().square())


class GPT(nn.Module):
    """Tokens (N, T), of so many classes, to logits (N, classes, T) for the token after each.

    shape is (T,) of the training data; other lengths work as well. 819,200 weights.
    """

    def __init__(
        self,
        shape: tuple[int] = (128,),
        classes: int = 256,
        width: int = 128,
        depth: int = 4,
        heads: int = 4,
    ) -> None:
        super().__init__()
        if len(shape) != 1 or width % (2 * heads):
            raise ValueError(
                f"GPT needs tokens (T,) and a width that {2 * heads} divides, got {shape} and {width}"
            )
        self.shape = shape
        self.words = nn.Embedding(classes, width)
        nn.init.normal_(self.words.weight, std=0.02)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.RMSNorm(width), nn.Linear(width, classes, bias=False)
        self.head.weight = self.words.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.words(tokens)))).transpose(1, 2)

    @torch.no_grad()
    def continued(self, tokens: Tensor, length: int, generator: torch.Generator | None = None) -> Tensor:
        """Tokens (T,) and as many more, each drawn from what the last ones let expect."""
        for _ in range(length):
            p = self(tokens[None, -self.shape[0] :])[0, :, -1].softmax(0)
            tokens = torch.cat([tokens, torch.multinomial(p, 1, generator=generator)])
        return tokens
