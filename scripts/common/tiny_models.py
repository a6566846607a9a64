"""Small Llama models for the shipped pair and `scripts.bench_medusa`: tokenizer, weights, losses, export."""

import math

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

EOS, PAD = "<|endoftext|>", "<|pad|>"


def train_tokenizer(texts, folder, vocab_size=4096):
    """Byte-level BPE with single digits, saved to `folder` in transformers' format; loaded again if it is there."""
    if not (folder / "tokenizer_config.json").exists():  # written last
        bpe = Tokenizer(models.BPE())
        bpe.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        bpe.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=[EOS, PAD], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        )
        bpe.train_from_iterator(texts, trainer)
        fast = transformers.PreTrainedTokenizerFast(
            tokenizer_object=bpe, eos_token=EOS, bos_token=EOS, pad_token=PAD, padding_side="left"
        )
        fast.save_pretrained(folder)
    return transformers.AutoTokenizer.from_pretrained(folder)


def tokenize(texts, tokenizer):
    """All texts as one uint16 array, each closed by the end-of-text token."""
    rows = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return np.concatenate([np.asarray([*row, tokenizer.eos_token_id], dtype=np.uint16) for row in rows])


def build_model(shape, vocab_size, context, seed):
    """A random Llama of the given shape; residual outputs are scaled down with depth (Radford et al. 2019)."""
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=vocab_size, head_dim=64, max_position_embeddings=context, tie_word_embeddings=True,
        rms_norm_eps=1e-5, bos_token_id=0, eos_token_id=0, pad_token_id=1, initializer_range=0.04, **shape,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    for name, weight in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weight.data.div_(math.sqrt(2 * config.num_hidden_layers))
    return model


def rows_of(stream, starts, length, device):
    """Rows `[len(starts), length]` (int64) of a token stream, beginning at `starts`."""
    rows = torch.from_numpy(np.stack([stream[s : s + length] for s in starts]).astype(np.int64))
    return rows.to(device, non_blocking=True)


@torch.inference_mode()
def held_out_loss(model, stream, context, device, rows=64):
    """Mean next-token loss in nats over the first `rows` windows of the held-out stream."""
    losses, training = [], model.training
    model.eval()
    for start in range(0, min(rows, (len(stream) - 1) // context), 8):
        x = rows_of(
            stream, [i * context for i in range(start, min(start + 8, (len(stream) - 1) // context))], context, device
        )
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = model(x, use_cache=False).logits
        losses.append(torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), x[:, 1:].flatten()))
    model.train(training)
    return torch.stack(losses).mean().item()


def distillation_loss(draft_logits, target_logits):
    """Half KL(p || q), half total variation, averaged over positions; p the target's distribution, q the draft's."""
    log_q, log_p = draft_logits.float().log_softmax(-1), target_logits.float().log_softmax(-1)
    p = log_p.exp()
    kl = (p * (log_p - log_q)).sum(-1)
    variation = 0.5 * (p - log_q.exp()).abs().sum(-1)
    return (0.5 * kl + 0.5 * variation).mean()


def distillation(draft, target):
    """A function from tokens `[B, S]` to the loss of `draft` against `target` on them; compiled on a GPU."""

    def loss_on(x):
        with torch.no_grad():
            p = target(x, use_cache=False).logits
        return distillation_loss(draft(x, use_cache=False).logits, p)

    return torch.compile(loss_on) if draft.device.type == "cuda" else loss_on


def export(model, folder):
    """Save in bf16 safetensors with a plain config."""
    model.to(torch.bfloat16).save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
