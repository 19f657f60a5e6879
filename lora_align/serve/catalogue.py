"""Find the policy that a request names, among the vectors, mixes and conditioned policies of the runs folder."""

import copy
import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from lora_align import runs
from lora_align.adapters import peft_format
from lora_align.adapters.delta import LoraDelta
from lora_align.adapters.geometry import Geometry
from lora_align.console import Screen
from lora_align.errors import UserError, nearest
from lora_align.evaluate.grid import weights_text
from lora_align.mix_weights import LARGEST, parse_weights
from lora_align.model.base import Base
from lora_align.policy import profiles, safe_ranges, start_policy, vectors
from lora_align.policy.policy import (
    BASE,
    BASE_ALONE,
    PROMPTS,
    START,
    START_POLICY,
    WANT,
    WANTS,
    Policy,
    check_base_and_start,
    find_policy,
    takes_scores,
)
from lora_align.policy.vectors import Vector
from lora_align.recipe import Recipe
from lora_align.runs import Run
from lora_align.serve.batcher import Batcher

SWEEP = "sweep"  # folder in the runs folder
FRESH_SECONDS = 1.0  # after them, the runs folder is read again


class UnknownNameError(UserError):
    """A request names something that the server does not have."""


@dataclass(frozen=True)
class _Collecting(Screen):
    """Collects warnings instead of printing them."""

    quiet: bool = True
    warnings: list[str] = field(default_factory=list)

    def warn(self, text: str) -> None:
        self.warnings.append(text)


@dataclass(frozen=True)
class Known:
    """The content of the runs folder at one moment."""

    vectors: Mapping[str, Vector]  # vectors that can be weighted
    mixes: Mapping[str, Policy]
    conditioned: Mapping[str, Run]  # by folder, the newest last
    read: float  # time.monotonic()


@dataclass(frozen=True)
class Served:
    """A policy for the batcher: the weight of each update, by a key that changes when a vector is trained again."""

    policy: Policy
    weights: Mapping[str, float]
    warnings: list[str]
    on_base: bool = False  # without a start adapter, whatever the weights are


