"""Projects of the Python API: a recipe and a folder of runs, with the commands as methods."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_align import described_pairs
from lora_align import recipe as recipes
from lora_align.console import Screen, count
from lora_align.data.rows import Message, with_system_prompt
from lora_align.policy import vectors
from lora_align.policy.policy import Policy, find_policy
from lora_align.rankers import Direction
from lora_align.vector import Vector

if TYPE_CHECKING:
    from lora_align.chat.session import Session
    from lora_align.evaluate.compare import Comparison

PolicyLike = Vector | str  # a vector, or a word that names a policy: start, base, mix, helpful=1, a folder


class Project:
    """A recipe, by its name or file, and the folder of its runs."""

    def __init__(
        self, recipe: str | Path = recipes.DEFAULT, runs: str | Path = "runs", *, quiet: bool = False, **tables: Any
    ) -> None:
        """Read the recipe. `tables` override values: `Project("demo", dpo={"limit": 64})`."""
        path, _ = recipes.find(str(recipe))
        self.runs, self.screen = Path(runs), Screen(quiet=quiet)
        self.recipe = described_pairs.attach(recipes.load(path, (), tables), self.runs)

    def train(
        self, preference: str, direction: str = "both", *, resume: bool = True, force: bool = False, **settings: Any
    ) -> Vector:
        """Train a preference by DPO and return its vector. Pairs of a described preference are made first.

        A published run of the same settings is used as it is; one of other settings is refused, unless `force`.
        `settings` are keys of the recipe's [dpo] table, such as `limit=64` or `learning_rate=1e-4`.
        """
        from lora_align.commands.make_pairs import make_missing
        from lora_align.train.dpo import train_dpo

        sides = Direction.parse(direction)
        recipe = make_missing(self._with("dpo", settings), [preference], self.runs, self.screen)
        train_dpo(recipe, [preference], sides, self.runs, self.screen, force=force, resume=resume and not force)
        both = preference in vectors.trained(self.runs)
        return self.vector(preference if both else f"dpo/{preference}/{direction}")

    def vector(self, name: str) -> Vector:
        """Return the vector of a trained preference, a run or an adapter folder."""
        vector = vectors.find(name, self.runs, self.recipe.preferences)
        return Vector({name: 1.0}, {name: vector}, self.recipe, self.runs)

    def vectors(self) -> list[Vector]:
        """Return the vectors of all preferences whose two adapters are trained."""
        return [self.vector(name) for name in vectors.trained(self.runs)]

    def policy(self, policy: PolicyLike) -> Policy:
        """Return the policy of a vector, or of a word such as `start`, `mix` or `helpful=1,harmless=-0.5`."""
        if isinstance(policy, Vector):
            return policy.policy
        return find_policy(policy, self.recipe, self.runs, self.screen)

    def chat(self, policy: PolicyLike = "start", **sampling: Any) -> Chat:
        """Open a conversation. `sampling` takes `temperature`, `top_p`, `max_new_tokens` and `seed`."""
        from lora_align.chat.session import open_session
        from lora_align.model import base as bases
        from lora_align.model.sampler_protocol import Sampling

        base = bases.find(self.recipe.base)
        chosen = self.policy(policy)
        return Chat(open_session(base, self.runs, self.recipe, chosen, Sampling(**sampling), self.screen))

    def generate(
        self, prompts: Sequence[str], policy: PolicyLike = "start", n: int = 1, **sampling: Any
    ) -> list[list[str]]:
        """Return n answers to each prompt. `sampling` is as for `chat`, at temperature 1 and seed 0 by default."""
        from lora_align.model import base as bases
        from lora_align.model.sampler_protocol import Sampling
        from lora_align.policy.loading import load_policy

        chosen = self.policy(policy)
        loaded = load_policy(bases.find(self.recipe.base), self.recipe, chosen, self.runs, self.screen)
        conversations = [with_system_prompt(chosen.system, (Message("user", text),)) for text in prompts]
        by_prompt: list[dict[int, str]] = [{} for _ in prompts]
        for batch in loaded.sampler.draw(conversations, n, Sampling(**{"temperature": 1.0, "seed": 0, **sampling})):
            for answer in batch:
                by_prompt[answer.prompt][answer.number] = answer.text
        return [[answers[number] for number in sorted(answers)] for answers in by_prompt]

    def evaluate(
        self, policies: PolicyLike | Sequence[PolicyLike], by: Sequence[str] = (), **settings: Any
    ) -> Comparison:
        """Measure policies on the same prompts, and compare the first with each of the others.

        `by` lists judges: names of reward models, or `pair:PREFERENCE`. `settings` are keys of the [eval] table.
        """
        from lora_align.evaluate.compare import compare_policies
        from lora_align.evaluate.measure import Evaluator

        recipe = self._with("eval", settings)
        several = policies if isinstance(policies, Sequence) and not isinstance(policies, str) else [policies]
        chosen = [self.policy(policy) for policy in several]
        return compare_policies(Evaluator.of(chosen, recipe, self.runs, self.screen, by), self.screen)

    def __repr__(self) -> str:
        return f"Project({self.recipe.source!r}, base {self.recipe.base.model!r}, runs {str(self.runs)!r})"

    def _with(self, table: str, settings: Mapping[str, Any]) -> recipes.Recipe:
        recipe = recipes.from_dict(self.recipe.as_dict(), self.recipe.source, keywords={table: settings})
        return described_pairs.attach(recipe, self.runs)


class Chat:
    """A conversation with a loaded base. Call it with a message; change `weights` between answers."""

    def __init__(self, session: Session) -> None:
        self.session = session

    @property
    def weights(self) -> MutableMapping[str, float]:
        """Return the current weights. Assign one to change it for the next answers."""
        return _Weights(self.session)

    @property
    def messages(self) -> list[dict[str, str]]:
        """Return the conversation so far."""
        return [{"role": turn.role, "content": turn.content} for turn in self.session.turns]

    def __call__(self, text: str, show: Callable[[str], None] | None = None) -> str:
        """Answer a message, and return the answer. `show` gets each piece of the answer as it is sampled.

        If an exception ends the answer, the conversation stays as it was before.
        """
        session, before = self.session, self.session.turns
        session.turns = [*before, Message("user", text)]
        pieces = []
        try:
            for piece in session.answer():
                pieces.append(piece)
                if show:
                    show(piece)
        except BaseException:
            session.turns = before
            session.cache.forget()
            raise
        session.turns = [*session.turns, Message("assistant", "".join(pieces))]
        return "".join(pieces).strip()

    def reset(self) -> None:
        """Delete the conversation; the weights do not change."""
        self.session.turns = []

    def __repr__(self) -> str:
        weights = " ".join(f"{name}={weight:g}" for name, weight in self.weights.items()) or "start policy"
        return f"Chat({weights}, {count(len(self.session.turns), 'message')})"


class _Weights(MutableMapping[str, float]):
    """The weights of a session, as a dictionary that changes them."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def __getitem__(self, name: str) -> float:
        return self._session.weights[name]

    def __setitem__(self, name: str, weight: float) -> None:
        for warning in self._session.set_weights({name: float(weight)}):
            Screen().warn(warning)

    def __delitem__(self, name: str) -> None:
        self[name] = 0.0

    def __iter__(self) -> Iterator[str]:
        return iter(self._session.weights)

    def __len__(self) -> int:
        return len(self._session.weights)

    def __repr__(self) -> str:
        return repr(self._session.weights)
