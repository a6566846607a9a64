"""Launches of the small kernels of a round on tensors that nothing reads, for `scripts.kernel_resources`.

Shapes are those of EAGLE-2's trees, 60 nodes in 6 levels of 10, on a model of 8 billion parameters."""

from collections.abc import Callable

import torch

NODES, DEPTH, WIDTH, VOCABULARY, HIDDEN = 61, 6, 10, 128256, 4096


def _long(*shape: int) -> torch.Tensor:
    return torch.zeros(*shape, dtype=torch.int64)


def _low(*shape: int) -> torch.Tensor:
    return torch.zeros(*shape, dtype=torch.bfloat16)


def _tables() -> None:
    from specdec.trees.tables_kernel import launch_tables

    launch_tables(_long(1, NODES), DEPTH, WIDTH)


def _places() -> None:
    from attention.paged import device_batch_kernel as kernels

    lengths, alive, table = _long(1), torch.ones(1, dtype=torch.bool), _long(1, 512)
    kernels.launch_place(lengths, alive, table, DEPTH + 1)
    kernels.launch_place_nodes(lengths, alive, table, NODES, _long(1, NODES), _long(1, NODES, 1))
    kernels.launch_moves(lengths, _long(1, DEPTH), lengths, alive, table)


def _expansion() -> None:
    from specdec.drafters.expansion import Candidates
    from specdec.drafters.expansion_kernel import launch_expand
    from specdec.drafters.grown_kernel import launch_choose

    size = 1 + WIDTH + (DEPTH - 1) * WIDTH**2
    found, run = Candidates(_long(1, size), torch.zeros(1, size), _long(1, size)), None
    for level, nodes in enumerate((1, WIDTH, WIDTH), 1):
        given = torch.zeros(1, nodes, WIDTH), _long(1, nodes, WIDTH), _long(VOCABULARY)
        grown = launch_expand(run, _long(1, 1), found, *given, level, level == 3)
        run = None if grown is None else grown[0]
    launch_choose(found.tokens, found.values, found.parents, NODES, by_value=False)


def _best_children() -> None:
    from specdec.drafters.block.children_kernel import launch_children
    from specdec.drafters.block.level_kernel import launch_level
    from specdec.drafters.block.slots import Factors

    factors = Factors(_low(1, VOCABULARY), _low(VOCABULARY, 256), _long(1, 32), _low(VOCABULARY, 256))
    launch_children(factors, _long(1, 256), 16)
    given = torch.zeros(1, 32), torch.zeros(1, 32, 16), _long(1, 32, 16)
    launch_level(*given, 64, _long(1), 2, _long(1, 256), None)


def _drafter() -> None:
    from specdec.drafters.network.rotation_kernel import launch_angles
    from specdec.model.fusion.pointwise_kernel import rms_norms

    launch_angles(_long(WIDTH), torch.zeros(128), 1.0, torch.bfloat16)
    rms_norms(_low(WIDTH, HIDDEN), _low(HIDDEN), 1e-5, _low(WIDTH, HIDDEN), _low(HIDDEN), 1e-5)


def _rows() -> None:
    from specdec.requests.append_kernel import launch_append
    from specdec.requests.kept_kernel import launch_keep, launch_recent

    lengths, alive, emitted = _long(1), torch.ones(1, dtype=torch.bool), _long(1, DEPTH + 1)
    launch_recent(_long(1, 512), lengths, DEPTH + 1)
    launch_keep(_low(1, DEPTH + 1, 3 * HIDDEN), _low(1, NODES, 3 * HIDDEN), _long(1, DEPTH), lengths, alive)
    launch_append(_long(1, 512), lengths, lengths, alive, emitted, lengths, _long(1, 1))


def _outcome() -> None:
    from specdec.acceptance.base import Acceptance
    from specdec.acceptance.greedy_kernel import launch_follow
    from specdec.rounds.packing_kernel import launch_pack
    from specdec.trees.tensors import tables_of

    tables, tokens = tables_of(_long(1, NODES), DEPTH, WIDTH), _long(1, NODES)
    verdict = Acceptance(*launch_follow(tokens, tokens, tables.parent, tables.path, tables.depth, tables.valid))
    faults = [torch.zeros(1, WIDTH) for _ in range(DEPTH)] + [torch.zeros(1, NODES), torch.zeros(1, dtype=torch.bool)]
    emitted = _long(1, DEPTH + 1)
    launch_pack(faults, [0] * DEPTH + [1, 2], verdict, emitted, tables, 4 * (DEPTH + 1) + 3 + DEPTH)


def _sampling() -> None:
    from specdec.sampling.draw_kernel import launch_find, launch_probs
    from specdec.sampling.log_probs_kernel import launch_top_log_probs
    from specdec.sampling.noise_kernel import launch_noise
    from specdec.sampling.ties_kernel import launch_threshold
    from specdec.sampling.top_kernel import launch_top
    from specdec.sampling.warped import Warped

    logits, number = _low(1, NODES, VOCABULARY), torch.ones(NODES, dtype=torch.float64)
    warm = Warped(logits).heated(number)
    launch_top_log_probs(warm.source, warm.flags, warm.shape, WIDTH)
    launch_top(logits, 1)
    stats = warm.stats
    cuts, *_ = launch_threshold(warm.source, warm.flags, *stats, number, 0)
    launch_find(warm.source, warm.flags, *stats, torch.zeros(NODES, 1, dtype=torch.float64))
    launch_probs(warm.source, warm.flags, *stats, torch.zeros(1, NODES, VOCABULARY))
    launch_noise(_long(1), _long(1), 3, 64)


def _pointwise() -> None:
    from specdec.model.fusion.pointwise_kernel import gate, rms_norm, rotate

    hidden, heads, angles = (
        torch.empty(1, *shape, dtype=torch.bfloat16) for shape in ((4, 4096), (32, 4, 128), (4, 128))
    )
    rms_norm(hidden, hidden[0, 0], 1e-5, False)
    rotate(heads, heads[:, :8], angles, angles)
    gate(hidden, "silu")


def _move(page_copy: bool) -> None:
    from attention.kv.move_kernel import launch_move_rows

    tensors = [torch.empty(1, 8, 512 * (16 if page_copy else 1), dtype=torch.int32) for _ in range(2)]
    index = torch.arange(4)
    launch_move_rows(tensors, index + 4, index, torch.tensor([0, 1, 2, 3, 4] if page_copy else [0, 4]))


def round_launches() -> dict[str, Callable[[], object]]:
    """Label -> a launch of the kernels of one part of a round."""
    return {
        "tables of trees": _tables, "places of tokens": _places, "expansion": _expansion,
        "best children": _best_children, "drafter's layer": _drafter, "rows": _rows, "outcome": _outcome,
        "sampling": _sampling, "pointwise": _pointwise, "commit": lambda: _move(False),
        "page copy": lambda: _move(True),
    }  # fmt: skip
