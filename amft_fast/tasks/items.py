"""Tasks that hold the items of each split in memory, and know the demonstration of one."""

from __future__ import annotations

from collections.abc import Sequence

from amft_fast.interfaces import Demo, Item


class OfItems:
    """Prompts and demonstrations of `_items`, by split. A task says in `demo` what is known of an item."""

    _items: dict[str, list[Item]]

    def prompts(self, split: str) -> Sequence[Item]:
        return self._items[split]

    def demos(self, split: str) -> Sequence[Demo]:
        """Of those items of a split that have one."""
        return [demo for item in self._items[split] if (demo := self.demo(item)) is not None]

    def demo(self, item: Item) -> Demo | None:
        """None: this task has none."""
        return None
