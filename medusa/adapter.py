"""LoRA for Medusa-2, where the backbone learns beside its heads (Hu et al. 2022, through peft)."""


def add_lora(model, rank: int = 32, alpha: int = 16, dropout: float = 0.05, targets: str | list[str] = "all-linear"):
    """A `peft.PeftModel` around `model`, whose layers it changes in place: the `adapter` of `train_medusa`.

    `targets` names the linear layers, by default all but the output layer. `adapter.merge_and_unload()` gives the
    trained model back as a plain one. Raises ImportError without peft."""
    from peft import LoraConfig, get_peft_model

    weights = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=targets, task_type="CAUSAL_LM")
    return get_peft_model(model, weights)
