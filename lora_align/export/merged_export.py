"""The command `export --merged`: the base with a mix added to its weights, for programs that take no adapters.

Memory holds one tensor of the base at a time.
"""

import fnmatch
import json
import math
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from shlex import quote
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from lora_align import store
from lora_align.adapters import safetensors_stream
from lora_align.adapters.delta import Factors, is_finite
from lora_align.adapters.safetensors_stream import TensorFile
from lora_align.commands.push_to_hub import CARD
from lora_align.console import Screen
from lora_align.errors import RunFailedError, UserError
from lora_align.export import FULL_DISK, ExportOptions
from lora_align.export.card import card, file_with_card
from lora_align.export.checkpoint import Checkpoint
from lora_align.export.divergence import kl_from_mix
from lora_align.export.exported import Exported
from lora_align.export.source import Source
from lora_align.model.base import CONFIG_FILES
from lora_align.model.base_folder import INDEX
from lora_align.model.nf4 import through_nf4

BLOCK = 1 << 18  # weights computed at once: few enough for the processor's cache
SAMPLED = 256  # rows of a weight, at most, on which errors are measured
CONVERTER = "convert_hf_to_gguf.py"  # llama.cpp's program
MODEL, WRITTEN = "model", "model.gguf"  # the folder that it reads, and the file that it writes
CONVERTED = {None: "auto", "bfloat16": "bf16", "float16": "f16", "float32": "f32"}  # --dtype → its --outtype
LARGE = 0.5  # an error of rounding that is reported, as a share of the mix's norm


@dataclass
class Errors:
    """Squared norms over the changed weights, estimated from sampled rows."""

    update: float = 0.0
    rounding: float = 0.0  # of the result
    nf4: float = 0.0  # of the base that the mix was trained on

    def figures(self, dtype: torch.dtype) -> dict[str, float]:
        """Return each error as a share of the update's norm."""
        if not self.update:
            return {}
        errors = {f"rounding to {_name(dtype)}": self.rounding, "NF4": self.nf4}
        return {f"error of {name} / norm of the mix": math.sqrt(of / self.update) for name, of in errors.items() if of}


