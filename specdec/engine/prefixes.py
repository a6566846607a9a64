"""Prefixes that requests share: blocks in the target's cache and, with the same tokens, in those of draft models."""

from collections.abc import Sequence

from attention.kv.page_table import PageTable
from attention.kv.prefix import PrefixIndex, block_keys
from specdec.drafters import Drafter
from specdec.drafters.base import DraftState, runners_of
from specdec.engine.group import Group
from specdec.engine.handle import Handle
from specdec.engine.memory import settled
from specdec.model.feature_runner import FeatureRunner
from specdec.model.round_runner import RoundRunner
from specdec.model.runner import ModelRunner
from specdec.requests.rows import Row


class SharedPrefixes:
    """Blocks that the rows of an engine have computed, for others to take over.

    Each cache has blocks of its own, since draft models see texts later than the target, or never. Those that read the
    target's features (`FeatureReader`) do not: a row takes over only what both have, as features are not kept. The last
    step of their blocks reads `FeatureTraits.tokens_ahead` tokens after it too, so their keys are those of the text
    without as many of its first tokens.

    Pages of a prefix are of no use without the recurrent states at its end. A target's states are kept where a prompt
    ends its last full block, and where a text leaves blocks that are known: there prompts are cut. A row
    takes over what has both, pages and states. Draft models with recurrent states share nothing, nor do prompts with
    images.

    saved: tokens of prompts that the target did not have to compute.
    """

    def __init__(self, target: ModelRunner, drafter: Drafter | None = None):
        self._target, self.saved = target, 0
        self._readers = [runner for runner in runners_of(drafter) if isinstance(runner, FeatureRunner)]
        self._recent = drafter.traits.feature_room if drafter is not None and self._readers else 0
        self._indexes: dict[PageTable, PrefixIndex] = {}
        self._keys: dict[Handle, list[bytes]] = {}
        self._shifted_keys: dict[int, dict[Handle, list[bytes]]] = {}
        self._entered: dict[Handle, tuple[int, bool]] = {}  # of each row's last `enter`, see there
        self._borders: dict[Handle, tuple[int, ...]] = {}  # blocks after which the states of a row are to be kept

    @property
    def indexes(self) -> list[PrefixIndex]:
        """That of each cache which has been used."""
        return list(self._indexes.values())

    @property
    def blocks(self) -> int:
        """Known ones of the target."""
        return len(self._of(self._target))

    def take(self, handle: Handle, group: Group, row: Row) -> None:
        """Let a new row take over the known blocks of its text, all but its last token."""
        self._entered.pop(handle, None)
        known, keys, states = self.known(handle), self.keys(handle), self._target.cache.states
        self._of(self._target).extend([row.sequence], keys[:known])
        if states is not None:
            if known:
                states.resume(row.sequence, known * self._target.page_size, keys[known - 1])
            self._borders[handle] = (self._of(self._target).known(keys), len(keys))
        for runner, sequence in _readers(group, row):
            if known:
                self._of(runner).extend([sequence], self._shifted(handle, _ahead(runner))[:known])
        self.saved += known * self._target.page_size

    def cut(self, handle: Handle, row: Row, tokens: int) -> int:
        """How many of the next `tokens` of a row's prompt are run at once: up to a border where states are kept."""
        done, size = self._target.cache.length(row.sequence), self._target.page_size
        left = [blocks * size - done for blocks in self._borders.get(handle, ()) if blocks * size > done]
        return min([tokens, *left])

    def keep_states(self, handle: Handle, row: Row) -> None:
        """Keep the states of a row whose prompt has run up to one of its borders."""
        blocks, rest = divmod(self._target.cache.length(row.sequence), self._target.page_size)
        states = self._target.cache.states
        if states is not None and blocks and not rest and blocks in self._borders.get(handle, ()):
            states.keep(row.sequence, blocks * self._target.page_size, self.keys(handle)[blocks - 1])

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
        texts: list[tuple[RoundRunner, int, int, bool]] = [(self._target, row.sequence, 0, False)]
        texts += [(runner, sequence, _ahead(runner), False) for runner, sequence in _readers(group, row)]
        texts += [(*one, 0, behind) for one in _drafts(group, row)]
        for runner, sequence, shift, lags in texts:
            # the last steps have read tokens that were drafted, where they read several
            held = settled(runner, sequence, row) - max(0, shift - 1)
            index, full = self._of(runner), max(0, held) // runner.page_size
            keys = (self._shifted(handle, shift) if shift else self.keys(handle))[:full]
            if index.freed([sequence]) <= index.known(keys) < full:  # a block is known with those before it only
                index.register([sequence], keys)
            if not lags:
                least = min(least, full)
        self._entered[handle] = least, behind

    def known(self, handle: Handle) -> int:
        """How many of `keys` a row could take over: of the target, and of what reads its features.

        Where anything reads them, the last tokens of a text are computed anew, for `Rows.features`."""
        known, size = self._of(self._target).known(self.keys(handle)), self._target.page_size
        for runner in self._readers:
            keys = self._shifted(handle, _ahead(runner))
            known = min(known, self._of(runner).known(keys)) if runner.page_size == size else 0
        known = min(known, max(0, handle.length - 1 - self._recent) // size) if self._recent else known
        states = self._target.cache.states
        return known if states is None else states.kept(self.keys(handle)[:known])

    def keys(self, handle: Handle) -> list[bytes]:
        """The keys of the full blocks of a request's text so far, without its last token."""
        return self._grow(handle, self._keys, 0)

    def _grow(self, handle: Handle, known: dict[Handle, list[bytes]], shift: int) -> list[bytes]:
        """The keys of a text without its first `shift` tokens, and without its last token where that is 0."""
        size, keys, prompt = self._target.page_size, known.setdefault(handle, []), handle.request.prompts[0]
        if handle.request.images is not None:
            return []  # tokens do not tell one image from another
        if len(keys) < (handle.length - max(1, shift)) // size:
            start = len(keys) * size + shift
            rest = [*prompt[start:].tolist(), *handle.record.new_tokens[max(0, start - len(prompt)) :]]
            first = block_keys([*prompt[:shift].tolist(), *handle.record.new_tokens][:shift], 1)[-1] if shift else None
            keys += block_keys(rest if shift else rest[:-1], size, before=keys[-1] if keys else first)
        return keys

    def _shifted(self, handle: Handle, shift: int) -> list[bytes]:
        """The same of its text without its first `shift` tokens, on which they depend too."""
        return self._grow(handle, self._shifted_keys.setdefault(shift, {}), shift)

    def forget(self, handle: Handle) -> None:
        """Drop the keys of a request that has finished; its blocks stay."""
        self._keys.pop(handle, None)
        self._borders.pop(handle, None)
        for keys in self._shifted_keys.values():
            keys.pop(handle, None)
        self._entered.pop(handle, None)

    def flush(self) -> None:
        """Forget all blocks, whose weights have changed, say."""
        for index in self.indexes:
            index.flush()
        if self._indexes and (states := self._target.cache.states) is not None:
            states.drop_kept()

    def _of(self, runner: RoundRunner) -> PrefixIndex:
        table = runner.cache.table
        if table not in self._indexes:
            self._indexes[table] = PrefixIndex([table])
        return self._indexes[table]


def _ahead(runner: RoundRunner) -> int:
    """How many tokens after its own a step of what reads features depends on."""
    assert isinstance(runner, FeatureRunner)
    return runner.source.traits.tokens_ahead


def _drafts(group: Group, row: Row) -> list[tuple[RoundRunner, int]]:
    """Draft models that can share the prefix of a row, with its sequence in their caches: those of equal page size.

    Not those whose positions the row may outgrow: `model_state.run_anew` then writes over the begin of its sequence."""
    states = [one for one in group.states if one.reader is None]
    return [
        (runner, sequence)
        for runner, sequence in _shared(states, group, row)
        if runner.max_positions is None or row.limit <= runner.max_positions
    ]


def _readers(group: Group, row: Row) -> list[tuple[RoundRunner, int]]:
    """The same of those that read features, of any length."""
    return _shared([one for one in group.states if one.reader is not None], group, row)


def _shared(states: Sequence[DraftState], group: Group, row: Row) -> list[tuple[RoundRunner, int]]:
    size = group.call.rows.target.page_size
    pairs = [(state.runner, state.prefix_sequence(row)) for state in states]
    return [
        (runner, own) for runner, own in pairs if own is not None and runner.page_size == size and not runner.recurrent
    ]
