"""How the branches of a guided step are combined."""

from torch import Tensor


def classifier_free_guidance(noise_pred: Tensor, scale: float) -> Tensor:
    """Moves the prediction away from the negative prompt's (Ho and Salimans 2022, eq. 6, as Imagen writes it).

    Args:
        noise_pred: (2 B, 4, h, w), the B predictions for the negative prompts first.
        scale: 1 is no guidance.

    Returns:
        (B, 4, h, w).
    """
    negative, positive = noise_pred.chunk(2)
    return negative + scale * (positive - negative)
