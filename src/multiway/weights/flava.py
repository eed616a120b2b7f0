"""How published files name the parts of FLAVA, as rules of `WeightMap`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from multiway.weights.layouts import TRANSFORMERS_BLOCK, TRANSFORMERS_STEM, Rules, packed, under
from multiway.weights.rename import WeightMap

HEADS = ("image", "text", "pair_image", "pair_text")
"""Our names of the masked heads."""

_MULTIMODAL_BLOCK = (
    ("attention.qkv.norm.{part}", "attention_layernorm.{part}"),
    ("attention.qkv.linear.{part}", *(f"attention.{name}." + "{part}" for name in ("query", "key", "value"))),
    ("attention.out.{part}", "attention.output.{part}"),
    ("ffn.norm.{part}", "feedforward_layernorm.{part}"),
    ("ffn.fc1.{part}", "feedforward.model.0.{part}"),
    ("ffn.fc2.{part}", "feedforward.model.2.{part}"),
)
"""A block of torchmultimodal."""


def _encoders(root: str, image: str, text: str, joint: str, norm: str, block: Rules) -> Rules:
    """Names of the three encoders, which are called so below ``root``, and of what lies between them; ``norm``: of the
    words.
    """
    words = text + "embeddings."
    return (
        *under("encoder.vision.trunk.", image, TRANSFORMERS_STEM),
        *under("encoder.vision.trunk.blocks.{layer}.", image + "encoder.layer.{layer}.", block),
        *under("encoder.language.blocks.{layer}.", text + "encoder.layer.{layer}.", packed(block)),
        *under("encoder.joint.blocks.{layer}.", joint + "encoder.layer.{layer}.", packed(block)),
        ("encoder.joint.cls_token", joint + "cls_token"),
        ("encoder.vision.norm.{part}", image + "layernorm.{part}"),
        ("encoder.language.norm.experts.shared.{part}", text + "layernorm.{part}"),
        ("encoder.joint.norm.experts.shared.{part}", joint + "layernorm.{part}"),
        ("encoder.vision.pooler.dense.{part}", image + "pooler.dense.{part}"),
        ("encoder.language.pooler.dense.{part}", text + "pooler.dense.{part}"),
        ("encoder.joint.pooler.dense.{part}", joint + "pooler.dense.{part}"),
        ("encoder.vision.projection.{part}", root + "image_projection.{part}"),
        ("encoder.language.projection.{part}", root + "text_projection.{part}"),
        ("encoder.joint.from_{modality}.{part}", root + "{modality}_to_mm_projection.{part}"),
        ("encoder.language.words.words.weight", words + "word_embeddings.weight"),
        ("encoder.language.words.positions", words + "position_embeddings.weight"),
        ("encoder.language.words.types", words + "token_type_embeddings.weight"),
        ("encoder.language.words.norm.{part}", words + norm + ".{part}"),
    )


def _layout(
    root: str,
    tower: str,
    joint: str,
    norm: str,
    block: Rules,
    terms: Sequence[str],
    rules: Rules,
    dropped: Sequence[str],
) -> WeightMap:
    """A layout: ``terms`` are its names of the masked heads, ``rules`` those of all heads."""
    names = (root + tower.format(name) for name in ("image", "text", joint))
    return WeightMap(
        rules=(*_encoders(root, *names, norm=norm, block=block), *rules),
        words={"term": dict(zip(HEADS, terms, strict=True))},
        ones={"encoder.vision.trunk.positions": -1},
        squeezed=("logit_scale",),
        dropped=("image_codebook.{place*}", root + "{tower}.embeddings.position_ids", *dropped),
        prefix=root,
    )


LAYOUTS: Mapping[str, WeightMap] = {
    "transformers": _layout(
        "flava.", "{}_model.", "multimodal", "LayerNorm", TRANSFORMERS_BLOCK, ("mim", "mlm", "mmm_image", "mmm_text"),
        (
            ("heads.{term}.dense.{part}", "{term}_head.transform.dense.{part}"),
            ("heads.{term}.norm.{part}", "{term}_head.transform.LayerNorm.{part}"),
            ("heads.{term}.decoder.{part}", "{term}_head.decoder.{part}"),
            ("match_pooler.dense.{part}", "itm_head.pooler.dense.{part}"),
            ("match_head.{part}", "itm_head.seq_relationship.{part}"),
            ("logit_scale", "flava.logit_scale"),
        ),
        ("{head}_head.bias", "flava.{tower}.embeddings.token_type_ids"),
    ),
    "torchmultimodal": _layout(
        "model.", "{}_encoder.", "mm", "layer_norm", _MULTIMODAL_BLOCK,
        ("mim_loss", "mlm_loss", "mmm_loss.mim", "mmm_loss.mlm"),
        (
            ("heads.{term}.dense.{part}", "loss.{term}.cls.dense.{part}"),
            ("heads.{term}.norm.{part}", "loss.{term}.cls.layer_norm.{part}"),
            ("heads.{term}.decoder.{part}", "loss.{term}.cls.decoder.{part}"),
            ("match_pooler.dense.{part}", "loss.itm_loss.pooler.dense.{part}"),
            ("match_head.{part}", "loss.itm_loss.cls.seq_relationship.{part}"),
            ("logit_scale", "loss.contrastive_loss.logit_scale"),
        ),
        ("loss.{head*}.cls.bias",),
    ),
}  # fmt: skip
"""Names in the hub's files and in torchmultimodal's. Both hold the biases of decoders twice, and some the image
tokenizer, which `multiway.backbones.dvae` reads.
"""
