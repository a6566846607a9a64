"""What a method really samples with, once the model's generation config was merged."""

from collections.abc import Mapping
from typing import Any

from specdec.requests.options import settle_config

FIELDS = (
    "do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff",
    "repetition_penalty", "no_repeat_ngram_size", "bad_words_ids", "sequence_bias", "suppress_tokens",
    "begin_suppress_tokens", "min_new_tokens", "min_length", "forced_eos_token_id", "eos_token_id",
)  # fmt: skip
OF_SAMPLES = ("temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
OFF = {"temperature": (1.0,), "top_k": (0,), "top_p": (1.0,), "typical_p": (1.0,), "repetition_penalty": (1.0,),
       "epsilon_cutoff": (0.0,), "eta_cutoff": (0.0,), "no_repeat_ngram_size": (0,), "min_length": (0,)}  # fmt: skip


def settings_for(model, temperature: float, top_k: int = 0, top_p: float = 1.0, from_model: bool = False) -> dict:
    """The sampling arguments that all methods get at a temperature; 0 is greedy.

    from_model: top-k, top-p and the like are those of the model's generation config. Else samples are drawn at this
        temperature with `top_k` and `top_p` alone, whatever the model's config says.
    """
    if temperature == 0:
        return {"do_sample": False}
    given: dict[str, Any] = {"do_sample": True, "temperature": temperature}
    own = _own(model)
    if from_model:
        return given | {"top_k": own.get("top_k", 0), "top_p": own.get("top_p", 1.0)}
    others = {name: OFF.get(name, (None,))[0] for name in OF_SAMPLES if name in own and name != "temperature"}
    return given | others | {"top_k": top_k, "top_p": top_p}


def used_by_ours(model, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What the generators of this library make of `settings` and the model's generation config."""
    return _fields(settle_config(model, None, dict(settings)))


def used_by_theirs(model, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What transformers' `generate` makes of them."""
    return _fields(model._prepare_generation_config(None, **settings)[0])


def notes_on(model, used: Mapping[str, Any]) -> list[str]:
    """Sentences about settings in force that a reader of "temperature 1" would not expect."""
    said = list[str]()
    at = f"temperature {used['temperature']:g}" if used.get("do_sample") else "temperature 0"
    for name, own in _own(model).items():
        of_samples = name in OF_SAMPLES and name != "temperature"
        if used.get("do_sample") and of_samples and used.get(name) != own:
            text = f"the model's generation config says {name}={own}, samples are drawn with {used.get(name, 'none')}"
            said.append(f"{at}: {text}")
    if used.get("do_sample") and used.get("top_k") == 1:
        said.append(f"{at}: top_k=1 leaves one token to choose, so these texts are greedy ones")
    for name in FIELDS:
        if name in used and name not in (*OF_SAMPLES, "do_sample", "eos_token_id"):
            said.append(f"{at}: {name}={used[name]} of the model's generation config is in force")
    return said


def _own(model) -> dict[str, Any]:
    """What the model's generation config says other than transformers' defaults."""
    return {
        name: value
        for name, value in model.generation_config.to_diff_dict().items()
        if name in FIELDS and value is not None
    }


def _fields(config) -> dict[str, Any]:
    """The fields that change a text, without those that are off; of greedy decoding without those of samples."""
    always = {"do_sample"} | ({"temperature", "top_k", "top_p"} if config.do_sample else set())
    found = {}
    for name in FIELDS:
        off, value = OFF.get(name, (None,)), vars(config).get(name)
        value = off[0] if value is None else value
        if name in always or value not in (None, *off) and (config.do_sample or name not in OF_SAMPLES):
            found[name] = value
    return found
