"""A published run to the hub: its files as its manifest names them, and a card that says what it is."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, ModelCardData, errors

from lora_align import __version__, runs
from lora_align.console import Screen, count, inert
from lora_align.errors import RunFailedError, UserError, first_line
from lora_align.runs import Run

CARD = "README.md"
DPO = "dpo"
KINDS = {  # what is pushed besides
    "mix": "A weighted sum of preference vectors",
    "sft": "A start policy, trained supervised",
    "reward": "A reward model, its heads in `heads.safetensors`",
    "rsf": "A policy that is asked for a direction in its system message",
}
TEXT = """---
{{ card_data }}
---

# {{ name }}

{{ about }}, a LoRA adapter for {{ base_shown }}, made with lora-align {{ version }}.
{% if needs_start %}
**It stands on another adapter** that was trained before it and is not in here (sha256 of its weights: {{ start }}).
{% endif %}
```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained({{ (base if on_hub else "the base's folder") | tojson }})
model = PeftModel.from_pretrained(base, {{ repository | tojson }})
```

It was made on the base in {{ quantization }}; weights of the base hash to {{ fingerprint }}.
{% if data %}
Trained on:
{% for line in data %}
- {{ line }}
{% endfor %}{% endif %}{% if parents %}
Added up:
{% for line in parents %}
- {{ line }}
{% endfor %}{% endif %}{% if unconverged %}
Unconverged: {{ unconverged }}
{% endif %}
{% if curve %}
![Its figures, step by step]({{ curve }})
{% endif %}
What it measured as it was made, and the recipe it was made by, are in `manifest.json`. Versions: {{ versions }}.
"""


def push_run(path: Path, to: str, *, public: bool, screen: Screen) -> str:
    """Push, and where to look at it. The repository is made where there is none: private, unless it is to be public."""
    found = runs.read(path)
    if found.manifest.stage not in (DPO, *KINDS):
        raise UserError(f"{path} is a run of {found.manifest.stage}, a report and no adapter: nothing to push")
    found.check_files()
    if to.count("/") != 1 or not all(to.split("/")):
        raise UserError(f"--to {to!r}: a repository on the hub, OWNER/NAME")
    files = [*found.manifest.files, runs.MANIFEST]
    size = sum(file["bytes"] for file in found.manifest.files.values())
    text = card(found, to)
    with _told_by_hub(to):
        hub = HfApi()
        seen = _is_private(hub, to)
        if seen is False and not public:
            raise UserError(f"{to} is there and public; --public says that this is meant, or name another")
        if seen is None:
            hub.create_repo(to, private=not public)
        seen_by = "public" if public and not seen else "private"
        screen.note(f"{to} ({seen_by}): {count(len(files), 'file')}, {size / 1e6:,.1f} MB")
        operations = [CommitOperationAdd(name, path / name) for name in files]
        operations.append(CommitOperationAdd(CARD, text.encode()))
        made = hub.create_commit(to, operations, commit_message=f"{found.manifest.stage} {path.name}")
    return str(made.repo_url)


def card(run: Run, repository: str) -> str:
    """What a person who finds the repository has to know."""
    manifest = run.manifest
    base = str(manifest.base["model"])
    on_hub = base.count("/") == 1 and not base.startswith((".", "/", "~"))
    data = ModelCardData(
        base_model=base if on_hub else None,
        library_name="peft",
        tags=["lora", "lora-align", manifest.stage],
    )
    made = ModelCard.from_template(
        data,
        template_str=TEXT,
        name=repository.split("/")[1],
        about=_about(run),
        base=base,
        base_shown=_literal(base),
        on_hub=on_hub,
        curve="curve.png" if "curve.png" in manifest.files else "",
        version=__version__,
        needs_start=bool(manifest.start) and not manifest.contains_start,
        start=_literal(manifest.start),
        repository=repository,
        quantization=_literal(manifest.base.get("quantization")) or "an unknown precision",
        fingerprint=_literal(manifest.base["fingerprint"]) or "an unknown value",
        data=list(_sources(manifest.data)),
        parents=[f"{_literal(of['name'])}: weight {of['weight']:g}" for of in manifest.parents],
        unconverged=_literal("; ".join(manifest.unconverged)),
        versions=_literal(", ".join(f"{name} {has}" for name, has in manifest.versions.items())),
    )
    return str(made)


def _about(run: Run) -> str:
    manifest = run.manifest
    if manifest.stage == DPO:
        towards = "towards" if manifest.direction == "pos" else "away from"
        return f"Trained by DPO {towards} the preference {_literal(manifest.preference)}"
    return KINDS[manifest.stage]


def _sources(data: Mapping[str, Any]) -> Iterator[str]:
    """Where rows came from, and how many: of one source, or of several by name."""
    if "source" in data:
        dropped = ", ".join(f"{_literal(reason)} {number:,}" for reason, number in data["dropped"].items())
        left_out = f" (left out: {dropped})" if dropped else ""
        yield f"{_literal(data['source'])}, {count(data['rows'], 'row')}{left_out}"
    else:
        for of in data.values():
            yield from _sources(of)


def _literal(text: object) -> str:
    """Text as a Markdown code span, in which neither Markdown nor HTML means anything; nothing for no text."""
    line = " ".join(inert(str(text or "")).split())
    fence = "`" * (max(map(len, re.findall("`+", line)), default=0) + 1)
    gap = " " if "`" in line else ""
    return f"{fence}{gap}{line}{gap}{fence}" if line else ""


def _is_private(hub: HfApi, repository: str) -> bool | None:
    """None where there is no such repository."""
    try:
        return bool(hub.repo_info(repository).private)
    except errors.RepositoryNotFoundError:
        return None


@contextmanager
def _told_by_hub(repository: str) -> Iterator[None]:
    """What the hub refuses, in one line."""
    try:
        yield
    except errors.HFValidationError as fault:
        raise UserError(f"--to {repository!r}: {first_line(fault)}") from fault
    except errors.HfHubHTTPError as fault:
        if fault.response.status_code in (401, 403):
            why = f"this account may not write there ({first_line(fault)}): hf auth login"
            raise UserError(f"{repository}: {why}") from fault
        raise RunFailedError(f"{repository}: {first_line(fault)}") from fault
    except errors.LocalTokenNotFoundError as fault:
        raise UserError(f"{repository}: nobody is logged in: hf auth login") from fault
    except (errors.OfflineModeIsEnabled, httpx2.HTTPError, ConnectionError) as fault:
        raise UserError(f"{repository}: the hub cannot be reached ({first_line(fault)})") from fault
