"""Where a prompt ends, a response begins and a text stops: padding, EOS, masks, whole words."""

import pytest
import torch

from rlhf_edu import tokens


def test_batch_by_hand():
    batch = tokens.collate([[5, 6], [7, 8, 9]], [[3, 4, 0], [2]], pad_id=1)
    assert batch["input_ids"].tolist() == [[5, 6, 3, 4, 0], [7, 8, 9, 2, 1]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]]
    assert batch["response_mask"].tolist() == [
        [False, False, True, True, True],
        [False, False, False, True, False],
    ]
    assert batch["response_mask"].dtype == torch.bool


def test_mask_counts_eos_and_never_prompt_or_padding(tokenizer, sentences):
    prompts = tokens.encode(tokenizer, [s[:8] for s in sentences[::37]])
    texts = [s[8:] for s in sentences[::37]]
    responses = tokens.encode_responses(tokenizer, texts, max_tokens=60)
    batch = tokens.collate(prompts, responses, tokenizer.pad_token_id)
    assert len({len(p) + len(r) for p, r in zip(prompts, responses, strict=True)}) > 1, "nothing to pad"
    for row, text in enumerate(texts):
        ids, mask = batch["input_ids"][row], batch["response_mask"][row]
        assert ids[mask].tolist() == [*tokens.encode(tokenizer, [text])[0], tokenizer.eos_token_id]
        assert not (ids[mask] == tokenizer.pad_token_id).any()
        assert (ids[batch["attention_mask"][row] == 0] == tokenizer.pad_token_id).all()
        assert not mask[: len(prompts[row])].any()


def test_padding_has_a_token_of_its_own(tokenizer):
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert tokenizer.padding_side == "right"
    assert (
        tokenizer("a film", add_special_tokens=True)["input_ids"] == tokens.encode(tokenizer, ["a film"])[0]
    )


@pytest.mark.parametrize("room", [-3, 0, 1, 5])
def test_overlong_response_keeps_its_start_and_then_has_no_end(tokenizer, room):
    text = " was lovely and moving to the end."
    ids = tokens.encode(tokenizer, [text])[0]
    (response,) = tokens.encode_responses(tokenizer, [text], max_tokens=len(ids) + room)
    if room >= 1:
        assert response == [*ids, tokenizer.eos_token_id]
    else:
        assert response == ids[: len(ids) + room]
        assert tokenizer.eos_token_id not in response


def test_empty_response_is_eos_alone(tokenizer):
    assert tokens.encode_responses(tokenizer, [""], max_tokens=5) == [[tokenizer.eos_token_id]]
    assert tokens.encode(tokenizer, []) == []


@pytest.mark.parametrize(
    "text", ["Amélie – naïve, “quoted” 100 %", "电影 很好 😀", " leading  spaces\tand\nlines ", "\x00\x7f"]
)
def test_any_text_survives_the_round_trip(tokenizer, text):
    response = tokens.encode_responses(tokenizer, [text], max_tokens=500)[0]
    assert tokens.decode_responses(tokenizer, [response, [*response, tokenizer.pad_token_id]]) == [text, text]


def test_prefixes_end_at_whole_words_and_read_back_as_the_same_tokens(tokenizer, sentences):
    found = 0
    for text in sentences[::7]:
        ids = tokens.encode(tokenizer, [text])[0]
        lengths = tokens.prefix_lengths(tokenizer, ids, 2, 8)
        at_words = [n for n in range(2, 9) if n < len(ids) and tokenizer.decode(ids[n:]).startswith(" ")]
        assert lengths == at_words
        for n in lengths:
            prefix = tokenizer.decode(ids[:n])
            assert text.startswith(prefix + " ")
            assert tokens.encode(tokenizer, [prefix])[0] == ids[:n]
        found += len(lengths)
    assert found > 50


def test_prefix_leaves_something_to_say(tokenizer):
    ids = tokens.encode(tokenizer, ["The film was great"])[0]
    assert max(tokens.prefix_lengths(tokenizer, ids, 1, 100)) < len(ids)
    assert tokens.prefix_lengths(tokenizer, ids[:1]) == [] == tokens.prefix_lengths(tokenizer, [])


def test_bad_batches_are_explained(tokenizer, one_sentence):
    with one_sentence("empty prompt", "at least one token"):
        tokens.collate([[4], []], [[5], [6]], 1)
    with one_sentence("2 prompts", "1 responses"):
        tokens.collate([[4], [5]], [[5]], 1)
    with one_sentence("must be a string", "NoneType"):
        tokens.encode(tokenizer, ["fine", None])


def test_saved_tokenizer_is_the_same(tokenizer, sentences, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    again = tokens.load_tokenizer(tmp_path)
    assert (again.pad_token_id, again.eos_token_id) == (tokenizer.pad_token_id, tokenizer.eos_token_id)
    assert tokens.encode(again, sentences[:50]) == tokens.encode(tokenizer, sentences[:50])


def test_tokenizer_without_padding_token_gets_one(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        path = tmp_path / name
        if path.exists():
            path.write_text(path.read_text().replace('"pad_token": "<|pad|>"', '"pad_token": null'))
    loaded = tokens.load_tokenizer(tmp_path)
    assert loaded.pad_token_id == loaded.eos_token_id == tokenizer.eos_token_id


def test_missing_or_damaged_tokenizer_is_explained(tmp_path, one_sentence):
    with one_sentence("tokenizer", str(tmp_path / "nowhere"), "git checkout data"):
        tokens.load_tokenizer(tmp_path / "nowhere")
    with one_sentence("tokenizer", "outputs/mini-seed0/policy", "check the folder"):
        tokens.load_tokenizer("outputs/mini-seed0/policy")
    (tmp_path / "tokenizer.json").write_text("{")
    with one_sentence("tokenizer", str(tmp_path)):
        tokens.load_tokenizer(tmp_path)


def test_tokenizer_of_the_hub_without_network_is_explained(one_sentence):
    with one_sentence("gpt2", "network"):
        tokens.load_tokenizer("gpt2")
