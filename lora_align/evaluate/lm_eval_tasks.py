"""Tasks of lm-evaluation-harness, run for every policy on the loaded model."""

import hashlib
import json
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING

from lora_align import runs, store
from lora_align.console import Screen
from lora_align.errors import UserError, first_line, nearest
from lora_align.evaluate.figures import Figures
from lora_align.evaluate.measure import Evaluator
from lora_align.metrics import intervals
from lora_align.policy.policy import Policy

if TYPE_CHECKING:
    from lm_eval.api.task import Task
    from lm_eval.models.huggingface import HFLM

BATCH_SIZE = 16
Values = Mapping[str, Sequence[float]]  # metric → a value for each question


def task_figures(tasks: Sequence[str], evaluator: Evaluator, screen: Screen) -> dict[str, Figures]:
    """Return the figures of every policy, by task and metric. `tasks` are names or .yaml files.

    Prompts are sent as the task defines them. If any policy has a system message, the chat template is applied for all
    policies.
    """
    loaded = _load(tasks)
    by_policy: dict[str, Figures] = {}
    for policy in evaluator.policies.policies:
        by_policy[policy.name] = {
            f"{name}: {metric}": intervals.mean(values, range(len(values)))
            for name, task in loaded.items()
            for metric, values in _values(name, task, policy, evaluator, screen).items()
        }
    return by_policy


def _load(words: Sequence[str]) -> "dict[str, Task]":
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as fault:
        raise UserError("--tasks: lm-evaluation-harness is not installed: pip install 'lm-eval>=0.4.13'") from fault
    manager = TaskManager(include_defaults=not all(Path(word).is_file() for word in words))
    known = manager.all_tasks
    for word in words:
        if not Path(word).is_file() and word not in known:
            raise UserError(f"--tasks: {word!r} is neither a file nor a task of the harness{nearest(word, known)}")
    try:
        with _quietly(hide=True):
            return dict(manager.load(list(words))["tasks"])
    except Exception as fault:
        raise UserError(f"--tasks: {', '.join(words)} could not be loaded: {first_line(fault)}") from fault


def _values(name: str, task: "Task", policy: Policy, evaluator: Evaluator, screen: Screen) -> Values:
    """Return the cached values of a task, or compute them. The cache key names task, questions and policy."""
    import lm_eval

    if policy.strength != 1:
        raise UserError(f"--tasks: {policy.name} has a scaled prompt, which tasks do not support; use prompt:TEXT")
    chat = any(other.system for other in evaluator.policies.policies)
    identity = {
        "policy": evaluator.policies.lineage(policy),
        "task": task.dump_config(),
        "questions": list(task.eval_docs),
        "chat": chat,
        "versions": {**runs.library_versions(), "lm_eval": lm_eval.__version__},
    }
    text = json.dumps(identity, sort_keys=True, default=str)
    cached = evaluator.folder / f"task-{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"
    if not cached.is_file():
        screen.note(f"{name}: {policy.name}")
        evaluator.policies.activate(policy)
        with _quietly(hide=screen.quiet or not sys.stderr.isatty()):
            values = _evaluate(name, task, _model(evaluator), policy.system, chat)
        cached.parent.mkdir(parents=True, exist_ok=True)
        with store.new_file(cached) as unfinished:
            unfinished.write_text(json.dumps({"task": name, "policy": policy.name, "values": values}))
    values = json.loads(cached.read_text())["values"]
    if not values:
        screen.warn(f"{name}: left out: no metric of this task is a number")
    return values  # type: ignore[no-any-return]


def _evaluate(name: str, task: "Task", model: "HFLM", system: str, chat: bool) -> Values:
    """Return the harness's metrics of each question, without those that are not numbers."""
    from lm_eval import evaluate

    result = evaluate(
        model, {name: task}, bootstrap_iters=0, system_instruction=system or None, apply_chat_template=chat
    )
    values: dict[str, list[float]] = {}
    for sample in result["samples"][name]:
        suffix = "" if sample["filter"] == "none" else f" ({sample['filter']})"
        for metric in sample["metrics"]:
            if isinstance(sample[metric], int | float):
                values.setdefault(metric + suffix, []).append(float(sample[metric]))
    return values


def _model(evaluator: Evaluator) -> "HFLM":
    from lm_eval.models.huggingface import HFLM

    chat = evaluator.base.chat
    chat.tokenizer.chat_template = chat.template  # the harness reads the template from the tokenizer
    return HFLM(
        pretrained=evaluator.model,
        tokenizer=chat.tokenizer,
        max_length=evaluator.base.max_length,
        batch_size=BATCH_SIZE,
        chat_template_args=dict(chat.template_kwargs),
    )


@contextmanager
def _quietly(*, hide: bool) -> Iterator[None]:
    """Silence the harness's log, and hide its progress bars if `hide`."""
    log = logging.getLogger("lm_eval")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        with redirect_stderr(StringIO() if hide else sys.stderr):
            yield
    finally:
        log.setLevel(before)
