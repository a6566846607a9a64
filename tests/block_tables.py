"""A block drafter without a network: its slots' logits and what the token before adds are tables of random numbers."""

from types import SimpleNamespace

import torch

from specdec import DrafterTraits
from specdec.drafters.block.session import BestFirstSession
from specdec.drafters.block.slots import Factors
from specdec.sampling.noise import round_noise
from specdec.sampling.processors import Processors


class TableState:
    """A `SlotState`: unary[k, t] are the logits of slot k after a text that ends with token t, and after a node with
    token s there are those and w2 @ w1[s] (None: drafter of marginals).

    unary [K, V, V']; w1 [V, R]; w2 [V', R]; ids [V']: the target's ids of the drafter's tokens."""

    reader, draft_room = None, 0

    def __init__(self, unary, w1=None, w2=None, ids=None):
        self._unary, self._w1, self._w2, self.ids = unary, w1, w2, ids
        self.passes, self._slots = 0, None

    def slots(self, batch):
        self.passes += 1
        self._slots = self._unary[:, batch.last_tokens()[:, 0]].transpose(0, 1)
        return self._slots

    def conditional(self, level, tokens, among=None, above=None):
        own, w2 = self._slots[:, level], self._w2
        if among is not None:
            own = own.gather(1, among)
        if w2 is None:
            return own[:, None]
        follow = self._w1[tokens]
        added = follow @ w2.T if among is None else follow @ w2[among].transpose(1, 2)
        return own[:, None] + added

    def factors(self, level, tokens):
        return None if self._w2 is None else Factors(self._slots[:, level], self._w1, tokens, self._w2)

    def end_proposal(self, batch):
        self._slots = None

    def admit(self, rows, joining):
        pass

    def truncate(self, rows, lengths):
        pass

    def release(self, rows):
        pass


def random_state(slots, vocabulary, drafted=None, rank=2, seed=0, scale=1.0, dtype=torch.float64, ids=None):
    """A state of normal numbers; `rank` 0: of marginals."""
    generator, drafted = torch.Generator().manual_seed(seed), drafted or vocabulary
    normal = lambda *shape: scale * torch.randn(*shape, generator=generator, dtype=dtype)
    more = (normal(vocabulary, rank), normal(drafted, rank)) if rank else (None, None)
    return TableState(normal(slots, vocabulary, drafted), *more, ids)


def stub_batch(last, vocabulary=None, seed=0, captured=False, nodes=None):
    """What a session reads of a batch of rows whose texts end with the tokens `last [A]`, without processors."""
    count, faults = len(last), []
    target = SimpleNamespace(vocab_size=vocabulary)
    rows = SimpleNamespace(processors=Processors([[]] * count), target=target)
    noise = round_noise(seed, range(count), [3] * count, torch.device("cpu"))
    return SimpleNamespace(
        rows=rows, size=count, captured=captured, members=(), nodes=nodes, faults=faults, noise=lambda: noise,
        last_tokens=lambda: torch.as_tensor(last)[:, None], ends=torch.full((count, 1), -1),
        report_fault=lambda about, what: faults.append((about, what)),
    )  # fmt: skip


class TableDrafter:
    """A drafter for `target` out of its own logits after single tokens, with some noise."""

    def __init__(self, model, growth, sample=True, marginal=False, noise=0.5, seed=0):
        vocabulary = model.config.vocab_size
        with torch.no_grad():
            after = model(input_ids=torch.arange(vocabulary)[:, None]).logits[:, -1].float()  # [V, V']
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randperm(vocabulary, generator=generator)[: vocabulary - vocabulary // 8]
        unary = noise * torch.randn(growth.depth, vocabulary, len(ids), generator=generator)
        unary[0] += 0 if not marginal else after[:, ids]
        more = (None, None) if marginal else (after, torch.eye(vocabulary)[ids])
        self._growth, self._sample = growth, sample
        self.state = TableState(unary, *more, ids)
        self.traits = DrafterTraits(growth.num_tokens, captured=True, own_depth=growth.depth, shapes="grown")

    def validate(self, target):
        pass

    def start(self, rows, max_tokens):
        session = BestFirstSession(self.state, self._growth, self._sample and rows.do_sample)
        session.states = ()  # there is no cache
        return session
