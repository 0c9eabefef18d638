"""The projector, the three models, and the function that decides what is trained.

    video classifier                vision encoder -> pooled token -> head
    video + language classifier     [CLS] video tokens [SEP] text [SEP] -> BERT-like encoder -> head on [CLS]
    video captioner                 video tokens, BOS, (question,) caption or answer, EOS -> causal language model

With --head attentive (heads.py) a query attends to each time step of the video:

    video classifier                learned query, video tokens -> attentive head
    video + language classifier     [CLS] text [SEP] -> BERT-like encoder -> query, video tokens -> attentive head
    video captioner                 learned queries, video tokens -> 16 tokens, BOS, caption, EOS -> language model

Shapes: B batch, T frames, C channels, H W pixels, N video tokens, L text tokens, D width, V vocabulary, K classes.
t, h and w are the numbers of tokens along time, height and width.
A `video` argument is either RGB uint8 (B, T, C, H, W), which the vision encoder normalises on the device, or the
features (B, 1 + N, D) that a frozen vision encoder has computed from it.

Read build_model() at the end first: it puts the parts together.
"""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from types import MethodType
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.functional import logsigmoid
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from config import Config, training_mode
from extras.fused import fuse_adapter
from heads import AttentiveHead, AttentiveProjector, TextQuery, classifier_layer
from pretrained import Source, load_language, locate, takes
from script import UserError, gc_disabled
from vision import VisionEncoder, grid_shape, load_vision

# -- batches ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TextCodec:
    """Turns texts into right-padded input_ids and attention_mask, (B, L) each. A row is a prompt, tokens, eos."""

    tokenizer: Any
    bos: tuple[int, ...]  # ids before every text
    eos: int
    max_tokens: int  # longer texts are cut; bos and eos do not count. A question and its answer share them

    @property
    def max_question(self) -> int:
        """How many tokens of a question are kept. It must not depend on the answer, which inference does not know."""
        return self.max_tokens // 2

    def tokens(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]

    def prompts(self, questions: list[str]) -> list[list[int]]:
        """The ids before each answer: bos, question, line feed; for an empty question only bos."""
        line_feed, *rows = self.tokens(["\n", *questions])
        return [[*self.bos, *ids[: self.max_question], *(line_feed if ids else [])] for ids in rows]

    def room_after(self, prompt: list[int]) -> int:
        """How many tokens of a text fit after its prompt."""
        return max(0, len(self.bos) + self.max_tokens - len(prompt))

    def __call__(self, texts: list[str], prompts: list[list[int]] | None = None) -> dict[str, torch.Tensor]:
        prompts = prompts or [[*self.bos]] * len(texts)
        pairs = zip(prompts, self.tokens(texts), strict=True)
        rows = [torch.tensor([*p, *ids[: self.room_after(p)], self.eos]) for p, ids in pairs]
        return {
            # any id will do as padding, because the mask hides it; GPT-2 has no padding id
            "input_ids": pad_sequence(rows, batch_first=True, padding_value=self.eos),  # (B, L)
            "attention_mask": pad_sequence([torch.ones_like(row) for row in rows], batch_first=True),  # (B, L)
        }


@dataclass(frozen=True)
class Collator:
    """Turns dataset items into a batch: the model's arguments and targets, and `index`, the numbers of the samples."""

    codec: TextCodec | None  # None: the model reads no text
    text_field: str | None  # which text the model reads: "caption", "text" or none

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = {
            "video": torch.stack([item["video"] for item in items]),  # (B, T, C, H, W) uint8 or (B, 1 + N, D) fp16
            "index": torch.tensor([item["index"] for item in items]),  # (B,)
        }
        if self.text_field != "caption":
            # (B,), or with several labels (B, K) bool
            batch["labels"] = torch.from_numpy(np.array([item["label"] for item in items]))
        if self.codec is None:
            return batch
        texts = [item[self.text_field] for item in items]
        if self.text_field != "caption":
            return batch | self.codec(texts)

        # a captioner's targets are its captions and answers: what comes after the prompt
        prompts = self.codec.prompts([item["question"] for item in items])
        lengths = torch.tensor([*map(len, prompts)])  # (B,)
        return batch | self.codec(texts, prompts) | {"prompt_tokens": lengths}