@dataclass
class Catalogue:
    """Finds policies, and lets the batcher load their updates. Every method may be called from any thread."""

    base: Base
    recipe: Recipe
    runs_dir: Path
    default: Policy
    batcher: Batcher
    report: Callable[[str], None]  # of runs that cannot be read
    _reported: set[str] = field(default_factory=set)
    _installed: dict[str, "Future[None]"] = field(default_factory=dict)  # by key
    _ids: dict[str, int] = field(default_factory=dict)
    _known: Known | None = None
    _geometry: tuple[tuple[str, ...], Geometry] | None = None  # of these keys
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _geometry_lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        if not self.default.name:
            self.default = replace(self.default, name=weights_text(self.default.weights))
        chat = self.base.chat
        # A fast tokenizer fails while another thread encodes with it. `encoding` is held by whoever encodes.
        self.encoding, self.decoder = threading.Lock(), copy.deepcopy(chat.tokenizer)
        self.stop_ids = chat.stop_ids  # found by encoding, once

    @cached_property
    def start(self) -> Run | None:
        """Return the start adapter. It stays the same until the server is started again."""
        start = start_policy.adapter(self.recipe, self.runs_dir)
        if start is not None:
            start.refuse_other_base(self.base.fingerprint)
            start.check_files()
        return start

    @property
    def fixed(self) -> bool:
        """Return whether the default is one adapter that contains the start adapter, so that it cannot be weighted."""
        return self.default.contains_start

    def known(self) -> Known:
        """Return the content of the runs folder, at most a second old."""
        with self._lock:
            if self._known is None or time.monotonic() > self._known.read + FRESH_SECONDS:
                self._known = self._read()
                for name in self._known.vectors:
                    self._ids.setdefault(name, len(self._ids))
            return self._known

    def ids(self) -> dict[str, int]:
        """Return the number of each vector, which stays the same while the server runs."""
        known = self.known()
        return {name: self._ids[name] for name in known.vectors}

    def names(self) -> list[str]:
        """Return the names of all models."""
        known = self.known()
        own = [f"{profiles.PREFIX}{name}" for name in profiles.names(self.runs_dir)]
        return list(
            dict.fromkeys([self.default.name, BASE, START, *known.vectors, *known.mixes, *known.conditioned, *own])
        )

    def serve(self, model: str, weights: Mapping[str, float] | None, want: Mapping[str, float] | None) -> Served:
        """Return the policy of a request. Load its updates, and wait until the batcher has them.

        `weights` replace those of the model. With a direction, they are added to the conditioned policy. Only names of
        the catalogue are looked up, so a request cannot name a folder.
        """
        known, screen = self.known(), _Collecting()
        prompted, on_base = model.startswith(PROMPTS), model == BASE and want is None
        if model.startswith(profiles.PREFIX):
            own = self._profile(model.removeprefix(profiles.PREFIX))
            model, weights = START, own if weights is None else weights
        elif "=" in model and not prompted and not model.startswith(WANTS):
            own = parse_weights(model)
            model, weights = (
                (self.default.name if model == self.default.name else START),
                own if weights is None else weights,
            )
        if prompted:
            policy = find_policy(model, self.recipe, self.runs_dir, screen)
            policy = self._weighted(known, policy, weights) if weights else policy
        elif want is not None or model.startswith(WANTS):
            policy = self._conditioned(known, model, want, screen)
            policy = self._weighted(known, policy, weights) if weights else policy
        else:
            policy = self._named(known, model)
            policy = policy if weights is None else self._weighted(known, policy, weights)
        return replace(self._loaded(policy, screen.warnings), on_base=on_base)

    def reweigh(self, served: Served, weights: Mapping[str, float]) -> Served:
        """Return a policy with other weights; the adapter and the prompt of a direction stay."""
        policy = BASE_ALONE if served.on_base else served.policy
        return replace(self._loaded(self._weighted(self.known(), policy, weights), []), on_base=served.on_base)

    def content(self) -> str:
        """Return a hash of what the page shows; it changes when a run is trained, measured or removed."""
        known = self.known()
        folders = [folder for stage in (safe_ranges.FOLDER, SWEEP) for folder in (self.runs_dir / stage).glob("*")]
        found = [*map(_key, known.vectors.values()), *known.mixes, *known.conditioned, *map(str, sorted(folders))]
        return hashlib.sha256(json.dumps(found).encode()).hexdigest()[:16]

    def geometry(self, known: Known) -> Geometry:
        """Return the norms and cosines of all vectors whose files are intact."""
        keys = tuple(map(_key, known.vectors.values()))
        with self._geometry_lock:
            if self._geometry is None or self._geometry[0] != keys:
                intact: dict[str, Vector] = {}
                for name, vector in known.vectors.items():
                    with self.skipping():
                        vector.load()
                        intact[name] = vector
                made = self.batcher.call(lambda: Geometry.of(vectors.load_updates(intact)[0]))
                self._geometry = keys, made.result()
            return self._geometry[1]

    def _profile(self, name: str) -> dict[str, float]:
        if name not in (known := profiles.names(self.runs_dir)):
            raise UnknownNameError(f"no profile {name!r}{nearest(name, known)} (known: {', '.join(known) or 'none'})")
        return profiles.weights(name, self.runs_dir)

    def _read(self) -> Known:
        """Read the runs folder, without runs that are damaged, unfinished or just being removed."""
        found: dict[str, Vector] = {} if self.fixed else dict(self.default.vectors)
        mixes: dict[str, Policy] = {}
        conditioned: dict[str, Run] = {}
        for name in vectors.trained(self.runs_dir):
            with self.skipping():
                found[name] = vectors.find(name, self.runs_dir)
        for run in runs.list_runs(self.runs_dir):
            name = run.path.relative_to(self.runs_dir).as_posix()
            if run.manifest.stage == "mix":
                with self.skipping():
                    mix = find_policy(name, self.recipe, self.runs_dir, _Collecting())
                    mixes[run.path.name] = replace(mix, name=run.path.name)
            elif run.manifest.stage == "rsf" and not takes_scores(run):
                conditioned[name] = run
        return Known(found, mixes, conditioned, time.monotonic())

    @contextmanager
    def skipping(self) -> Iterator[None]:
        """Skip a run that cannot be read, because it is damaged or is removed at this moment; report it once."""
        try:
            yield
        except (UserError, OSError) as fault:
            if str(fault) not in self._reported:
                self._reported.add(str(fault))
                self.report(f"skipped: {fault}")

    def _named(self, known: Known, model: str) -> Policy:
        """Return the policy with a name that /v1/models lists."""
        if model in ("", self.default.name):
            return self.default if self.fixed else self._weighted(known, self.default, self.default.weights)
        if model in (BASE, START):
            return BASE_ALONE if model == BASE else START_POLICY
        if model in known.vectors:
            return self._weighted(known, START_POLICY, {model: 1.0})
        if model in known.mixes:
            return known.mixes[model]
        if model in known.conditioned:
            raise UserError(f'{model} takes a direction; give one in `want`, as in {{"helpfulness": 0.8}}')
        raise UnknownNameError(f"no model {model!r}{nearest(model, self.names())} (known: {', '.join(self.names())})")

    def _weighted(self, known: Known, policy: Policy, weights: Mapping[str, float]) -> Policy:
        """Return the base, the start policy or the conditioned policy that `policy` is, plus weighted vectors."""
        for name in weights:
            if name not in known.vectors:
                hint, names = nearest(name, list(known.vectors)), ", ".join(known.vectors) or "none"
                raise UnknownNameError(f"no vector {name!r}{hint} (known: {names})")
            if not abs(weights[name]) <= LARGEST:
                raise UserError(f"{name}={weights[name]:g}: expected a weight from -{LARGEST:g} to {LARGEST:g}")
        chosen = {name: known.vectors[name] for name in weights}
        vectors.refuse_start_inside(chosen.values())
        start = 0.0 if policy.name == BASE else 1.0
        if policy.prompted:
            return replace(policy, vectors=chosen, weights=weights)
        if policy.conditioned is None:
            return Policy(weights_text(weights) if start or any(weights.values()) else BASE, chosen, weights, start)
        adapter = policy.conditioned.name
        return replace(policy, vectors={adapter: policy.vectors[adapter], **chosen}, weights={adapter: 1.0, **weights})

    def _conditioned(self, known: Known, model: str, want: Mapping[str, float] | None, screen: Screen) -> Policy:
        """Return the policy of a direction, by the conditioned policy that `model` names, or by the newest."""
        text = ",".join(f"{name}={weight!r}" for name, weight in (want or {}).items())
        folder = model if model in known.conditioned else ""
        if want is None:
            head, _, text = model.partition(":")
            folder = head.removeprefix(WANT).removeprefix("@")
        elif not folder:
            self._named(known, model)  # refuses an unknown name
        if not known.conditioned:
            raise UnknownNameError("no conditioned policy in the runs folder; `lora-align rsf` trains one")
        folder = folder or list(known.conditioned)[-1]
        if folder not in known.conditioned:
            raise UnknownNameError(f"no conditioned policy {folder!r} (known: {', '.join(known.conditioned)})")
        objectives = known.conditioned[folder].manifest.method["objectives"]
        for name in parse_weights(text):
            if name not in objectives:
                hint, names = nearest(name, objectives), ", ".join(objectives)
                raise UnknownNameError(f"{folder} has no objective {name!r}{hint} (its objectives: {names})")
        return find_policy(f"{WANT}@{folder}:{text}", self.recipe, self.runs_dir, screen)

    def _loaded(self, policy: Policy, warnings: list[str]) -> Served:
        """Let the batcher load the updates of a policy, if it does not have them."""
        check_base_and_start(self.base, start_policy.identity(self.start), policy.vectors.values())
        keys = {name: _key(vector) for name, vector in policy.vectors.items()}
        weights = {keys[name]: weight for name, weight in policy.weights.items()}
        if policy.start and self.start is not None:
            weights[START] = policy.start
        kept = self._current() | set(weights)
        with self._lock:
            self._installed = {key: done for key, done in self._installed.items() if key in kept}
            loaders = {keys[name]: vector.load for name, vector in policy.vectors.items()}
            if START in weights:
                loaders[START] = self._load_start
            fresh = {key: load for key, load in loaders.items() if key not in self._installed}
            if fresh:
                done = self.batcher.call(lambda: self.batcher.install(fresh, kept))
                self._installed |= dict.fromkeys(fresh, done)
            waiting = [self._installed[key] for key in weights]
        try:
            for done in waiting:
                done.result()
        except BaseException:
            with self._lock:  # the next request tries again
                self._installed = {key: done for key, done in self._installed.items() if done not in waiting}
            raise
        return Served(policy, weights, [*warnings, *policy.warnings(), *self._far(policy)])

    def _load_start(self) -> LoraDelta:
        assert self.start is not None
        return peft_format.load(self.start.path, whole=True)

    def _far(self, policy: Policy) -> list[str]:
        """Return warnings of weights beyond their safe range."""
        try:
            return safe_ranges.warnings_beyond_reach(policy.weights, policy.vectors, self.runs_dir)
        except OSError:
            return [f"{policy.name}: its runs were removed, so their safe weights are unknown"]

    def _current(self) -> set[str]:
        """Return the keys of the updates that are in the runs folder now, or in the default policy."""
        known = self.known()
        named = [*known.vectors.values(), *self.default.vectors.values()]
        named += [vector for policy in known.mixes.values() for vector in policy.vectors.values()]
        named += [Vector(name, (vectors.Parent(run.path, 1.0, run),)) for name, run in known.conditioned.items()]
        return {START, *map(_key, named)}


def _key(vector: Vector) -> str:
    """Return a name for a vector's update that changes when the vector is trained again."""
    known = [parent.run.manifest.digest if parent.run else "" for parent in vector.parents]
    parts = [[parent.sign for parent in vector.parents], known, vector.layers]
    if not all(known):
        parts.append(vector.lineage())
    return f"{vector.name}#{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]}"
