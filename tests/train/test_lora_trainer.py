"""The parts of lora_trainer that need no training."""

from pathlib import Path

from lora_align.train import lora_trainer


def test_a_figure_may_be_missing_in_some_steps(tmp_path: Path) -> None:
    """A step of a reward model without pairs has no accuracy, and one without ratings no error."""
    history = [{"step": 1.0, "loss": 0.7, "error": 20.0}, {"step": 2.0, "loss": 0.6, "accuracy": 0.5}]
    lora_trainer.draw_curve(history, "reward", tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 1000
