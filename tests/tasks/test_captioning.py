"""Captioning: the loss written out, decoding with a cache against decoding without, beam search against all texts."""

from __future__ import annotations

import dataclasses
import itertools
import math
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

from multiway.backbones.multiway import MultiwayTransformer
from multiway.data.captions import CaptionCollate
from multiway.data.collate import Sample
from multiway.errors import ConfigError, NumericsError
from multiway.plan import make_plan
from multiway.systems import vit
from multiway.systems.beit3 import BEiT3, Config
from multiway.tasks import captioning
from multiway.tasks.captioning import BINS_PER_NAT, Captioning, beam_search, generate
from multiway.types import Across
from tests.contracts.toys import DECOUPLED, GRID, IMAGE_PX, SHARED, WORDS, randomize, sample

SHAPES = {"decoupled": dataclasses.replace(DECOUPLED, codes=0), "shared": dataclasses.replace(SHARED, codes=0)}
either = pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)
COLLATE = CaptionCollate(words=WORDS, grid=GRID)
BOS, EOS, MASK = WORDS.bos, WORDS.eos, WORDS.mask_id


def model_of(config: Config) -> BEiT3:
    model = BEiT3(config)
    randomize(model)
    return model.eval()


def pictures(count: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, 3, IMAGE_PX, IMAGE_PX), dtype=torch.uint8, generator=generator)


def uncached(model: BEiT3, image: Tensor, texts: Tensor) -> Tensor:
    """Scores at a ``<mask>`` behind each text: int64 (B, K, N) -> (B, K, vocab), everything read in one pass."""
    count, beams, length = texts.shape
    ids = torch.cat([texts, torch.full((count, beams, 1), MASK)], dim=2).flatten(0, 1)
    tokens = GRID[0] * GRID[1] + 1
    lengths = {"image": [tokens] * len(ids), "text": [length + 1] * len(ids)}
    plan = make_plan({"pair": lengths}, causal_text=True)
    found = model(plan, image=image.repeat_interleave(beams, 0), text=ids.flatten())
    last = torch.arange(1, len(ids) + 1) * (length + 1) - 1
    return model.text_logits(found, last).view(count, beams, -1)


# ----------------------------------------------------------------------------------------------------------- the cache


@either
@torch.inference_mode()
def test_step_by_step_equals_one_pass(config: Config) -> None:
    """Acceptance test 4 of masked.md 7.5: the cache is the whole past, the dropped ``<mask>`` leaves no trace."""
    model, image, beams = model_of(config), pictures(3), 2
    rng = np.random.default_rng(0)
    cache = model.begin(image, 8 * beams)
    texts, parents = torch.full((3, beams, 1), BOS), None
    for _ in range(7):
        got = model.advance(cache, texts[..., -1], parents, MASK)
        assert (got - uncached(model, image, texts)).abs().max() < 1e-5
        parents = torch.from_numpy(rng.integers(beams, size=(3, beams)))
        words = torch.from_numpy(rng.integers(WORDS.first, WORDS.stop, (3, beams, 1)))
        texts = torch.cat([texts.take_along_dim(parents[..., None], 1), words], dim=2)
    assert cache.filled == GRID[0] * GRID[1] + 1 + 7 * beams


@either
@pytest.mark.parametrize("beams", [1, 3])
@torch.inference_mode()
def test_captions_are_those_without_a_cache(config: Config, beams: int) -> None:
    model, image = model_of(config), pictures(4)
    got = generate(model, image, bos=BOS, eos=EOS, mask_id=MASK, longest=12, beams=beams)
    texts = torch.full((4, beams, 0), BOS)

    def advance(words: Tensor, parents: Tensor | None) -> Tensor:
        nonlocal texts
        if parents is not None:
            texts = texts.take_along_dim(parents[..., None], 1)
        texts = torch.cat([texts, words[..., None]], dim=2)
        return uncached(model, image, texts)

    want, _ = beam_search(advance, torch.full((4,), BOS), EOS, longest=12, beams=beams)
    assert got == want
    assert len({tuple(ids) for ids in got}) > 1


