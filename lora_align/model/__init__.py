"""The frozen 4-bit base: loading, tokens, log-probabilities, adapters over it, sampling."""
