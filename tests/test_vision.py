"""Prompts with images: exact against the stock model on each sequence alone, images looked at once for each tree."""

import copy
import itertools

import pytest
import torch
from transformers import masking_utils
from trl.trainer.dpo_trainer import DataCollatorForVisionPreference
from vision_families import FAMILIES, build, images_seen, pair, picture

import preftree
from preftree.attention.flex import block_mask
from preftree.attention.mask import visible_nodes
from preftree.images import Images, PromptImages
from preftree.models import prepared_part
from preftree.models.interface import _rule
from preftree.models.verify import verify_images
from preftree.packing import PackedRow
from preftree.trainers.collator import TreeCollator
from preftree.trainers.groups import Layout
from preftree.trainers.vision import ImageReader, image_token_ids

# Images of several sizes, two in one prompt, the same image and prompt twice, the same words with another image, no image at
# all; responses that begin alike.
EXAMPLES = [
    pair(0, [(16, 24), (30, 12)], "the cat runs ?", "a red cat .", "a red dog ! but new"),
    pair(5, [(20, 20)], "a bird ?", "the tree", "a"),
    pair(9, [(20, 20)], "a bird ?", "the tree", "a"),
    pair(7, [], "river", "blue", "old river"),
    pair(5, [(20, 20)], "a bird ?", "the river", "the tree . and"),
    pair(11, [(40, 17)], "red", "bird tree", "bird"),
]
no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
TREES = 5  # of the examples, two share one


def collator(processor, model, **settings):
    reader = ImageReader(DataCollatorForVisionPreference(processor), Layout(), image_token_ids(processor, model.config))
    return TreeCollator(pad_token_id=0, reader=reader, **settings)


def tokens_by_trl(processor, examples):
    """``[(ids, prompt length)]`` of chosen, rejected, chosen, ... as TRL's collator gives them for the whole batch."""
    batch = DataCollatorForVisionPreference(processor)([dict(example) for example in examples])
    rows = [
        (ids[attended == 1].tolist(), int(((attended == 1) & (scored == 0)).sum()))
        for ids, attended, scored in zip(
            batch["input_ids"], batch["attention_mask"], batch["completion_mask"], strict=True
        )
    ]
    return list(itertools.chain(*zip(rows[: len(examples)], rows[len(examples) :], strict=True)))


def inputs_alone(processor, example, length):
    """What the processor gives the stock model for the images of one sequence of ``length`` tokens."""
    parts = [{"type": "image"}] * len(example["images"]) + [{"type": "text", "text": example["prompt"][0]["content"]}]
    text = processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)
    images = [example["images"]] if example["images"] else None
    given = processor(images=images, text=[text], return_tensors="pt", add_special_tokens=False)
    prompt = given["input_ids"].shape
    inputs = {}
    for name, value in given.items():
        if name.endswith("token_type_ids"):
            inputs[name] = torch.nn.functional.pad(value, (0, length - prompt[1]))
        elif name not in ("input_ids", "attention_mask"):
            inputs[name] = value
    return inputs


