"""One adapter that is to be served: how it was trained, its base, and how it is asked."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from shlex import quote
from typing import Any

from ftlevel.config.commands.servers import Server
from ftlevel.data.encoding.prompts import PromptFormat, prompt_ids, read_format
from ftlevel.errors import InputError, listing, with_article
from ftlevel.merging.normal_form.form import BaseWeights, open_base
from ftlevel.merging.serving.start import start_model
from ftlevel.methods.merging import read_peft_config
from ftlevel.models.kinds import model_kind
from ftlevel.models.loading import load_config, load_tokenizer
from ftlevel.tasks import TASKS
from ftlevel.trained.adapterhub import is_adapterhub
from ftlevel.trained.load import card_overrides
from ftlevel.trained.model_ref import ModelRef, load_own_tokenizer

TEXTS = (
    "Write a sentence about rain.",
    "What does this function return?",
    "Name three animals that can swim.",
    "The list is sorted, and then",
    "Explain why the sky is blue.",
    "Summarize: The bridge was closed for two days, as the river had risen.",
)
"""What is asked of the model as trained and of the server: short, so that asking is cheap."""


@dataclass(frozen=True)
class Prompt:
    """One question.

    Attributes:
        text: what the user says.
        ids: the tokens that the model gets, as in training.
        messages: the turns by which a chat API is asked the same; empty without a chat template.
        rendered: the text of `ids`, for servers that take no tokens; empty where the tokenizer
            would make others of it.
    """

    text: str
    ids: list[int]
    messages: list[dict[str, str]]
    rendered: str = ""


@dataclass(frozen=True)
class Entry:
    """An adapter on its way to a server.

    Attributes:
        name: what the server will call it.
        found: the adapter, its base and its card.
    """

    name: str
    found: ModelRef

    @property
    def directory(self) -> Path:
        """Where the adapter is."""
        if self.found.directory is None:
            raise TypeError("an adapter has a directory")
        return self.found.directory

    @cached_property
    def peft_config(self) -> dict[str, Any]:
        """Its adapter_config.json."""
        return read_peft_config(self.directory)

    @cached_property
    def model_config(self) -> Any:
        """The config of its base, with the head that was trained."""
        return load_config(self.found.source, **card_overrides(self.found.card))

    @property
    def task(self) -> Any:
        """What it was trained for."""
        return TASKS[self.found.card.task]

    @property
    def kind(self) -> str:
        """Kind of its model."""
        return model_kind(self.model_config)

    @property
    def auto_class(self) -> str:
        """The class of transformers for its task."""
        return self.task.auto_class(self.kind, self.model_config.model_type)

    @property
    def answers(self) -> bool:
        """Whether it goes on writing after a prompt, as servers let it."""
        return self.kind == "decoder" and self.task.writes_text

    @property
    def base_name(self) -> str:
        """What a server is told to load as its base: a Hub id, or where it lies."""
        source = self.found.source
        if source.kind == "hub":
            return source.name
        place = Path(source.location, source.gguf_file or "")
        return str(place.resolve())

    @cached_property
    def base(self) -> BaseWeights:
        """The weights of its base."""
        return open_base(self.found.source, self.model_config, self.auto_class)

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer that it was trained with."""
        return load_own_tokenizer(self.found.source, self.found.directory)

    @cached_property
    def base_tokenizer(self) -> Any:
        """The tokenizer of its base, which servers use."""
        return load_tokenizer(self.found.source)

    @property
    def added_tokens(self) -> list[str]:
        """The tokens that its tokenizer has and that of its base has not."""
        return sorted(set(self.tokenizer.get_vocab()) - set(self.base_tokenizer.get_vocab()))

    @property
    def own_chat_template(self) -> str | None:
        """The chat template that it was trained with, where that of its base is another."""
        own = getattr(self.tokenizer, "chat_template", None)
        other = getattr(self.base_tokenizer, "chat_template", None)
        return own if isinstance(own, str) and own != other else None

    def prompts(self) -> list[Prompt]:
        """Return the questions, laid out as in training."""
        format_ = read_format(self.found.card) or PromptFormat("plain")
        chats = format_.kind == "chat-template"
        found = []
        for text in TEXTS:
            said = {"role": "user", "content": format_.user_text(text)}
            messages = format_.with_system([said]) if chats else []
            ids = prompt_ids(self.tokenizer, format_, text)
            rendered = self.tokenizer.decode(ids)
            same = self.tokenizer(rendered)["input_ids"] == ids
            found.append(Prompt(text, ids, messages, rendered if same else ""))
        return found

    def in_float32(self, *, with_adapter: bool = True) -> ModelRef:
        """Return it to be loaded in float32 onto a base that is not quantized for it."""
        card = replace(self.found.card, dtype="float32")
        if not self.found.is_stored_quantized:
            card = replace(card, quantization={"kind": "none"})
        return replace(self.found, card=card, directory=self.directory if with_adapter else None)


