"""What `scripts.bench_cpu` measures, a file each; a worker loads one of them in that engine's own interpreter.

PACKAGES: distributions whose versions a result names.
export(models, folder): turn every transformers model in `models`, a folder each, into the engine's own files of that
    name in an empty `folder`.
load(settings) -> call: open `target` and the draft model that `settings["draft"]` names for one kind of decoding.
call(prompts, new_tokens, seed) -> (texts, rounds): token ids of every prompt in, those that followed out; greedy where
    `seed` is None, else drawn at temperature 1. `rounds` are forwards of the target after which tokens were kept, steps
    without a draft among them. No call may find anything that an earlier one left, such as keys of its prompt.
"""
