"""Articles, tokenizers and segments: from files to tensors of token ids."""