def adapter_name(found: ModelRef) -> str:
    """Return what a server calls an adapter: the name of its run, or of its directory."""
    place = found.run or found.directory
    return place.resolve().name if place is not None else found.source.name


def _named(entry: Entry) -> str:
    return str(entry.found.run or entry.directory)


def open_entry(name: str, found: ModelRef, server: Server | None) -> Entry:
    """Return `found` as what is to be served.

    Raises:
        InputError: it is no adapter, or one that PEFT does not load.
    """
    if found.directory is None:
        what = f"{name} is a whole model, and there is no adapter to write"
        if server is not None and "merged" in server.formats and found.source.kind != "gguf":
            hub = found.source.kind == "hub"
            place = Path(found.source.name if hub else found.source.location)
            raise InputError(
                f"{what}. {server.title} loads it as it is: "
                f"{' && '.join(start_model(server, place, place.name))}"
            )
        raise InputError(f"{what}. For one file name --format gguf.")
    if is_adapterhub(found.directory):
        raise InputError(f"{name} is a bottleneck adapter, which no server of ours loads.")
    return Entry(name, found)


def check_for(entry: Entry, server: Server | None) -> list[str]:
    """Refuse what `server` would not serve as trained, by the adapter's card and base alone.

    Returns:
        What the user should know, as sentences without a full stop.

    Raises:
        InputError: with the reason and the way out.
    """
    notes = []
    kind, stored = (
        entry.found.card.quantization.get("kind", "none"),
        entry.found.is_stored_quantized,
    )
    if kind != "none" and not stored:
        notes.append(
            f"{entry.name} was trained on a base in {kind}; a server that loads "
            f"{entry.base_name} in 16 or 32 bits gives the adapter another base than the one it "
            "was trained on. ftlevel merge onto the dequantized weights is what was trained"
        )
    if server is None:
        return notes
    if not entry.answers:
        raise InputError(
            f"it was trained for {entry.found.card.task} on {with_article(entry.kind)}, and "
            f"adapters of {server.title} write text by a decoder here. Write it with --format peft "
            f"alone, or merge it: ftlevel merge {quote(_named(entry))} --out DIR"
        )
    family = entry.model_config.model_type
    if server.families and family not in server.families:
        raise InputError(
            f"{server.title} is not known here to name the modules of {family} as transformers "
            f"does (known: {listing(server.families)}). Merge it"
        )
    if entry.found.source.kind == "gguf" and "gguf" not in server.formats:
        raise InputError(
            f"its base is the file {entry.base_name}, and {server.title} serves adapters beside a "
            "base of transformers' files. Merge it"
        )
    if added := entry.added_tokens:
        raise InputError(
            f"it was trained with {len(added):,} more tokens than its base has "
            f"({listing(map(repr, added), 3)}), and {server.title} reads the tokenizer of the base "
            f"only. Merge it"
        )
    return notes + [server.note] * bool(server.note)


def whole_format(server: Server | None) -> str:
    """Return the format in which `server` loads a merged model."""
    formats = server.formats if server else ()
    return next((name for name in formats if name in ("merged", "gguf")), "merged")


def checked_form(form: Any, entry: Entry, server: Server | None) -> Any:
    """Return the normal form as `server` wants it; refuse one that it would not serve as trained.

    Raises:
        InputError: with the reason and the way out.
    """
    if server is None:
        return form
    if form.whole_modules:
        raise InputError(
            f"{server.title} does not load modules that were trained as a whole, here "
            f"{listing(form.whole_modules, 2)}. Merge it"
        )
    if not server.vocabulary and (words := form.in_vocabulary):
        raise InputError(
            f"{server.title} does not serve LoRA on {listing(words, 3)} as it was trained. Merge it"
        )
    if server.ranks and form.rank > server.ranks[-1]:
        raise InputError(
            f"it needs rank {form.rank}, and {server.title} ends at {server.ranks[-1]}. Merge it"
        )
    return form.on_every_layer(entry.base.model) if server.every_layer else form
