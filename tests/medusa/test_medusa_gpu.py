"""Heads on a GPU: the same loop over the Triton kernels, the same loss in bf16 arithmetic."""

import pytest
import torch

from medusa import MedusaGenerator, TrainingSettings, medusa_loss, train_medusa
from specdec import TokenTree
from specdec.training.data import Rows
from tests.families import CONFIGS, OUTPUT_BIAS, build, ragged_prompts
from tests.matrix import random_heads

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("family", sorted(CONFIGS | OUTPUT_BIAS))
def test_greedy_equals_transformers(family):
    model = build(family).cuda()
    ids, mask = (x.cuda() for x in ragged_prompts(8))
    expected = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=24)
    assert (
        MedusaGenerator(model, random_heads(model), TokenTree.from_widths((3, 2, 1)))
        .generate(ids, mask, max_new_tokens=24)
        .sequences.equal(expected)
    )


def test_the_loss_is_that_of_the_cpu_and_nearly_so_in_bf16():
    model = build("llama")
    heads, hidden = random_heads(model, 3), torch.randn(2, 40, 32, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(97, (2, 40), generator=torch.Generator().manual_seed(1))
    expected = medusa_loss(heads, hidden, labels)[0]
    gradients = torch.autograd.grad(expected, list(heads.parameters()))
    heads.cuda()
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 3e-2)):
        with torch.autocast("cuda", torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = medusa_loss(heads, hidden.cuda(), labels, chunk=13)[0]
        torch.testing.assert_close(loss.cpu(), expected, rtol=tolerance, atol=tolerance)
        for ours, theirs in zip(torch.autograd.grad(loss, list(heads.parameters())), gradients, strict=True):
            assert (ours.cpu() - theirs).norm() <= tolerance * theirs.norm()


def test_training_in_bf16_lowers_the_loss(tmp_path):
    from accelerate import Accelerator

    model = build("llama").to("cuda", torch.bfloat16)
    tokens = (torch.arange(24) * 5 + torch.arange(32)[:, None]) % 97
    rows = Rows(tokens.int(), tokens.int(), torch.zeros_like(tokens, dtype=torch.int32))
    heads = random_heads(model, 2).float()
    records = train_medusa(
        model,
        heads,
        rows,
        tmp_path,
        TrainingSettings(60, batch=16, lr=1e-2),
        accelerator=Accelerator(mixed_precision="bf16"),
        progress=False,
    )
    assert records[-1]["loss"] < 0.7 * records[0]["loss"]
