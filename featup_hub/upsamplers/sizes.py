"""Which sizes a source passes through on its way to the output: the rule, and nothing else."""

from __future__ import annotations

__all__ = ["stage_sizes"]


def stage_sizes(
    source_size: tuple[int, int], output_size: tuple[int, int]
) -> list[tuple[int, int]]:
    """Plans the sizes a source passes through on its way to the output.

    The rule: n = ceil(log2 of the larger ratio) stages, counted from the output. The last stage
    makes the output, the one before it half of that (rounded up), and so on, never below the
    source. So every stage but the first doubles (up to the rounding of odd sizes), and the
    cheapest one, the first, takes up whatever ratio is left.

    Args:
        source_size: Height and width of the features.
        output_size: Height and width wanted, neither smaller than the source's.

    Returns:
        One size per stage, the last being ``output_size``; empty where nothing is to be done.

    Raises:
        ValueError: If the output is smaller than the source.

    Example:
        >>> stage_sizes((14, 14), (224, 224))
        [(28, 28), (56, 56), (112, 112), (224, 224)]
        >>> stage_sizes((16, 16), (224, 224))  # patch 14: the first stage has ratio 1.75
        [(28, 28), (56, 56), (112, 112), (224, 224)]
        >>> stage_sizes((12, 15), (360, 480))  # stride 32 takes five stages
        [(23, 30), (45, 60), (90, 120), (180, 240), (360, 480)]
    """
    (h, w), (height, width) = source_size, output_size
    if height < h or width < w:
        raise ValueError(
            f"the output must be at least as large as the source, {h}×{w}; "
            f"got {height}×{width}; resize features with torch.nn.functional.interpolate instead"
        )
    # Comparisons only, so that traced with symbolic sizes the number of stages stays a number;
    # and no division of negative numbers, which ONNX rounds towards zero.
    count = 0
    while height > h * 2**count or width > w * 2**count:
        count += 1
    steps = [2**left for left in range(count - 1, -1, -1)]
    return [
        (max((height + step - 1) // step, h), max((width + step - 1) // step, w)) for step in steps
    ]
