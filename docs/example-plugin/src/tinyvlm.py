"""A stand-in for your framework: a vision encoder, and a language side that reads its tokens."""

import torch
from torch import nn

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


class Eye(nn.Module):
    """(B, 3, 32, 32) normalised pixels -> {"tokens": (B, 16, 24), "summary": (B, 24)}."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 24, kernel_size=8, stride=8)
        self.block = nn.TransformerEncoderLayer(24, 4, 48, dropout=0.0, batch_first=True)

    def forward(self, image):
        tokens = self.block(self.patches(image).flatten(2).transpose(1, 2))
        return {"tokens": tokens, "summary": tokens.mean(1)}


class TinyVLM(nn.Module):
    """Image and words in, logits over 20 words out."""

    def __init__(self):
        super().__init__()
        self.eye = Eye()
        self.words = nn.Embedding(20, 24)
        self.reader = nn.TransformerEncoderLayer(24, 4, 48, dropout=0.0, batch_first=True)
        self.head = nn.Linear(24, 20)

    def forward(self, image, words):
        seen = self.eye(image)["tokens"]
        return self.head(self.reader(torch.cat([seen, self.words(words)], dim=1))[:, -1])
