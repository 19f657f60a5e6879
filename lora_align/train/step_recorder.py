"""Record the steps of a training run, show progress, and stop it at a signal."""

import json
import signal
import time
from pathlib import Path
from types import FrameType

from transformers import TrainerCallback

from lora_align import distributed
from lora_align.console import Progress, Screen

# short names, because a line of progress must fit 80 columns
PROGRESS_NAMES = {"loss": "loss", "margin": "margin", "accuracy": "acc", "error": "error", "lm": "lm"}
RECORDED = (*PROGRESS_NAMES, "chosen_reward", "rejected_reward")


class StepRecorder(TrainerCallback):
    """Record the figures of every step, show some of them, and request checkpoints."""

    def __init__(self, progress: Progress, metrics_file: Path, stop: "StopSignal", save_seconds: float) -> None:
        self.progress, self.metrics_file, self.stop, self.save_seconds = progress, metrics_file, stop, save_seconds
        self.started = self.saved = time.monotonic()
        self.stopped = 0  # the number of the signal that stopped the run, or 0
        self.history: list[dict[str, float]] = []
        if metrics_file.exists():  # the steps before a checkpoint
            self.history = [json.loads(line) for line in metrics_file.read_text(encoding="utf-8").splitlines()]
        self.tokens_before = self.history[-1]["tokens"] if self.history else 0.0
        self.seconds_before = self.history[-1]["seconds"] if self.history else 0.0

    @property
    def seconds(self) -> float:
        """Return the seconds of training, including those before a checkpoint."""
        return self.seconds_before + time.monotonic() - self.started

    def on_step_end(self, args, state, control, **_):  # type: ignore[no-untyped-def]
        """Request a checkpoint every `save_minutes`, after the last step, and when a signal arrived on any rank."""
        due = time.monotonic() - self.saved >= self.save_seconds or state.global_step >= state.max_steps
        ranks = distributed.all_gather((self.stop.signal, due))
        self.stopped = max(signal for signal, _ in ranks)
        if self.stopped or ranks[0][1]:
            control.should_save, self.saved = True, time.monotonic()
        control.should_training_stop |= bool(self.stopped)

    def on_log(self, args, state, control, logs=None, **_):  # type: ignore[no-untyped-def]
        """Append a line to the record."""
        if "loss" not in logs:
            return
        tokens = float(logs.get("num_tokens", 0.0))
        rate = (tokens - self.tokens_before) / max(self.seconds - self.seconds_before, 1e-9)
        record = {"step": state.global_step, **{name: float(logs[name]) for name in RECORDED if name in logs}}
        record |= {"learning_rate": float(logs["learning_rate"]), "tokens": tokens, "tokens_per_second": round(rate)}
        record["seconds"] = round(self.seconds, 3)
        self.history.append(record)
        with self.metrics_file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(record) + "\n")
        shown = {short: f"{record[name]:.3f}" for name, short in PROGRESS_NAMES.items() if name in record}
        self.progress.show(state.global_step, {**shown, "tok/s": f"{rate:,.0f}"})


class StopSignal:
    """Record the first SIGINT or SIGTERM, so that the current step can finish. A second one acts as usual."""

    def __init__(self, screen: Screen) -> None:
        self.screen, self.signal = screen, 0

    def __enter__(self) -> "StopSignal":
        self.before = {number: signal.signal(number, self._record) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _record(self, number: int, _: FrameType | None) -> None:
        self.signal = number
        self.screen.note("finishing the current step, then saving a checkpoint; press Ctrl-C again to stop at once")
        self.__exit__()
