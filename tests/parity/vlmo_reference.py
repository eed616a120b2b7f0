"""VLMo in plain torch, from the specification alone (masked.md 5.1 to 5.3): texts first, padded, one kind at a time.

``state``: tensors under the names of the released files. Nothing here knows how multiway lays anything out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

TEXT_ROWS = 196


@dataclass
class Reference:
    """A model of ``depth`` layers, the experts of pairs from ``vl_start`` on; ``side``: patches on a side."""

    state: dict[str, Tensor]
    depth: int
    heads: int
    vl_start: int
    side: int
    patch: int

    def linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.state[f"{name}.weight"], self.state.get(f"{name}.bias"))

    def norm(self, x: Tensor, name: str, eps: float) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.state[f"{name}.weight"], self.state[f"{name}.bias"], eps)

    def text(self, ids: Tensor) -> Tensor:
        """int64 (B, T) -> (B, T, D)."""
        x = self.state["text_embeddings.word_embeddings.weight"][ids]
        x = x + self.state["text_embeddings.token_type_embeddings.weight"][0]
        if "transformer.pos_embed" in self.state:
            x = x + self.state["text_embeddings.position_embeddings.weight"][: ids.shape[1]]
        return self.norm(x, "text_embeddings.LayerNorm", 1e-12) + self.state["token_type_embeddings.weight"][0]

    def image(self, pixels: Tensor, kind: int = 1) -> Tensor:
        """float (B, 3, H, W), token type of the picture -> (B, 1 + P, D)."""
        s = self.state
        x = F.conv2d(
            pixels,
            s["transformer.patch_embed.proj.weight"],
            s["transformer.patch_embed.proj.bias"],
            stride=self.patch,
        )
        x = x.flatten(2).transpose(1, 2)
        x = torch.cat([s["transformer.cls_token"].expand(len(x), -1, -1), x], dim=1)
        if "transformer.pos_embed" in s:
            x = x + s["transformer.pos_embed"]
        return x + s["token_type_embeddings.weight"][kind]

    def bias_rows(self, texts: int, pictures: bool) -> Tensor:
        """Row of the table for each query and key of a text of ``texts`` tokens, then a picture: int64 (N, N)."""
        side, places = self.side, self.side**2 + 1
        n = (2 * side - 1) ** 2 + 3
        last = n + 2 * TEXT_ROWS + 2
        total = texts + (places if pictures else 0)
        rows = torch.empty(total, total, dtype=torch.int64)
        for q in range(total):
            for k in range(total):
                a, b = q - texts, k - texts
                if q < texts and k < texts:
                    inner = last - 1 if q == k else last - 3 if q == 0 else last - 2
                    rows[q, k] = inner if q == 0 or k == 0 else (k - q) + 194 + n + 2
                elif q < texts:
                    rows[q, k] = n
                elif k < texts:
                    rows[q, k] = n + 1
                elif a == 0 or b == 0:
                    rows[q, k] = n - 1 if a == b else n - 3 if a == 0 else n - 2
                else:
                    (ra, ca), (rb, cb) = divmod(a - 1, side), divmod(b - 1, side)
                    rows[q, k] = (ra - rb + side - 1) * (2 * side - 1) + (ca - cb + side - 1)
        return rows

    def attention(self, x: Tensor, layer: int, keep: Tensor, rows: Tensor) -> Tensor:
        """x: (B, N, D); keep: bool (B, N), keys that are real; rows: int64 (N, N) of the table."""
        s, name = self.state, f"transformer.blocks.{layer}.attn"
        q_bias, v_bias = s[f"{name}.q_bias"], s[f"{name}.v_bias"]
        qkv = F.linear(x, s[f"{name}.qkv.weight"], torch.cat([q_bias, torch.zeros_like(q_bias), v_bias]))
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in qkv.chunk(3, dim=-1))
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(2, 3)
        if "relative_position_bias_table" in s:
            own = s["relative_position_bias_table"].chunk(self.depth, dim=1)[layer]
            scores = scores + own[rows].permute(2, 0, 1)
        scores = scores.masked_fill(~keep[:, None, None], float("-inf"))
        return self.linear((scores.softmax(-1) @ v).transpose(1, 2).flatten(2), f"{name}.proj")

    def expert(self, x: Tensor, layer: int, which: str) -> Tensor:
        name = f"transformer.blocks.{layer}"
        h = self.norm(x, f"{name}.norm2_{which}", 1e-6)
        return self.linear(F.gelu(self.linear(h, f"{name}.mlp_{which}.fc1")), f"{name}.mlp_{which}.fc2")

    def layer(self, x: Tensor, layer: int, keep: Tensor, rows: Tensor, kind: str, texts: int) -> Tensor:
        name = f"transformer.blocks.{layer}"
        one = torch.ones(x.shape[-1])
        g1, g2 = (self.state.get(f"{name}.gamma_{i}", one) for i in (1, 2))
        x = x + g1 * self.attention(self.norm(x, f"{name}.norm1", 1e-6), layer, keep, rows)
        if kind != "vl":
            return x + g2 * self.expert(x, layer, {"text": "text", "image": "imag"}[kind])
        if layer >= self.vl_start:
            return x + g2 * self.expert(x, layer, "vl")
        parts = self.expert(x[:, :texts], layer, "text"), self.expert(x[:, texts:], layer, "imag")
        return x + g2 * torch.cat(parts, dim=1)

    def run(self, x: Tensor, keep: Tensor, texts: int, kind: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Layers from ``start`` to before ``stop`` over ``texts`` tokens of text, then those of a picture, if any."""
        rows = self.bias_rows(texts, pictures=x.shape[1] > texts)
        for layer in range(self.depth)[start:stop]:
            x = self.layer(x, layer, keep, rows, kind, texts)
        return x

    def finish(self, x: Tensor) -> Tensor:
        return self.norm(x, "transformer.norm", 1e-6)

    def both(self, pixels: Tensor, ids: Tensor, pad: Tensor, kind: int = 1) -> Tensor:
        """Final tokens (B, T + 1 + P, D) of pairs; pad: bool (B, T), True = padding."""
        image = self.image(pixels, kind)
        keep = torch.cat([~pad, torch.ones(image.shape[:2], dtype=torch.bool)], dim=1)
        return self.finish(self.run(torch.cat([self.text(ids), image], dim=1), keep, ids.shape[1], "vl"))

    def vectors(self, x: Tensor, keep: Tensor, texts: int, kind: str) -> tuple[Tensor, Tensor, Tensor]:
        """Final tokens of one modality, its vector (a), and (b) by the experts of pairs."""
        half = self.run(x, keep, texts, kind, stop=self.vl_start)
        final = self.finish(self.run(half, keep, texts, kind, start=self.vl_start))
        joint = self.finish(self.run(half, keep, texts, "vl", start=self.vl_start))
        a = self.linear(final[:, 0], f"itc_{kind}_proj.fc")
        b = self.linear(joint[:, 0], f"itc_vl_{kind}_proj.fc")
        return final, F.normalize(a, dim=-1), F.normalize(b, dim=-1)

    def alone(self, pixels: Tensor, ids: Tensor, pad: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """`vectors` of pictures and of texts."""
        image = self.image(pixels)
        keep = torch.ones(image.shape[:2], dtype=torch.bool)
        return self.vectors(image, keep, 0, "image"), self.vectors(self.text(ids), ~pad, ids.shape[1], "text")

    def pooled(self, tokens: Tensor) -> Tensor:
        return self.linear(tokens[:, 0], "pooler.dense").tanh()

    def words(self, tokens: Tensor) -> Tensor:
        """Scores of all words (..., vocab)."""
        h = F.gelu(self.linear(tokens, "mlm_score.transform.dense"))
        h = self.norm(h, "mlm_score.transform.LayerNorm", 1e-12)
        return h @ self.state["mlm_score.decoder.weight"].T + self.state["mlm_score.bias"]

    def contrast(self, image: Tensor, text: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The loss of one kind of vectors, and both ways' scores."""
        to_text, to_image = scale.exp() * image @ text.T, scale.exp() * text @ image.T
        place = torch.arange(len(image))
        return (F.cross_entropy(to_text, place) + F.cross_entropy(to_image, place)) / 2, to_text, to_image

    def answers(self, pooled: Tensor, name: str) -> Tensor:
        h = self.linear(pooled, f"{name}.0")
        return self.linear(F.gelu(self.norm(h, f"{name}.1", 1e-5)), f"{name}.3")


def hardest(scores: Tensor, draw: Tensor) -> list[int]:
    """Of each row another column, by the inverse of the distribution softmax(row), its diagonal zeroed."""
    chosen = []
    for i, row in enumerate(scores.detach().double().softmax(1)):
        weights = row.clone()
        weights[i] = 0
        target, total = float(draw[i]) * float(weights.sum()), 0.0
        for j, weight in enumerate(weights.tolist()):
            total += weight
            if weight and total > target:
                chosen.append(j)
                break
    return chosen


def losses(
    model: Reference, pixels: Tensor, ids: Tensor, shown: Tensor, pad: Tensor, draws: Tensor
) -> dict[str, Tensor]:
    """The three losses of pre-training: ids, and as ``shown`` with words hidden, int64 (B, T)."""
    image, text = model.alone(pixels, ids, pad)
    alone, to_text, to_image = model.contrast(image[1], text[1], model.state["logit_scale"])
    joint, _, _ = model.contrast(image[2], text[2], model.state["logit_vl_scale"])
    hidden = (shown != ids) & ~pad
    words = F.cross_entropy(model.words(model.both(pixels, shown, pad)[:, : ids.shape[1]])[hidden], ids[hidden])
    texts, pictures = hardest(to_text, draws[:, 0]), hardest(to_image, draws[:, 1])
    groups = [(pixels, ids, pad), (pixels[pictures], ids, pad), (pixels, ids[texts], pad[texts])]
    scores = torch.cat([model.linear(model.pooled(model.both(*own)), "itm_score.fc") for own in groups])
    right = torch.cat([torch.ones(len(ids)), torch.zeros(2 * len(ids))]).long()
    return {"words": words, "contrast": (alone + joint) / 2, "match": F.cross_entropy(scores, right)}
