"""Training: rows, losses, steps, checkpoints, and the stages sft, dpo and reward."""
