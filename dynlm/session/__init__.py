"""Model, tokenizer, prior and rules in one object, and what one does with them: read, evaluate, tune, meta-train."""
