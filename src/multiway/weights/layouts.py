"""How published files name the parts that all plain Vision Transformers share, as rules of `WeightMap`."""

from __future__ import annotations

import re
from collections.abc import Sequence

Rules = tuple[tuple[str, ...], ...]


def under(ours: str, theirs: str, rules: Sequence[tuple[str, ...]]) -> Rules:
    """The rules with a prefix before every name."""
    return tuple((ours + own, *(theirs + name for name in names)) for own, *names in rules)


TIMM_BLOCK: Rules = (
    ("attention.qkv.norm.{part}", "norm1.{part}"),
    ("attention.qkv.linear.{part}", "attn.qkv.{part}"),
    ("attention.out.{part}", "attn.proj.{part}"),
    ("ffn.norm.{part}", "norm2.{part}"),
    ("ffn.{name}.{part}", "mlp.{name}.{part}"),
)
"""A block with biased keys, as timm and most official files have it."""

BEIT_BLOCK: Rules = (
    ("gamma_{which}", "gamma_{which}"),
    ("attention.qkv.linear.q_bias", "attn.q_bias"),
    ("attention.qkv.linear.v_bias", "attn.v_bias"),
    ("attention.bias.table", "attn.relative_position_bias_table"),
    *TIMM_BLOCK,
)
"""A block of the BEiT family: no bias of keys, factors on branches, perhaps its own relative bias."""

TRANSFORMERS_BLOCK: Rules = (
    ("gamma_{which}", "lambda_{which}"),
    ("attention.qkv.norm.{part}", "layernorm_before.{part}"),
    ("attention.qkv.linear.q_bias", "attention.attention.query.bias"),
    ("attention.qkv.linear.v_bias", "attention.attention.value.bias"),
    (
        "attention.qkv.linear.{part}",
        *(f"attention.attention.{name}." + "{part}" for name in ("query", "key", "value")),
    ),
    ("attention.bias.table", "attention.attention.relative_position_bias.relative_position_bias_table"),
    ("attention.out.{part}", "attention.output.dense.{part}"),
    ("ffn.norm.{part}", "layernorm_after.{part}"),
    ("ffn.fc1.{part}", "intermediate.dense.{part}"),
    ("ffn.fc2.{part}", "output.dense.{part}"),
)
"""A block in files of transformers' ViT, ViTMAE and BEiT on the hub."""

TIMM_STEM: Rules = (
    ("cls_token", "cls_token"),
    ("positions", "pos_embed"),
    ("embed.{part}", "patch_embed.proj.{part}"),
)
"""Patches, class token and positions; positions have a batch dimension of 1 in front there."""

TRANSFORMERS_STEM: Rules = (
    ("cls_token", "embeddings.cls_token"),
    ("positions", "embeddings.position_embeddings"),
    ("hide_token", "embeddings.mask_token"),
    ("embed.{part}", "embeddings.patch_embeddings.projection.{part}"),
)
"""The same in transformers' files."""

OPENAI_BLOCK: Rules = (
    ("attention.qkv.norm.{part}", "ln_1.{part}"),
    ("attention.qkv.linear.{part}", "attn.in_proj_{part}"),
    ("attention.out.{part}", "attn.out_proj.{part}"),
    ("ffn.norm.{part}", "ln_2.{part}"),
    ("ffn.fc1.{part}", "mlp.c_fc.{part}"),
    ("ffn.fc2.{part}", "mlp.c_proj.{part}"),
)
"""A block of OpenAI's CLIP and of open_clip, either tower."""

CLIP_BLOCK: Rules = (
    ("attention.qkv.norm.{part}", "layer_norm1.{part}"),
    ("attention.qkv.linear.{part}", *(f"self_attn.{name}_proj." + "{part}" for name in "qkv")),
    ("attention.out.{part}", "self_attn.out_proj.{part}"),
    ("ffn.norm.{part}", "layer_norm2.{part}"),
    ("ffn.{name}.{part}", "mlp.{name}.{part}"),
)
"""A block of transformers' CLIP and SigLIP, either tower."""


PACKED = re.compile(r"^(attention\.qkv|attention\.out|ffn)(?=\.)")


def packed(rules: Rules) -> Rules:
    """The rules of a block for one over packed rows, whose parts are `Multiway` with one expert."""
    return tuple((PACKED.sub(r"\1.experts.shared", ours), *theirs) for ours, *theirs in rules)
