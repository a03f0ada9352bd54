"""What a transformers directory keeps beside the weights: how its inputs are made."""

COMPANIONS = (
    "tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "merges.txt", "tokenizer.model",
    "special_tokens_map.json", "added_tokens.json", "preprocessor_config.json", "generation_config.json",
    "chat_template.jinja",
)  # fmt: skip
