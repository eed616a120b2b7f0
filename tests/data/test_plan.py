"""The layout of a batch against a list of its tokens, one by one."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from multiway.plan import Tokens, dense_tokens, make_plan

lengths = st.lists(st.integers(1, 6), max_size=4)
pairs = st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), max_size=4)


@st.composite
def batches(draw):
    """Kinds of samples in canonical order, at least one sample."""
    image, pair, text = draw(lengths), draw(pairs), draw(lengths)
    kinds = {
        "image": {"image": image},
        "pair": {"image": [i for i, _ in pair], "text": [t for _, t in pair]},
        "text": {"text": text},
    }
    kinds = {kind: modalities for kind, modalities in kinds.items() if any(map(len, modalities.values()))}
    return kinds or {"text": {"text": [1]}}


def listed(kinds):
    """Every token as (kind, modality, sample in the batch, position), in the order of the rows."""
    rows, before = [], 0
    for kind, modalities in kinds.items():
        for modality, ns in modalities.items():
            rows += [(kind, modality, before + b, position) for b, n in enumerate(ns) for position in range(n)]
        before += len(next(iter(modalities.values())))
    return rows


def places(group):
    """Row of the group at every place of the padded layout, (B, N), -1 = padding."""
    if group.index is None:
        return torch.arange(group.rows).view(group.samples, group.length)
    rows = torch.full((group.samples * group.length,), -1)
    rows[group.inverse] = torch.arange(group.rows)
    real = rows >= 0
    assert torch.equal(group.index[real], rows[real])
    assert (group.index[~real] == 0).all()
    return rows.view(group.samples, group.length)


@given(kinds=batches())
def test_rows_are_the_real_tokens_in_canonical_order(kinds):
    plan, rows = make_plan(kinds), listed(kinds)
    assert plan.rows == len(rows)
    assert plan.position.tolist() == [position for *_, position in rows]
    assert plan.sample.tolist() == [sample for _, _, sample, _ in rows]
    assert plan.samples == len({sample for _, _, sample, _ in rows})
    assert plan.starts.keys() == {modality for _, modality, _, _ in rows}
    for modality, start in plan.starts.items():
        assert start.tolist() == [r for r, row in enumerate(rows) if row[1] == modality and row[3] == 0]
        here = [r for r, row in enumerate(rows) if row[1] == modality]
        assert plan.extent(modality) == (here[0], here[-1] + 1)
    for kind in ("image", "pair", "text"):
        for modality in ("image", "text"):
            assert plan.part(modality, kind) == sum(row[:2] == (kind, modality) for row in rows)
    assert [(s.modality, s.kind) for s in plan.segments] == [
        (modality, kind) for kind, modalities in kinds.items() for modality in modalities
    ]


@given(kinds=batches(), causal=st.booleans())
def test_a_group_holds_each_sample_as_one_sequence(kinds, causal):
    plan, rows = make_plan(kinds, causal_text=causal), listed(kinds)
    first = 0
    for group in plan.groups:
        mine = rows[first : first + group.rows]
        assert {kind for kind, *_ in mine} == {group.kind}
        sequences = [[mine[r][1:] for r in sequence.tolist() if r >= 0] for sequence in places(group)]
        samples = sorted({sample for _, _, sample, _ in mine})
        order = {modality: i for i, modality in enumerate(kinds[group.kind])}
        assert sequences == [
            sorted((row[1:] for row in mine if row[2] == sample), key=lambda row: (order[row[0]], row[2]))
            for sample in samples
        ]
        assert group.length == max(map(len, sequences))
        first += group.rows
    assert first == plan.rows


@given(kinds=batches(), causal=st.booleans())
def test_tokens_see_their_own_sample_and_no_padding(kinds, causal):
    plan, rows = make_plan(kinds, causal_text=causal), listed(kinds)
    first = 0
    for group in plan.groups:
        layout = places(group)
        keep = torch.ones(1, 1, 1, 1, dtype=torch.bool) if group.keep is None else group.keep
        assert keep.dtype == torch.bool
        keep = keep.expand(group.samples, 1, group.length, group.length)
        for b, sequence in enumerate(layout.tolist()):
            for q, query in enumerate(sequence):
                seen = [k for k, key in enumerate(sequence) if key >= 0]
                if causal and query >= 0:
                    modality = rows[first + query][1]
                    images = [k for k in seen if rows[first + sequence[k]][1] == "image"]
                    seen = images if modality == "image" else sorted({*images, *(k for k in seen if k <= q)})
                if query >= 0:
                    assert keep[b, 0, q].nonzero().flatten().tolist() == seen
                else:
                    assert keep[b, 0, q].any()  # a padded query attends to something: no NaN from an empty softmax
        first += group.rows


def test_nothing_is_gathered_where_the_rows_are_the_layout():
    (images,) = make_plan({"image": {"image": [5, 5, 5]}}).groups
    assert images.index is images.inverse is images.keep is None
    (equal_pairs,) = make_plan({"pair": {"image": [5, 5], "text": [3, 3]}}).groups
    assert equal_pairs.keep is None
    assert equal_pairs.index.tolist() == [0, 1, 2, 3, 4, 10, 11, 12, 5, 6, 7, 8, 9, 13, 14, 15]


def test_runs_give_each_expert_one_slice():
    plan = make_plan({"image": {"image": [4, 4]}, "pair": {"image": [4], "text": [3]}, "text": {"text": [2, 1]}})
    assert plan.runs(["image", "text"]) == [("image", 12), ("text", 6)]
    assert plan.runs(["image", "text", "pair"]) == [("image", 8), ("pair", 7), ("text", 3)]
    assert plan.runs([]) == [("shared", 18)]
    assert plan.runs(["image"]) == [("image", 12), ("shared", 6)]


def test_an_absent_modality_has_no_rows():
    plan = make_plan({"image": {"image": []}, "text": {"text": [2]}})
    assert plan.extent("image") == (0, 0)
    assert plan.part("image", "image") == 0
    assert [group.kind for group in plan.groups] == ["text"]


@given(kinds=batches())
def test_views_of_tokens(kinds):
    plan, rows = make_plan(kinds), listed(kinds)
    values = torch.arange(plan.rows * 2, dtype=torch.float32).view(-1, 2) + 1
    tokens = Tokens(values, plan)
    for modality in plan.starts:
        sequences: dict[int, list[int]] = {}
        for r, (_, name, sample, _) in enumerate(rows):
            if name == modality:
                sequences.setdefault(sample, []).append(r)
        dense, pad = tokens.dense(modality)
        assert dense.shape[:2] == pad.shape == (len(sequences), max(map(len, sequences.values())))
        for b, mine in enumerate(sequences.values()):
            assert torch.equal(tokens.prefix(modality)[b], values[mine[0]])
            assert torch.equal(dense[b, : len(mine)], values[mine])
            assert pad[b].tolist() == [False] * len(mine) + [True] * (pad.shape[1] - len(mine))
        assert (dense[pad] == 0).all()
    assert torch.equal(tokens.rows(torch.tensor([plan.rows - 1, 0])), values[[-1, 0]])


def test_moving_a_plan_moves_all_of_it():
    plan = make_plan({"pair": {"image": [2, 2], "text": [3, 1]}}, causal_text=True).to("meta")
    tensors = [plan.position, plan.sample, *plan.starts.values()]
    for group in plan.groups:
        tensors += [
            value for value in (getattr(group, f.name) for f in dataclasses.fields(group)) if torch.is_tensor(value)
        ]
    assert len(tensors) == 7
    assert {x.device.type for x in tensors} == {"meta"}


def test_lengths_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="plan of 'pair': every modality needs one length >= 1 per sample"):
        make_plan({"pair": {"image": [2, 2], "text": [3]}})
    with pytest.raises(ValueError, match="plan of 'text'"):
        make_plan({"text": {"text": np.array([3, 0])}})


@given(kinds=batches(), skip=st.integers(0, 1))
def test_the_mean_is_that_of_each_sequence(kinds, skip):
    plan = make_plan(kinds)
    values = torch.randn(plan.rows, 3, generator=torch.Generator().manual_seed(0))
    sequences: dict[tuple[str, int], list[int]] = {}
    for r, (_, modality, sample, _) in enumerate(listed(kinds)):
        sequences.setdefault((modality, sample), []).append(r)
    for modality in plan.modalities:
        own = [rows[skip:] for (name, _), rows in sequences.items() if name == modality]
        found = Tokens(values, plan).mean(modality, skip)
        assert len(found) == len(own)
        for mean, rows in zip(found, own):
            if rows:
                torch.testing.assert_close(mean, values[rows].mean(0))


@given(kinds=batches())
def test_sequences_of_equal_length_are_known_where_a_view_will_do(kinds):
    plan = make_plan(kinds)
    for modality in plan.modalities:
        found = {kind: own[modality] for kind, own in kinds.items() if own.get(modality)}
        (kind, *others), ns = found, {n for own in found.values() for n in own}
        alone = not others and len(kinds[kind]) == 1 and len(ns) == 1
        assert plan.equal_length(modality) == (ns.pop() if alone else None)


def test_dense_tokens_are_a_batch_of_equal_lengths():
    x = torch.randn(3, 5, 4, requires_grad=True)
    tokens = dense_tokens(x)
    assert tokens.plan.equal_length("image") == 5
    values, pad = tokens.dense("image")
    assert torch.equal(values, x) and pad.shape == (3, 5) and not pad.any()
    assert values.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    one, two = tokens.plan, make_plan({"image": {"image": [5, 5, 5]}})
    assert one.segments == two.segments and one.groups == two.groups
    assert torch.equal(one.position, two.position) and torch.equal(one.sample, two.sample)
    assert one.starts.keys() == two.starts.keys() and torch.equal(one.starts["image"], two.starts["image"])
    assert dense_tokens(x.to("meta")).plan.position.is_meta


def assert_plans_equal(one, other):
    """Sizes, rows, and who sees whom."""
    assert one.segments == other.segments
    for field in ("position", "sample"):
        assert torch.equal(getattr(one, field), getattr(other, field)), field
    assert one.starts.keys() == other.starts.keys()
    assert all(torch.equal(one.starts[name], other.starts[name]) for name in one.starts)
    for a, b in zip(one.groups, other.groups, strict=True):
        assert (a.kind, a.rows, a.samples, a.length) == (b.kind, b.rows, b.samples, b.length)
        assert torch.equal(places(a), places(b))
        assert (a.keep is None) == (b.keep is None) and (a.keep is None or torch.equal(a.keep, b.keep))


@given(kinds=batches())
def test_the_plan_of_one_kind_is_that_of_a_batch_of_it(kinds):
    plan = make_plan(kinds)
    for kind in kinds:
        assert_plans_equal(plan.of(kind), make_plan({kind: kinds[kind]}))


@given(kinds=batches(), pictures=st.integers(1, 5))
def test_all_texts_are_sequences_of_their_own(kinds, pictures):
    if "pair" in kinds:
        kinds["pair"]["image"] = [pictures] * len(kinds["pair"]["image"])
    own = [kinds[kind]["text"] for kind in ("pair", "text") if kind in kinds and kinds[kind].get("text")]
    if not own:
        return
    texts = make_plan(kinds).texts()
    assert texts.samples == sum(map(len, own)) and texts.modalities == ("text",)
    assert texts.position.tolist() == [p for ns in own for n in ns for p in range(n)]
    assert texts.sample.tolist() == [i for i, n in enumerate(n for ns in own for n in ns) for _ in range(n)]
    first = np.cumsum([0, *(n for ns in own for n in ns)])[:-1]
    assert texts.starts["text"].tolist() == first.tolist()
    for group, ns in zip(texts.groups, own, strict=True):
        (alone,) = make_plan({"text": {"text": ns}}).groups
        assert (group.kind, group.rows, group.samples, group.length) == ("text", sum(ns), len(ns), max(ns))
        assert torch.equal(places(group), places(alone))
        assert (group.keep is None) == (alone.keep is None)
        assert group.keep is None or torch.equal(group.keep, alone.keep)


def test_texts_that_see_only_what_is_before_them_are_left_in_their_pairs():
    kinds = {"pair": {"image": [3, 3], "text": [2, 4]}}
    with pytest.raises(ValueError, match="causal"):
        make_plan(kinds, causal_text=True).texts()
    alone = make_plan({"text": {"text": [2, 4]}}, causal_text=True)
    assert_plans_equal(alone.texts(), alone)
