"""The frozen 4-bit base model: loading, chat format, log-probabilities, mixing of vectors, sampling."""
