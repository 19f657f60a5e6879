"""Picks over HTTP, for the page: two answers to a prompt, a pick, and the weights learned so far."""

import secrets
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any

from anyio import CapacityLimiter, to_thread
from pydantic import BaseModel, Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from lora_align.data.files import EVERYDAY
from lora_align.errors import UserError
from lora_align.mix_weights import NAME, NAME_RULE
from lora_align.model.sampler_protocol import Sampling
from lora_align.policy import profiles
from lora_align.prefer.arena import Arena
from lora_align.prefer.learner import Choice, Learner
from lora_align.prefer.session import prompts_of
from lora_align.serve.api import read_json
from lora_align.serve.catalogue import Catalogue, UnknownNameError
from lora_align.serve.requests import Name, parse

PATH = "/v1/picks"
MOST = 4  # sessions at a time; another one ends the one that was not used for longest
THREADS = 4  # for sampling, so that other requests keep theirs
ENDED = "this session has ended; reload the page"
BUDGET = 0.2  # KL(start‖mix) per token, as the default of the command `prefer`
LENGTH = 128  # tokens of an answer


class Begin(BaseModel):
    """Begin a session. Without vectors, it weighs all of the server's."""

    vectors: Annotated[list[Name], Field(max_length=64)] = []
    kl: Annotated[float, Field(gt=0, le=100)] = BUDGET


class Pick(BaseModel):
    """A pick: 1 for the first answer, 0 for the second, 0.5 for neither, null to skip."""

    number: int
    won: Annotated[float, Field(ge=0, le=1, multiple_of=0.5)] | None


class Save(BaseModel):
    """Save the weights as a profile."""

    profile: str


@dataclass
class Session:
    """A person's picks."""

    id: str
    learner: Learner
    choice: Choice | None = None
    number: int = 0  # of the choice
    ended: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)

    def pick(self, body: Pick) -> dict[str, Any]:
        """Learn from a pick of the choice that is shown. A second pick of one choice has no effect."""
        with self.lock:
            if self.ended:
                raise UnknownNameError(ENDED)
            if body.number == self.number and (choice := self.choice):
                self.choice, self.number = None, self.number + 1
                if body.won is not None:
                    self.learner.learn(choice, body.won)
            return self.state()

    def state(self) -> dict[str, Any]:
        """Return the choice, and the weights learned so far."""
        self.choice = self.choice or self.learner.choice()
        learned = self.learner.learned().as_json()
        return {
            "id": self.id,
            "number": self.number,
            "prompt": "\n".join(turn.content for turn in self.choice.prompt if turn.role != "system"),
            "answers": [self.choice.first.text, self.choice.second.text],
            **learned,
        }


@dataclass
class Sessions:
    """The sessions of a server."""

    catalogue: Catalogue
    running: dict[str, Session] = field(default_factory=dict)  # by id, the last used one at the end
    lock: threading.Lock = field(default_factory=threading.Lock)

    def begin(self, body: Begin) -> dict[str, Any]:
        """Sample the first answers."""
        names = list(dict.fromkeys(body.vectors)) or list(self.catalogue.known().vectors)
        if len(names) < 2:
            raise UserError(f"two vectors or more are needed, and there are {', '.join(names) or 'none'}")
        sampling = Sampling(1.0, 1.0, LENGTH, secrets.randbits(31))
        arena = Arena.of(self.catalogue, names, sampling)
        learner = Learner(arena, prompts_of(str(EVERYDAY), arena.base), body.kl, sampling.seed or 0)
        session = Session(secrets.token_hex(16), learner)
        state = session.state()
        with self.lock:
            self.running[session.id] = session
            oldest = [self.running.pop(name) for name in list(self.running)[:-MOST]]
        for old in oldest:
            with old.lock:
                old.ended = True
                old.learner.close()
        return state

    def save(self, session: Session, body: Save) -> dict[str, Any]:
        """Save the weights of a session."""
        if not NAME.fullmatch(body.profile):
            raise UserError(f"profile {body.profile!r}: expected {NAME_RULE}")
        with session.lock, self.lock:
            profiles.save(body.profile, self.catalogue.runs_dir, session.learner.learned().as_json())
        return {"model": f"{profiles.PREFIX}{body.profile}"}

    def find(self, request: Request) -> Session:
        """Return the session that a path names."""
        with self.lock:
            if found := self.running.pop(request.path_params["id"], None):
                self.running[found.id] = found
                return found
        raise UnknownNameError(ENDED)


def pick_routes(catalogue: Catalogue) -> list[Route]:
    """Return the routes of picks."""
    sessions, threads = Sessions(catalogue), CapacityLimiter(THREADS)

    async def answer(work: Callable[[Any], dict[str, Any]], body: BaseModel) -> Response:
        return JSONResponse(await to_thread.run_sync(work, body, limiter=threads))

    async def begin(request: Request) -> Response:
        return await answer(sessions.begin, parse(Begin, await read_json(request)))

    async def pick(request: Request) -> Response:
        return await answer(sessions.find(request).pick, parse(Pick, await read_json(request)))

    async def save(request: Request) -> Response:
        session, body = sessions.find(request), parse(Save, await read_json(request))
        return await answer(lambda given: sessions.save(session, given), body)

    paths = {PATH: begin, f"{PATH}/{{id}}": pick, f"{PATH}/{{id}}/profile": save}
    return [Route(path, endpoint, methods=["POST"]) for path, endpoint in paths.items()]
