"""Write mixes for other programs."""

GGUF_DTYPES = ("float32", "float16", "q8_0")
