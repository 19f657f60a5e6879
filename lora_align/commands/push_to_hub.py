"""The command `push`: upload the files of a run to the Hugging Face hub, with a model card."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx2
import yaml
from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, ModelCardData, errors, try_to_load_from_cache

from lora_align import __version__, runs
from lora_align.console import Screen, count
from lora_align.errors import RunFailedError, UserError, first_line, inert
from lora_align.model.base_folder import hub_id
from lora_align.policy.policy import takes_scores
from lora_align.runs import Run

CARD = "README.md"
DPO = "dpo"
ABOUT = {  # stage → first words of its card; DPO has its own
    "mix": "A merge of preference vectors",
    "sft": "A start policy, trained by SFT",
    "reward": "A reward model, with its heads in `heads.safetensors`",
    "rsf": "A policy that takes a direction in its system message",
}
QUANTIZED = {"nf4": "in 4-bit NF4", "none": "without quantization"}
STEERLM = "A SteerLM-style policy that takes scores in its system message"
TEXT = """---
{{ card_data }}
---

# {{ name }}

{{ about }}. A LoRA adapter for {{ base_shown }}, made with lora-align {{ version }}.
{% if needs_start %}
**It needs the start adapter that it was trained on**, which is not in this repository (its sha256: {{ start }}).
{% endif %}
```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained({{ (base if on_hub else "the base's folder") | tojson }})
model = PeftModel.from_pretrained(base, {{ repository | tojson }})
```

The base was loaded {{ quantization }}; the hash of its weights is {{ fingerprint }}.
{% if data %}
Trained on:
{% for line in data %}
- {{ line }}
{% endfor %}{% endif %}{% if parents %}
Merged by {{ method }} from:
{% for line in parents %}
- {{ line }}
{% endfor %}{% endif %}{% if unconverged %}
Unconverged: {{ unconverged }}
{% endif %}
{% if curve %}
![Training curves]({{ curve }})
{% endif %}
`manifest.json` has the metrics and the recipe of the run. Versions: {{ versions }}.
"""


@dataclass(frozen=True)
class Pushed:
    """A run on the hub."""

    run: Path
    repository: str
    address: str

    def as_json(self) -> dict[str, Any]:
        """Return plain data."""
        return {**asdict(self), "run": str(self.run)}

    def summary(self) -> str:
        """Return the address of the repository."""
        return self.address


def push_run(path: Path, to: str, *, public: bool, screen: Screen) -> Pushed:
    """Upload a run. A repository that does not exist is created, private unless `public`."""
    run = runs.read(path)
    if run.manifest.stage not in (DPO, *ABOUT):
        raise UserError(
            f"{path} is a run of `{run.manifest.stage}`, without an adapter; push one of sft, dpo, reward, rsf or merge"
        )
    run.check_files()
    if to.count("/") != 1 or not all(to.split("/")):
        raise UserError(f"--to {to!r}: expected a repository on the hub, OWNER/NAME")
    files = [*run.manifest.files, runs.MANIFEST]
    size = sum(file["bytes"] for file in run.manifest.files.values())
    text = model_card(run, to)
    with _hub_errors(to):
        hub = HfApi()
        private = _is_private(hub, to)
        if private is False and not public:
            raise UserError(f"{to} exists and is public; add --public to push there, or name another repository")
        if private is None:
            hub.create_repo(to, private=not public)
            private = not public
        screen.note(f"{to} ({'private' if private else 'public'}): {count(len(files), 'file')}, {size / 1e6:,.1f} MB")
        operations = [CommitOperationAdd(name, path / name) for name in files]
        operations.append(CommitOperationAdd(CARD, text.encode()))
        commit = hub.create_commit(to, operations, commit_message=f"{run.manifest.stage} {path.name}")
    return Pushed(path, to, str(commit.repo_url))


def model_card(run: Run, repository: str) -> str:
    """Return the model card of a run."""
    manifest = run.manifest
    base = str(manifest.base["model"])
    on_hub = hub_id(base) == base
    data = ModelCardData(
        base_model=hub_id(base) or None,
        library_name="peft",
        tags=["lora", "lora-align", manifest.stage],
    )
    card = ModelCard.from_template(
        data,
        template_str=TEXT,
        name=repository.split("/")[1],
        about=_about(run),
        base=base,
        base_shown=literal(base),
        on_hub=on_hub,
        curve="curve.png" if "curve.png" in manifest.files else "",
        version=__version__,
        needs_start=bool(manifest.start) and not manifest.contains_start,
        start=literal(manifest.start),
        repository=repository,
        quantization=QUANTIZED.get(manifest.base.get("quantization", ""), "in an unknown precision"),
        fingerprint=literal(manifest.base["fingerprint"]) or "an unknown value",
        data=list(data_lines(manifest.data)),
        method=literal(manifest.method.get("name", "")),
        parents=[f"{literal(of['name'])}: weight {of['weight']:g}" for of in manifest.parents],
        unconverged=literal("; ".join(manifest.unconverged)),
        versions=literal(", ".join(f"{name} {number}" for name, number in manifest.versions.items())),
    )
    return str(card)


def _about(run: Run) -> str:
    manifest = run.manifest
    if manifest.stage == DPO:
        towards = "towards" if manifest.direction == "pos" else "away from"
        return f"A policy that was trained by DPO {towards} the preference {literal(manifest.preference)}"
    if manifest.stage == "rsf" and takes_scores(run):
        return STEERLM
    return ABOUT[manifest.stage]


def data_lines(data: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line for each data source: its name, its rows, why rows were dropped, and the licences on the hub."""
    if "source" in data:
        dropped = ", ".join(f"{number:,} × {literal(reason)}" for reason, number in data["dropped"].items())
        without = f" (dropped: {dropped})" if dropped else ""
        source = str(data["source"])
        licences = "".join(f"; licence: {_licence_of_dataset(name)}" for name in _hub_names(source))
        yield f"{literal(source)}, {count(data['rows'], 'row')}{without}{licences}"
    else:
        for one in data.values():
            yield from data_lines(one)


