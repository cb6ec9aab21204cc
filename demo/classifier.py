"""A small digit classifier, trained on the same scans: it says which digit a video shows."""

from pathlib import Path

import torch
from digit_nodes.format import GREY_MEAN, GREY_STD
from safetensors.torch import load_file
from torch import nn

WEIGHTS = Path(__file__).parent / "weights" / "digit_classifier.safetensors"


class Classifier(nn.Module):
    """Frames [n, 1, 64, 64] in [0, 1] -> logits [n, 10]."""

    def __init__(self):
        super().__init__()
        layers = []
        for width_in, width, stride in ((1, 16, 2), (16, 32, 2), (32, 64, 2), (64, 64, 1), (64, 96, 1)):
            layers += [nn.Conv2d(width_in, width, 3, stride, padding=1), nn.GroupNorm(4, width), nn.GELU()]
        # 8x8 positions that each see 47 pixels: the one that sees the digit best speaks, wherever it is.
        self.layers = nn.Sequential(*layers, nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(96, 10))

    def forward(self, frames):
        return self.layers((frames - GREY_MEAN) / GREY_STD)

    @torch.no_grad()
    def recognise(self, videos: torch.Tensor):
        """Videos [b, t, 64, 64] -> (digits [b], confidence [b]): the mean of the frames' probabilities."""
        b, t = videos.shape[:2]
        logits = self(videos.flatten(0, 1).unsqueeze(1))
        confidence, digits = logits.softmax(-1).view(b, t, 10).mean(1).max(-1)
        return digits, confidence


def load(path=WEIGHTS) -> Classifier:
    model = Classifier()
    model.load_state_dict({name: w.float() for name, w in load_file(str(path)).items()})
    return model.eval()
