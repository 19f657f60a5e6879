"""Tasks of lm-evaluation-harness, put to every policy by way of the model that is loaded here."""

import hashlib
import json
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING

from lora_align import runs
from lora_align.console import Screen
from lora_align.errors import UserError, first_line, nearest
from lora_align.evaluate.figures import Figures
from lora_align.evaluate.measure import Evaluator
from lora_align.metrics import intervals
from lora_align.policy.policy import Policy

if TYPE_CHECKING:
    from lm_eval.api.task import Task
    from lm_eval.models.huggingface import HFLM

AT_ONCE = 16  # texts
Values = Mapping[str, Sequence[float]]  # of each metric, one a question


def figures(words: Sequence[str], evaluator: Evaluator, screen: Screen) -> dict[str, Figures]:
    """Every policy's, by task and metric. Tasks have names, or are files that say what they ask.

    Where a policy is asked for a direction, all are asked through the chat template; else as tasks are written.
    """
    tasks = _loaded(words)
    told: dict[str, Figures] = {}
    for policy in evaluator.policies.policies:
        found: Figures = {}
        for name, task in tasks.items():
            for metric, values in _values(name, task, policy, evaluator, screen).items():
                found[f"{name}: {metric}"] = intervals.mean(values, range(len(values)))
        told[policy.name] = found
    return told


def _loaded(words: Sequence[str]) -> "dict[str, Task]":
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as fault:
        raise UserError("--tasks: lm-evaluation-harness is not installed: pip install 'lora-align[tasks]'") from fault
    manager = TaskManager(include_defaults=not all(Path(word).is_file() for word in words))
    known = manager.all_tasks
    for word in words:
        if not Path(word).is_file() and word not in known:
            raise UserError(f"--tasks: no file, and no task of the harness, is called {word!r}{nearest(word, known)}")
    try:
        with _quietly(hide=True):
            return dict(manager.load(list(words))["tasks"])
    except Exception as fault:
        raise UserError(f"--tasks: {', '.join(words)} could not be loaded: {first_line(fault)}") from fault


def _values(name: str, task: "Task", policy: Policy, evaluator: Evaluator, screen: Screen) -> Values:
    """As they were measured before, if they were: by the task's settings and questions, and who answers."""
    chat = any(other.system for other in evaluator.policies.policies)
    import lm_eval

    identity = {
        "policy": evaluator.policies.lineage(policy),
        "task": task.dump_config(),
        "questions": list(task.eval_docs),
        "chat": chat,
        "versions": {**runs.library_versions(), "lm_eval": lm_eval.__version__},
    }
    text = json.dumps(identity, sort_keys=True, default=str)
    kept = evaluator.folder / f"task-{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"
    if not kept.is_file():
        screen.note(f"{name}: {policy.name}")
        evaluator.policies.activate(policy)
        with _quietly(hide=screen.quiet or not sys.stderr.isatty()):
            values = _asked(name, task, _model(evaluator), policy.system, chat)
        kept.parent.mkdir(parents=True, exist_ok=True)
        unfinished = kept.with_name(f".{kept.name}")
        unfinished.write_text(json.dumps({"task": name, "policy": policy.name, "values": values}))
        unfinished.replace(kept)
    values = json.loads(kept.read_text())["values"]
    if not values:
        screen.warn(f"{name}: none of its metrics is a mean over questions; it is left out")
    return values  # type: ignore[no-any-return]


def _asked(name: str, task: "Task", model: "HFLM", system: str, chat: bool) -> Values:
    """What the harness finds of each question, where that is a number."""
    from lm_eval import evaluate

    result = evaluate(
        model, {name: task}, bootstrap_iters=0, system_instruction=system or None, apply_chat_template=chat
    )
    values: dict[str, list[float]] = {}
    for sample in result["samples"][name]:
        way = "" if sample["filter"] == "none" else f" ({sample['filter']})"
        for metric in sample["metrics"]:
            if isinstance(sample[metric], int | float):
                values.setdefault(metric + way, []).append(float(sample[metric]))
    return values


def _model(evaluator: Evaluator) -> "HFLM":
    from lm_eval.models.huggingface import HFLM

    chat = evaluator.base.chat
    chat.tokenizer.chat_template = chat.template  # the harness knows no other
    return HFLM(
        pretrained=evaluator.model,
        tokenizer=chat.tokenizer,
        max_length=evaluator.base.max_length,
        batch_size=AT_ONCE,
        chat_template_args=dict(chat.template_kwargs),
    )


@contextmanager
def _quietly(*, hide: bool) -> Iterator[None]:
    """The harness's own bars, for a person who waits; what it logs is not for anybody."""
    log = logging.getLogger("lm_eval")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        with redirect_stderr(StringIO() if hide else sys.stderr):
            yield
    finally:
        log.setLevel(before)
