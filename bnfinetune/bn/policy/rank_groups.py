"""Which ranks share their batch statistics."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist

from bnfinetune.errors import PolicyError

# One set of subgroups per size and default group: making a group is a collective that leaks if repeated per layer.
_subgroups: dict[int, tuple[dist.ProcessGroup, dist.ProcessGroup]] = {}


@dataclass(frozen=True)
class GroupChoice:
    """The ranks that `sync` pools over, by a given group, by size, or all of them.

    Attributes:
        process_group: a group of `torch.distributed`. It cannot be written to disk: a copy that was pickled has lost
            it and says so when it is used.
        size: ranks per group, of consecutive ranks; such as the GPUs of one node.
    """

    process_group: Any = field(default=None, compare=False)
    size: int | None = None
    lost: bool = False

    def resolve(self) -> dist.ProcessGroup | None:
        """The group to pool over; None where this process is alone in it or `torch.distributed` is not in use.

        Raises:
            PolicyError: the group was lost by pickling, or `size` does not divide the number of ranks.
        """
        if self.lost:
            raise PolicyError("sync lost its process group by pickling; apply_policy again with process_group=")
        if not (dist.is_available() and dist.is_initialized()):
            return None
        group = self.process_group
        if group is None:
            group = dist.group.WORLD if self.size is None else _subgroup(self.size)
        return group if dist.get_world_size(group) > 1 else None

    def __deepcopy__(self, memo: dict[int, Any]) -> GroupChoice:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return GroupChoice, (None, self.size, self.lost or self.process_group is not None)


def _subgroup(size: int) -> dist.ProcessGroup:
    world = dist.group.WORLD
    assert world is not None
    known = _subgroups.get(size)
    if known is None or known[0] is not world:
        ranks = dist.get_world_size()
        if ranks % size:
            raise PolicyError(f"sync_group_size={size} does not divide the {ranks} ranks; choose a divisor")
        mine, _ = dist.new_subgroups(group_size=size)
        known = _subgroups[size] = (world, mine)
    return known[1]
