"""Settings of the learned drafters of `scripts.bench_learned`, beside those of `scripts.medusa_bench.presets`."""

# prompts: decoded, of all kinds in turn; timed_steps: of training, of which the first warm_steps do not count;
# chains: drafted tokens, the longest is judged; tree: nodes, depth and width of trees, 60, 6, 10 are EAGLE-2's own;
# grown: rows of best-first trees, the last token's among them
# eagle3: its draft vocabulary (None: the target's) and `UnrolledSettings`; dspark: its network and `BlockSettings`; for
# so short a training its first layer sees four tokens, and it learns from kl, not DSpark's 0.1 ce + 0.9 tv
# fmt: off
PRESETS = {
    "full": dict(
        prompts=16, repeats=3, timed_steps=16, warm_steps=6, chains=[5, 7], tree=[60, 6, 10], grown=[16, 64],
        eagle3=dict(
            draft_vocabulary=None, settings=dict(batch=16, rows_at_once=16, lr=1e-3, depth=4, decay=0.8, loss="kl"),
        ),
        dspark=dict(
            network=dict(num_layers=3, block_size=7, windows=[4, None, None]),
            settings=dict(batch=16, rows_at_once=16, lr=1e-3, anchors=128, loss=[["kl", 1.0]]),
        ),
    ),
    "smoke": dict(
        prompts=2, repeats=1, timed_steps=3, warm_steps=1, chains=[2, 3], tree=[8, 3, 3], grown=[8],
        eagle3=dict(
            draft_vocabulary=256, settings=dict(batch=2, rows_at_once=2, lr=1e-3, depth=2, decay=0.8, loss="kl"),
        ),
        dspark=dict(
            network=dict(num_layers=1, block_size=3, markov_rank=8, windows=[4]),
            settings=dict(batch=2, rows_at_once=2, lr=1e-3, anchors=8, loss=[["kl", 1.0]]),
        ),
    ),
}
# fmt: on
