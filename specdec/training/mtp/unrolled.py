"""The steps of MTP modules that decoding takes after every token of packed texts, all texts at once, with gradients.

One module repeated (FastMTP, arXiv 2509.18362): row j of step k reads the embedding of token j + 1 + k and what row j
of step k - 1 gave, in step 0 the target's state of token j, at position j + k, and predicts token j + 2 + k. It sees
what `UnrolledAttention` says. One module a depth (DeepSeek-AI 2024, DeepSeek-V3, equations 21 to 23): the same rows at
position j, each module over its own keys, those of rows up to j.

The modules are transformers' own classes, so attention is given to them as one of transformers' attention functions,
in twins (`attention.hf.twin`): the modules themselves stay as they are and can be decoded with in between."""

from contextlib import contextmanager

from torch import Tensor, nn
from torch.nn import functional

from attention.gpu import to_device
from attention.hf.probe import ATTENDING, PLAIN, layer_kinds
from attention.hf.twin import SLOT, make_twin
from specdec.drafters.mtp.network import MtpInput, final_norm
from specdec.training.backbone import positions_of
from specdec.training.data import Rows
from specdec.training.mtp.network import MtpNetwork
from specdec.training.unrolled.attention import UnrolledAttention

NAME = "specdec_unrolled"  # no mask function has this name, so that a model builds no mask


class UnrolledModules:
    """The training forward of a network. Raises ValueError for modules with layers that keep a recurrent state."""

    def __init__(self, network: MtpNetwork):
        from transformers import AttentionInterface  # takes seconds

        AttentionInterface.register(NAME, _attend)
        self._network = network
        for part in network.parts:
            kinds = layer_kinds(part.network.config.get_text_config())
            if not set(kinds) <= ATTENDING | PLAIN:
                raise ValueError(f"MTP modules are trained whose layers attend, got layers {', '.join(kinds)}")
        self._twins = [make_twin(part.network) for part in network.parts]
        for twin in self._twins:
            twin.attend_through(NAME)

    def __call__(self, rows: Rows, tokens: Tensor, states: Tensor, depth: int) -> list[Tensor]:
        """The outputs `[B * S, h]` of each of `depth` steps, after the module's norm.

        rows: on the CPU, `tokens [B, S]` are theirs on the device; states `[B, S, h]`: the target's. Rows whose token,
        or label, is in another text or after the end are computed too; nobody sees them.

        Raises ValueError for more steps than there are modules, where these are several."""
        recycled = len(self._twins) == 1
        if not recycled and depth > len(self._twins):
            raise ValueError(f"{len(self._twins)} MTP modules, one a depth, take as many steps, got depth {depth}")
        documents, outputs = rows.documents, list[Tensor]()
        positions = to_device(positions_of(documents).flatten(), tokens.device)
        over = lambda: UnrolledAttention(documents, None, tokens.device, sliding=True)
        attend, hidden = over(), states.flatten(0, 1)
        for step in range(depth):
            if step and not recycled:
                attend = over()
            given = tokens.roll(-1 - step, 1).flatten()
            place = 0 if recycled else step
            output, hidden = self._run(place, given, hidden, positions + (step if recycled else 0), step, attend)
            outputs.append(output)
        return outputs

    def _run(self, number: int, tokens: Tensor, states: Tensor, positions: Tensor, step: int,
             attend: UnrolledAttention) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Module `number` over `tokens [T]` and `states [T, h]` -> its output, and what the next step reads, `[T, h]`.

        Raises ValueError where not every layer attends through transformers' interface."""
        twin, network = self._twins[number], self._network
        first, slot = twin.model.get_input_embeddings(), twin.slot
        assert isinstance(first, MtpInput)
        absent = (positions == 0)[None] if network.zero_first and step == 0 else None
        slot.batch, slot.attended = attend, 0
        try:
            with first.reading(states[None], absent), _read_by(final_norm(twin.model)) as before:
                inputs = dict(input_ids=tokens[None], position_ids=positions[None], use_cache=False, return_dict=True)
                output = twin.model.base_model(**inputs).last_hidden_state[0]
        finally:
            slot.batch = None
        layers = _attending(twin.model)
        if slot.attended != layers:
            raise ValueError(
                f"{slot.attended} of {layers} layers of the MTP module, a {type(twin.model).__name__}, attend through "
                "transformers' AttentionInterface"
            )
        return output, output if network.normed else before[0][0]


def _attending(model) -> int:
    config = model.config.get_text_config()
    kinds = layer_kinds(config)
    return sum(kind not in PLAIN for kind in kinds) if kinds else config.num_hidden_layers


@contextmanager
def _read_by(norm: nn.Module):
    """What `norm` reads in the forward inside, a list."""
    seen = list[Tensor]()
    hook = norm.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    try:
        yield seen
    finally:
        hook.remove()


def _attend(module, query: Tensor, key: Tensor, value: Tensor, attention_mask, scaling=None, dropout=0.0,
            sliding_window=None, softcap=None, s_aux=None, **kwargs) -> tuple[Tensor, None]:  # fmt: skip
    """The attention function that transformers calls.

    `query [1, H, T, D]`, `key [1, G, T, D]`, `value [1, G, T, Dv]` -> `([1, T, H, Dv], None)`."""
    name, slot = type(module).__name__, vars(module)[SLOT]
    added = dict(attention_mask=attention_mask, softcap=softcap, s_aux=s_aux, position_bias=kwargs.get("position_bias"))
    if other := [what for what, given in added.items() if given is not None]:
        raise ValueError(f"{name} attends with {', '.join(other)}, which MTP modules are not trained with")
    layer, slot.attended = slot.attended, slot.attended + 1
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    width = max(query.shape[-1], value.shape[-1])  # those of latent attention differ
    q, k, v = (functional.pad(x[0].transpose(0, 1), (0, width - x.shape[-1])) for x in (query, key, value))
    return slot.batch.attend(layer, q, k, v, scale, sliding_window)[None, ..., : value.shape[-1]], None
