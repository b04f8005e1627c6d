"""The models that share the memory, the requests for them, and how a request is answered."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from modelcache.demo.digits import Digits
from modelcache.demo.weights import SentenceModel

#: What each model may need beside its weights while it answers a request.
WORKSPACE_BYTES = 4 << 20
_DIGITS_PER_REQUEST = 24
_SENTENCES_PER_REQUEST = 2

SENTENCES = (
    "The lighthouse keeper climbed the stairs at dusk.",
    "A model that is parked keeps its weights in RAM.",
    "The ferry leaves the harbour every forty minutes.",
    "She tuned the violin before the audience arrived.",
    "Bread needs flour, water, salt and a little patience.",
    "The graphics card has less memory than the models need.",
    "Snow fell on the railway and the trains ran late.",
    "He repaired the old clock with a single spring.",
    "The least recently used book goes back to the shelf.",
    "Two rivers meet below the northern bridge.",
    "The committee postponed its decision until spring.",
    "A good map leaves out almost everything.",
    "The orchard gives apples in September.",
    "Copying is cheap; waiting for the disk is not.",
    "The telescope was pointed at a faint galaxy.",
    "Nobody remembered who had locked the archive.",
    "The recipe calls for three eggs and a lemon.",
    "An engine idles until somebody needs it.",
    "The night train crosses the border before dawn.",
    "Children built a dam across the small stream.",
    "The librarian knew where every volume stood.",
    "Wind turbines turned slowly above the fields.",
    "The museum shows tools from the bronze age.",
    "Every request has a model that answers it best.",
)


@dataclass(frozen=True, slots=True)
class Variant:
    """One model.

    Attributes:
        name: It is registered under.
        what: It is, in a few words.
        load: Loads it from disk into RAM: what somebody without a cache would call.
        loader: What is registered: `load` itself, or the name of a loader.
        options: Of the registration.
        origin: Where its bytes come from when no tier holds them, in words.
    """

    name: str
    what: str
    load: Callable[[], Any]
    loader: object
    origin: str
    options: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Request:
    """One request: which model, and which of the inputs."""

    number: int
    model: str
    place: int


class Workload:
    """The models, most wanted first, and the answers to requests."""

    def __init__(self, sentences: SentenceModel, digits: Digits) -> None:
        self.digits = digits
        #: The files the models are loaded from.
        self.files = (*sentences.folder.glob("*.safetensors"), digits.path)
        self._encode = sentences.encode
        self.variants = _variants(sentences, digits)
        self.cnn = next(variant.name for variant in self.variants if variant.load == digits.load)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the models, most wanted first."""
        return tuple(variant.name for variant in self.variants)

    def variant(self, name: str) -> Variant:
        """One of the models."""
        return next(variant for variant in self.variants if variant.name == name)

    def requests(self, count: int, seed: int) -> tuple[Request, ...]:
        """Requests whose models follow a Zipf law: the k-th most wanted is wanted 1/k as often as the first."""
        draw = random.Random(seed)
        names = [variant.name for variant in self.variants]
        weights = [1 / rank for rank in range(1, len(names) + 1)]
        models = draw.choices(names, weights, k=count)
        # The first requests name each model once, so that even a short trace has them all.
        first = draw.sample(names, len(names))[:count]
        models[: len(first)] = first
        return tuple(Request(number, model, draw.randrange(1 << 16)) for number, model in enumerate(models))

    def answer(self, model: Any, request: Request, device: torch.device) -> torch.Tensor:
        """What a model on `device` says to a request: unit vectors or logits, float32 (n, features) in RAM."""
        with torch.inference_mode():
            if request.model == self.cnn:
                images = self.digits.images[self.digit_places(request)]
                logits: torch.Tensor = model(images.to(device))
                return logits.cpu()
            return embed(model, self._encode(self._texts(request)), device)

    def digit_places(self, request: Request) -> torch.Tensor:
        """Which of the images a request shows, int64 (n,)."""
        return (torch.arange(_DIGITS_PER_REQUEST) + request.place) % len(self.digits.labels)

    def _texts(self, request: Request) -> Sequence[str]:
        return [SENTENCES[(request.place + 5 * i) % len(SENTENCES)] for i in range(_SENTENCES_PER_REQUEST)]


def embed(model: Any, tokens: Mapping[str, torch.Tensor], device: torch.device) -> torch.Tensor:
    """Unit vectors by mean pooling, float32 (sentence, feature) in RAM."""
    with torch.inference_mode():
        inputs = {name: tensor.to(device) for name, tensor in tokens.items()}
        hidden = model(**inputs).last_hidden_state.cpu().float()
    mask = tokens["attention_mask"].unsqueeze(-1).float()
    pooled = (hidden * mask).sum(1) / mask.sum(1)
    return torch.nn.functional.normalize(pooled, dim=1)


def load_sentence_model(folder: str, **options: Any) -> Any:
    """A BERT from its folder, in RAM."""
    import transformers

    return transformers.BertModel.from_pretrained(folder, local_files_only=True, **options).eval()


def _variants(sentences: SentenceModel, digits: Digits) -> tuple[Variant, ...]:
    folder, prefix = str(sentences.folder), sentences.prefix

    def layers(count: int) -> Callable[[], Any]:
        return lambda: load_sentence_model(folder, num_hidden_layers=count)

    def file(dtype: str) -> dict[str, object]:
        return {"path": folder, "dtype": dtype, "model": "BertModel"}

    five, three = layers(5), layers(3)
    original = "its safetensors file"
    again = "its loader, called again"
    image = "an image file of the cache"
    return (
        Variant(
            f"{prefix}-fp32",
            "all 6 layers, float32",
            lambda: load_sentence_model(folder),
            "transformers",
            original,
            file("float32"),
        ),
        Variant("digits-cnn", "trained here, in seconds", digits.load, digits.load, image),
        Variant(
            f"{prefix}-bf16",
            "all 6 layers, bfloat16",
            lambda: load_sentence_model(folder, dtype=torch.bfloat16),
            "transformers",
            original,
            file("bfloat16"),
        ),
        Variant(f"{prefix}-5layers", "5 of 6 layers, float32", five, five, again, {"reload": True}),
        Variant(f"{prefix}-3layers", "3 of 6 layers, float32", three, three, image),
    )
