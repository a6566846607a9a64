"""What speculative decoding should gain, in closed form (Leviathan et al. 2023, section 3)."""


def expected_tokens_per_round(alpha: float, length: int) -> float:
    """E[tokens per round] of a chain of `length` tokens whose every token is accepted with probability `alpha`, the bonus token included.

    >>> round(expected_tokens_per_round(0.8, 5), 3)
    3.689
    """
    if not 0 <= alpha <= 1 or length < 0:
        raise ValueError(f"alpha must lie in [0, 1] and length be >= 0, got {alpha} and {length}")
    return sum(alpha**i for i in range(length + 1))


def expected_speedup(alpha: float, length: int, draft_cost: float, verify_cost: float = 1.0) -> float:
    """Tokens per round over the round's cost, both costs in units of one autoregressive step of the target.

    >>> round(expected_speedup(0.8, 8, 0.05), 2)
    3.09
    """
    if draft_cost < 0 or verify_cost <= 0:
        raise ValueError(f"draft_cost must be >= 0 and verify_cost > 0, got {draft_cost} and {verify_cost}")
    return expected_tokens_per_round(alpha, length) / (length * draft_cost + verify_cost)
