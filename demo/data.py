"""Moving handwritten digits: scikit-learn's bundled 8x8 scans, drawn large, on bouncing paths."""

import math

import torch
import torch.nn.functional as F
from digit_nodes.format import FRAMES, SIZE

GLYPH = 36  # side of a drawn digit in pixels, before its random scale
SCALE = (0.9, 1.12)
TURN = math.radians(10)
SPEED = (0.6, 3.0)  # pixels a frame, along each axis


def load_digits(test: bool, device="cpu"):
    """The scans of one side of a fixed 80/20 split, stratified by class.

    Returns (glyphs [n, 1, GLYPH, GLYPH] float32 in [0, 1], labels [n] int64).
    """
    from sklearn.datasets import load_digits as bundled
    from sklearn.model_selection import train_test_split

    data = bundled()
    sides = train_test_split(data.images, data.target, test_size=0.2, random_state=0, stratify=data.target)
    images, labels = (sides[1], sides[3]) if test else (sides[0], sides[2])
    images = torch.as_tensor(images, dtype=torch.float32, device=device).unsqueeze(1) / 16
    glyphs = F.interpolate(images, size=(GLYPH, GLYPH), mode="bicubic", align_corners=False).clamp(0, 1)
    return glyphs, torch.as_tensor(labels, dtype=torch.int64, device=device)


def _uniform(generator, shape, low, high):
    return low + (high - low) * torch.rand(shape, generator=generator, device=generator.device)


def render(glyphs: torch.Tensor, generator: torch.Generator, frames: int = FRAMES) -> torch.Tensor:
    """Draw each glyph on a random straight path that bounces off the borders.

    glyphs [b, 1, GLYPH, GLYPH] on the generator's device -> frames [b, frames, SIZE, SIZE] in [0, 1].
    """
    b = len(glyphs)
    scale = _uniform(generator, (b, 1), *SCALE) * (GLYPH / 2)  # half a side, in pixels
    angle = _uniform(generator, (b, 1), -TURN, TURN)
    margin = GLYPH / 2 * SCALE[1]
    room = SIZE - 2 * margin
    speed = _uniform(generator, (b, 1, 2), *SPEED)
    speed = speed * (torch.randint(0, 2, (b, 1, 2), generator=generator, device=speed.device) * 2 - 1)
    start = _uniform(generator, (b, 1, 2), 0, room)
    time = torch.arange(frames, device=speed.device).view(1, -1, 1)
    walk = (start + speed * time).remainder(2 * room)
    centre = margin + torch.where(walk > room, 2 * room - walk, walk) - SIZE / 2  # [b, frames, 2] from the middle

    # affine_grid maps an output position in [-1, 1] to a position in the glyph: rotate(out * SIZE/2 - centre) / scale
    cos, sin = (angle.cos() / scale).expand(b, frames), (angle.sin() / scale).expand(b, frames)
    x, y = centre.unbind(-1)
    theta = torch.stack(
        [cos * SIZE / 2, sin * SIZE / 2, -(cos * x + sin * y), -sin * SIZE / 2, cos * SIZE / 2, sin * x - cos * y],
        dim=-1,
    ).view(b * frames, 2, 3)
    grid = F.affine_grid(theta, (b * frames, 1, SIZE, SIZE), align_corners=False)
    repeated = glyphs.repeat_interleave(frames, dim=0)
    drawn = F.grid_sample(repeated, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return drawn.view(b, frames, SIZE, SIZE)
