"""How the branches of a guided step are combined, and at which steps there are two."""

from torch import Tensor

GUIDANCE_SCALE = 6.5
"""The scale for a checkpoint that does not give one, as Kolors' own do not."""


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


def is_guided(timestep: Tensor, timesteps: Tensor, interval: tuple[float, float]) -> bool:
    """Says whether a prediction lies in the interval of guidance (Kynkäänniemi et al. 2024).

    Args:
        timestep: (), where the prediction is made; a step of two predictions makes them at two timesteps.
        timesteps: (n,), those of the plan, never rising; equal ones share a position.
        interval: two fractions of them, the second excluded: (0, 1) is all of them.
    """
    start, end = interval
    return start <= (timesteps > timestep).sum().item() / len(timesteps) < end
