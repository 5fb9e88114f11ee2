"""The k largest of each row, found among few."""

import math

import torch
from torch import Tensor


def largest(rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """
    What `rows.topk(k, sorted=False)` returns, but for the choice among equal values; the result has no order.

    Each row is cut into interleaved groups. An entry among the k largest lies in one of the k groups with the largest
    maxima: otherwise k maxima, all of other groups, would be larger. So `topk`, which is slow, looks at the maxima
    and then at k groups, instead of at everything.

    Args:
        rows (`torch.Tensor`): contiguous, shape [rows, entries].
        k (`int`): how many.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: values (dtype of `rows`) and indices (int64), both of shape [rows, k].
    """
    count, entries = rows.shape
    # Maxima and members of groups are equally many where a group has sqrt(entries / k) members.
    members = math.gcd(entries, 1 << max(entries // k, 1).bit_length() // 2)
    groups = entries // members
    if members == 1 or groups <= k:
        found = rows.topk(k, dim=-1, sorted=False)
        return found.values, found.indices
    grouped = rows.view(count, members, groups)
    chosen = grouped.amax(dim=1).topk(k, dim=-1, sorted=False).indices
    candidates = grouped.gather(2, chosen.unsqueeze(1).expand(count, members, k)).view(count, members * k)
    values, places = candidates.topk(k, dim=-1, sorted=False)
    member = torch.div(places, k, rounding_mode="floor")
    return values, chosen.gather(1, places - member * k).add_(member, alpha=groups)
