"""What the length of a response adds to its reward."""

import numpy as np


def soft_overlong(lengths: np.ndarray, *, max_length: int, share: float = 0.2) -> np.ndarray:
    """DAPO's soft overlong punishment (arXiv 2503.14476, section 3.4): from 0 to −1 before the length limit.

        min( 0, (T − c − length) / c ),   c = share · T

    Args:
      lengths: [R] tokens of each response, at most T.
      max_length: T, the length limit in tokens.
      share: of T, over which the penalty grows; DAPO's is 4,096 of 20,480 tokens.

    Returns:
      [R] float32

    Raises:
      ValueError: `share` is not in (0, 1].
    """
    if not 0 < share <= 1:
        raise ValueError(f'share is a part of the length limit, in (0, 1]; got {share}')
    room = share * max_length
    return np.minimum(0, (max_length - room - lengths) / room).astype(np.float32)
