"""Learning to learn while reading: hand-made rules are tuned, learned rules trained by meta-gradients."""
