"""The loss of a reconstructed image: every pixel is a coin whose bias is the pixel's intensity."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def pixel_nats(outputs: Float[Tensor, "rows pixels"], targets: Float[Tensor, "rows pixels"]) -> Float[Tensor, " rows"]:
    """Return each image's summed cross-entropy against its intensities 0..1, in nats."""
    return F.binary_cross_entropy_with_logits(outputs, targets, reduction="none").sum(1)


def sample_pixels(outputs: Float[Tensor, "rows pixels"], seeds: Sequence[int]) -> Float[Tensor, "rows pixels"]:
    """Draw each pixel black or white as the model predicts it, one seed an image."""
    draws = [torch.rand(outputs.shape[1], generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return (torch.stack(draws).to(outputs.device) < torch.sigmoid(outputs)).to(outputs.dtype)
