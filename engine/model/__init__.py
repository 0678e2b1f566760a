"""The hardware side: weights, tokens, KV, and the process that runs them."""
