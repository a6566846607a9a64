"""Sizes of the Medusa experiment: the one that is measured, and one that only checks the path."""

# prompt_files: held-out files that prompts come from, half of them for calibration; edit_every: one file of every so
# many gives edit examples
# fmt: off
PRESETS = {
    "full": dict(
        max_bytes=120_000_000, tokenizer_bytes=20_000_000, vocab_size=16384, context=1024, edit_every=20,
        prompt_files=600,
        target=dict(hidden_size=1024, intermediate_size=2816, num_hidden_layers=26, num_attention_heads=16,
                    num_key_value_heads=8),
        parameters_at_least=300_000_000, target_batch=64, target_steps=600, target_lr=6e-4,
        heads=5, heads_batch=32, rows_at_once=32, heads_steps=600, heads_lr=1e-3, validation_rows=36,
        draft=dict(hidden_size=768, intermediate_size=2048, num_hidden_layers=3, num_attention_heads=12,
                   num_key_value_heads=4),
        draft_batch=32, draft_steps=500, draft_lr=1e-3, calibration_prompts=16, prompts=8, tokens=128, repeats=3,
    ),
    "smoke": dict(
        max_bytes=400_000, tokenizer_bytes=200_000, vocab_size=512, context=512, edit_every=2, prompt_files=60,
        target=dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
                    num_key_value_heads=1),
        parameters_at_least=0, target_batch=2, target_steps=6, target_lr=3e-3,
        heads=5, heads_batch=2, rows_at_once=2, heads_steps=4, heads_lr=1e-3, validation_rows=2,
        draft=dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
                   num_key_value_heads=1),
        draft_batch=2, draft_steps=4, draft_lr=3e-3, calibration_prompts=2, prompts=2, tokens=16, repeats=1,
    ),
}
# fmt: on
