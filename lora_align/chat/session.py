"""A chat session: a loaded base, vectors with changeable weights, and the conversation so far."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from transformers import PreTrainedModel

from lora_align.console import Screen
from lora_align.data.rows import Message, with_system_prompt
from lora_align.errors import UserError
from lora_align.model.base import Base
from lora_align.model.decoding import PrefixCache, stream_tokens, text_pieces
from lora_align.model.mixer import Mixer
from lora_align.model.sampler import Sampling
from lora_align.policy import safe_ranges, vectors
from lora_align.policy import start as start_policy
from lora_align.policy.policy import Conditioned, Policy, check_stands_on
from lora_align.policy.vectors import Vector
from lora_align.recipe import Recipe


@dataclass
class Session:
    """A conversation with one loaded model.

    `fixed` means that the weights cannot change: the mix contains a start adapter that is not available by itself.
    """

    base: Base
    model: PreTrainedModel
    runs_dir: Path
    recipe: Recipe
    sampling: Sampling
    start: str = ""
    fixed: bool = False
    vectors: dict[str, Vector] = field(default_factory=dict)
    mixer: Mixer | None = None
    turns: list[Message] = field(default_factory=list)
    system: str = ""
    conditioned: Conditioned | None = None
    cache: PrefixCache = field(default_factory=PrefixCache)
    tokens: int = 0  # number of tokens in the last answer
    retries: int = 0  # number of retries of the last question

    @property
    def weights(self) -> dict[str, float]:
        """Return the current weights."""
        return dict(self.mixer.weights) if self.mixer else {}

    @property
    def want(self) -> dict[str, float] | None:
        """Return the direction of the conditioned policy, if there is one."""
        return dict(self.conditioned.want.weights) if self.conditioned and self.conditioned.want else None

    def only(self, weights: Mapping[str, float]) -> dict[str, float]:
        """Return these weights, and 0 for every other vector except the conditioned policy."""
        conditioned = self.conditioned.name if self.conditioned else ""
        others = {name: weight if name == conditioned else 0.0 for name, weight in self.weights.items()}
        return {**others, **weights}

    def set_weights(self, weights: Mapping[str, float]) -> list[str]:
        """Change weights for the next answers, and return warnings. Load vectors that are not loaded yet."""
        if self.fixed:
            raise UserError("the weights are fixed: this mix contains a start adapter that is not in the runs folder")
        loaded = self.mixer.updates if self.mixer else {}
        new = {
            name: vectors.find(name, self.runs_dir, self.recipe.preferences) for name in weights if name not in loaded
        }
        merged = {**self.weights, **weights}
        if new:
            vectors.refuse_start_inside(new.values())
            check_stands_on(self.base, self.start, new.values())
            updates = {**loaded, **{name: vector.load() for name, vector in new.items()}}
            mixer = Mixer(self.model, updates, merged)
            if self.mixer:
                self.mixer.remove()
            self.mixer = mixer
        elif self.mixer:
            self.mixer.set(merged)
        self.cache.forget()
        self.vectors |= new
        far = safe_ranges.warnings_beyond_reach(merged, self.vectors, self.runs_dir)
        return [*(warning for vector in new.values() for warning in vector.warnings()), *far]

    def answer(self, sampling: Sampling | None = None) -> Iterator[str]:
        """Yield the assistant's next answer piece by piece, and count its tokens in `tokens`."""
        request = self.conditioned.system if self.conditioned else ""
        turns = with_system_prompt(request, with_system_prompt(self.system, tuple(self.turns)))
        prompt = self.base.chat.prompt_ids(turns)
        space = self.base.max_length - len(prompt)
        if space < 1:
            raise UserError(
                f"the conversation fills the base's {self.base.max_length} tokens; /undo, or start a new chat"
            )
        sampling = sampling or self.sampling
        sampling = replace(sampling, max_new_tokens=min(space, sampling.max_new_tokens))
        self.tokens = 0
        tokens = stream_tokens(self.model, prompt, self.base.chat.stop_ids, sampling, self.cache)
        yield from text_pieces(self.base.chat.tokenizer, self._counted(tokens))

    def _counted(self, tokens: Iterator[int]) -> Iterator[int]:
        for token in tokens:
            self.tokens += 1
            yield token


def open_session(
    base: Base, runs_dir: Path, recipe: Recipe, policy: Policy, sampling: Sampling, screen: Screen
) -> Session:
    """Load the base, the start adapter and a policy's vectors."""
    mixed, fixed, start, start_id = dict(policy.vectors), False, None, ""
    if policy.contains_start:
        _, start_id = vectors.common_base(mixed.values())
        start = start_policy.published(runs_dir, start_id)
        fixed = start is None
        if start is not None:  # subtract it from the mix, so that the weight of the mix does not scale it
            mixed = {name: vector.without(start) for name, vector in mixed.items()}
    elif policy.start:
        start = start_policy.adapter(recipe, runs_dir)
        start_id = start_policy.identity(start)
    check_stands_on(base, start_id, policy.vectors.values())
    if policy.contains_start:
        screen.note("start adapter: part of the mix")
    elif start is not None:
        screen.note(f"start adapter: {start.path}, added")
    far = safe_ranges.warnings_beyond_reach(policy.weights, policy.vectors, runs_dir)
    for warning in [*policy.warnings(), *_differences(base, policy.vectors.values()), *far]:
        screen.warn(warning)
    model = start_policy.load(base, start)
    loaded = dict(policy.vectors)
    session = Session(base, model, runs_dir, recipe, sampling, start_id, fixed, loaded, conditioned=policy.conditioned)
    if mixed:
        session.mixer = Mixer(session.model, {n: v.load() for n, v in mixed.items()}, policy.weights)
    return session


def _differences(base: Base, policy_vectors: Iterable[Vector]) -> list[str]:
    """Return a warning for each property of the base, except its weights, that differs from training."""
    theirs, _ = vectors.common_base(policy_vectors)
    words = {"chat_format": "chat template or tokenizer", "quantization": "quantization"}
    ours = base.identity
    return [
        f"the {name} of the recipe is not that of the vectors' training; answers may be worse"
        for key, name in words.items()
        if theirs and theirs.get(key) != ours[key]
    ]