@dataclass(frozen=True)
class MergedWeights:
    """The weights of a base with a mix added."""

    source: Source
    checkpoint: Checkpoint
    dtype: torch.dtype  # of matrices; vectors keep their dtype
    dequantised: bool  # the mix is added to the dequantised NF4 base
    modules: dict[str, str]  # tensor name → module
    errors: Errors = field(default_factory=Errors)

    @classmethod
    def of(cls, source: Source, how: ExportOptions) -> "MergedWeights":
        """Find the tensor of every module of the mix. By default, keep a stored float16 or bfloat16."""
        checkpoint = Checkpoint.of(source.base)
        if how.dequantised and not checkpoint.quantised:
            raise UserError(f'--dequantised: base.quantization is {source.base.recipe.quantization!r}, not "nf4"')
        modules = {checkpoint.tensor(name): name for name in source.merge.names()}
        stored = {entry.dtype for file in checkpoint.files for name, entry in file.entries.items() if name in modules}
        chosen = how.dtype or ("float16" if stored == {"F16"} else "bfloat16")
        return cls(source, checkpoint, getattr(torch, chosen), how.dequantised, modules)

    @property
    def size(self) -> int:
        """Return the bytes of all tensors."""
        entries = [entry for file in self.checkpoint.files for entry in file.entries.values()]
        return sum(math.prod(of.shape) * self.dtype.itemsize if len(of.shape) > 1 else of.size for of in entries)

    def tensors(self, file: TensorFile) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors of one file of the checkpoint. The next tensor overwrites the last."""
        buffer = torch.empty(max((entry.size for entry in file.entries.values()), default=0), dtype=torch.uint8)
        for name in file.entries:
            yield name, self._tensor(name, file.read(name, buffer))

    def _tensor(self, name: str, weight: Tensor) -> Tensor:
        if weight.ndim < 2 or not weight.is_floating_point():
            return weight
        if name in self.checkpoint.transposed:
            return self._matrix(name, weight.T).T
        return self._matrix(name, weight)

    def _matrix(self, name: str, weight: Tensor) -> Tensor:
        """Return a matrix [out, in] of the result. Count its errors if the mix changes it."""
        quantised, double_quant = name in self.checkpoint.quantised, self.source.base.recipe.double_quant
        base = through_nf4(weight, double_quant=double_quant) if quantised and self.dequantised else weight
        too_large = f"a value is too large for {_name(self.dtype)}"
        if name not in self.modules:
            converted = base.to(self.dtype)
            if self.dtype == torch.float16 and not is_finite(converted):
                raise UserError(f"{name}: {too_large}; give --dtype bfloat16")
            return converted
        factors = self.source.merge.module(self.modules[name]).factors
        if weight.shape != (len(factors.B), factors.A.shape[1]):
            raise UserError(f"{self.modules[name]}: the mix does not fit the base's weight {tuple(weight.shape)}")
        some = torch.randperm(len(weight), generator=torch.Generator().manual_seed(0))[:SAMPLED]
        before, plain = base[some].float(), weight[some].float()  # copies: `added` may overwrite both
        result = added(base, factors, self.dtype)
        if result is None:
            raise UserError(f"{self.modules[name]}: {too_large}; give smaller weights")
        update = factors.B[some].float() @ factors.A.float()
        rows = len(weight) / len(some)  # each sampled row stands for so many
        self.errors.update += rows * _energy(update)
        self.errors.rounding += rows * _energy(result[some].float() - (before + update))
        if quantised and not self.dequantised:
            self.errors.nf4 += rows * _energy(through_nf4(plain, double_quant=double_quant) - plain)
        return result


def export_merged(source: Source, target: Path, screen: Screen, how: ExportOptions) -> Exported:
    """Write the merged model to a folder, with its card."""
    use = f"vllm serve {quote(str(target))}"
    with store.exported_folder(target) as staging:
        warn_of_kwargs(source, screen)
        figures = write_model(source, staging, target, screen, how)
        (staging / CARD).write_text(card(source, f"{about_model(source, how)}.", use, figures), encoding="utf-8")
    return Exported({target: sum(file.stat().st_size for file in target.iterdir())}, use, figures)


def about_model(source: Source, how: ExportOptions) -> str:
    """Return what a merged model is."""
    return f"The mix {source.weights} added to {'the dequantised NF4 base' if how.dequantised else 'its base'}"


def warn_of_kwargs(source: Source, screen: Screen) -> None:
    """Warn that a model's files cannot hold the arguments of the chat template."""
    if source.base.recipe.chat_template_kwargs:
        screen.warn("base.chat_template_kwargs are not part of the files; send them with each request")