def _hub_names(source: str) -> Iterator[str]:
    """Yield the hub ids in a source such as `owner/name subset + file.jsonl`."""
    for part in source.split(" + "):
        name = part.partition(" ")[0]
        if re.fullmatch(r"[\w-]+/[\w.-]+", name) and not Path(part).suffix:
            yield name


def _licence_of_dataset(name: str) -> str:
    """Return the licence in the card that was downloaded with a dataset, and the dataset's page."""
    page, readme = f"https://huggingface.co/datasets/{name}", try_to_load_from_cache(name, CARD, repo_type="dataset")
    stated = licence_of_card(Path(readme)) if isinstance(readme, str) else ""
    return f"{literal(stated)}, see {page}" if stated else page


def licence_of_card(readme: Path) -> str:
    """Return the licences in the metadata of a card; "" if it states none."""
    text = readme.read_text(encoding="utf-8", errors="replace") if readme.is_file() else ""
    if not text.startswith("---"):
        return ""
    try:
        data = ModelCard(text).data
    except (ValueError, yaml.YAMLError):
        return ""
    stated = data.get("license_name") or data.get("license") or ""
    return ", ".join(map(str, stated)) if isinstance(stated, list) else str(stated)


def literal(text: object) -> str:
    """Return text as a Markdown code span, in which Markdown and HTML have no effect; "" for no text."""
    line = " ".join(inert(str(text or "")).split())
    fence = "`" * (max(map(len, re.findall("`+", line)), default=0) + 1)
    gap = " " if "`" in line else ""
    return f"{fence}{gap}{line}{gap}{fence}" if line else ""


def _is_private(hub: HfApi, repository: str) -> bool | None:
    """Return whether a repository is private; None if it does not exist."""
    try:
        return bool(hub.repo_info(repository).private)
    except errors.RepositoryNotFoundError:
        return None


@contextmanager
def _hub_errors(repository: str) -> Iterator[None]:
    """Turn errors of the hub into errors of one line."""
    try:
        yield
    except errors.HFValidationError as fault:
        raise UserError(f"--to {repository!r}: {first_line(fault)}") from fault
    except errors.HfHubHTTPError as fault:
        if fault.response.status_code in (401, 403):
            why = f"this account may not write there ({first_line(fault)}); log in: hf auth login"
            raise UserError(f"{repository}: {why}") from fault
        raise RunFailedError(f"{repository}: {first_line(fault)}") from fault
    except errors.LocalTokenNotFoundError as fault:
        raise UserError(f"{repository}: not logged in; log in: hf auth login") from fault
    except (errors.OfflineModeIsEnabled, httpx2.HTTPError, ConnectionError) as fault:
        raise UserError(
            f"{repository}: the hub cannot be reached ({first_line(fault)}); check the network and try again"
        ) from fault
