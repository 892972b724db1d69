"""The prompts of a comparison shared among the processes that ``accelerate launch`` started.

Every process has the whole model and goes through all arms for its prompts, so that each clip is
compared with a dense one of the same device.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

T = TypeVar("T")
# Processes wait for each other as long as it takes to generate clips.
PATIENCE = timedelta(days=2)


@dataclass(frozen=True)
class Ranks:
    """This process among those of a comparison.

    Attributes:
        index: Its number; 0 writes the report.
        count: How many there are.
        local: Its number on this machine.
    """

    index: int = 0
    count: int = 1
    local: int = 0

    @classmethod
    def started(cls, device: str) -> Ranks:
        """The processes that a launcher has started; one without a launcher.

        Args:
            device: "cpu", "cuda" or "cuda:N".

        Raises:
            ValueError: If several processes would share the GPU that ``device`` names.
        """
        if int(os.environ.get("WORLD_SIZE", "1")) < 2:
            return cls()
        if ":" in device:
            raise ValueError(
                f"expected device 'cuda' under several processes, which gives each its own GPU, "
                f"got {device!r}"
            )
        from accelerate import PartialState

        state = PartialState(cpu=device == "cpu", timeout=PATIENCE)
        return cls(state.process_index, state.num_processes, state.local_process_index)

    def leave(self) -> None:
        """Ends what connects the processes. All must call it, and nothing that waits after it.

        Its threads would abort a process that ends while they run, one time in many.
        """
        if self.count > 1:
            import torch.distributed

            torch.distributed.destroy_process_group()

    def place(self, device: str) -> str:
        """The device of this process."""
        return f"cuda:{self.local}" if device == "cuda" and self.count > 1 else device

    def own(self, items: Sequence[T]) -> list[tuple[int, T]]:
        """This process's items with their places; the first process has the first one."""
        return list(enumerate(items))[self.index :: self.count]

    def gather(self, items: list[T]) -> list[T]:
        """The items of all processes, one process after the other. All must call it."""
        if self.count == 1:
            return items
        from accelerate.utils import gather_object

        return gather_object(items)

    def from_first(self, value: T) -> T:
        """``value`` of the first process. All must call it."""
        if self.count == 1:
            return value
        from accelerate.utils import broadcast_object_list

        return broadcast_object_list([value])[0]
