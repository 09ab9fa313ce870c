"""Tiny vision-language models with random weights, their processors made here, and pairs with drawn images."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import torch
import transformers as hf
from conftest import WORDS
from PIL import Image
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.smolvlm import processing_smolvlm
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

# Families that place an image's tokens on several axes, ones that count them like words, and one whose image tokens see
# each other in both directions.
FAMILIES = (
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
    "llava",
    "llava_next",
    "gemma3",
    "idefics3",
    "smolvlm",
    "internvl",
)


def build(family: str, seed: int = 0):
    """``(processor, model)`` in evaluation mode."""
    torch.manual_seed(seed)
    processor, model = globals()[f"_{family}"]()
    for parameter in model.parameters():
        if not parameter.any():  # Gemma's projector begins with zeros, which would hide what images are
            torch.nn.init.normal_(parameter, std=0.1)
    return processor, model.eval()


def picture(seed: int, height: int, width: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


def pair(seed: int, sizes: list[tuple[int, int]], question: str, chosen: str, rejected: str) -> dict:
    """A pair whose images are drawn from ``seed`` on."""
    return {
        "images": [picture(seed + index, *size) for index, size in enumerate(sizes)],
        "prompt": [{"role": "user", "content": question}],
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
    }


def pairs(count: int) -> list[dict]:
    """Pairs with one or two images of odd sizes; some responses begin alike."""
    questions = ["the cat runs ?", "a bird", "the old river sleeps near the stone ?"]
    answers = ["the dog .", "the dog sings , but", "a", "red tree over a new stone ."]
    return [
        pair(
            10 * index,
            [(16 + 3 * (index % 4), 20 + 5 * (index % 3))] * (1 + (index % 3 == 0)),
            questions[index % 3],
            answers[index % 4],
            answers[(index + 1) % 4],
        )
        for index in range(count)
    ]


def images_seen(model):
    """A list that grows by the number of images whenever the model's tower looks at some with gradients."""
    seen = []
    backbone = model.model
    tower = next(
        getattr(backbone, name) for name in ("visual", "vision_tower", "vision_model") if hasattr(backbone, name)
    )

    def count(module, args, kwargs):
        if torch.is_grad_enabled():
            values = kwargs.get("grid_thw", kwargs.get("pixel_values", args[0] if args else None))
            seen.append(len(values))

    tower.register_forward_pre_hook(count, with_kwargs=True)
    return seen


def _tokenizer(special: list[str], **named: str) -> hf.PreTrainedTokenizerFast:
    own = ["<pad>", "<eos>", "<unk>", "<user>", "<assistant>", *special]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*own, *WORDS])}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>", "extra_special_tokens": named}
    fast = hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    fast.add_tokens([AddedToken(token, special=True, normalized=False) for token in special], special_tokens=True)
    return fast


def _template(image: str) -> str:
    return (
        "{% for m in messages %}<{{ m['role'] }}> {% for part in m['content'] %}{% if part['type'] == 'image' %}"
        + image
        + " {% else %}{{ part['text'] }} {% endif %}{% endfor %}<eos> {% endfor %}"
        "{% if add_generation_prompt %}<assistant> {% endif %}"
    )


def _without_video(processor: type) -> type:
    """The processor without one for videos, which would need torchvision."""

    class OfImages(processor):  # type: ignore[misc]
        def check_argument_for_proper_class(self, name, argument):
            return None if name == "video_processor" else super().check_argument_for_proper_class(name, argument)

    return OfImages


def _text(tokenizer, **changes) -> dict:
    return {
        "model_type": "llama",
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.3,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 1,
        **changes,
    }


_TOWER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 4,
}


def _qwen(name: str, tower: dict, **text):
    tokenizer = _tokenizer(["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"])
    images = Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, size={"shortest_edge": 64, "longest_edge": 1024})
    template = _template("<|vision_start|><|image_pad|><|vision_end|>")
    processor = _without_video(getattr(hf, f"{name}Processor"))(images, tokenizer, None, chat_template=template)
    rope = {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [1, 1, 2]}
    own = _text(tokenizer, rope_parameters=rope, **text)
    del own["model_type"]
    places = ("image_token", "video_token", "vision_start_token", "vision_end_token")
    tokens = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
    ids = {f"{place}_id": tokenizer.convert_tokens_to_ids(token) for place, token in zip(places, tokens, strict=True)}
    tower = {"depth": 2, "num_heads": 4, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2, **tower}
    config = getattr(hf, f"{name}Config")(text_config=own, vision_config=tower, **ids)
    return processor, getattr(hf, f"{name}ForConditionalGeneration")(config)


