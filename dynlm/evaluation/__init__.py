"""What reading gains: losses on identical tokens, perplexities, intervals over articles."""
