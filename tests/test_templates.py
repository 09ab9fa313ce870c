"""Chat templates that fail for a row, that do not know messages in parts, and what rows may set of them."""

import pytest
from conftest import CHAT_TEMPLATE, word_tokenizer
from preference_data import chat_pairs, dataset, examples
from trl_runs import COMMON, classes

METHODS = ("DPO", "ORPO", "CPO", "TPO", "KTO", "Reward")
# An error of Python's for one text, none of Jinja's.
DIVIDES = "{% for m in messages %}{{ 10 // (0 if m['content'] == 'no' else 10) }}{% endfor %} " + CHAT_TEMPLATE
ALTERNATES = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %} " + CHAT_TEMPLATE
)
WRITES_PARTS = CHAT_TEMPLATE.replace(
    "{{ m['content'] }}",
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for part in m['content'] %}{{ part['text'] }}{% endfor %}{% endif %}",
)
LEAVES_PARTS_OUT = CHAT_TEMPLATE.replace("{{ m['content'] }}", "{{ m['content'] if m['content'] is string }}")


def make(model_path, rows, tmp_path, template=CHAT_TEMPLATE, method="DPO", stream=False, **settings):
    config, trainer_class = classes("preftree", method)
    tokenizer = word_tokenizer()
    tokenizer.chat_template = template
    data = dataset(rows)
    common = {name: value for name, value in COMMON.items() if name != "beta" or method != "Reward"} | settings
    return trainer_class(
        model_path,
        args=config(output_dir=str(tmp_path), **(common | {"max_steps": 1} if stream else common)),
        train_dataset=data.to_iterable_dataset() if stream else data,
        processing_class=tokenizer,
    )


NO = [{"role": "assistant", "content": "no"}]


def refused(rows, row):
    """Rows of which one's answers are what the template divides by."""
    rows[row] = rows[row] | {name: NO for name in ("chosen", "rejected", "completion") if name in rows[row]}
    return rows


@pytest.mark.parametrize("method", METHODS)
def test_whatever_a_template_raises_names_the_row(model_path, tmp_path, method):
    rows = refused(examples(method, chat_pairs(4)), 2)
    with pytest.raises(ValueError, match="train dataset, row 2: the chat template: integer division"):
        make(model_path, rows, tmp_path, DIVIDES, method)


@pytest.mark.parametrize("method", ["DPO", "ORPO"])
def test_rows_that_other_processes_tokenise(model_path, tmp_path, method):
    rows = refused(examples(method, chat_pairs(4)), 3)
    with pytest.raises(ValueError, match="train dataset, row 3: the chat template: integer division"):
        make(model_path, rows, tmp_path, DIVIDES, method, dataset_num_proc=2)


@pytest.mark.parametrize("method", METHODS)
def test_roles_that_do_not_alternate(model_path, tmp_path, method):
    prompt = [{"role": "user", "content": "the dog"}]
    pairs = [pair | {"prompt": prompt * (1 + (number == 2))} for number, pair in enumerate(chat_pairs(4))]
    row = 4 if method == "KTO" else 2  # two of a pair
    with pytest.raises(ValueError, match=f"train dataset, row {row}: the chat template: roles must alternate"):
        make(model_path, examples(method, pairs), tmp_path, ALTERNATES, method)


def test_whatever_a_template_raises_names_a_streams_row(model_path, tmp_path):
    rows = refused(chat_pairs(4), 2)
    with pytest.raises(ValueError, match="train dataset, row 2: the chat template: integer division"):
        make(model_path, rows, tmp_path, DIVIDES, stream=True).train()


def test_rows_of_lists_are_the_users(model_path, tmp_path):
    rows = [
        {
            "prompt": pair["prompt"],
            "completions": [pair["chosen"], pair["rejected"], pair["chosen"]],
            "scores": [2, 1, 0],
        }
        for pair in chat_pairs(3)
    ]
    rows[2]["completions"][1] = NO
    with pytest.raises(ValueError, match="train dataset, row 2: the chat template: integer division"):
        make(model_path, rows, tmp_path, DIVIDES)


