"""The formats of `export`, each with the function that writes it."""

from collections.abc import Callable
from pathlib import Path

from lora_align.console import Screen
from lora_align.export import ExportOptions
from lora_align.export.exported import Exported
from lora_align.export.gguf_export import export_gguf
from lora_align.export.merged_export import export_gguf_merged, export_merged
from lora_align.export.ollama_export import export_ollama
from lora_align.export.source import Source

EXPORTERS: dict[str, Callable[[Source, Path, Screen, ExportOptions], Exported]] = {
    "--gguf": export_gguf,
    "--merged": export_merged,
    "--gguf-merged": export_gguf_merged,
    "--ollama": export_ollama,
}
