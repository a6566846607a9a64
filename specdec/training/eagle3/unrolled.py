"""Training-time test: the steps that decoding takes after every token of a text at once (Li et al. 2025, 3.2).

Row j of step k is the k-th step after anchor j, the token whose target state its features began with: it reads the
embedding of token j + 1 + k and what row j of step k - 1 gave, in step 0 the target's features of token j, and predicts
token j + 2 + k. The drafter reads tokens of the text, never its own. In P-EAGLE the steps after the first one read the
mask token and the learned feature in place of both, so that they do not wait for each other."""

from torch import Tensor

from attention.gpu import to_device
from specdec.drafters.eagle3.module import Eagle3Model
from specdec.training.backbone import positions_of
from specdec.training.unrolled.attention import UnrolledAttention


def unroll(network: Eagle3Model, tokens: Tensor, documents: Tensor, features: Tensor, depth: int,
           marked: Tensor | None = None) -> list[Tensor]:  # fmt: skip
    """The `output [B * S, h]` of each of `depth` steps, for `Eagle3Model.logits`.

    tokens `[B, S]`, documents `[B, S]` best on the CPU, features `[B, S, F]`, see `Backbone.features`. Rows whose
    token, or label, is in another text or after the end are computed too, and those that `marked` leaves out; nobody
    sees them."""
    documents = documents.cpu()
    attend = UnrolledAttention(documents, network.config.windows, tokens.device)
    positions = to_device(positions_of(documents).flatten(), tokens.device)
    hidden, outputs = network.fuse(features.flatten(0, 1)), []
    for step in range(depth):
        embedded = network.embed(tokens.roll(-1 - step, 1).flatten())
        output, hidden = network(embedded, hidden, positions + step, attend)
        outputs.append(output)
    return outputs


def unroll_in_parallel(network: Eagle3Model, tokens: Tensor, documents: Tensor, features: Tensor, depth: int,
                       marked: Tensor | None = None) -> list[Tensor]:  # fmt: skip
    """The same for a P-EAGLE network; a slot sees the text up to its anchor and the slots before it after that anchor.

    marked `[B, S]`: how many of the steps come after each token, on the CPU (None: all); the others' outputs are zero.

    One slot is run after the other, which gives what one pass over all of them does, since a slot reads no other's
    output but sees their keys and values alone."""
    documents = documents.cpu()
    attend = UnrolledAttention(documents, network.config.windows, tokens.device, sliding=True)
    positions = to_device(positions_of(documents).flatten(), tokens.device)
    embedded, hidden = network.embed(tokens.roll(-1, 1).flatten()), network.fuse(features.flatten(0, 1))
    outputs = [network(embedded, hidden, positions, attend)[0]]
    (mask_token, mask_features), size = network.mask_steps(1), tokens.numel()
    embedded, hidden = network.embed(mask_token), network.fuse(mask_features)
    for step in range(1, depth):
        rows = None if marked is None else to_device((marked.flatten() > step).nonzero()[:, 0], tokens.device)
        count = size if rows is None else len(rows)
        attend.after(rows)
        given = embedded.expand(count, -1), hidden.expand(count, -1)
        output, _ = network(*given, (positions if rows is None else positions[rows]) + step, attend)
        outputs.append(output if rows is None else output.new_zeros(size, output.shape[1]).index_copy(0, rows, output))
    return outputs
