"""Write mixes for other programs."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Format:
    """A format of `export`: its types of numbers, the default first, and the options that it reads."""

    dtypes: tuple[str, ...]
    options: tuple[str, ...]
    is_file: bool = False  # with a card, FILE.md, beside it; other formats are folders


@dataclass(frozen=True)
class ExportOptions:
    """Select how a mix is exported."""

    dtype: str | None = None  # None: the default
    each: bool = False  # one file a vector
    dequantised: bool = False  # merge into the dequantised NF4 base
    check: bool = True  # compare a merged model with the mix


FULL_DISK = "make room, or write to another disk"  # a remedy
_ADAPTER, _MODEL = ("float16", "float32", "q8_0"), ("bfloat16", "float16", "float32")
_MERGING = ("--dequantised", "--no-check", "--dtype")
FORMATS = {
    "--gguf": Format(_ADAPTER, ("--each", "--dtype"), is_file=True),
    "--merged": Format(_MODEL, _MERGING),
    "--gguf-merged": Format(_MODEL, _MERGING, is_file=True),
    "--ollama": Format(_MODEL, _MERGING),
}
