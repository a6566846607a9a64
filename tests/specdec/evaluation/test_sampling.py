"""What methods sample with once the model's generation config was merged, and what is said of it."""

import pytest
from transformers import GenerationConfig

from specdec.evaluation.sampling import notes_on, settings_for, used_by_ours, used_by_theirs
from tests.families import build


@pytest.fixture
def model():
    made = build("llama")
    made.generation_config = GenerationConfig(do_sample=True, top_k=1, top_p=0.5, repetition_penalty=1.2)
    return made


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("from_model", [False, True])
def test_ours_and_theirs_sample_alike_whatever_the_models_config_says(model, temperature, from_model):
    given = settings_for(model, temperature, from_model=from_model)
    used = used_by_ours(model, given)
    assert used == used_by_theirs(model, given)
    assert used["repetition_penalty"] == 1.2
    if temperature:
        assert (used["top_k"], used["top_p"]) == ((1, 0.5) if from_model else (0, 1.0))


def test_a_config_with_top_k_1_is_not_passed_over_in_silence(model):
    said = " / ".join(notes_on(model, used_by_ours(model, settings_for(model, 1.0))))
    assert "config says top_k=1, samples are drawn with 0" in said and "config says top_p=0.5" in said
    assert "repetition_penalty=1.2" in said and "greedy" not in said
    own = " / ".join(notes_on(model, used_by_ours(model, settings_for(model, 1.0, from_model=True))))
    assert "top_k=1 leaves one token to choose" in own and "config says" not in own
    plain = build("llama")
    assert notes_on(plain, used_by_ours(plain, settings_for(plain, 1.0))) == []
