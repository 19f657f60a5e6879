"""LoRA algebra on plain tensors: exact sums, optimal truncation, and PEFT files. Needs torch but no base model."""
