"""The generators on a GPU, where the Triton kernels serve them with no change to user code."""

import pytest
import torch

import specdec
from tests.families import CONFIGS, ragged_prompts
from tests.specdec.test_generators import PAIR, speculative

pytestmark = pytest.mark.gpu


def spy_on_kernels(monkeypatch) -> list[str]:
    """Names of the Triton launchers that were called."""
    from attention import kv_write_kernel, paged_kernel

    calls = []
    for module, name in ((paged_kernel, "paged_attention_triton"), (kv_write_kernel, "launch_write_kv")):
        launch = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *arguments, launch=launch, name=name: calls.append(name) or launch(*arguments))
    return calls


@pytest.mark.parametrize("family", CONFIGS)
def test_greedy_equals_transformers(family, monkeypatch):
    calls = spy_on_kernels(monkeypatch)
    generator = speculative(family)
    model, draft = generator.target.model.cuda(), generator.drafter.runner.model.cuda()
    generator = specdec.SpeculativeGenerator(model, specdec.ModelDrafter(draft, 4))
    ids, mask = (x.cuda() for x in ragged_prompts(8))
    expected = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=30)
    assert generator.generate(ids, mask, max_new_tokens=30).sequences.equal(expected)
    assert set(calls) == {"paged_attention_triton", "launch_write_kv"}


@pytest.mark.parametrize("kv_dtype", ["int8", "fp8"])
def test_quantised_pages_stay_close_to_the_reference(kv_dtype):
    """The same tokens as the PyTorch reference over the same quantised pages, apart from near-ties."""
    prompts = PAIR.tokenizer(PAIR.prompts[next(iter(PAIR.prompts))], return_tensors="pt", padding=True)
    on_cpu = specdec.AutoregressiveGenerator(PAIR.target, kv_dtype=kv_dtype).generate(
        prompts.input_ids, attention_mask=prompts.attention_mask, max_new_tokens=16
    )
    target = specdec.load_tiny_pair().target.cuda()
    ids, mask = prompts.input_ids.cuda(), prompts.attention_mask.cuda()
    on_gpu = specdec.AutoregressiveGenerator(target, kv_dtype=kv_dtype).generate(ids, attention_mask=mask, max_new_tokens=16)
    same = (on_gpu.sequences.cpu() == on_cpu.sequences).all(1)
    assert float(same.float().mean()) >= 0.75


def test_bfloat16_pair_speculates(monkeypatch):
    """Accepts about as often as in float32; the kernels run."""
    calls = spy_on_kernels(monkeypatch)
    pair = specdec.load_tiny_pair()
    target, draft = pair.target.to("cuda", torch.bfloat16), pair.draft.to("cuda", torch.bfloat16)
    batch = pair.tokenizer(["def mean(values):", "import os\n\n"], return_tensors="pt", padding=True).to("cuda")
    out = specdec.SpeculativeGenerator(target, specdec.ModelDrafter(draft, 4)).generate(batch.input_ids, batch.attention_mask, max_new_tokens=48)
    assert out.stats.pooled.acceptance_rate > 0.4 and "paged_attention_triton" in calls
