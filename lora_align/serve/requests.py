"""The requests of the API: OpenAI's fields, and the fields for weights and directions."""

import secrets
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from lora_align.errors import UserError
from lora_align.mix_weights import LARGEST, LONGEST
from lora_align.serve.catalogue import UnknownNameError

OWN_FIELDS = ("weights", "want", "lora")  # other servers do not have these
ALIKE = 0.8  # similarity at which an unknown field counts as a typo of one of them
MOST_EXTRA = 100  # fields that clients send for other servers
UNSUPPORTED = {  # field → the values that mean the default, which clients may send
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "logit_bias": ({},),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "best_of": (1,),
    "suffix": ("",),
    "echo": (False,),
    "audio": (),
    "modalities": (["text"],),
    "top_k": (-1, 0),
    "min_p": (0,),
    "repetition_penalty": (1,),
    "min_tokens": (0,),
    "stop_token_ids": ([],),
    "grammar": ("",),
    "json_schema": (),
    **{f"guided_{kind}": () for kind in ("json", "regex", "choice", "grammar")},
    "chat_template_kwargs": ({},),
}
Weight = Annotated[float, Field(ge=-LARGEST, le=LARGEST, allow_inf_nan=False)]
Name = Annotated[str, Field(min_length=1, max_length=4 * LONGEST)]
Weights = Annotated[dict[Name, Weight], Field(max_length=64)]
StopText = Annotated[str, Field(min_length=1, max_length=256)]


class TextPart(BaseModel):
    """A part of a message's content."""

    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    """A message of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]

    @property
    def text(self) -> str:
        """Return the content as one text."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class Scale(BaseModel):
    """An entry of llama.cpp's `lora`: a vector by its number in /v1/vectors, and its weight."""

    id: Annotated[int, Field(ge=0)]
    scale: Weight


class StreamOptions(BaseModel):
    """Options of a streamed answer."""

    include_usage: bool = False


class CompletionBody(BaseModel):
    """The fields that chats and completions share."""

    model_config = ConfigDict(extra="allow")

    model: Annotated[str, Field(max_length=4096)] = ""
    weights: Weights | None = None
    want: Weights | None = None
    lora: Annotated[list[Scale], Field(max_length=64)] | None = None
    n: Annotated[int, Field(ge=1, le=64)] = 1
    temperature: Annotated[float, Field(ge=0, le=10)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: StopText | Annotated[list[StopText], Field(max_length=16)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    return_token_ids: bool = False  # as in vLLM, like the next field
    ignore_eos: bool = False

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, data: Any) -> Any:
        """Let null mean the default, as clients send it."""
        return {key: value for key, value in data.items() if value is not None} if isinstance(data, dict) else data

    @model_validator(mode="after")
    def _refuse_unsupported(self) -> "CompletionBody":
        extra = self.model_extra or {}
        if len(extra) > MOST_EXTRA:
            raise ValueError(f"{len(extra)} unknown fields; at most {MOST_EXTRA} are ignored")
        for key, value in extra.items():
            if key in UNSUPPORTED and value not in UNSUPPORTED[key]:
                raise ValueError(f"{key} is not supported; leave it out")
            if close := get_close_matches(key[:LONGEST], OWN_FIELDS, 1, ALIKE):
                raise ValueError(f"there is no field {key!r}; did you mean {close[0]!r}?")
        if sum(given is not None for given in (self.weights, self.lora)) > 1:
            raise ValueError("weights and lora exclude each other; give one of them")
        return self

    @property
    def stop_texts(self) -> tuple[str, ...]:
        """Return the stop sequences."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def random_seed(self) -> int:
        """Return the seed, or a random one."""
        return self.seed if self.seed is not None else secrets.randbits(62)


class ChatBody(CompletionBody):
    """A request to /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=4096)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] = 0

    @property
    def length(self) -> int | None:
        """Return the maximum number of tokens, if it is given."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def logprob_count(self) -> int | None:
        """Return the number of alternatives to each token; None without log-probabilities."""
        return self.top_logprobs if self.logprobs else None


Tokens = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]


class TextBody(CompletionBody):
    """A request to /v1/completions."""

    prompt: str | Tokens | Annotated[list[str] | list[Tokens], Field(min_length=1, max_length=64)]
    max_tokens: Annotated[int, Field(ge=1)] = 16  # as in OpenAI's API
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @property
    def length(self) -> int | None:
        """Return the maximum number of tokens."""
        return self.max_tokens

    @property
    def logprob_count(self) -> int | None:
        """Return the number of alternatives to each token; None without log-probabilities."""
        return self.logprobs

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """Return the prompts, as texts or as tokens."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        return [self.prompt] if isinstance(self.prompt[0], int) else self.prompt


def parse(kind: type[BaseModel], data: Any) -> Any:
    """Return the request of a body. Otherwise name the first wrong field and what is expected."""
    try:
        return kind.model_validate(data)
    except ValidationError as fault:
        first = fault.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(map(str, first["loc"]))
        message = first["msg"].removeprefix("Value error, ")
        raise UserError(f"{where}: {message}" if where else message) from fault


def weights_of(body: CompletionBody, ids: Mapping[str, int]) -> Mapping[str, float] | None:
    """Return the weights of a request, if it gives any; `ids` has the numbers of `lora` by name."""
    if body.lora is None:
        return body.weights
    names = {number: name for name, number in ids.items()}
    unknown = [entry.id for entry in body.lora if entry.id not in names]
    if unknown:
        raise UnknownNameError(f"lora: no vector has the id {unknown[0]}; /v1/vectors lists the ids")
    return {names[entry.id]: entry.scale for entry in body.lora}
