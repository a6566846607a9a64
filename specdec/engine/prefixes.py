"""Prefixes that requests share: blocks in the target's cache and, with the same tokens, in those of draft models."""

from collections.abc import Sequence

from attention.kv.prefix import PrefixIndex, block_keys
from specdec.drafters.base import DraftState
from specdec.engine.group import Group
from specdec.engine.handle import Handle
from specdec.model.runner import ModelRunner
from specdec.requests.rows import Row


class SharedPrefixes:
    """Blocks that the rows of an engine have computed, for others to take over.

    saved: tokens of prompts that did not have to be computed.
    """

    def __init__(self, target: ModelRunner):
        self._target, self._index, self.saved = target, PrefixIndex([target.cache.table]), 0
        self._keys: dict[Handle, list[bytes]] = {}

    @property
    def blocks(self) -> int:
        """Known ones."""
        return len(self._index)

    def serve(self, states: Sequence[DraftState], row: Row) -> None:
        """Look after the caches of draft models too: of `states` that can share the prefix of `row`."""
        tables = [self._target.cache.table, *(state.runner.cache.table for state in _sharing(states, row))]
        if tables != list(self._index.tables):
            self._index.flush()
            self._index = PrefixIndex(tables)

    def take(self, handle: Handle, group: Group, row: Row) -> None:
        """Let a new row take over the known blocks of its text, all but its last token."""
        states = group.states
        self.serve(states, row)
        keys = self.keys(handle)
        blocks = self._index.extend(self._sequences(group, row), keys)
        self.saved += blocks * self._target.page_size

    def enter(self, handle: Handle, group: Group, row: Row) -> None:
        """Register the blocks that all caches hold of a row's text before its last round, whose draft may lie there."""
        sequences, size = self._sequences(group, row), self._target.page_size
        held = [table.length(s) for table, s in zip(self._index.tables, sequences, strict=True)]
        full = min(*held, row.length_before - 1) // size
        keys = self.keys(handle)[:full]
        if self._index.known(keys) < full:
            self._index.register(sequences, keys)

    def known(self, handle: Handle) -> int:
        """How many of `keys` are known."""
        return self._index.known(self.keys(handle))

    def keys(self, handle: Handle) -> list[bytes]:
        """The keys of the full blocks of a request's text so far, without its last token."""
        size, keys = self._target.page_size, self._keys.setdefault(handle, [])
        if len(keys) < (handle.length - 1) // size:
            rest = [*handle.prompt, *handle.record.new_tokens][len(keys) * size : -1]
            keys += block_keys(rest, size, before=keys[-1] if keys else None)
        return keys

    def forget(self, handle: Handle) -> None:
        """Drop the keys of a request that has finished; its blocks stay."""
        self._keys.pop(handle, None)

    def flush(self) -> None:
        """Forget all blocks, whose weights have changed, say."""
        self._index.flush()

    def _sequences(self, group: Group, row: Row) -> list[int]:
        shared = [state.prefix_sequence(row) for state in _sharing(group.states, row)]
        return [row.sequence, *(sequence for sequence in shared if sequence is not None)]


def _sharing(states: Sequence[DraftState], row: Row) -> list[DraftState]:
    return [state for state in states if state.prefix_sequence(row) is not None]