def _qwen2_vl():
    return _qwen("Qwen2VL", {"embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2})


def _qwen2_5_vl():
    tower = {"hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 32}
    return _qwen("Qwen2_5_VL", tower | {"window_size": 16, "fullatt_block_indexes": [1]})


def _qwen3_vl():
    tower = {"hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 32}
    return _qwen("Qwen3VL", tower | {"num_position_embeddings": 64, "deepstack_visual_indexes": [0]}, head_dim=8)


def _llava_like(name: str, images, **settings):
    tokenizer = _tokenizer(["<image>"])
    common = {"patch_size": 4, "vision_feature_select_strategy": "default"}
    processor = getattr(hf, f"{name}Processor")(
        images, tokenizer, **common, num_additional_image_tokens=1, chat_template=_template("<image>")
    )
    config = getattr(hf, f"{name}Config")(
        vision_config={"model_type": "clip_vision_model", **_TOWER},
        text_config=_text(tokenizer),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        **settings,
    )
    return processor, getattr(hf, f"{name}ForConditionalGeneration")(config)


_SQUARE = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}


def _llava():
    return _llava_like("Llava", CLIPImageProcessorPil(**_SQUARE))


def _llava_next():
    grid = [[16, 32], [32, 16], [32, 32]]
    return _llava_like(
        "LlavaNext", LlavaNextImageProcessorPil(**_SQUARE, image_grid_pinpoints=grid), image_grid_pinpoints=grid
    )


def _gemma3():
    names = {"boi_token": "<boi>", "eoi_token": "<eoi>", "image_token": "<img>"}
    tokenizer = _tokenizer(list(names.values()), **names)
    images = Gemma3ImageProcessorPil(size={"height": 16, "width": 16}, image_seq_length=4)
    processor = hf.Gemma3Processor(images, tokenizer, chat_template=_template("<boi>"), image_seq_length=4)
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    text = _text(
        tokenizer, head_dim=8, num_hidden_layers=3, sliding_window=5, layer_types=kinds, query_pre_attn_scalar=8
    )
    config = hf.Gemma3Config(
        text_config=text | {"model_type": "gemma3_text"},
        vision_config={"model_type": "siglip_vision_model", "vision_use_head": False, **_TOWER},
        mm_tokens_per_image=4,
        **{f"{name}_id": tokenizer.convert_tokens_to_ids(token) for name, token in names.items()},
    )
    return processor, hf.Gemma3ForConditionalGeneration(config)


def _idefics_like(name: str, images, processor_class: type, *more, **named: str):
    places = [f"<row_{row}_col_{column}>" for row in range(1, 4) for column in range(1, 4)]
    special = ["<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>", *places]
    tokenizer = _tokenizer(special, **named)
    processor = processor_class(images, tokenizer, *more, image_seq_len=4, chat_template=_template("<image>"))
    image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    config = getattr(hf, f"{name}Config")(
        vision_config=_TOWER, text_config=_text(tokenizer), image_token_id=image_token_id, scale_factor=2
    )
    return processor, getattr(hf, f"{name}ForConditionalGeneration")(config)


_CROPS = {"size": {"longest_edge": 32}, "max_image_size": {"longest_edge": 16}}


def _idefics3():
    return _idefics_like("Idefics3", Idefics3ImageProcessorPil(**_CROPS), hf.Idefics3Processor)


def _smolvlm():
    processing_smolvlm.num2words = processing_smolvlm.num2words or str  # of times in videos
    video = SimpleNamespace(num_frames=1, fps=1, size={"longest_edge": 16})
    named = {
        "fake_image_token": "<fake_token_around_image>",
        "image_token": "<image>",
        "end_of_utterance_token": "<end_of_utterance>",
        "global_image_token": "<global-img>",
    }
    images = SmolVLMImageProcessorPil(**_CROPS)
    return _idefics_like("SmolVLM", images, _without_video(hf.SmolVLMProcessor), video, **named)


def _internvl():
    names = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    tokenizer = _tokenizer(list(names.values()), **names)
    images = GotOcr2ImageProcessorPil(
        size={"height": 16, "width": 16}, crop_to_patches=True, min_patches=1, max_patches=4
    )
    processor = _without_video(hf.InternVLProcessor)(
        images, tokenizer, None, image_seq_length=4, chat_template=_template("<IMG_CONTEXT>")
    )
    tower = _TOWER | {"image_size": [16, 16], "patch_size": [4, 4], "layer_scale_init_value": 0.5}
    image_token_id = tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
    config = hf.InternVLConfig(vision_config=tower, text_config=_text(tokenizer), image_token_id=image_token_id)
    return processor, hf.InternVLForConditionalGeneration(config)
