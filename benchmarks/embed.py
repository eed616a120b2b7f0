"""Texts into vectors: our packed path beside Hugging Face's CLIP text model, random weights, the same width and depth.

    python benchmarks/embed.py

Ours is what `multiway.encode` and `multiway embed` do with texts, tokenizing included; CLIP is handed token ids of the
same lengths, so that its tokenizer costs it nothing. ``padded``: every text to 77 tokens, as CLIP's processor does;
``sorted``: texts sorted by length and padded to the longest of each batch, as careful users do. Both must give CLIP's
same vectors to 1e-4. A figure is CLIP / ours, so 2 is twice as fast. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import statistics
from functools import partial

import torch
from reference import check_equal, draw_lengths
from timing import autocast, options, parsed, ratio, report, take_turns
from torch import Tensor, nn

from multiway.data.text import TextTokenizer
from multiway.preprocessor import Preprocessor
from multiway.pretrained import Pretrained, encode
from multiway.systems.beit3 import BEiT3, Config

SIZES = {"tiny": (32, 2, 2), "small": (384, 12, 6), "base": (512, 12, 8)}
"""Width, depth and heads; base is the text tower of CLIP's base models."""

BATCH = 64
LONGEST = 77
CLIP_BOS, CLIP_EOS, CLIP_VOCAB = 49406, 49407, 49408
WORDS = ["a", "man", "woman", "dog", "child", "two", "people", "on", "in", "the", "red", "grass", "water", "playing"]


def draw_captions(count: int) -> list[str]:
    """Captions of 9 to 20 tokens with the two specials: 14 on average, as COCO's."""
    generator = torch.Generator().manual_seed(1)
    lengths = draw_lengths("caption", count, generator).tolist()
    return [
        " ".join(WORDS[i] for i in torch.randint(len(WORDS), (n - 2,), generator=generator).tolist()) for n in lengths
    ]


def build_ours(size: str, tokenizer: TextTokenizer, device: str) -> BEiT3:
    """A BEiT-3 with retrieval heads."""
    dim, depth, heads = SIZES[size]
    with torch.device(device):
        model = BEiT3(Config(dim=dim, depth=depth, heads=heads, hidden=4 * dim, masked=False, contrast=True))
    model.init_weights()
    return model.eval()


def build_clip(size: str, device: str) -> nn.Module:
    """CLIP's text model with its projection."""
    try:
        from transformers import CLIPTextConfig, CLIPTextModelWithProjection
    except ImportError as error:
        raise SystemExit("this benchmark needs its peer: pip install transformers") from error
    dim, depth, heads = SIZES[size]
    config = CLIPTextConfig(
        vocab_size=CLIP_VOCAB,
        hidden_size=dim,
        intermediate_size=4 * dim,
        projection_dim=dim,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        max_position_embeddings=LONGEST,
        bos_token_id=CLIP_BOS,
        eos_token_id=CLIP_EOS,
    )
    torch.manual_seed(0)
    return CLIPTextModelWithProjection(config).to(device).eval()


@torch.inference_mode()
def embed_padded(model: nn.Module, texts: list[list[int]], longest: int | None, dtype: str, device: str) -> Tensor:
    """Unit vectors (N, D) on the CPU; ``longest``: tokens to which every text is padded, None = by the batch."""
    vectors = []
    for start in range(0, len(texts), BATCH):
        some = texts[start : start + BATCH]
        length = longest or max(map(len, some))
        ids = torch.tensor([ids + [CLIP_EOS] * (length - len(ids)) for ids in some], device=device)
        keep = torch.tensor([[1] * len(ids) + [0] * (length - len(ids)) for ids in some], device=device)
        with autocast(dtype, device):
            found = model(input_ids=ids, attention_mask=keep).text_embeds
        vectors.append(nn.functional.normalize(found.float(), dim=-1).cpu())
    return torch.cat(vectors)


def embed_sorted(model: nn.Module, texts: list[list[int]], dtype: str, device: str) -> Tensor:
    """`embed_padded` by the batch of texts sorted by length, in the given order."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    vectors = embed_padded(model, [texts[i] for i in order], None, dtype, device)
    return torch.empty_like(vectors).index_copy_(0, torch.tensor(order), vectors)


def compare(args: argparse.Namespace) -> None:
    """Both ways of CLIP beside ours, in every dtype."""
    captions = draw_captions(args.texts)
    tokenizer = TextTokenizer.train(captions, vocab=256, model="bpe")
    model = build_ours(args.size, tokenizer, args.device)
    clip = build_clip(args.size, args.device)
    texts = [[CLIP_BOS, *ids.tolist(), CLIP_EOS] for ids in tokenizer.batch(captions)]
    vectors = embed_padded(clip, texts, LONGEST, "fp32", args.device)
    check_equal("CLIP sorted and padded", vectors, embed_sorted(clip, texts, "fp32", args.device))
    figures, facts = {}, {}
    for dtype in args.dtypes:
        ours = Pretrained(model, tokenizer, Preprocessor.of(model.config, tokenizer), precision=dtype)
        sides = {
            "padded": partial(embed_padded, clip, texts, LONGEST, dtype, args.device),
            "sorted": partial(embed_sorted, clip, texts, dtype, args.device),
            "ours": partial(encode, ours, text=captions, batch=BATCH),
        }
        took = take_turns(sides, args, peers=["padded", "sorted"])
        facts[dtype] = {side: len(texts) / statistics.median(own) for side, own in took.items()}
        for side in ("padded", "sorted"):
            figures[f"{side} {dtype}"] = ratio(took[side], took["ours"])
    tokens = statistics.mean(map(len, texts))
    version = importlib.metadata.version("transformers")
    report(args, figures, peer=f"transformers {version}", tokens=tokens, texts_per_second=facts)


def main() -> None:
    """Read the options and compare."""
    parser = options(__doc__)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--texts", type=int, default=256)
    compare(parsed(parser))


if __name__ == "__main__":
    main()
