"""Uploads to the Hugging Face hub."""


def push_model(model, tokenizer, repo: str) -> str:
    """Upload a model with its tokenizer; returns the repository's full name, with the owner that `repo` may omit."""
    from huggingface_hub import HfApi

    repo = HfApi().create_repo(repo, exist_ok=True).repo_id
    model.push_to_hub(repo)
    tokenizer.push_to_hub(repo)
    return repo
