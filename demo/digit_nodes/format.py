"""What the digit model's inputs and outputs mean. Needs torch alone.

A video is 16 grey frames of 64x64 pixels in [0, 1]. Its latent has the shape Wan's has, [b, 16, 16, 16, 16] =
[batch, channels, frames, height, width]: a channel is one pixel of a 4x4 tile, so there is no autoencoder. Latents
here are what the model sees; ComfyUI stores them through Wan21.process_out, and process_in brings them back.
"""

import torch
import torch.nn.functional as F

FRAMES, SIZE, TILE = 16, 64, 4
CHANNELS = TILE * TILE
LATENT_SHAPE = (CHANNELS, FRAMES, SIZE // TILE, SIZE // TILE)
# Grey level g is stored as (g - GREY_MEAN) / GREY_STD: about zero mean and unit variance over the data.
GREY_MEAN, GREY_STD = 0.1, 0.25

DIGITS = ("none", "0", "1", "2", "3", "4", "5", "6", "7", "8", "9")  # "none": no class, for guidance
TEXT_DIM = 4096  # what ComfyUI expects of a Wan model
WORDS = 8  # tokens of a prompt
_WORD_DIMS = TEXT_DIM // (len(DIGITS) * WORDS)


def conditioning(digits) -> torch.Tensor:
    """Digits (entries of DIGITS) -> prompt embeddings, float32 [len(digits), WORDS, TEXT_DIM].

    Each word of each digit owns a block of dimensions: all prompts are orthogonal, and of unit mean square like a
    text encoder's.
    """
    out = torch.zeros(len(digits), WORDS, TEXT_DIM)
    for row, digit in enumerate(digits):
        if digit not in DIGITS:
            raise ValueError(f"digit is {digit!r}; it must be one of {', '.join(DIGITS)}")
        for word in range(WORDS):
            start = (DIGITS.index(digit) * WORDS + word) * _WORD_DIMS
            out[row, word, start : start + _WORD_DIMS] = (TEXT_DIM / _WORD_DIMS) ** 0.5
    return out


def frames_to_latent(frames: torch.Tensor) -> torch.Tensor:
    """Frames [b, t, h, w] in [0, 1] -> latents [b, 16, t, h/4, w/4]."""
    latent = F.pixel_unshuffle(frames.unsqueeze(2), TILE)  # [b, t, 16, h/4, w/4]
    return (latent.transpose(1, 2) - GREY_MEAN) / GREY_STD


def latent_to_frames(latent: torch.Tensor) -> torch.Tensor:
    """Latents [b, 16, t, h, w] -> frames [b, t, 4h, 4w], clamped to [0, 1]."""
    if latent.ndim != 5 or latent.shape[1] != CHANNELS:
        raise ValueError(
            f"samples has shape {list(latent.shape)}; the digit model's latents are "
            f"[batch, {CHANNELS}, frames, height, width]: use EmptyHunyuanLatentVideo"
        )
    grey = latent.transpose(1, 2) * GREY_STD + GREY_MEAN
    return F.pixel_shuffle(grey, TILE).squeeze(2).clamp(0, 1)