def logps_by_stock(model, processor, examples):
    logps = []
    for index, (ids, prompt_length) in enumerate(tokens_by_trl(processor, examples)):
        given = torch.tensor([ids], device=model.device)
        inputs = inputs_alone(processor, examples[index // 2], len(ids))
        inputs = {name: value.to(model.device) for name, value in inputs.items()}
        logits = model(input_ids=given, attention_mask=torch.ones_like(given), use_cache=False, **inputs).logits[0]
        log_p = logits.float().log_softmax(-1)
        logps.append(log_p[torch.arange(prompt_length - 1, len(ids) - 1), given[0, prompt_length:]].sum())
    return torch.stack(logps)


def differences(model, processor, examples, backend="auto", **settings):
    """Largest relative difference of log-probs, and of any parameter's gradient (see `oracle.compare_with_stock`)."""
    stock = copy.deepcopy(model)
    prepared = preftree.prepare_model(model, backend=backend)
    weights = torch.randn(2 * len(examples), generator=torch.Generator().manual_seed(1)).to(model.device)
    expected = logps_by_stock(stock, processor, examples)
    (expected * weights).sum().backward()
    got = torch.zeros_like(expected)
    for row in collator(processor, model, **settings)(examples)["rows"]:
        out = preftree.sequence_logps(prepared, row)
        (out.logps * weights[row.sequence_ids]).sum().backward()
        got[row.sequence_ids] = out.logps.detach()
    largest = max(p.grad.abs().max() for p in stock.parameters() if p.grad is not None)
    worst = 0.0
    for mine, theirs in zip(model.parameters(), stock.parameters(), strict=True):
        if theirs.grad is not None:
            scale = max(theirs.grad.abs().max(), 1e-3 * largest)
            own = torch.zeros_like(theirs.grad) if mine.grad is None else mine.grad
            worst = max(worst, float((own - theirs.grad).abs().max() / scale))
    return float(((got - expected).detach().abs() / expected.detach().abs().clamp(min=1)).max()), worst


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, no_gpu])])
@pytest.mark.parametrize("family", FAMILIES)
def test_exact(family, device, monkeypatch):
    # (Towers convolve: by default cuDNN does so in TF32, on each batch of images otherwise.)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    processor, model = build(family)
    logps, gradients = differences(model.to(device), processor, EXAMPLES)
    assert logps <= 1e-5
    assert gradients <= 1e-5


@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma3", "idefics3"])
@pytest.mark.parametrize("settings", [{"row_length": 150}, {"share_prefixes": False}, {"backend": "dense"}], ids=str)
def test_exact_in_several_rows_unshared_and_by_the_specification(family, settings):
    # (In float64 but for log-probs: in float32 gradients of the stock model itself are 1.4e-5 off on some processors.)
    processor, model = build(family, seed=1)
    examples = EXAMPLES[1:] if "row_length" in settings else EXAMPLES
    assert max(differences(model.double(), processor, examples, **settings)) <= 1e-5


@pytest.mark.parametrize("family", ["qwen3_vl", "llava"])
def test_exact_in_training_with_checkpoints(family):
    processor, model = build(family)
    model.train().gradient_checkpointing_enable({"use_reentrant": False})
    assert max(differences(model, processor, EXAMPLES)) <= 1e-5


@pytest.mark.parametrize("family", ["qwen2_vl", "gemma3", "idefics3"])
def test_questions_about_one_image_share_it(family, monkeypatch):
    monkeypatch.setattr("preftree.trainers.collator.SHARED_START", 3)
    processor, model = build(family)
    examples = [
        pair(5, [(20, 20)], question, "the tree", "the tree .") for question in ("a bird ?", "a cat", "a bird ? red")
    ]
    assert len(collator(processor, model)(examples)["rows"][0].images.sets) == 1
    assert max(differences(model.double(), processor, examples)) <= 1e-5  # (float32: as above)


@pytest.mark.parametrize("family", FAMILIES)
def test_rounding_is_no_reason_to_refuse(family):
    """In bfloat16 hidden states of a row are as far from the stock model's as rounding takes them."""
    processor, model = build(family)
    prepared = preftree.prepare_model(model.to(torch.bfloat16))
    for examples in (EXAMPLES, EXAMPLES[::-1], EXAMPLES[:1]):
        (row,) = collator(processor, model)(examples)["rows"]
        with torch.no_grad():
            verify_images(prepared_part(prepared), row)
            preftree.sequence_logps(prepared, row)


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_trls(family):
    processor, model = build(family)
    groups = [collator(processor, model).group(example) for example in EXAMPLES]
    got = [item for group in groups for item in zip(group.sequences, group.prompt_lengths, strict=True)]
    assert got == tokens_by_trl(processor, EXAMPLES)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava", "gemma3"])
