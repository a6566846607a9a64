"""A target and a draft model in folders, as users have them, texts in a file, and no progress bars."""

import json

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from specdec.tiny_pair import FOLDER

torch.set_num_threads(1)  # tiny tensors: waiting threads would cost ten times more on shared cores
CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% if quiet is defined and quiet %}<quiet>{% endif %}{% endif %}"
)


@pytest.fixture(autouse=True)
def quiet():
    """No progress bars; the verbosity that commands set is put back."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    yield
    logging.set_verbosity(verbosity)
    if bars:
        logging.enable_progress_bar()


@pytest.fixture
def short_texts(tmp_path):
    """A file of a dozen short texts, of which a training holds out the last one."""
    texts = [f"def function_{n}(value):\n    return value + {n}\n" for n in range(12)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return tmp_path / "data.jsonl"


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Target and draft model in folders, the tokenizer with a chat template beside the weights."""
    base = tmp_path_factory.mktemp("pair")
    tokenizer = AutoTokenizer.from_pretrained(FOLDER / "target")
    tokenizer.chat_template = CHAT
    for name, layers, seed in (("target", 2, 0), ("draft", 1, 1)):
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=4096, hidden_size=32, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=256, bos_token_id=0, eos_token_id=0, pad_token_id=1,
            initializer_range=0.3,
        )  # fmt: skip
        LlamaForCausalLM(config).eval().save_pretrained(base / name)
        tokenizer.save_pretrained(base / name)
    return base
