"""Just enough classical image analysis, in numpy alone: smoothing, erosion, connected components, holes."""

import numpy as np


def smooth(pixels: np.ndarray) -> np.ndarray:
    """Averages each pixel of (H, W, C) with its neighbours, weighted 1 2 1 along either axis."""
    padded = np.pad(pixels, ((1, 1), (1, 1), (0, 0)), mode="edge")
    rows = padded[:-2] + 2 * padded[1:-1] + padded[2:]
    return (rows[:, :-2] + 2 * rows[:, 1:-1] + rows[:, 2:]) / 16


def erode(mask: np.ndarray, times: int = 1) -> np.ndarray:
    """Takes away, `times` times, the pixels of a mask (H, W) that touch its outside by a side or a corner."""
    for _ in range(times):
        padded = np.pad(mask, 1)
        rows = padded[:-2] & padded[1:-1] & padded[2:]
        mask = rows[:, :-2] & rows[:, 1:-1] & rows[:, 2:]
    return mask


def dilate(mask: np.ndarray, times: int = 1) -> np.ndarray:
    """Adds, `times` times, the pixels that touch a mask (H, W) by a side or a corner."""
    for _ in range(times):
        padded = np.pad(mask, 1)
        rows = padded[:-2] | padded[1:-1] | padded[2:]
        mask = rows[:, :-2] | rows[:, 1:-1] | rows[:, 2:]
    return mask


def components(mask: np.ndarray) -> tuple[np.ndarray, int]:
    """Numbers the connected parts of a mask (H, W); pixels that touch by a side are connected.

    Returns labels (H, W), 0 outside the mask and 1 to n inside, and n. The runs of each row are joined, by union-find,
    with the runs of the row above that they overlap.
    """
    steps = np.diff(np.pad(mask, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    rows, starts = np.nonzero(steps == 1)
    stops = np.nonzero(steps == -1)[1]
    parent = list(range(len(rows)))

    def root(run: int) -> int:
        while parent[run] != run:
            parent[run] = parent[parent[run]]
            run = parent[run]
        return run

    first = np.searchsorted(rows, np.arange(mask.shape[0] + 1))
    for row in range(1, mask.shape[0]):
        above, below = range(first[row - 1], first[row]), range(first[row], first[row + 1])
        for a in above:
            for b in below:
                if starts[a] < stops[b] and starts[b] < stops[a]:
                    parent[root(b)] = root(a)
    labels, numbers = np.zeros(mask.shape, dtype=np.int32), {}
    for run, row in enumerate(rows):
        labels[row, starts[run] : stops[run]] = numbers.setdefault(root(run), len(numbers) + 1)
    return labels, len(numbers)


def fill_holes(mask: np.ndarray) -> np.ndarray:
    """Adds to a mask (H, W) whatever of the outside cannot be reached from the edge of the picture."""
    labels, _ = components(~np.pad(mask, 1))
    return labels[1:-1, 1:-1] != labels[0, 0]


def bounding_box(mask: np.ndarray) -> tuple[int, int, int, int]:
    """The first and the one-past-last column and row of a mask that is not empty: left, top, right, bottom."""
    columns, rows = np.nonzero(mask.any(axis=0))[0], np.nonzero(mask.any(axis=1))[0]
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
