"""Stand-ins for the tiny components that diffusers' tests load from the hub, as a hub cache.

    python tests/mirror/tiny_hub.py FOLDER
    HF_HUB_CACHE=FOLDER HF_HUB_OFFLINE=1 python -m pytest -p sparse_mirror ...

Configurations are small, weights random, and vocabularies the bytes: tests that compare with fixed
numbers then fail with and without sparse attention, all others run.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())


def write_tokenizer(
    folder: Path, pieces: list[str], kind: str, *, unigram: bool = False, **settings: Any
) -> None:
    """A vocabulary of bytes, in the format of the slow and in that of the fast tokenizers.

    Args:
        folder: Where to.
        pieces: The vocabulary in order, special tokens included.
        kind: Class name of the tokenizer.
        unigram: Whether it is one of sentencepiece's, whose texts end with ``eos_token``.
        **settings: Special tokens and lengths.
    """
    vocab = {piece: index for index, piece in enumerate(pieces)}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    if unigram:
        unknown = vocab[settings["unk_token"]]
        tokenizer = Tokenizer(models.Unigram([(piece, 0.0) for piece in pieces], unknown))
        end = settings["eos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"$A {end}", special_tokens=[(end, vocab[end])]
        )
    else:
        tokenizer = Tokenizer(models.BPE(vocab, [], unk_token=settings["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([piece for piece in pieces if piece[1:] and piece[0] == "<"])
    tokenizer.save(str(folder / "tokenizer.json"))
    data = {"tokenizer_class": kind, **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(data))


def write_t5(folder: Path) -> None:
    config = transformers.T5Config(
        vocab_size=1103, d_model=32, d_ff=37, d_kv=8, num_layers=2, num_heads=4
    )
    transformers.T5ForConditionalGeneration(config).save_pretrained(folder)
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    pieces = [*special.values(), *BYTES]
    write_tokenizer(folder, pieces, "T5Tokenizer", unigram=True, **special, model_max_length=512)


def write_umt5(folder: Path) -> None:
    config = transformers.UMT5Config(
        vocab_size=1103, d_model=32, d_ff=37, d_kv=8, num_layers=2, num_heads=4
    )
    transformers.UMT5EncoderModel(config).save_pretrained(folder)


def write_clip(folder: Path) -> None:
    start, end = "<|startoftext|>", "<|endoftext|>"
    # Text encoders pool at the end token, for which the tests' configurations say 2.
    pieces = ["<pad>", start, end, *BYTES, *(f"{piece}</w>" for piece in BYTES)]
    special = {"bos_token": start, "eos_token": end, "unk_token": end, "pad_token": end}
    write_tokenizer(folder, pieces, "CLIPTokenizer", **special, model_max_length=77)


def write_bert(folder: Path) -> None:
    config = transformers.BertConfig(
        vocab_size=1124, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=37,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(folder)
    letters = [chr(code) for code in range(33, 127)]
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters]
    pieces += [f"##{letter}" for letter in letters]
    (folder / "vocab.txt").write_text("\n".join(pieces) + "\n")
    transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)


CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_qwen(folder: Path) -> None:
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"]
    special += ["<|image_pad|>", "<|video_pad|>"]
    names = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    # The ids of the special tokens are named in the tests' model configurations.
    pieces = [*BYTES, *(f"<|unused_{i}|>" for i in range(1000)), *special]
    write_tokenizer(
        folder, pieces, "Qwen2Tokenizer", **names, chat_template=CHAT, model_max_length=32768
    )
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2_vl"}))
    tokenizer = transformers.Qwen2Tokenizer.from_pretrained(folder)
    images = transformers.Qwen2VLImageProcessor(min_pixels=28 * 28, max_pixels=56 * 56)
    videos = transformers.Qwen2VLVideoProcessor()
    transformers.Qwen2VLProcessor(images, tokenizer, videos, chat_template=CHAT).save_pretrained(
        folder
    )


def write_gemma(folder: Path) -> None:
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>"}
    pieces = [*special.values(), "<unk>", *BYTES]
    settings = {**special, "unk_token": "<unk>", "chat_template": CHAT, "model_max_length": 512}
    write_tokenizer(folder, pieces, "GemmaTokenizer", **settings)
    (folder / "config.json").write_text(json.dumps({"model_type": "gemma"}))


def write_llama(folder: Path) -> None:
    config = transformers.LlamaConfig(
        vocab_size=32000, hidden_size=16, intermediate_size=37, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    pieces = [*special.values(), *BYTES]
    for place in (folder, folder / "tokenizer"):
        place.mkdir(exist_ok=True)
        write_tokenizer(place, pieces, "LlamaTokenizerFast", **special, pad_token="</s>")


COMPONENTS: dict[str, Callable[[Path], None]] = {
    "hf-internal-testing/tiny-random-t5": write_t5,
    "hf-internal-testing/tiny-random-umt5": write_umt5,
    "hf-internal-testing/tiny-random-clip": write_clip,
    "hf-internal-testing/tiny-random-BertModel": write_bert,
    "hf-internal-testing/tiny-random-Qwen2VLForConditionalGeneration": write_qwen,
    "hf-internal-testing/dummy-gemma": write_gemma,
    "hf-internal-testing/tiny-gemma3": write_gemma,
    "hf-internal-testing/tiny-random-LlamaForCausalLM": write_llama,
    "finetrainers/dummy-hunyaunvideo": write_llama,
}


def write_cache(root: Path) -> None:
    """Writes every stand-in under ``root`` as the hub's client keeps its downloads."""
    for name, write in COMPONENTS.items():
        repository = root / f"models--{name.replace('/', '--')}"
        folder = repository / "snapshots" / "stand-in"
        folder.mkdir(parents=True, exist_ok=True)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / "main").write_text("stand-in")
        torch.manual_seed(0)
        try:
            write(folder)
        except ImportError as missing:
            print(f"{name}: {missing}", file=sys.stderr)


if __name__ == "__main__":
    write_cache(Path(sys.argv[1]))
