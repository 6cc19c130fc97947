"""The text model of a run and its tokeniser: loaded, or new and made for the captions."""

import os
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, NamedTuple

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerFast
from transformers.modeling_utils import PreTrainedModel

from hf_vlm.data.source import Source
from hf_vlm.features.loading import quiet_transformers
from hf_vlm.models.modeling_image_text import SMALL_TEXT_MODEL, as_text_config
from hf_vlm.training.arguments import VisionTrainingArguments

__all__ = ["RunTexts", "prepare_texts", "train_tokenizer"]

PAD, START, END = "[PAD]", "[CLS]", "[SEP]"
VOCABULARY_SIZE = 8192  # at most, of a new tokeniser
NUM_READ = 4096  # images whose captions it is made for


class RunTexts(NamedTuple):
    """What a run needs for its texts.

    Attributes:
        tokenizer: Tokeniser of transformers, whose `model_max_length` is the length that texts are padded and cut to.
        config: Fields of the configuration of the text model.
        model: Weights to start from; None for a new one.
    """

    tokenizer: Any
    config: dict[str, Any]
    model: PreTrainedModel | None = None


def prepare_texts(args: VisionTrainingArguments, source: Source) -> RunTexts:
    """The text model that `args.text_encoder` names with its tokeniser, or a new one for the texts of a source.

    Raises:
        ValueError: There is no such model, it reads fewer tokens than `text_length`, or fields of
            `model_config.text_config` are not of its configuration.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the data workers are the parallelism
    texts = _load(args.text_encoder) if args.text_encoder else _make(args, source)
    most = texts.config.get("max_position_embeddings", args.text_length)
    if args.text_length > most:
        raise ValueError(f"text_length is {args.text_length}, but the text model reads {most} tokens at most.")
    texts.tokenizer.model_max_length = args.text_length
    return texts


def _load(name: str) -> RunTexts:
    try:
        with quiet_transformers():
            model = AutoModel.from_pretrained(name, trust_remote_code=False, use_safetensors=True)
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"text_encoder: {name} holds no text model of transformers: {reason}") from error
    return RunTexts(tokenizer, model.config.to_dict(), model)


def _make(args: VisionTrainingArguments, source: Source) -> RunTexts:
    fields = dict(args.model_config.get("text_config") or {})
    fields = fields if "model_type" in fields else {**SMALL_TEXT_MODEL, **fields}
    default = as_text_config({"model_type": fields["model_type"]})
    if unknown := [field for field in fields if not hasattr(default, field)]:
        raise ValueError(f"model_config.text_config: {type(default).__name__} has no field {unknown[0]!r}.")
    tokenizer = train_tokenizer(_texts(source))
    ids = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.cls_token_id,
        "eos_token_id": tokenizer.sep_token_id,
    }
    return RunTexts(tokenizer, {"max_position_embeddings": default.max_position_embeddings} | fields | ids)


def _texts(source: Source) -> Iterator[str]:
    for example in islice(source.dataset.select_columns(["text"]), NUM_READ):
        yield from example["text"]


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokeniser of lower-case texts, made of some texts: it knows the parts of any other."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        min_frequency=2,
        special_tokens=[PAD, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{START} $A {END}", special_tokens=[(token, tokenizer.token_to_id(token)) for token in (START, END)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        cls_token=START,
        sep_token=END,
        model_input_names=["input_ids", "attention_mask"],
    )
