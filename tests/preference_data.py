"""Random preference pairs for the tests' word tokenizer."""

import random

from conftest import WORDS
from datasets import Dataset


def sentence(generator: random.Random, low: int, high: int) -> str:
    return " ".join(generator.choice(WORDS) for _ in range(generator.randint(low, high)))


def text_pairs(count: int, seed: int = 0, explicit: bool = True) -> list[dict]:
    """Plain-text pairs of odd lengths; some responses begin alike."""
    generator = random.Random(seed)
    pairs = []
    for index in range(count):
        prompt = sentence(generator, 3, 25) + " "
        chosen, rejected = sentence(generator, 1, 14), sentence(generator, 2, 9)
        if index % 3 == 0:
            rejected = f"{chosen} {rejected}"
        pair = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
        pairs.append(pair if explicit else {"chosen": prompt + chosen, "rejected": prompt + rejected})
    return pairs


def chat_pairs(count: int, seed: int = 0) -> list[dict]:
    """Chats, a third of them with several turns."""
    generator = random.Random(seed)
    pairs = []
    for index in range(count):
        roles = ["user", "assistant", "user"] if index % 3 == 0 else ["user"]
        prompt = [{"role": role, "content": sentence(generator, 3, 12)} for role in roles]
        pairs.append(
            {
                "prompt": prompt,
                "chosen": [{"role": "assistant", "content": sentence(generator, 2, 10)}],
                "rejected": [{"role": "assistant", "content": sentence(generator, 2, 10)}],
            }
        )
    return pairs


def dataset(pairs: list[dict]) -> Dataset:
    return Dataset.from_list(pairs)


def ranked_texts(count: int) -> list[dict]:
    """Two or three completions to a prompt, with scores."""
    pairs = text_pairs(2 * count)
    result = []
    for first, second in zip(pairs[::2], pairs[1::2], strict=True):
        completions = [first["chosen"], first["rejected"], second["rejected"]][: 3 - len(result) % 2]
        result.append(
            {"prompt": first["prompt"], "completions": completions, "scores": [2.0, 0.5, 1.0][: len(completions)]}
        )
    return result


def examples(method: str, pairs: list[dict], seed: int = 5) -> list[dict]:
    """Pairs in the form that a method's trainer takes."""
    generator = random.Random(seed)
    chat = isinstance(pairs[0]["chosen"], list)

    def text():
        words = sentence(generator, 1, 12)
        return [{"role": "assistant", "content": words}] if chat else words

    if method == "TPO":
        return [pair | {"reference": text()} for pair in pairs]
    if method == "KTO":
        sides = (("chosen", True), ("rejected", False))
        return [
            {"prompt": pair["prompt"], "completion": pair[side], "label": label}
            for pair in pairs
            for side, label in sides
        ]
    return pairs
