"""text/separators.py: which token ends a document, for tokenizers of the layout of published ones; and that packed
tokens, their key and a resumed run keep to it.
"""

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from tests.byte_tokenizers import CHATML, LLAMA_3, tokenizer_of
from tests.text.documents import loader, options, packed_dirs, small_tokenizer, windows_of, write_jsonl
from text.encoding import Encoder
from text.opening import open_source
from text.separators import choose_separator, special_tokens
from text.sources import TextSource
from text.token_file import token_file_inputs


def chosen(option: str, *args, **named) -> str:
    return choose_separator(option, tokenizer_of(*args, **named)).token


@pytest.mark.parametrize(
    ("special", "named", "separator"),
    [
        (LLAMA_3, dict(bos_token=LLAMA_3[0], eos_token="<|eot_id|>"), "<|end_of_text|>"),  # Llama-3.1-8B-Instruct
        (LLAMA_3, dict(bos_token=LLAMA_3[0], eos_token="<|eom_id|>"), "<|end_of_text|>"),
        (LLAMA_3, dict(bos_token=LLAMA_3[0], eos_token="<|end_of_text|>"), "<|end_of_text|>"),  # Llama-3.1-8B
        # SmolLM2-Instruct, whose separator is listed as unk
        (CHATML, dict(bos_token="<|im_start|>", eos_token="<|im_end|>", unk_token=CHATML[0]), "<|endoftext|>"),
        (CHATML, dict(eos_token="<|im_end|>", pad_token="<|endoftext|>"), "<|endoftext|>"),  # Qwen2.5-Instruct
        (CHATML, dict(eos_token="<|endoftext|>"), "<|endoftext|>"),  # a base model
        (["<s>", "</s>"], dict(bos_token="<s>", eos_token="</s>"), "</s>"),  # Llama-2, TinyLlama: turns end with it too
        (["<s>", "</s>", "<|im_end|>"], dict(bos_token="<s>", eos_token="<|im_end|>"), "</s>"),  # a Mistral for chats
        (["<|im_end|>"], dict(eos_token="<|im_end|>"), "<|im_end|>"),  # there is no other
        (["<end>", "</s>"], dict(eos_token="<end>"), "<end>"),  # nothing says that it ends a turn
    ],
)
def test_what_auto_takes(special, named, separator):
    assert chosen("auto", special, **named) == separator


def test_an_unknown_eos_ends_a_turn_if_the_chat_template_has_it():
    special = ["<end>", "</s>"]
    for template in ("{{ message }}<end>", "{{ message + eos_token }}", {"default": "{{ message }}<end>"}):
        assert chosen("auto", special, template, eos_token="<end>") == "</s>"
    assert chosen("auto", special, "{{ message }}", eos_token="<end>") == "<end>"
    llama_2 = "{{ ' [INST] ' + message + ' [/INST]' + eos_token }}"
    assert chosen("auto", ["<s>", "</s>", "<|endoftext|>"], llama_2, eos_token="</s>") == "</s>"


def test_it_says_which_and_why():
    separator = choose_separator("auto", tokenizer_of(LLAMA_3, eos_token="<|eot_id|>"))
    assert str(separator) == "'<|end_of_text|>' (257)"
    assert separator.why == "it ended documents in pretraining; the eos_token '<|eot_id|>' ends a turn of a chat"
    assert choose_separator("auto", small_tokenizer()).why == "the eos_token"


def test_a_token_by_its_name():
    tokenizer = tokenizer_of(LLAMA_3, eos_token="<|eot_id|>")
    assert choose_separator("<|eom_id|>", tokenizer).id == special_tokens(tokenizer)["<|eom_id|>"] == 258
    assert Encoder(tokenizer, "<|eom_id|>")(["a", ""]).tolist()[1:] == [258, 258]


@pytest.mark.parametrize("token", ["<|endoftext|>", "0", "two words", "a", "<|eot_id|><|eot_id|>"])
def test_what_is_no_special_token_is_one_line(token):
    """An id is none, nor is what a text may hold."""
    with pytest.raises(ValueError) as error:
        choose_separator(token, tokenizer_of(LLAMA_3, eos_token="<|eot_id|>"))
    message = str(error.value)
    assert message.startswith(f"--document_separator {token!r}: not a special token of the tokenizer")
    assert message.endswith("expected auto, or '<|end_of_text|>' or '<|eot_id|>'") and "\n" not in message


def test_a_tokenizer_without_eos_or_without_any_special_token():
    assert chosen("<|endoftext|>", ["<|endoftext|>"]) == "<|endoftext|>"
    for special in ([], ["<|endoftext|>"]):
        with pytest.raises(ValueError, match="has no eos_token.*or name a token with --document_separator"):
            chosen("auto", special)
    with pytest.raises(ValueError, match="expected auto, or one that it has"):
        choose_separator("</s>", tokenizer_of([]))


# --- packed tokens -------------------------------------------------------------------------------------------


def chat() -> PreTrainedTokenizerFast:
    return tokenizer_of(CHATML, eos_token="<|im_end|>")


def key_of(path: Path, *separator: str) -> dict[str, object]:
    source = TextSource(str(path))
    return token_file_inputs(open_source(source), source, Encoder(chat(), *separator))


def test_the_key_of_packed_tokens_has_the_separator(tmp_path, own_cache, offline):
    path = write_jsonl(tmp_path / "a.jsonl", ["ab", "cd"])
    assert key_of(path) == key_of(path, "auto") == key_of(path, "<|endoftext|>")
    assert key_of(path, "<|im_end|>") != key_of(path)
    assert (key_of(path)["eos_id"], key_of(path, "<|im_end|>")["eos_id"]) == (256, 258)


@pytest.mark.parametrize("streaming", [False, True])
def test_windows_have_the_separator_of_the_options(tmp_path, own_cache, offline, streaming):
    path = write_jsonl(tmp_path / "a.jsonl", ["abc"] * 20)
    for given, expected in (("auto", 256), ("<|im_end|>", 258)):
        args = options(path, dataset_streaming=streaming, document_separator=given)
        ids = [i for window in windows_of(loader(args, tokenizer=chat())) for i in window]
        assert {i for i in ids if i >= 256} == {expected}


def test_text_that_is_packed_anew_names_the_tokens_of_earlier_versions(tmp_path, own_cache, offline, caplog):
    path = write_jsonl(tmp_path / "a.jsonl", ["abc"] * 20)
    tokenizer = chat()
    loader(options(path, document_separator="<|im_end|>"), tokenizer=tokenizer)
    assert "packed with" not in caplog.text
    (before,) = packed_dirs(tmp_path)
    loader(options(path), tokenizer=tokenizer)
    assert f"{before} has this text packed with '<|im_end|>'" in caplog.text
    assert "give --document_separator '<|im_end|>'" in caplog.text
    assert len(packed_dirs(tmp_path)) == 2
    caplog.clear()
    loader(options(path), tokenizer=tokenizer)  # it is there now
    assert "packed with" not in caplog.text
