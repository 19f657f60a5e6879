"""A batcher in a thread of its own, with the base that it loads there."""

import threading
from concurrent.futures import Future
from dataclasses import dataclass

from lora_align.model.base import Base
from lora_align.model.batch_sampling import affordable
from lora_align.serve.batcher import LARGEST_BATCH, Batcher

STOP_SECONDS = 3  # for the running answers


@dataclass(frozen=True)
class Engine:
    """The batcher, its thread, an event for the end of the thread, and the error that ended it."""

    batcher: Batcher
    thread: threading.Thread
    stopped: threading.Event
    failure: list[Exception]

    @classmethod
    def start(cls, base: Base) -> "Engine":
        """Load the base, and let its batcher run."""
        started: Future[Batcher] = Future()
        failure: list[Exception] = []
        stopped = threading.Event()

        def compute() -> None:
            try:
                model = base.load()
                budget = min(affordable(model, 1) // 2, LARGEST_BATCH * base.max_length)  # allocations have spare room
                started.set_result(Batcher(model, budget))
                started.result().run()
            except Exception as fault:  # noqa: BLE001 - the main thread reports every error
                failure.append(fault)
                if not started.done():
                    started.set_exception(fault)
            finally:
                stopped.set()

        thread = threading.Thread(target=compute, name="batcher", daemon=True)
        thread.start()
        return cls(started.result(), thread, stopped, failure)

    def stop(self) -> None:
        """Fail all answers, and wait for the end of the thread."""
        self.batcher.stop()
        self.thread.join(STOP_SECONDS)