def test_what_no_template_raised_stays_as_it_is(model_path, tmp_path, monkeypatch):
    def broken(*args, **kwargs):
        raise TypeError("something else")

    monkeypatch.setattr("trl.trainer.dpo_trainer.common_prefix_length", broken)
    with pytest.raises(TypeError, match="something else"):
        make(model_path, chat_pairs(4), tmp_path)


def in_parts(rows, names=("chosen",)):
    """Rows whose messages are lists of parts, two of each."""

    def parts(message):
        return message | {"content": [{"type": "text", "text": text} for text in (message["content"], " the old dog")]}

    return [row | {name: [parts(message) for message in row[name]] for name in names} for row in rows]


@pytest.mark.parametrize("stream", [False, True], ids=["rows", "stream"])
@pytest.mark.parametrize("template", [CHAT_TEMPLATE, LEAVES_PARTS_OUT], ids=["as-it-is", "left-out"])
def test_parts_that_a_template_does_not_write_out(model_path, tmp_path, template, stream):
    # (Arrow holds one kind of content: all rows' answers are in parts.)
    rows = in_parts(chat_pairs(3))
    message = "train dataset, row 0, field 'chosen', message 0, part 0: the chat template does not write out the text"
    with pytest.raises(ValueError, match=message):
        make(model_path, rows, tmp_path, template, stream=stream).train()


def test_parts_of_lists_and_of_unpaired_answers(model_path, tmp_path):
    pairs = in_parts(chat_pairs(1), ("chosen", "rejected"))
    ranked = [
        {"prompt": pairs[0]["prompt"], "completions": [pairs[0]["chosen"], pairs[0]["rejected"]], "scores": [2, 1]}
    ]
    with pytest.raises(ValueError, match=r"row 0, field 'completions\[0\]', message 0, part 0: the chat template"):
        make(model_path, ranked, tmp_path)
    with pytest.raises(ValueError, match="row 0, field 'completion', message 0, part 0: the chat template"):
        make(model_path, examples("KTO", pairs), tmp_path, method="KTO")


def test_parts_that_a_template_writes_out(model_path, tmp_path):
    rows = chat_pairs(3)
    parts = in_parts(rows, ("chosen", "rejected"))
    for row in range(3):
        for name in ("chosen", "rejected"):
            (message,) = rows[row][name]
            rows[row][name] = [message | {"content": message["content"] + " the old dog"}]
    plain, found = (make(model_path, each, tmp_path, WRITES_PARTS).train_dataset for each in (rows, parts))
    for name in ("prompt_ids", "chosen_ids", "rejected_ids"):
        assert found[name] == plain[name]


@pytest.mark.parametrize("part", [{"type": "audio", "text": "x"}, {"type": "text", "text": None}])
def test_parts_that_are_no_text(model_path, tmp_path, part):
    rows = [row | {"chosen": [{"role": "assistant", "content": [part]}]} for row in chat_pairs(2)]
    with pytest.raises(ValueError, match=r"row 0, field 'chosen', message 0, part 0: must be \{'type': 'text'"):
        make(model_path, rows, tmp_path, WRITES_PARTS)


@pytest.mark.parametrize("name", ["conversation", "tokenize", "chat_template", "return_tensors", "max_length"])
def test_what_rows_may_not_set(model_path, tmp_path, name):
    rows = [row | {"chat_template_kwargs": {"word": "cat"}} for row in chat_pairs(2)]
    template = CHAT_TEMPLATE.replace("{% for", "{{ word }} {% for", 1)
    ids = make(model_path, rows, tmp_path, template).train_dataset["prompt_ids"]
    assert all(each[0] == word_tokenizer().convert_tokens_to_ids("cat") for each in ids)
    rows[1]["chat_template_kwargs"] = {"word": "cat", name: "x"}
    # (Arrow gives the first row the name, too, and nothing in it.)
    with pytest.raises(ValueError, match=f"row 0, field 'chat_template_kwargs': '{name}' is no variable of a template"):
        make(model_path, rows, tmp_path, template)