def test_images_are_looked_at_once_for_each_tree(family):
    processor, model = build(family)
    prepared = preftree.prepare_model(model)
    seen = images_seen(model)
    (row,) = collator(processor, model)(EXAMPLES)["rows"]
    preftree.sequence_logps(prepared, row)
    assert len(row.images.sets) == TREES - 1
    assert seen == [2 + 1 + 1 + 1]  # in one call


def test_axes_are_those_of_each_sequence():
    processor, model = build("qwen2_vl")
    prepared = prepared_part(preftree.prepare_model(model))
    (row,) = collator(processor, model)(EXAMPLES)["rows"]
    positions = prepared._positions(row)
    assert positions.shape == (3, 1, len(row))
    for sequence, place in enumerate(row.images.set_of):
        path = row.path(sequence)
        ids = row.input_ids[path][None]
        expected = torch.arange(len(path)).expand(3, 1, -1)
        if place >= 0:
            types = (ids == model.config.image_token_id).int()
            grid = row.images.sets[place]["image_grid_thw"]
            expected, _ = model.model.get_rope_index(ids, image_grid_thw=grid, mm_token_type_ids=types)
        assert torch.equal(positions[..., path], expected)
    assert not torch.equal(positions[0, 0], row.position_ids)


def test_a_decoder_that_stumbles_is_refused(monkeypatch):
    processor, model = build("qwen2_vl")
    prepared = preftree.prepare_model(model)

    def stumble(self, ids, inputs):
        raise TypeError("decode() takes no such argument")

    monkeypatch.setattr("preftree.models.prepared.PreparedModel._given_to_decoder", stumble)
    (row,) = collator(processor, model)(EXAMPLES[:1])["rows"]
    with pytest.raises(NotImplementedError, match=r"Qwen2VL.* cannot share prefixes with images exactly: TypeError"):
        preftree.sequence_logps(prepared, row)


def test_token_placed_in_two_ways_is_refused(monkeypatch):
    processor, model = build("qwen2_vl")
    prepared = preftree.prepare_model(model, verify=False)
    stock = type(model.model).compute_3d_position_ids
    monkeypatch.setattr(
        type(model.model),
        "compute_3d_position_ids",
        lambda self, *a, **k: stock(self, *a, **k) + k["input_ids"].shape[1],
    )
    (row,) = collator(processor, model)(EXAMPLES[:1])["rows"]
    with pytest.raises(NotImplementedError, match="places a token that sequences share otherwise in one of them"):
        preftree.sequence_logps(prepared, row)


@pytest.mark.parametrize(
    ("wrong", "family"),
    [(wrong, family) for wrong in ("order", "positions") for family in ("qwen2_vl", "gemma3", "llava")]
    + [("mask", "gemma3")],
)
def test_what_is_not_exact_is_refused_on_the_first_row(wrong, family, monkeypatch):
    if wrong == "order":
        stock = Images.inputs.fget
        monkeypatch.setattr(
            Images, "inputs", property(lambda self: stock(Images(self.sets[::-1], self.set_of, self.token_inputs)))
        )
    elif wrong == "positions":
        monkeypatch.setattr(
            "preftree.models.prepared.PreparedModel._positions", lambda self, row: torch.arange(len(row))
        )
    else:
        monkeypatch.setattr("preftree.models.interface._knows_tokens", lambda function, length: False)
    processor, model = build(family)
    prepared = preftree.prepare_model(model, verify=False)
    prepared_part(prepared).try_images = verify_images
    (row,) = collator(processor, model)([EXAMPLES[1], EXAMPLES[5]])["rows"]
    for _ in range(2):  # and again, if it is asked once more
        with pytest.raises(
            NotImplementedError, match="cannot share prefixes with images exactly: hidden states of a row"
        ):
            preftree.sequence_logps(prepared, row)


# ------------------------------------------------------------------------------------------------------------- masks


