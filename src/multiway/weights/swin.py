"""How published files name the parts of Swin and Swin V2, as rules of `WeightMap`; V2's have a ``branch`` on our side.

Rules of the classifier, and prefixes such as SimMIM's, are the systems' business.
"""

from __future__ import annotations

from collections.abc import Mapping

from multiway.weights.layouts import Rules, under

_BLOCK: Rules = (
    ("attention.norm.{part}", "norm1.{part}"),
    ("attention.qkv.{part}", "attn.qkv.{part}"),
    ("attention.out.{part}", "attn.proj.{part}"),
    ("attention.bias.table", "attn.relative_position_bias_table"),
    ("attention.branch.qkv.weight", "attn.qkv.weight"),
    ("attention.branch.qkv.{which}_bias", "attn.{which}_bias"),
    ("attention.branch.out.{part}", "attn.proj.{part}"),
    ("attention.branch.cosine.logit_scale", "attn.logit_scale"),
    ("attention.branch.bias.fc1.{part}", "attn.cpb_mlp.0.{part}"),
    ("attention.branch.bias.fc2.weight", "attn.cpb_mlp.2.weight"),
    ("ffn.norm.{part}", "norm2.{part}"),
    ("ffn.branch.{name}.{part}", "mlp.{name}.{part}"),
    ("ffn.{name}.{part}", "mlp.{name}.{part}"),
)

_TRANSFORMERS_BLOCK: Rules = (
    ("attention.norm.{part}", "layernorm_before.{part}"),
    (
        "attention.qkv.{part}",
        *(f"attention.self.{name}." + "{part}" for name in ("query", "key", "value")),
    ),
    ("attention.out.{part}", "attention.output.dense.{part}"),
    ("attention.bias.table", "attention.self.relative_position_bias_table"),
    ("attention.branch.qkv.weight", *(f"attention.self.{name}.weight" for name in ("query", "key", "value"))),
    ("attention.branch.qkv.q_bias", "attention.self.query.bias"),
    ("attention.branch.qkv.v_bias", "attention.self.value.bias"),
    ("attention.branch.out.{part}", "attention.output.dense.{part}"),
    ("attention.branch.cosine.logit_scale", "attention.self.logit_scale"),
    ("attention.branch.bias.fc1.{part}", "attention.self.continuous_position_bias_mlp.0.{part}"),
    ("attention.branch.bias.fc2.weight", "attention.self.continuous_position_bias_mlp.2.weight"),
    ("ffn.norm.{part}", "layernorm_after.{part}"),
    ("ffn.fc1.{part}", "intermediate.dense.{part}"),
    ("ffn.fc2.{part}", "output.dense.{part}"),
    ("ffn.branch.fc1.{part}", "intermediate.dense.{part}"),
    ("ffn.branch.fc2.{part}", "output.dense.{part}"),
)

_MERGE: Rules = (
    ("norm.{part}", "norm.{part}"),
    ("linear.weight", "reduction.weight"),
    ("branch.weight", "reduction.weight"),
)

OFFICIAL: Rules = (
    ("embed.{part}", "patch_embed.proj.{part}"),
    ("embed_norm.{part}", "patch_embed.norm.{part}"),
    ("hide_token", "mask_token"),
    *under("stages.{stage}.blocks.{block}.", "layers.{stage}.blocks.{block}.", _BLOCK),
    *under("stages.{before}.merge.project.", "layers.{before}.downsample.", _MERGE),
    ("norm.{part}", "norm.{part}"),
)
"""An encoder in the files of its authors, and with NEXT_STAGE in timm's."""

NEXT_STAGE: Mapping[str, Mapping[str, str]] = {"before": {str(stage): str(stage + 1) for stage in range(3)}}
"""Words of timm's files: a map is merged at the start of the next stage, not at the end of its own."""

TRANSFORMERS: Rules = (
    ("embed.{part}", "embeddings.patch_embeddings.projection.{part}"),
    ("embed_norm.{part}", "embeddings.norm.{part}"),
    ("hide_token", "embeddings.mask_token"),
    *under("stages.{stage}.blocks.{block}.", "encoder.layers.{stage}.blocks.{block}.", _TRANSFORMERS_BLOCK),
    *under("stages.{before}.merge.project.", "encoder.layers.{before}.downsample.", _MERGE),
    ("norm.{part}", "layernorm.{part}"),
)
"""An encoder in files of transformers' Swin and Swinv2 on the hub."""

BUFFERS = ("{block*}.relative_position_index", "{block*}.relative_coords_table", "{block*}.attn_mask")
"""What files carry that follows from sizes."""
