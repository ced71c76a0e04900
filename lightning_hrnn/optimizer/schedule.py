"""When the length of a run is known: lower the learned rate to zero over its last part.

A rule that does not know when training ends can only guess how soon to settle. Who knows says so by
`HRNN.cooldown`, a multiplier of all learned rates.
"""

from __future__ import annotations

import math

SHARE = 0.5  # of a run, its last part


def cooldown(step: float, steps: float, share: float = SHARE) -> float:
    """Return 1 until the last part of a run, then half a cosine down to zero at its end.

    It ends flat: the last steps are short enough to settle in a smooth minimum, where a line would still shake.

    Args:
        step: of the run, 0 the first; or any measure of how much is behind.
        steps: length of the run, in the same measure.
        share: of the run that the cosine takes, from 0 to 1.

    Example:
        >>> tuple(round(cooldown(step, 100), 3) for step in (0, 50, 75, 99, 100, 200))
        (1.0, 1.0, 0.5, 0.001, 0.0, 0.0)
    """
    left = max(0.0, 1 - step / steps)
    if share == 0:
        return float(left > 0)
    return 0.5 - 0.5 * math.cos(math.pi * min(1.0, left / share))
