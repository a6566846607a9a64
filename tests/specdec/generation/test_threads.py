"""Several threads, one model: every text is the model's own, and the model stays as it was."""

import threading

import pytest
import torch

import specdec
from tests.families import build

CALLS = 50
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def models(device):
    target, draft = build("llama"), build("llama", seed=1)
    for model in (target, draft):
        model.generation_config.eos_token_id = None
    return target.to(device), draft.to(device)


def own_text(model, ids) -> list[int]:
    return model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12, pad_token_id=1)[
        0, ids.shape[1] :
    ].tolist()


def run(works, calls: int = CALLS) -> None:
    """Every function in a thread of its own, `calls` times; whatever one raises or finds wrong is raised here."""
    failures = []

    def repeat(work):
        try:
            for call in range(calls):
                work(call)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=repeat, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


@pytest.mark.parametrize("device", DEVICES)
def test_generators_of_one_model_a_shared_one_and_its_own_generate(device):
    """Two threads share a generator, one has its own and builds it anew now and then, one calls the model itself."""
    target, draft = models(device)
    prompts = [torch.randint(3, 97, (1, n), generator=torch.Generator().manual_seed(n)).to(device) for n in (3, 17, 9)]
    wanted = [own_text(target, ids) for ids in prompts]
    setting = target.config._attn_implementation, target.config.pad_token_id, target.config.to_json_string()
    shared = specdec.SpeculativeGenerator(target, specdec.ModelDrafter(draft, num_tokens=3))
    lone = [specdec.SpeculativeGenerator(target, specdec.PromptLookupDrafter())]

    def ours(generator, call):
        ids, want = prompts[call % 3], wanted[call % 3]
        assert generator.generate(ids, max_new_tokens=12).sequences[0, ids.shape[1] :].tolist() == want

    def rebuilding(call):
        if call % 10 == 9:
            lone[0] = specdec.SpeculativeGenerator(target, specdec.PromptLookupDrafter())
        ours(lone[0], call)

    def theirs(call):
        assert own_text(target, prompts[call % 3]) == wanted[call % 3]

    run([lambda call: ours(shared, call), lambda call: ours(shared, call + 1), rebuilding, theirs])
    assert (target.config._attn_implementation, target.config.pad_token_id, target.config.to_json_string()) == setting
    assert own_text(target, prompts[0]) == wanted[0]
    assert shared.target.cache.free_pages == shared.target.cache.num_pages


@pytest.mark.parametrize("device", DEVICES)
def test_generators_that_share_a_drafter_in_both_orders_wait_for_each_other(device):
    """Their locks are taken in one order, whatever holds what; nobody waits for ever."""
    target, draft = models(device)
    other = build("llama", seed=2).to(device)
    other.generation_config.eos_token_id = None
    a, b = (specdec.ModelDrafter(model, num_tokens=2, sample=False) for model in (draft, other))
    generators = [specdec.SpeculativeGenerator(target, specdec.MergedDrafter(*pair)) for pair in ((a, b), (b, a))]
    ids = torch.tensor([[5, 6, 7]], device=device)
    want = own_text(target, ids)

    def work(generator):
        def call(_):
            assert generator.generate(ids, max_new_tokens=12).sequences[0, 3:].tolist() == want

        return call

    run([work(generator) for generator in generators], calls=12)