@either
@torch.inference_mode()
def test_a_caption_does_not_depend_on_the_other_pictures(config: Config) -> None:
    model, image = model_of(config), pictures(4)
    write = partial(generate, model, bos=BOS, eos=EOS, mask_id=MASK, longest=10)
    assert write(image) == [text for own in image.split(1) for text in write(own)]


@either
def test_a_picture_is_read_once(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """All later steps take two tokens for each beam."""
    rows, extend = [], MultiwayTransformer.extend

    def counted(self: MultiwayTransformer, x: Tensor, *rest: object) -> Tensor:
        rows.append(len(x))
        return extend(self, x, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(MultiwayTransformer, "extend", counted)
    generate(model_of(config), pictures(2), bos=BOS, eos=EOS, mask_id=MASK, longest=10, beams=3)
    assert rows[0] == 2 * 17 and set(rows[1:]) == {2 * 3 * 2}


@either
@torch.inference_mode()
def test_bf16_writes_captions_like_those_of_fp32(config: Config) -> None:
    model, image = model_of(config), pictures(2)
    words = torch.full((2, 3), BOS)

    def scores() -> Tensor:
        cache = model.begin(image, 12)
        model.advance(cache, words, None, MASK)
        return model.advance(cache, words + WORDS.first, torch.tensor([[2, 1, 0]] * 2), MASK).float()

    exact = scores()
    with torch.autocast("cpu", torch.bfloat16):
        near = scores()
        assert len(generate(model, image, bos=BOS, eos=EOS, mask_id=MASK, longest=10)) == 2
    assert 0 < (near - exact).abs().max() < 0.1 * exact.abs().max()


# --------------------------------------------------------------------------------------------------------- beam search

END, FIRST = 0, 9
"""Of a vocabulary of END and a few words, behind which stands FIRST."""


def table(seed: int, pictures: int, vocab: int) -> dict[tuple[int, ...], np.ndarray]:
    """Random log-probabilities of the next word after every text of a picture, made when first asked for."""

    class Table(dict):
        def __missing__(self, key: tuple[int, ...]) -> np.ndarray:
            scores = 2 * np.random.default_rng([seed, *key]).normal(size=vocab)
            self[key] = scores - np.logaddexp.reduce(scores)
            return self[key]

    return Table()


def reader(known: dict[tuple[int, ...], np.ndarray], count: int, beams: int) -> captioning.Advance:
    """Beam search's view of a table."""
    texts: list[list[tuple[int, ...]]] = [[()] * beams for _ in range(count)]

    def advance(words: Tensor, parents: Tensor | None) -> Tensor:
        for i in range(count):
            before = texts[i] if parents is None else [texts[i][p] for p in parents[i]]
            texts[i] = [(*text, int(word)) for text, word in zip(before, words[i], strict=True)]
        return torch.from_numpy(np.array([[known[i, *text] for text in own] for i, own in enumerate(texts)]))

    return advance


def every_text(known: dict, picture: int, vocab: int, longest: int, penalty: float) -> tuple[list[int], float]:
    """The best of all texts: those that end with END, and those that are ended by their length."""
    found = []
    for count in range(longest - 2):
        for words in itertools.product(range(1, vocab), repeat=count):
            text = (FIRST, *words)
            total = sum(known[picture, *text[: i + 1]][word] for i, word in enumerate(words))
            last = known[picture, *text]
            ending = last.max() if count == longest - 3 else last[END]
            found.append(((total + ending) / (count + 1) ** penalty, list(words)))
    score, words = max(found)
    return words, score


@pytest.mark.parametrize("penalty", [0.0, 0.6, 1.0])
def test_a_wide_beam_finds_the_best_of_all_texts(penalty: float) -> None:
    vocab, longest, count, beams = 4, 6, 12, 81
    known = table(1, count, vocab)
    got, scores = beam_search(
        reader(known, count, beams), torch.full((count,), FIRST), END, longest=longest, beams=beams,
        length_penalty=penalty,
    )  # fmt: skip
    want = [every_text(known, i, vocab, longest, penalty) for i in range(count)]
    assert got == [words for words, _ in want]
    assert scores.tolist() == pytest.approx([score for _, score in want], rel=1e-5)
    assert len({len(words) for words in got}) > 1


def plain_beam_search(known: dict, picture: int, vocab: int, longest: int, beams: int, penalty: float) -> list[int]:
    """The rules of masked.md 6.3 for one picture, candidate by candidate."""
    running: list[tuple[float, tuple[int, ...]]] = [(0.0, (FIRST,))]
    best, result = -math.inf, ()
    tokens = 2  # <s> and <mask>
    while True:
        candidates = [(s + known[picture, *t][w], t, w) for s, t in running for w in range(vocab)]
        candidates = sorted(candidates, key=lambda c: -c[0])[: 3 * beams]
        if best >= candidates[0][0] / (longest - 1) ** penalty:
            return list(result)
        running = []
        for total, text, word in candidates:
            if word == END or tokens + 1 == longest:
                if total / len(text) ** penalty > best:
                    best, result = total / len(text) ** penalty, text[1:]
            else:
                running.append((total, (*text, word)))
            if len(running) == beams:
                break
        if tokens + 1 == longest:
            return list(result)
        tokens += 1


@pytest.mark.parametrize(("beams", "vocab", "longest"), [(3, 12, 9), (2, 7, 32), (1, 7, 8), (3, 12, 3)])
def test_narrow_beams_follow_the_rules_to_the_letter(beams: int, vocab: int, longest: int) -> None:
    count = 25
    known = table(2, count, vocab)
    got, _ = beam_search(
        reader(known, count, beams), torch.full((count,), FIRST), END, longest=longest, beams=beams, length_penalty=0.6
    )
    assert got == [plain_beam_search(known, i, vocab, longest, beams, 0.6) for i in range(count)]


def test_one_beam_without_length_penalty_is_greedy() -> None:
    count, vocab, longest = 20, 6, 10
    known = table(3, count, vocab)
    got, _ = beam_search(
        reader(known, count, 1), torch.full((count,), FIRST), END, longest=longest, beams=1, length_penalty=0
    )
    for i, words in enumerate(got):
        text = [FIRST]
        while len(text) < longest - 2 and (word := int(known[i, *text].argmax())) != END:
            text.append(word)
        assert words == text[1:]


@pytest.mark.parametrize(("end", "steps"), [(-0.334, 2), (-0.338, 30)])
def test_it_stops_when_nothing_better_can_come(end: float, steps: int) -> None:
    """What runs on at first has log((1 - e ** end) / 4), and loses nothing later: 7.92 and 7.80 times the end's own
    score. It could only win over the end while that is less than 31 ** .6 = 7.85 times.
    """
    calls = []

    def advance(words: Tensor, parents: Tensor | None) -> Tensor:
        calls.append(words)
        first = torch.tensor([end, *[math.log((1 - math.exp(end)) / 4)] * 4])
        return (first if len(calls) == 1 else torch.tensor([-40.0, 0.0, -40.0, -40.0, -40.0])).view(1, 1, 5)

    got, scores = beam_search(advance, torch.tensor([FIRST]), END, beams=1)
    assert len(calls) == steps and got == [[]] and scores.item() == pytest.approx(end)


def test_a_model_that_has_diverged_is_said() -> None:
    with pytest.raises(NumericsError, match="diverged"):
        beam_search(lambda words, parents: torch.full((2, 3, 5), math.nan), torch.zeros(2, dtype=torch.long), 1)


# ---------------------------------------------------------------------------------------------------------- objective


def objective_of(config: Config = SHAPES["decoupled"], **more: float) -> Captioning:
    made = Captioning(BEiT3(config), **more)  # type: ignore[arg-type]
    randomize(made.model)
    return made


def samples(count: int, seed: int = 0) -> list[Sample]:
    return [sample(seed, "pair", i) for i in range(count)]


def divergences(objective: Captioning, batch: dict) -> Tensor:
    """KL of the smoothed target from the prediction at every hidden place, term by term."""
    tokens = objective.model(batch["plan"], image=batch["image"], text=batch["text"])
    logits = objective.model.text_logits(tokens, batch["text_hidden"])
    target = torch.full_like(logits, 0.1 / (logits.shape[1] - 1)).scatter(1, batch["text_target"][:, None], 0.9)
    return torch.nn.functional.kl_div(logits.log_softmax(-1), target, reduction="none").sum(1)


@either
def test_the_loss_is_the_divergence_from_the_smoothed_word(config: Config) -> None:
    objective, batch = objective_of(config), COLLATE({"pair": samples(5)})
    counts = objective.counts(batch)
    assert counts == {"caption": len(batch["text_hidden"])}
    out, want = objective(batch, counts), divergences(objective, batch)
    assert out.loss.item() == pytest.approx(want.mean().item(), rel=1e-5)
    assert out.sums["caption"].item() == pytest.approx(want.sum().item(), rel=1e-5)
    assert out.sums["caption/dropped"] == 0


def test_a_perfect_prediction_has_no_loss() -> None:
    entropy = captioning.smoothed_entropy(0.1, 40)
    target = torch.full((1, 40), 0.1 / 39)
    target[0, 7] = 0.9
    loss, _ = captioning.masked_cross_entropy(lambda _: target.log(), torch.tensor([0]), torch.tensor([7]), 40, 0.1)
    assert loss.item() == pytest.approx(entropy, rel=1e-6)
    assert captioning.smoothed_entropy(0.0, 40) == 0


@either
def test_what_comes_later_does_not_matter(config: Config) -> None:
    """Neither to the picture nor to the words before."""
    model, image = model_of(config), pictures(2)
    plan = make_plan({"pair": {"image": [17, 17], "text": [6, 6]}}, causal_text=True)
    text = torch.randint(4, 40, (12,), generator=torch.Generator().manual_seed(0))
    other = text.clone()
    other[4] = 5 + (text[4] == 5)
    before, after = (model(plan, image=image, text=ids).values for ids in (text, other))
    same = (before == after).all(1)
    assert same[: 34 + 4].all() and not same[38] and not same[39] and same[40:].all()


def halves(objective: Captioning, limit: float = math.inf) -> tuple[Tensor, list[Tensor], dict[str, int]]:
    """Loss of six pairs at once, and of two and four of them, gradients of the latter added up."""
    objective.limit.fill_(limit)
    whole = COLLATE({"pair": samples(6)})
    counts = objective.counts(whole)
    again = samples(6)
    return (
        objective(whole, counts).loss,
        [objective(COLLATE({"pair": part}), counts).loss for part in (again[:2], again[2:])],
        counts,
    )


@pytest.mark.parametrize("limit", [math.inf, 4.0])
def test_the_loss_does_not_depend_on_micro_batches(limit: float) -> None:
    objective = objective_of()
    whole, parts, _ = halves(objective, limit)
    assert sum(part.item() for part in parts) == pytest.approx(whole.item(), rel=1e-5)
    gradients = []
    for losses in ([whole], parts):
        objective.zero_grad(set_to_none=True)
        for loss in losses:
            loss.backward()
        gradients.append({n: p.grad for n, p in objective.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, want in gradients[0].items():
        assert (gradients[1][name] - want).norm() <= 1e-5 * want.norm() + 1e-8, name


def test_the_worst_fifth_is_dropped_late_wherever_it_is_computed() -> None:
    """The limit is the 80 % quantile of the step before, of all micro-batches and processes."""
    objective = objective_of(drop_after=3)
    batches = [COLLATE({"pair": samples(8, seed)}) for seed in range(3)]
    losses = torch.cat([divergences(objective, batch) for batch in batches]).detach()
    counts = {"caption": len(losses)}
    for step in (0, 2):
        for batch in batches:
            objective(batch, counts)
        objective.after_step(step)
        assert objective.limit == math.inf and not objective.seen.any()
    for batch in batches:
        assert objective(batch, counts).sums["caption/dropped"] == 0
    objective.after_step(3)
    quantile = losses.sort().values[math.ceil(0.8 * len(losses)) - 1].item()
    assert objective.limit.item() == pytest.approx(quantile, abs=1 / BINS_PER_NAT)

    kept = losses < objective.limit
    outs = [objective(batch, counts) for batch in batches]
    assert sum(out.sums["caption/dropped"].item() for out in outs) == (~kept).sum()
    assert (~kept).float().mean().item() == pytest.approx(0.2, abs=0.03)
    want = (losses * kept).sum() / (0.8 * len(losses))
    assert sum(out.loss.item() for out in outs) == pytest.approx(want.item(), rel=1e-5)

    # Two processes, of which the other one sees the last batch.
    process, other = objective_of(drop_after=0), objective_of()
    other(batches[2], counts)
    process(batches[0], counts)
    process(batches[1], counts, Across(total=lambda x: x + other.seen))
    process.after_step(0)
    assert process.limit == objective.limit
    process.init_weights()
    assert process.limit == math.inf and not process.seen.any()


def test_the_limit_is_part_of_a_checkpoint() -> None:
    objective = objective_of(drop_after=0)
    batch = COLLATE({"pair": samples(4)})
    objective(batch, objective.counts(batch))
    objective.after_step(0)
    other = objective_of()
    other.load_state_dict(objective.state_dict())
    assert other.limit == objective.limit < math.inf


def test_an_evaluation_leaves_the_quantile_alone() -> None:
    objective, batch = objective_of(), COLLATE({"pair": samples(4)})
    objective.eval()(batch, objective.counts(batch))
    assert not objective.seen.any()


def test_it_learns_captions_by_heart_and_writes_them() -> None:
    torch.manual_seed(0)
    config = dataclasses.replace(SHAPES["decoupled"], depth=2, drop_path=0.0, init_std=0.15)
    objective = Captioning(BEiT3(config), smoothing=0.0)
    objective.init_weights()
    optimizer = torch.optim.Adam(objective.parameters(), lr=5e-3)
    pairs = samples(4)
    for step in range(120):
        fresh = [dataclasses.replace(pair, rng=np.random.default_rng([step, i])) for i, pair in enumerate(pairs)]
        batch = COLLATE({"pair": fresh})
        loss = objective(batch, objective.counts(batch)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    images = torch.stack([pair.image for pair in pairs if pair.image is not None])
    got = generate(objective.model.eval(), images, bos=BOS, eos=EOS, mask_id=MASK, longest=16)
    assert got == [pair.text.tolist() for pair in pairs if pair.text is not None]


# ------------------------------------------------------------------------------------------------------ what would fit


def test_models_that_cannot_caption_are_refused_when_it_is_built() -> None:
    picture_only = vit.ViT(vit.Config(dim=32, depth=1, heads=2, hidden=64, patch=8, image_px=32, classes=3))
    with pytest.raises(ConfigError, match="captioning needs a model that encodes image with text; ViT encodes image"):
        Captioning(picture_only)
    retrieval_only = BEiT3(dataclasses.replace(DECOUPLED, masked=False, contrast=True))
    with pytest.raises(ConfigError, match="fills in hidden words, such as a BEiT-3 with model.masked"):
        Captioning(retrieval_only)
    with pytest.raises(ConfigError, match="no head of words"):
        retrieval_only.begin(pictures(1), 3)


class Joint(torch.nn.Module):
    """Reads pictures with texts, but writes nothing."""

    accepts = frozenset({frozenset({"image", "text"})})


def test_a_joint_encoder_that_does_not_write_is_refused() -> None:
    with pytest.raises(ConfigError, match="this Joint does not: take a pre-trained one"):
        Captioning(Joint())
