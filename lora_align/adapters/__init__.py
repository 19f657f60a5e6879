"""LoRA algebra on plain tensors: exact sums, optimal truncation, and PEFT's files. Needs torch, never a base."""