def image_row(spare=3):
    """Two trees, the first with images at its nodes 1 to 3 and 5 to 6, and the token kinds of the row."""
    first = PromptImages(
        {"pixel_values": torch.zeros(2, 4)}, 7, {"token_type_ids": torch.tensor([0, 1, 1, 1, 0, 1, 1])}
    )
    second = PromptImages({"pixel_values": torch.ones(1, 4)}, 2, {"token_type_ids": torch.tensor([1, 1])})
    trees = [
        preftree.TokenTree.from_sequences(
            [[1, 2, 2, 2, 3, 2, 2, *tail] for tail in ([4, 5], [4, 6, 7], [8])], [7] * 3, images=first
        ),
        preftree.TokenTree.from_sequences([[9, 9]], [1]),
        preftree.TokenTree.from_sequences([[2, 2, 5], [2, 2, 6]], [2, 2], images=second),
    ]
    return preftree.pack(trees, sum(map(len, trees)) + spare)[0]


def image_rule(row, window=None):
    kinds = row.images.token_inputs["token_type_ids"]
    begins = (kinds == 1) & (torch.nn.functional.pad(kinds, (1, 0))[:-1] == 0)
    blocks = torch.where(kinds == 1, begins.int().cumsum(-1) - 1, -1)[None]
    function = masking_utils.or_masks(masking_utils.causal_mask_function, masking_utils.blockwise_overlay(blocks))
    if window is not None:
        function = masking_utils.and_masks(function, masking_utils.sliding_window_overlay(window))
    return _rule(function, None, row)


@pytest.mark.parametrize("window", [None, 3])
def test_image_tokens_see_their_image(window):
    row = image_row()
    rule = image_rule(row, window)
    visible = visible_nodes(row, rule)
    blocks = [range(1, 4), range(5, 7), range(14, 16)]
    for query, key in itertools.product(range(len(row)), repeat=2):
        below = key <= query < int(row.end[key])
        both_ways = any(query in block and key in block for block in blocks)
        near = window is None or int(row.position_ids[key]) > int(row.position_ids[query]) - window
        assert bool(visible[query, key]) == ((below or both_ways) and near), (query, key)


@pytest.mark.parametrize("window", [None, 3, 20])
@pytest.mark.parametrize("block", [2, 16])  # images end inside blocks, or go on in the next
def test_blocks_of_flex_attention_hold_what_image_tokens_see(window, block):
    row = image_row(spare=64 - 19)
    rule = image_rule(row, window)
    mask = block_mask(row, rule, block)
    seen = torch.zeros(len(row), len(row), dtype=torch.bool)
    node = torch.arange(len(row))
    entries = mask.mask_mod(0, 0, node[:, None], node[None, :])
    for query_block, count in enumerate(mask.kv_num_blocks[0, 0].tolist()):
        for key_block in mask.kv_indices[0, 0, query_block, :count].tolist():
            here = (
                slice(query_block * block, (query_block + 1) * block),
                slice(key_block * block, (key_block + 1) * block),
            )
            seen[here] = entries[here]
    assert int(mask.full_kv_num_blocks.sum()) == 0
    assert torch.equal(seen, visible_nodes(row, rule))
    backwards = torch.zeros_like(seen)
    for key_block, count in enumerate(mask.q_num_blocks[0, 0].tolist()):
        for query_block in mask.q_indices[0, 0, key_block, :count].tolist():
            here = (
                slice(query_block * block, (query_block + 1) * block),
                slice(key_block * block, (key_block + 1) * block),
            )
            backwards[here] = entries[here]
    assert torch.equal(backwards, visible_nodes(row, rule))


def test_a_backend_that_cannot_is_refused_by_name():
    processor, model = build("gemma3")
    prepared = preftree.prepare_model(model, backend="varlen")
    (row,) = collator(processor, model)(EXAMPLES[:1])["rows"]
    with pytest.raises(
        NotImplementedError, match=r"'varlen' cannot serve this layer: the family lets tokens .* Use 'auto'"
    ):
        preftree.sequence_logps(prepared, row)


def test_a_rule_of_positions_stays_one():
    row = image_row()
    assert _rule(masking_utils.sliding_window_causal_mask_function(3), None, row).nodes is None
    assert _rule(masking_utils.or_masks(masking_utils.causal_mask_function), None, row).nodes is None
    assert image_rule(row).nodes is not None
    assert not image_rule(row).known