# -- models -----------------------------------------------------------------------------------------


def check_grid(vision: VisionEncoder, grid: int) -> None:
    """Raises UserError if a time step has fewer patches than the grid of tokens that it is pooled to."""
    _, side = grid_shape(vision.config)
    if grid > side:
        raise UserError(f"--token_grid {grid}: this backbone has {side} x {side} patches at this size")


class Projector(nn.Module):
    """Maps video tokens to a language model's width: norm, 2-layer MLP, plus a learned time embedding.

    A language model gets the tokens as one flat sequence, so the embedding has to tell it which time step each is from.
    """

    def __init__(self, vision: VisionEncoder, width: int, grid: int, dropout: float):
        super().__init__()
        hidden = vision.config.hidden_size
        layers = nn.Linear(hidden, width), nn.GELU(), nn.Dropout(dropout), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.LayerNorm(hidden), *layers)
        self.num_tokens = vision.num_tokens(grid)
        first = int(vision.has_pooled_token)  # it belongs to no time step, so it gets entry 0
        times = torch.arange(vision.num_times).repeat_interleave(grid**2) + first
        times = torch.cat([times.new_zeros(first), times])
        self.register_buffer("times", times, persistent=False)  # (N,)
        self.time_embedding = nn.Embedding(int(times.max()) + 1, width)
        nn.init.normal_(self.time_embedding.weight, std=0.02)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.mlp(tokens) + self.time_embedding(self.times)  # (B, N, D)


