"""What a batch loses to slots of rows that have ended.

Captured rounds run over a power of two of slots, halved when half of the rows have ended. Rows with the same number of
new tokens take different numbers of rounds with drafts, and the more so the more tokens a round has."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from specdec.cuda_graph import up_to_power

KEPT = 0.9  # weight of the calls before, at each call
LEAST_GAIN = 0.2  # accepted tokens a round, below which a call tells nothing
LEAST_LEFT = 0.5  # share of a round's tokens that counts at least


def share_at_work(rounds: Sequence[int], cost: Callable[[int], float] = float) -> float:
    """The share of the time of a batch for which its slots work, if row i takes `rounds[i]` rounds.

    cost: the time of a round of so many slots, in any unit; slots count alike if none is given.

    >>> share_at_work([4, 4, 4, 2])  # 14 of 16
    0.875
    >>> share_at_work([4, 2])  # one slot from the third round on
    1.0
    >>> share_at_work([4, 2], cost=lambda slots: 1.0)  # which takes as long as two
    0.75
    """
    ended, time = 0, 0.0
    for number, end in enumerate(sorted(rounds)):
        time += (end - ended) * cost(up_to_power(len(rounds) - number))
        ended = end
    slots = up_to_power(len(rounds))
    return sum(rounds) * cost(slots) / slots / time


@dataclass(slots=True)
class IdleSlots:
    """The share of speed that each accepted token a round costs, learned from calls of one number of rows.

    lost, gained: sums over calls, with earlier ones faded, of the share of time lost and of accepted tokens a round.
    """

    lost: float = 0.0
    gained: float = 1.0  # the weight of the guess that nothing is lost

    @property
    def per_token(self) -> float:
        """The share of speed that an accepted token costs."""
        return max(0.0, self.lost / self.gained)

    def add(self, rounds: Sequence[int], tokens: Sequence[int], cost: Callable[[int], float] = float) -> None:
        """Add a call in which row i took `rounds[i]` rounds for `tokens[i]` tokens.

        What plain decoding would idle, since some texts are shorter, is not held against drafts. Single rows and calls
        with few accepted tokens are ignored."""
        if len(rounds) < 2:
            return
        gain = sum(tokens) / sum(rounds) - 1
        if gain >= LEAST_GAIN:
            lost = 1 - share_at_work(rounds, cost) / share_at_work(tokens, cost)
            self.lost, self.gained = KEPT * self.lost + lost, KEPT * self.gained + gain

    def useful(self, tokens: float) -> float:
        """Of the `tokens` of a round those that count, for the loss that comes with them.

        >>> IdleSlots(lost=0.1, gained=2.0).useful(3.0)
        2.7
        """
        return tokens * max(LEAST_LEFT, 1 - self.per_token * (tokens - 1))
