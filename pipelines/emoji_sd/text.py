"""A small CLIP tokenizer (byte-level BPE, so any prompt is valid) and a CLIP text encoder."""

from __future__ import annotations

import json

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
MAX_LENGTH = 32  # tokens per prompt, begin and end included


def build_tokenizer(names: list[str], vocab_size: int) -> CLIPTokenizer:
    """BPE merges learned from `names`; the vocabulary starts with all 256 bytes, inside and at the end of a word."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    base = alphabet + [c + "</w>" for c in alphabet]
    merges = learn_merges(names, alphabet, vocab_size - len(base) - 2)
    vocab = {token: i for i, token in enumerate([*base, *dict.fromkeys(a + b for a, b in merges), BOS, EOS])}
    return CLIPTokenizer(
        vocab=vocab, merges=merges,  # type: ignore[arg-type]
        bos_token=BOS, eos_token=EOS, pad_token=EOS, unk_token=EOS,
        model_max_length=MAX_LENGTH,
    )  # fmt: skip


def learn_merges(names: list[str], alphabet: list[str], count: int) -> list[tuple[str, str]]:
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>", continuing_subword_prefix=""))
    bpe.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    bpe.pre_tokenizer = CLIPTokenizer().backend_tokenizer.pre_tokenizer
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2 * len(alphabet) + count, initial_alphabet=alphabet, end_of_word_suffix="</w>",
        show_progress=False,
    )  # fmt: skip
    bpe.train_from_iterator(names, trainer)
    found = json.loads(bpe.to_str())["model"]["merges"]
    return [(left, right) for left, right in found][:count]


def build_text_encoder(tokenizer: CLIPTokenizer, width: int, layers: int) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        max_position_embeddings=MAX_LENGTH,
        bos_token_id=tokenizer.bos_token_id,  # type: ignore[arg-type]
        eos_token_id=tokenizer.eos_token_id,  # type: ignore[arg-type]
        pad_token_id=tokenizer.pad_token_id,  # type: ignore[arg-type]
    )
    return CLIPTextModel(config)


def tokenize(tokenizer: CLIPTokenizer, prompts: list[str]) -> Tensor:
    """Prompts → ids [B, MAX_LENGTH], as StableDiffusionPipeline makes them."""
    rows = tokenizer(prompts, padding="max_length", max_length=MAX_LENGTH, truncation=True).input_ids
    return torch.tensor(rows)
