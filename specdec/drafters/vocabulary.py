"""Two vocabularies and the tokens that both have."""


def shared_tokens(target_tokenizer, draft_tokenizer) -> list[tuple[int, int]]:
    """(target id, draft id) of the tokens whose text is the same, a leading space included; special tokens pair by name
    only.
    """
    special = set(target_tokenizer.all_special_tokens) | set(draft_tokenizer.all_special_tokens)

    def texts(tokenizer) -> dict[str, int]:
        spaces = {
            tokenizer.convert_ids_to_tokens(ids)[0][0]
            for ids in [tokenizer(" ", add_special_tokens=False).input_ids]
            if ids
        }
        found: dict[str, int] = {}
        for token, index in tokenizer.get_vocab().items():
            text = token if token in special else "".join(" " if c in spaces else c for c in token)
            found[text] = min(index, found.get(text, index))
        return found

    ours, theirs = texts(target_tokenizer), texts(draft_tokenizer)
    return sorted((index, theirs[text]) for text, index in ours.items() if text in theirs)