class VideoModel(nn.Module):
    """What all models have in common: a vision encoder, the sources of its backbones, and how they are frozen."""

    task: str  # in words, for people
    text_field: str | None = None  # which text the model reads: "caption", "text" or none
    multi_label = False  # each class has a probability of its own, of the logit's sigmoid
    thresholds: dict[str, float] | None = None  # of each class with multi_label, chosen on val

    def __init__(self, vision_encoder: VisionEncoder):
        super().__init__()
        self.vision_encoder = vision_encoder
        self.tokenizer: Any = None
        self.sources: dict[str, Source] = {}
        self._frozen: list[nn.Module] = []

    def backbones(self) -> dict[str, nn.Module]:
        """The pretrained parts, {"vision": ..., "language": ...}; a video classifier has only the first."""
        language = {"language": self.language_model} if hasattr(self, "language_model") else {}
        return {"vision": self.vision_encoder} | language

    def freeze(self, backbone: nn.Module) -> None:
        """Stops gradients to the backbone's weights, and keeps it in eval(): dropout would only blur its features."""
        backbone.requires_grad_(False)
        self._frozen.append(backbone)
        if backbone is self.vision_encoder:
            backbone.frozen = True

    def train(self, mode: bool = True) -> "VideoModel":
        super().train(mode)
        for backbone in self._frozen:
            backbone.eval()
        return self

    def truncation_note(self, samples: list[Any]) -> str | None:
        """One line on how many texts or captions of the samples are too long and will be cut; None if none are."""
        return None

    def codec(self) -> TextCodec | None:
        """How this model encodes the texts that it reads; None if it reads none."""
        return None

    def collator(self) -> Collator:
        """Makes batches for this model from dataset items."""
        return Collator(self.codec(), self.text_field)

    def targets(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """What the logits are compared with: (B,), (B, L), or with several labels (B, K) bool; -100 is ignored."""
        return batch["labels"]

    def scores(self, video: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
        """The logits of a video (B, K). For several views of it, (B, V, T, C, H, W), the logits of the mean of their
        probabilities."""
        if video.ndim <= 5:
            return self(video=video, **inputs).float()
        # one view at a time: all at once would multiply the memory by their number
        views = torch.stack([self(video=view, **inputs).float() for view in video.unbind(1)])  # (V, B, K)
        if self.multi_label:  # log(p / (1 - p)); the number of views cancels out
            return logsigmoid(views).logsumexp(0) - logsigmoid(-views).logsumexp(0)
        return views.log_softmax(-1).logsumexp(0) - math.log(len(views))


class VideoClassifier(VideoModel):
    """Vision encoder, dropout, linear head on the pooled token."""

    task = "classification"

    def __init__(self, vision_encoder: VisionEncoder, num_classes: int, dropout: float):
        super().__init__(vision_encoder)
        self.dropout = nn.Dropout(dropout)
        self.head = classifier_layer(vision_encoder.config.hidden_size, num_classes)

    def forward(self, video: torch.Tensor) -> torch.Tensor:
        """A video -> logits (B, K)."""
        return self.head(self.dropout(self.vision_encoder(video)))


class AttentiveClassifier(VideoModel):
    """Vision encoder, attentive head with a learned query on its grid tokens."""

    task = "classification"

    def __init__(self, vision_encoder: VisionEncoder, num_classes: int, config: Config):
        super().__init__(vision_encoder)
        vision_encoder.fc_norm = None  # it normalises VideoMAE's mean token, which is not read
        check_grid(vision_encoder, config.token_grid)
        self.grid = config.token_grid
        self.head = AttentiveHead(vision_encoder, num_classes, config.dropout)

    def forward(self, video: torch.Tensor) -> torch.Tensor:
        """A video -> logits (B, K)."""
        return self.head(self.vision_encoder.encode_video(video, self.grid))


class VisionLanguageModel(VideoModel):
    """A vision encoder and a language model. Subclasses set `bos` and `eos` if the model reads texts."""

    bos: tuple[int, ...]  # ids before every text
    eos: int
    video_positions = 0  # how many of the language model's positions the video takes

    def __init__(self, vision_encoder: VisionEncoder, language_model: nn.Module, tokenizer: Any, config: Config):
        super().__init__(vision_encoder)
        vision_encoder.fc_norm = None  # it normalises VideoMAE's mean token, which is not read
        check_grid(vision_encoder, config.token_grid)
        self.language_model, self.tokenizer = language_model, tokenizer
        self.grid, self.max_text_tokens = config.token_grid, config.max_text_tokens

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.language_model.get_input_embeddings()(input_ids)  # (..., L, D)

    def room_for_text(self, taken: int) -> int:
        """How many text tokens fit next to `taken` other positions. Raises UserError if none do."""
        positions = positions_of(self.language_model)
        if positions is None:
            return self.max_text_tokens
        if positions - taken < 1:
            raise UserError(
                f"{taken} positions for video and special tokens leave no room for text: the language model has "
                f"{positions}; lower --token_grid or --num_frames"
            )
        return min(self.max_text_tokens, positions - taken)

    def codec(self) -> TextCodec | None:
        if self.text_field is None:
            return None
        room = self.room_for_text(self.video_positions + len(self.bos) + 1)  # eos takes one
        return TextCodec(self.tokenizer, self.bos, self.eos, room)

    def truncation_note(self, samples: list[Any]) -> str | None:
        """Counts texts, not samples: a video may have several captions. See VideoModel."""
        # captions repeat: tokenise each different one once
        codec = self.codec()
        if codec is None:
            return None
        questions = Counter(s.question for s in samples if s.question)
        texts = Counter(
            (s.question or "", text)
            for s in samples
            for text in (s.captions if self.text_field == "caption" else [s.text or ""])
        )
        too_long = []
        if texts:
            tokens = codec.tokens([text for _, text in texts])
            rooms = map(codec.room_after, codec.prompts([question for question, _ in texts]))
            cut = sum(count for count, ids, room in zip(texts.values(), tokens, rooms, strict=True) if len(ids) > room)
            noun = "captions and answers, with their questions," if questions else f"{self.text_field}s"
            too_long += [f"{cut} of {texts.total()} {noun} are longer than {codec.max_tokens} tokens"] if cut else []
        if questions:
            counts = zip(questions.values(), codec.tokens([*questions]), strict=True)
            most = codec.max_question
            cut = sum(count for count, ids in counts if len(ids) > most)
            too_long += [f"{cut} of {questions.total()} questions are longer than {most} tokens"] if cut else []
        if not too_long:
            return None

        # either the option is the limit, or what the language model has left after the video
        advice = "train with a larger --max_text_tokens to keep them whole"
        if codec.max_tokens < self.max_text_tokens:
            advice = "the language model has no more positions"
            if self.video_positions:
                advice += "; train with a lower --token_grid or --num_frames"
        return f"note: {' and '.join(too_long)} and are cut; {advice}"


def positions_of(language_model: nn.Module) -> int | None:
    """How many tokens a language model can read; None if there is no limit."""
    positions = getattr(language_model.config, "max_position_embeddings", None)
    if not positions or positions < 0:
        return None
    for name, module in language_model.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return positions - module.padding_idx - 1  # RoBERTa counts positions from padding_idx + 1
    return positions


def cls_and_sep(tokenizer: Any) -> tuple[int, int]:
    """The ids of [CLS] and [SEP], which a classifier needs. Raises UserError if a tokenizer lacks one of them."""
    ids = tokenizer.cls_token_id, tokenizer.sep_token_id
    if None in ids:
        raise UserError("the language model's tokenizer has no [CLS] or [SEP] token")
    return ids


class ProjectorModel(VisionLanguageModel):
    """The language model reads the video too: a projector turns video tokens into embeddings of that model."""

    def __init__(self, vision_encoder: VisionEncoder, language_model: nn.Module, tokenizer: Any, config: Config):
        super().__init__(vision_encoder, language_model, tokenizer, config)
        width = language_model.get_input_embeddings().embedding_dim  # not the hidden size in ELECTRA and OPT
        if config.head == "attentive":
            self.projector = AttentiveProjector(vision_encoder, width, config.dropout)
        else:
            self.projector = Projector(vision_encoder, width, config.token_grid, config.dropout)
        self.video_positions = self.projector.num_tokens

    def video_tokens(self, video: torch.Tensor) -> torch.Tensor:
        """A video -> (B, N, D) in the width of the language model's embeddings."""
        return self.projector(self.vision_encoder.encode_video(video, self.grid))


class VisionLanguageClassifier(ProjectorModel):
    """[CLS] video [SEP] text [SEP] through a BERT-like encoder; the head reads [CLS]."""

    task = "vision-language classification"

    def __init__(self, vision_encoder, language_model, tokenizer, config: Config, num_classes: int):
        super().__init__(vision_encoder, language_model, tokenizer, config)
        self.text_field = "text" if config.use_text else None
        self.special_ids = _, sep = cls_and_sep(tokenizer)
        self.bos, self.eos = (), sep  # the video comes between [CLS] and the text
        self.video_positions += 2  # [CLS] and [SEP] around it
        self.room_for_text(self.video_positions + int(config.use_text))  # raises UserError at once if none is left
        types = getattr(language_model.config, "type_vocab_size", None) or 0
        self.has_types = types > 1 and takes(language_model, "token_type_ids")
        self.dropout = nn.Dropout(config.dropout)
        self.head = classifier_layer(language_model.config.hidden_size, num_classes)

    def forward(
        self, video: torch.Tensor, input_ids: torch.Tensor | None = None, attention_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """A video, and text ids that end in [SEP], right-padded (B, L) -> logits (B, K)."""
        # [CLS] video [SEP]: token type 0, nothing masked
        video = self.video_tokens(video)  # (B, N, D)
        batch, device = len(video), video.device
        special = self.embed(torch.tensor(self.special_ids, device=device)).to(video.dtype)  # (2, D)
        cls, sep = special.expand(batch, 2, -1).split(1, dim=1)  # (B, 1, D) each
        embeds, mask = [cls, video, sep], torch.ones(batch, video.shape[1] + 2, dtype=torch.long, device=device)
        types = torch.zeros_like(mask)

        # text [SEP]: token type 1, as the second sentence in BERT's pretraining; padding comes last
        if input_ids is not None:
            embeds.append(self.embed(input_ids))
            types = torch.cat([types, torch.ones_like(input_ids)], dim=1)
            mask = torch.cat([mask, attention_mask], dim=1)

        # not every encoder has token types: DistilBERT and ModernBERT have none
        inputs = {"inputs_embeds": torch.cat(embeds, dim=1), "attention_mask": mask}  # (B, N + 2 + L, D)
        if self.has_types:
            inputs["token_type_ids"] = types
        hidden = self.language_model(**inputs).last_hidden_state  # (B, N + 2 + L, D)
        return self.head(self.dropout(hidden[:, 0]))


class AttentiveLanguageClassifier(VisionLanguageModel):
    """[CLS] text [SEP] through a BERT-like encoder makes the query of an attentive head."""

    task = "vision-language classification"

    def __init__(self, vision_encoder, language_model, tokenizer, config: Config, num_classes: int):
        super().__init__(vision_encoder, language_model, tokenizer, config)
        self.text_field = "text" if config.use_text else None
        self.special_ids = cls, sep = cls_and_sep(tokenizer)
        self.bos, self.eos = (cls,), sep
        embeddings = language_model.get_input_embeddings().weight
        sizes = (language_model.config.hidden_size, vision_encoder.config.hidden_size)
        self.head = AttentiveHead(vision_encoder, num_classes, config.dropout, TextQuery(embeddings, *sizes))

    def forward(
        self, video: torch.Tensor, input_ids: torch.Tensor | None = None, attention_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """A video, and [CLS] text [SEP], right-padded (B, L) -> logits (B, K)."""
        # without texts all clips share the query of the empty text, [CLS] [SEP]
        tokens = self.vision_encoder.encode_video(video, self.grid)  # (B, N, D)
        if input_ids is None:
            input_ids = torch.tensor([self.special_ids], device=tokens.device)  # (1, 2)
            attention_mask = torch.ones_like(input_ids)
        outputs = self.language_model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return self.head(tokens, self.embed(input_ids), outputs, attention_mask)


class VideoCaptioner(ProjectorModel):
    """Video tokens, BOS, caption, EOS through a causal language model. If the clip has a question: video tokens, BOS,
    question, line feed, answer, EOS."""

    task = "captioning"
    text_field = "caption"

    def __init__(self, vision_encoder, language_model, tokenizer, config: Config):
        super().__init__(vision_encoder, language_model, tokenizer, config)
        if tokenizer.eos_token_id is None:
            raise UserError("the language model's tokenizer has no end-of-text token")
        # GPT-2 has one token for both ends; some tokenizers name it as EOS only
        self.eos = tokenizer.eos_token_id
        self.bos = (self.eos if tokenizer.bos_token_id is None else tokenizer.bos_token_id,)
        self.codec()  # raises UserError at once if no caption fits

    def targets(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """The ids after the prompt, including EOS. Padding is found by the mask, not by its id, which may equal EOS."""
        ids, mask = batch["input_ids"], batch["attention_mask"]
        in_prompt = torch.arange(ids.shape[1], device=ids.device) < batch["prompt_tokens"][:, None]  # (B, L)
        return ids.masked_fill(in_prompt | (mask == 0), -100)[:, 1:]  # (B, L - 1)

    def forward(self, video: torch.Tensor, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """A video, and prompt, caption, EOS, right-padded (B, L) -> logits for `targets` (B, L - 1, V)."""
        # the logits of the video tokens are not needed, and each has the size of the vocabulary
        video = self.video_tokens(video)  # (B, N, D)
        video_mask = torch.ones(video.shape[:2], dtype=attention_mask.dtype, device=video.device)
        logits = self.language_model(
            inputs_embeds=torch.cat([video, self.embed(input_ids)], dim=1),
            attention_mask=torch.cat([video_mask, attention_mask], dim=1),
            logits_to_keep=input_ids.shape[1],
            use_cache=False,
        ).logits  # (B, L, V)
        return logits[:, :-1]  # what follows EOS is not a target

    @torch.no_grad()
    def generate(self, video: torch.Tensor, config: Config, questions: list[str] | None = None) -> list[str]:
        """Writes one caption per clip, or an answer if the clip's question is not "": greedy, or the best of
        config.num_beams beams. Raises UserError if the video, the question and config.max_new_tokens exceed the
        language model's positions."""
        from transformers import GenerationConfig

        # the prompt is the video, BOS, and the question
        video = self.video_tokens(video)  # (B, N, D)
        prompts = self.codec().prompts(questions or [""] * len(video))
        positions, taken = positions_of(self.language_model), video.shape[1] + max(map(len, prompts))
        if positions and taken + config.max_new_tokens > positions:
            after = "the video and the question" if questions and any(questions) else "the video"
            raise UserError(f"--max_new_tokens {config.max_new_tokens}: at most {positions - taken} fit after {after}")
        texts = [self.embed(torch.tensor(ids, device=video.device)).to(video.dtype) for ids in prompts]  # (P, D) each

        # padding comes first, because generate() continues the last token of every row
        rows = [torch.cat(parts) for parts in zip(video, texts, strict=True)]  # (N + P, D) each
        embeds = pad_sequence(rows, batch_first=True, padding_side="left")  # (B, N + P, D)
        masks = [torch.ones(len(row), dtype=torch.long, device=video.device) for row in rows]
        mask = pad_sequence(masks, batch_first=True, padding_side="left")  # (B, N + P)

        # a GenerationConfig of our own: generate() would otherwise use the backbone's, which may ask for sampling
        options = GenerationConfig(
            max_new_tokens=config.max_new_tokens,
            num_beams=config.num_beams,
            do_sample=False,
            eos_token_id=self.eos,
            pad_token_id=self.eos,
        )
        ids = self.language_model.generate(inputs_embeds=embeds, attention_mask=mask, generation_config=options)
        return [text.strip() for text in self.tokenizer.batch_decode(ids, skip_special_tokens=True)]


# -- what is trained --------------------------------------------------------------------------------


def linear_layers(backbone: nn.Module) -> list[str]:
    """The names of all linear layers of a backbone, with or without adapters on them. They are read from the model, so
    that every family works."""
    from peft.tuners.lora import LoraLayer
    from transformers.pytorch_utils import Conv1D

    # torch's own attention reads the weights of its output layer and never calls it, so an adapter there would be dead
    kinds, uncalled = (nn.Linear, Conv1D, LoraLayer), nn.modules.linear.NonDynamicallyQuantizableLinear
    layers = ((n, m) for n, m in backbone.named_modules() if isinstance(m, kinds) and not isinstance(m, uncalled))
    names = (n for n, _ in layers if "pooler" not in n)
    return [n for n in names if "lora_" not in n and not n.endswith(".base_layer")]


def body_of(backbone: nn.Module) -> nn.Module:
    """The part of a backbone that AutoModel would load: without the output head."""
    return backbone.backbone if isinstance(backbone, VisionEncoder) else backbone.base_model


def lora_config(body: nn.Module, rank: int) -> Any:
    """LoRA (arXiv:2106.09685) on every linear layer: rank r, alpha 2 r. No dropout: on a CPU, it doubled the time."""
    from peft import LoraConfig
    from transformers.pytorch_utils import Conv1D

    transposed = any(isinstance(module, Conv1D) for module in body.modules())  # GPT-2 stores its weights transposed
    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=linear_layers(body), fan_in_fan_out=transposed)


def add_lora(backbone: nn.Module, rank: int) -> None:
    """Adds an adapter to every linear layer of a backbone, in place, and freezes the backbone's own weights."""
    from peft import inject_adapter_in_model

    backbone.requires_grad_(False)
    inject_adapter_in_model(lora_config(body_of(backbone), rank), body_of(backbone))
    for _, layer in adapters(backbone):
        fuse_adapter(layer)


def merge_adapters(model: nn.Module) -> None:
    """Adds every adapter to its layer's weights and removes it: same outputs, without the cost of the adapters."""
    for name, adapter in list(adapters(model)):
        adapter.merge()
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, adapter.get_base_layer())


def adapters(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, layer) of every layer with a LoRA adapter. Does not import peft, which is slow and rarely needed."""
    return ((name, module) for name, module in model.named_modules() if hasattr(module, "lora_A"))


def choose_trained(model: VideoModel, config: Config) -> None:
    """Freezes backbones and adds adapters as training_mode says. New layers are always trained."""
    modes = training_mode(config)
    for name, backbone in model.backbones().items():
        if modes[name] == "lora":
            add_lora(backbone, config.lora_r)
        elif modes[name] == "frozen":
            model.freeze(backbone)
        # gradients flow through a frozen language model, but not through a frozen vision backbone
        if config.gradient_checkpointing and (name == "language" or trained_tensors(backbone)):
            checkpoint_layers(backbone)


def checkpoint_layers(backbone: nn.Module) -> None:
    """Makes each layer of a backbone recompute its activations in the backward pass (arXiv:1604.06174).

    transformers can do this too, but only for layers in train(), and a frozen backbone is in eval().
    Raises UserError if transformers does not support it for the backbone's layers.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [module for module in backbone.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise UserError("--gradient_checkpointing True: one of these backbones cannot recompute its activations")
    for layer in layers:
        layer.forward = MethodType(recomputing_forward, layer)


def recomputing_forward(self: nn.Module, *args: Any, **inputs: Any) -> Any:
    """Replaces a layer's forward. Without gradients there is nothing to recompute."""
    if not torch.is_grad_enabled():
        return type(self).forward(self, *args, **inputs)
    return checkpoint(type(self).forward, self, *args, use_reentrant=False, **inputs)


def trained_tensors(model: nn.Module) -> dict[str, nn.Parameter]:
    """The tensors that are trained, by name: what a checkpoint holds and what the optimizer gets."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def parameter_table(model: nn.Module) -> list[tuple[str, int, int]]:
    """(name, trained parameters, all parameters) of every part of the model, and last of the whole model."""
    rows = []
    for name, part in [*model.named_children(), ("all", model)]:
        sizes = [(p.numel(), p.requires_grad) for p in part.parameters()]
        if sizes:
            rows.append((name, sum(n for n, trained in sizes if trained), sum(n for n, _ in sizes)))
    return rows


@gc_disabled()  # importing transformers' models makes many objects, and the collector would visit them all
def build_model(config: Config, num_classes: int, sources: dict[str, Source] | None = None) -> VideoModel:
    """Builds the model that `config` describes, on the CPU, and decides which of its tensors are trained.

    `sources` says where to load the backbones from ("vision" and, with a language model, "language"); by default their
    names in `config` decide. Raises UserError if a backbone cannot be loaded or an option does not fit it.
    """
    # names -> sources
    if sources is None:
        sources = {part: locate(getattr(config, f"{part}_model"), config.weights) for part in training_mode(config)}

    # sources -> pretrained backbones -> model with new layers
    vision_encoder = load_vision(sources["vision"], config)
    config = vision_encoder.fill_auto(config)
    attentive = config.head == "attentive"
    if config.use_vlm:
        language_classifier = AttentiveLanguageClassifier if attentive else VisionLanguageClassifier
        parts = (vision_encoder, *load_language(sources["language"], config.captioning), config)
        model = VideoCaptioner(*parts) if config.captioning else language_classifier(*parts, num_classes)
    elif attentive:
        model = AttentiveClassifier(vision_encoder, num_classes, config)
    else:
        model = VideoClassifier(vision_encoder, num_classes, config.dropout)
    model.sources, model.multi_label = sources, config.multi_label == "True"

    # full, frozen or LoRA
    choose_trained(model, config)
    return model
