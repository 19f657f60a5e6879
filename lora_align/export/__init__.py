"""Write mixes for other programs."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Format:
    """A format of `export`: its types of numbers, the default first, and the options that it reads."""

    dtypes: tuple[str, ...]
    options: tuple[str, ...]
    card_beside: bool = False  # the card is FILE.md; other formats are folders


@dataclass(frozen=True)
class ExportOptions:
    """Select how a mix is exported."""

    dtype: str | None = None  # None: the default
    each: bool = False  # one file a vector
    dequantised: bool = False  # merge into what remains of the base in NF4
    check: bool = True  # compare a merged model with the mix


_ADAPTER, _MODEL = ("float16", "float32", "q8_0"), ("bfloat16", "float16", "float32")
FORMATS = {
    "--gguf": Format(_ADAPTER, ("--each", "--dtype"), card_beside=True),
    "--merged": Format(_MODEL, ("--dequantised", "--no-check", "--dtype")),
    "--gguf-merged": Format(_MODEL, ("--dequantised", "--no-check", "--dtype"), card_beside=True),
    "--ollama": Format((), ("--no-check",)),
}
