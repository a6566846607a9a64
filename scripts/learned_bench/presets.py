"""Settings of the learned drafters of `scripts.bench_learned`, beside those of `scripts.medusa_bench.presets`."""

# prompts: decoded, of all kinds in turn; timed_steps: of training, of which the first warm_steps do not count;
# chains: drafted tokens, the longest is judged; tree: nodes, depth and width of trees, 60, 6, 10 are EAGLE-2's own;
# eagle3: its draft vocabulary (None: the target's) and `UnrolledSettings`
# fmt: off
PRESETS = {
    "full": dict(
        prompts=16, repeats=3, timed_steps=16, warm_steps=6, chains=[5, 7], tree=[60, 6, 10],
        eagle3=dict(
            draft_vocabulary=None, settings=dict(batch=16, rows_at_once=16, lr=1e-3, depth=4, decay=0.8, loss="kl"),
        ),
    ),
    "smoke": dict(
        prompts=2, repeats=1, timed_steps=3, warm_steps=1, chains=[2, 3], tree=[8, 3, 3],
        eagle3=dict(
            draft_vocabulary=256, settings=dict(batch=2, rows_at_once=2, lr=1e-3, depth=2, decay=0.8, loss="kl"),
        ),
    ),
}
# fmt: on
