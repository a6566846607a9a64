"""How a best-first tree grows, in numbers."""

from dataclasses import dataclass, replace

FAST_WIDTH, FAST_CHILDREN, FAST_CANDIDATES = 32, 16, 256


@dataclass(frozen=True, slots=True)
class Growth:
    """How large a best-first tree is, and how much of the vocabulary is looked at for it.

    num_tokens: its nodes, without the root. The root is verified too, and 64 rows are the most that a GPU's products of
        few rows take: 63 nodes cost a good deal less than 64.
    depth: its levels at most; a drafter must have as many slots.
    width: nodes of a level, the likeliest, that get children (None: all that the tree may have).
    children: of each of them that are looked at, the likeliest (None: all that the tree may have).
    candidates: tokens of each slot that are looked at, the likeliest by its unary logits, or in the first slot by those
        after the last token (None: the whole vocabulary).

    With None everywhere the tree has the nodes of the largest draft probabilities (`exact`). Smaller numbers are
    approximations, of the shape alone: whatever tree a drafter proposes, the text stays the target's. `candidates` also
    takes probabilities among these tokens alone, which are a little too large. Raises ValueError for numbers below 1.

    >>> Growth(64).exact, Growth.fast(64).exact
    (True, False)
    """

    num_tokens: int = 64
    depth: int = 7
    width: int | None = None
    children: int | None = None
    candidates: int | None = None

    def __post_init__(self):
        given = self.num_tokens, self.depth, self.width or 1, self.children or 1, self.candidates or 1
        asked = self.num_tokens, self.depth, self.width, self.children, self.candidates
        if 0 in asked or not all(type(number) is int for number in given) or min(given) < 1:
            raise ValueError(
                f"num_tokens, depth, width, children and candidates must be integers of at least 1, got {asked}"
            )

    @classmethod
    def fast(cls, num_tokens: int = 64, depth: int = 7) -> "Growth":
        """A tree that differs little from the exact one and takes a fraction of its time on a large vocabulary."""
        return cls(num_tokens, depth, FAST_WIDTH, FAST_CHILDREN, FAST_CANDIDATES)

    @property
    def exact(self) -> bool:
        """Whether the tree has the nodes of the largest draft probabilities, up to ties."""
        return self.candidates is None and min(self.most_expanded, self.most_children) == self.num_tokens

    @property
    def most_expanded(self) -> int:
        """Nodes of a level that get children, at most."""
        return self.num_tokens if self.width is None else min(self.width, self.num_tokens)

    @property
    def most_children(self) -> int:
        """Children of a node, at most."""
        return self.num_tokens if self.children is None else min(self.children, self.num_tokens)

    def of_size(self, num_tokens: int) -> "Growth":
        """The same for another number of nodes."""
        return replace(self, num_tokens=num_tokens)

    def describe(self) -> str:
        """In words."""
        if self.exact:
            return f"the {self.num_tokens} likeliest nodes, up to {self.depth} deep"
        tokens = "all tokens" if self.candidates is None else f"the {self.candidates} likeliest tokens of each slot"
        return (
            f"about the {self.num_tokens} likeliest nodes, up to {self.depth} deep: of {tokens}, {self.most_children} "
            f"children of {self.most_expanded} nodes a level are looked at"
        )