# ------------------------------------------------------------------------------------------------- trees and rows


def test_rows_keep_images_in_their_order_and_move_them():
    row = image_row()
    assert [inputs["pixel_values"].shape[0] for inputs in row.images.sets] == [2, 1]
    assert row.images.set_of == [0, 0, 0, -1, 1, 1]
    assert row.images.inputs["pixel_values"].tolist() == [[0.0] * 4] * 2 + [[1.0] * 4]
    assert row.images.token_inputs["token_type_ids"].tolist() == [0, 1, 1, 1, 0, 1, 1] + [0] * 7 + [1, 1] + [0] * 5
    moved = row.to("meta")
    assert {tensor.device.type for tensor in moved.tensors} == {"meta"}
    assert len(moved.tensors) == len(row.tensors) == len(PackedRow.tensors.fget(image_row()))
    nothing = row.without_sequences()
    assert nothing.num_sequences == nothing.num_unshared_tokens == 0
    assert nothing.images.sets is row.images.sets


def test_images_of_different_sizes_are_filled_up():
    sizes = [
        {"pixel_values": torch.ones(1, 2, 3, 5), "pixel_attention_mask": torch.ones(1, 2, 3).long()},
        {"pixel_values": torch.ones(2, 3, 2, 7), "pixel_attention_mask": torch.ones(2, 1, 4).long()},
    ]
    joined = Images(sizes, [0, 1], {}).inputs
    assert joined["pixel_values"].shape == (3, 3, 3, 7)
    assert joined["pixel_values"][0, :2, :3, :5].sum() == joined["pixel_values"][0].sum() == 30
    assert joined["pixel_attention_mask"].shape == (3, 2, 4)
    only = [{"pixel_values": inputs["pixel_values"]} for inputs in sizes]
    with pytest.raises(ValueError, match="pixel_values: images of different shapes"):
        Images(only, [0, 1], {}).inputs  # noqa: B018
    with pytest.raises(ValueError, match="of some images a model would be given"):
        Images([sizes[0], only[1]], [0, 1], {}).inputs  # noqa: B018


def test_sequences_must_share_the_images():
    images = PromptImages({"pixel_values": torch.zeros(1, 4)}, 3, {})
    with pytest.raises(ValueError, match="sequence 1 differs from sequence 0 before token 3, where their images end"):
        preftree.TokenTree.from_sequences([[1, 2, 2, 3], [1, 2, 3, 3]], [3, 3], images=images)
    with pytest.raises(ValueError, match="sequence 1 has 2 tokens: its images' tokens end at 3"):
        preftree.TokenTree.from_sequences([[1, 2, 2, 3], [1, 2]], [3, 2], images=images)


def test_row_without_sequences_looks_at_images_all_the_same():
    processor, model = build("llava")
    prepared = preftree.prepare_model(model)
    (row,) = collator(processor, model)(EXAMPLES[:2])["rows"]
    seen = images_seen(model)
    preftree.sequence_logps(prepared, row.without_sequences()).logps.sum().backward()
    assert seen == [3]
    assert all(not p.grad.any() for p in model.model.vision_tower.parameters() if p.grad is not None)
    assert any(p.grad is not None for p in model.model.vision_tower.parameters())


def test_equal_words_with_other_images_are_not_shared():
    processor, model = build("llava")
    same, other = pair(1, [(16, 16)], "a cat", "the dog", "a dog"), pair(2, [(16, 16)], "a cat", "the dog", "a dog")
    together = collator(processor, model)([same, copy.deepcopy(same)])["rows"][0]
    apart = collator(processor, model)([same, other])["rows"][0]
    assert [len(together.images.sets), len(apart.images.sets)] == [1, 2]
    assert apart.num_tokens == 2 * together.num_tokens
    assert picture(1, 4, 4).tobytes() != picture(2, 4, 4).tobytes()
