"""A chat session: a loaded base, vectors with changeable weights, and the conversation so far."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from transformers import PreTrainedModel

from lora_align.console import Screen
from lora_align.data.rows import Message, with_system_prompt
from lora_align.errors import UserError
from lora_align.model.base import Base
from lora_align.model.mixer import Mixer
from lora_align.model.sampler_protocol import Sampling
from lora_align.model.streaming import PrefixCache, stream_tokens, text_pieces
from lora_align.policy import safe_ranges, vectors
from lora_align.policy.loading import load_policy
from lora_align.policy.policy import Conditioned, Policy, check_base_and_start
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
    asked: str = ""  # the system prompt of a prompted policy
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
            raise UserError(
                "the weights are fixed: this mix contains a start adapter that is not in the runs folder; name its "
                "preferences with --weights instead"
            )
        loaded = self.mixer.updates if self.mixer else {}
        new = {
            name: vectors.find(name, self.runs_dir, self.recipe.preferences) for name in weights if name not in loaded
        }
        merged = {**self.weights, **weights}
        if new:
            vectors.refuse_start_inside(new.values())
            check_base_and_start(self.base, self.start, new.values())
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
        request = self.conditioned.system if self.conditioned else self.asked
        turns = with_system_prompt(request, with_system_prompt(self.system, tuple(self.turns)))
        prompt = self.base.chat.prompt_ids(turns)
        space = self.base.max_length - len(prompt)
        if space < 1:
            raise UserError(
                f"the conversation fills the base's {self.base.max_length:,} tokens; shorten it, or start a new chat"
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
    """Load a policy, and begin a conversation with it."""
    if policy.strength != 1:
        raise UserError(f"{policy.name}: chat uses a prompt at strength 1 only; `eval`, `sweep` and `serve` scale it")
    loaded = load_policy(base, recipe, policy, runs_dir, screen)
    return Session(
        base,
        loaded.model,
        runs_dir,
        recipe,
        sampling,
        start=loaded.start,
        fixed=loaded.fixed,
        vectors=dict(policy.vectors),
        mixer=loaded.mixer,
        conditioned=policy.conditioned,
        asked=policy.system if policy.prompted else "",
    )