def write_model(
    source: Source, folder: Path, target: Path, screen: Screen, how: ExportOptions, copies: int = 1
) -> dict[str, float]:
    """Write the merged model to a folder; return its errors and, if wanted, how far its answers are from the mix's.

    The disk of the target must have room for `copies` models.
    """
    weights = MergedWeights.of(source, how)
    store.check_free_space(target.parent, copies * weights.size, FULL_DISK)
    folder.mkdir(exist_ok=True)
    with screen.progress("files", len(weights.checkpoint.files)) as progress:
        for done, file in enumerate(weights.checkpoint.files, 1):
            safetensors_stream.write(folder / file.path.name, weights.tensors(file), file.entries)
            progress.show(done, {})
    _copy_settings(source, weights, folder)
    figures = weights.errors.figures(weights.dtype)
    if how.check:
        figures |= kl_from_mix(source, folder, weights.size // weights.dtype.itemsize, screen)
        if weights.errors.nf4:
            screen.note("compare with the KL of --dequantised, which adds the mix to the dequantised NF4 base")
    if (share := math.sqrt(weights.errors.rounding / (weights.errors.update or 1.0))) > LARGE:
        remedy = "see the KL, or give --dtype float32" if how.check else "give --dtype float32"
        screen.warn(f"the error of rounding to {_name(weights.dtype)} is {share:.2g} times the mix; {remedy}")
    return figures


def export_gguf_merged(source: Source, target: Path, screen: Screen, how: ExportOptions) -> Exported:
    """Write the merged model to one GGUF file with llama.cpp's converter."""
    converter = shutil.which(CONVERTER)
    if not converter:
        raise UserError(
            f"--gguf-merged: {CONVERTER} is not on PATH; it is part of llama.cpp. Or give --merged DIR, and run it "
            f"elsewhere: python {CONVERTER} DIR --outfile {target.name}"
        )
    aside = TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.")
    with aside as temporary, file_with_card(target) as (file, text):
        warn_of_kwargs(source, screen)
        figures = write_model(source, Path(temporary, MODEL), target, screen, how, copies=2)
        screen.note(f"running {converter} …")
        words = [str(Path(converter).absolute()), MODEL, "--outfile", WRITTEN, "--outtype", CONVERTED[how.dtype]]
        _convert(words, Path(temporary))  # inside, because the converter replaces braces in a path
        Path(temporary, WRITTEN).replace(file)
        use = f"llama-server -m {quote(str(target))}"
        about = f"{about_model(source, how)}, as a GGUF file."
        text.write_text(card(source, about, use, figures), encoding="utf-8")
    return Exported({target: target.stat().st_size}, use, figures)


def _convert(words: list[str], folder: Path) -> None:
    """Run the converter in a folder; an error shows the last line that it wrote."""
    try:
        done = subprocess.run(words, cwd=folder, capture_output=True, text=True, errors="replace", check=False)
    except OSError as fault:
        raise RunFailedError(f"{words[0]} does not run: {fault.strerror}") from fault
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise RunFailedError(f"{words[0]} failed: {last}")
    if not (folder / WRITTEN).is_file():
        raise RunFailedError(f"{words[0]} wrote no file")


def added(weight: Tensor, factors: Factors, dtype: torch.dtype) -> Tensor | None:
    """Return W + BA, computed in float32 and rounded once; None if a value is not finite.

    A weight of the same dtype is overwritten.
    """
    B, A = factors.B.float(), factors.A.float()
    result = weight if weight.dtype == dtype else torch.empty(weight.shape, dtype=dtype)
    rows = max(1, BLOCK // weight.shape[1])
    for before, after, left in zip(weight.split(rows), result.split(rows), B.split(rows), strict=True):
        after.copy_(torch.addmm(before.float(), left, A))
        if not is_finite(after):
            return None
    return result


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _energy(matrix: Tensor) -> float:
    return float(matrix.double().square().sum())


def _copy_settings(source: Source, weights: MergedWeights, staging: Path) -> None:
    """Copy configuration and tokenizer; write the index, the dtype and the recipe's chat template."""
    folder, dtype = source.base.folder, _name(weights.dtype)
    aside = (store.DIGESTS, CARD)  # the base's own
    for file in folder.iterdir():
        if any(fnmatch.fnmatch(file.name, pattern) for pattern in CONFIG_FILES) and file.name not in aside:
            shutil.copyfile(file, staging / file.name)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    key = "torch_dtype" if "torch_dtype" in config else "dtype"
    (staging / "config.json").write_text(json.dumps({**config, key: dtype}, indent=2), encoding="utf-8")
    if (staging / INDEX).is_file():
        index = json.loads((staging / INDEX).read_text(encoding="utf-8"))
        index["metadata"] = {**index.get("metadata", {}), "total_size": weights.size}
        (staging / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")
    if source.base.recipe.chat_template:
        (staging / "chat_template.jinja").write_text(source.base.chat.template, encoding="utf-8")
