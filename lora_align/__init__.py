"""lora-align: preferences as LoRA adapters that add and subtract."""

import logging
import os

__version__ = "0.1.0"

# These act when a library is imported, so they have to stand before any of them.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
if "OMP_WAIT_POLICY" not in os.environ:
    # How long torch's threads wait for each other at full speed: by default so long that beside another busy program
    # they take the time from the one that is waited for.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(
    lambda record: "gemm_4bit_forward" not in record.getMessage()  # an optional kernel that is not needed here
)
