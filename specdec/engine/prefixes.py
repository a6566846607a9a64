"""Prefixes that requests share: blocks in the target's cache and, with the same tokens, in those of draft models."""

from collections.abc import Sequence

from attention.kv.page_table import PageTable
from attention.kv.prefix import PrefixIndex, block_keys
from specdec.engine.group import Group
from specdec.engine.handle import Handle
from specdec.engine.memory import settled
from specdec.model.runner import ModelRunner
from specdec.requests.rows import Row


class SharedPrefixes:
    """Blocks that the rows of an engine have computed, for others to take over.

    Each cache has blocks of its own, since draft models see texts later than the target, or never.

    saved: tokens of prompts that the target did not have to compute.
    """

    def __init__(self, target: ModelRunner):
        self._target, self.saved = target, 0
        self._indexes: dict[PageTable, PrefixIndex] = {}
        self._keys: dict[Handle, list[bytes]] = {}
        self._entered: dict[Handle, tuple[int, bool]] = {}  # of each row's last `enter`, see there

    @property
    def indexes(self) -> list[PrefixIndex]:
        """That of each cache which has been used."""
        return list(self._indexes.values())

    @property
    def blocks(self) -> int:
        """Known ones of the target."""
        return len(self._of(self._target))

    def take(self, handle: Handle, row: Row) -> None:
        """Let a new row take over the known blocks of its text, all but its last token."""
        self._entered.pop(handle, None)
        blocks = self._of(self._target).extend([row.sequence], self.keys(handle))
        self.saved += blocks * self._target.page_size

    def take_drafts(self, group: Group, rows: Sequence[Row]) -> list[Row]:
        """Let draft models take over the known blocks of rows that they see for the first time.

        Returns the rows but for those whose next block another one of them is about to compute."""
        begin, coming = [], set[tuple[int, bytes]]()
        for row in rows:
            keys, wanted = self.keys(group.handle(row)), set[tuple[int, bytes]]()
            for runner, sequence in _drafts(group, row):
                index, size = self._of(runner), runner.page_size
                if runner.cache.length(sequence) == 0:
                    index.extend([sequence], keys)
                blocks, rest = divmod(runner.cache.length(sequence), size)
                wanted |= {(id(runner), key) for key in keys[blocks : blocks + 1] if not rest}
            if wanted.isdisjoint(coming):
                begin.append(row)
            coming |= wanted
        return begin

    def enter_new(self, group: Group, rows: Sequence[Row]) -> None:
        """`enter` rows after a round, but for those that have no further full block since they were entered."""
        for row in rows:
            handle = group.handle(row)
            full, behind = self._entered.get(handle, (-1, False))
            if (row.length_before - 1) // self._target.page_size > full or behind != group.is_behind(row):
                self.enter(handle, group, row)

    def enter(self, handle: Handle, group: Group, row: Row) -> None:
        """Register the blocks each cache holds of a row's text before its last round, whose draft may lie after it.

        Remembers how many all caches that grow in its rounds hold, and whether draft models are behind, whose do not.
        A block that is lost meanwhile is entered again with the next one."""
        least, behind = row.length_before, group.is_behind(row)
        for runner, sequence in [(self._target, row.sequence), *_drafts(group, row)]:
            index, full = self._of(runner), settled(runner, sequence, row) // runner.page_size
            keys = self.keys(handle)[:full]
            if index.freed([sequence]) <= index.known(keys) < full:  # a block is known with those before it only
                index.register([sequence], keys)
            if runner is self._target or not behind:
                least = min(least, full)
        self._entered[handle] = least, behind

    def known(self, handle: Handle) -> int:
        """How many of `keys` are known of the target."""
        return self._of(self._target).known(self.keys(handle))

    def keys(self, handle: Handle) -> list[bytes]:
        """The keys of the full blocks of a request's text so far, without its last token."""
        size, keys = self._target.page_size, self._keys.setdefault(handle, [])
        if len(keys) < (handle.length - 1) // size:
            start, prompt = len(keys) * size, handle.request.prompts[0]
            rest = [*prompt[start:].tolist(), *handle.record.new_tokens[max(0, start - len(prompt)) :]][:-1]
            keys += block_keys(rest, size, before=keys[-1] if keys else None)
        return keys

    def forget(self, handle: Handle) -> None:
        """Drop the keys of a request that has finished; its blocks stay."""
        self._keys.pop(handle, None)
        self._entered.pop(handle, None)

    def flush(self) -> None:
        """Forget all blocks, whose weights have changed, say."""
        for index in self.indexes:
            index.flush()

    def _of(self, runner: ModelRunner) -> PrefixIndex:
        table = runner.cache.table
        if table not in self._indexes:
            self._indexes[table] = PrefixIndex([table])
        return self._indexes[table]


def _drafts(group: Group, row: Row) -> list[tuple[ModelRunner, int]]:
    """Draft models that can share the prefix of a row, with its sequence in their caches: those of equal page size.

    Not those whose positions the row may outgrow: `model_state.run_anew` then writes over the begin of its sequence."""
    size, found = group.call.rows.target.page_size, list[tuple[ModelRunner, int]]()
    for state in group.states:
        runner, sequence = state.runner, state.prefix_sequence(row)
        stays = runner.max_positions is None or row.limit <= runner.max_positions
        if sequence is not None and runner.page_size == size and stays:
            found.append((runner, sequence))
    return found
