"""lora-align: preferences as LoRA adapters that add and subtract."""

import logging
import os

__version__ = "0.1.0"

# Both act when a library is imported, so they have to stand before any of them.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(
    lambda record: "gemm_4bit_forward" not in record.getMessage()  # an optional kernel that is not needed here
)
